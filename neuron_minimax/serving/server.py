"""The server's process: what it binds, who may use it, and how it stops."""

import logging
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from neuron_minimax.errors import BackendError
from neuron_minimax.serving.app import create_app
from neuron_minimax.serving.gate import JsonLines
from neuron_minimax.serving.metrics import Metrics
from neuron_minimax.serving.service import Service, Settings

logger = logging.getLogger("neuron_minimax.serving")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})


class _Server(uvicorn.Server):
    """Drains before it stops: the first signal lets running requests finish, the second ends at
    once.
    """

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or not self.started:
            self.should_exit = self.force_exit = True
        else:
            self._draining = True
            threading.Thread(target=self._finish, name="drain", daemon=True).start()

    def _finish(self) -> None:
        logger.info("draining")
        if not self._service.drain():
            logger.warning("some requests did not finish in time")
        self.should_exit = True


def read_api_keys(path: Path) -> tuple[bytes, ...]:
    """One key per line; empty lines and lines that start with # do not count."""
    try:
        lines = [line.strip() for line in path.read_bytes().splitlines()]
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read ({error.strerror}); expected a file with one API key per line"
        ) from None
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys:
        raise BackendError(f"{path} holds no API key; expected one per line")
    return keys


def serve(
    traced: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | Path | None = None,
    allow_anonymous: bool = False,
    allowed_hosts: tuple[str, ...] = (),
    model_name: str | None = None,
    on_listening: Callable[[str], None] = lambda url: None,
    **options: Any,
) -> None:
    """Serve a compiled directory until SIGTERM or SIGINT; `options` are fields of Settings.

    Raises BackendError or GenerationError when it cannot be loaded or served as asked.
    """
    traced = Path(traced)
    keys = read_api_keys(Path(api_key_file)) if api_key_file else ()
    local = host in ("127.0.0.1", "localhost", "::1")
    if not local and not keys and not allow_anonymous:
        raise BackendError(
            f"serving on {host} needs --api-key-file, or --allow-anonymous to let anyone in"
        )
    wildcard = host in ("0.0.0.0", "::")
    hosts = frozenset(name.lower() for name in allowed_hosts)
    if not wildcard or hosts:
        hosts |= LOOPBACK | {host.lower()}
    settings = Settings(
        model_name=model_name or traced.resolve().name, api_keys=keys, hosts=hosts, **options
    )
    service = Service(settings, Metrics())
    _configure_logging()
    config = uvicorn.Config(
        create_app(service),
        host=host,
        port=port,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config, service)
    sockets = [_bind(config)]
    on_listening(f"http://{host}:{sockets[0].getsockname()[1]}")

    def give_up() -> None:
        server.should_exit = True

    service.load_in_background(traced, give_up)
    server.run(sockets=sockets)
    service.stop()
    if service.failure is not None:
        raise service.failure


def _bind(config: uvicorn.Config) -> socket.socket:
    """A listening socket. It says that it is TCP: otherwise asyncio leaves Nagle's algorithm on,
    and on a connection that is kept open the first token waits 40 ms, for the client to acknowledge
    the headers before it.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(config.backlog)
    except OSError as error:
        raise BackendError(
            f"port {config.port} of {config.host} cannot be used: {error.strerror}"
        ) from None
    return listener


def _configure_logging() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger("neuron_minimax")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(logging.INFO)
