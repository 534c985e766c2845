"""The server's process: the model it serves, the port it binds, who may use it, how it stops."""

import logging
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from neuron_minimax.backends import compile_model
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import BackendError
from neuron_minimax.serving.access import JsonLogFormatter
from neuron_minimax.serving.app import create_app
from neuron_minimax.serving.engine_thread import Metrics
from neuron_minimax.serving.service import Service, Settings

logger = logging.getLogger("neuron_minimax.serving")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
DEMO_OPTIONS: Mapping[str, Any] = {"slots": 8}


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Settings):
    """The options of a server; without a `model_name` the compiled directory's name is taken.

    `api_key_file` holds one key per line, beside those in `api_keys`. `allowed_hosts` and `hosts`
    are accepted in the Host header beside loopback and `host`.
    """

    model_name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] = ()

    def settled(self, traced: Path) -> "ServerOptions":
        """Return the options with the model's name, the keys and the accepted hosts filled in.

        Raises BackendError when anyone could use a server that is not on loopback, or the keys
        cannot be read.
        """
        keys = self.api_keys + (read_api_keys(self.api_key_file) if self.api_key_file else ())
        local = self.host in ("127.0.0.1", "localhost", "::1")
        if not local and not keys and not self.allow_anonymous:
            raise BackendError(
                f"serving on {self.host} needs --api-key-file, or --allow-anonymous to let anyone "
                "in"
            )
        hosts = frozenset(name.lower() for name in (*self.hosts, *self.allowed_hosts))
        if hosts or self.host not in ("0.0.0.0", "::"):
            hosts |= LOOPBACK | {self.host.lower()}
        name = self.model_name or traced.resolve().name
        return replace(self, model_name=name, api_keys=keys, hosts=hosts)


class _Server(uvicorn.Server):
    """Drains before it stops: one signal lets running requests finish, a second ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or not self.started:
            self.should_exit = True
            self.force_exit = True
        else:
            self._draining = True
            threading.Thread(target=self._finish, name="drain", daemon=True).start()

    def _finish(self) -> None:
        logger.info("draining")
        if not self._service.drain():
            logger.warning("some requests did not finish in time")
        self.should_exit = True


def read_api_keys(path: Path) -> tuple[bytes, ...]:
    """Read one key per line; empty lines and lines that start with # do not count.

    Raises BackendError when the file cannot be read, or holds none.
    """
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


def demo_model(
    parent: Path = Path("traced_model"),
    options: Mapping[str, Any] = DEMO_OPTIONS,
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Compile the embedded demo into `parent`/demo-serving, or recognize it there; return where.

    It serves eight requests at a time unless the CPU `options` say otherwise. Raises
    ConversionError or BackendError.
    """
    traced = parent / "demo-serving"
    converted = parent / "demo-serving-converted"
    with resources.as_file(resources.files("neuron_minimax") / "demo") as checkpoint:
        plan = plan_conversion(Checkpoint.open(checkpoint))
        plan.write(converted, overwrite=True)  # of another version's demo
    compile_model(converted, traced, options=options, progress=progress)
    return traced


def serve(
    traced: str | Path,
    options: ServerOptions,
    on_listening: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve a compiled directory until SIGTERM or SIGINT.

    Raises BackendError or GenerationError when it cannot be loaded or served as asked.
    """
    traced = Path(traced)
    options = options.settled(traced)
    service = Service(options, Metrics())
    _configure_logging()
    config = uvicorn.Config(
        create_app(service),
        host=options.host,
        port=options.port,
        log_config=None,
        server_header=False,
        timeout_graceful_shutdown=10,
    )
    server = _Server(config, service)
    sockets = [listen(config)]
    on_listening(f"http://{options.host}:{sockets[0].getsockname()[1]}")

    def give_up() -> None:
        server.should_exit = True

    service.load_in_background(traced, give_up)
    server.run(sockets=sockets)
    service.stop()
    if service.failure is not None:
        raise service.failure


def listen(config: uvicorn.Config) -> socket.socket:
    """Return a listening socket. Raises BackendError when the port cannot be used.

    It says that it is TCP. Otherwise asyncio leaves Nagle's algorithm on, and on a connection that
    is kept open the first token waits for the client to acknowledge the headers before it.
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
    handler.setFormatter(JsonLogFormatter())
    root = logging.getLogger("neuron_minimax")
    root.handlers = [handler]
    root.propagate = False
    root.setLevel(logging.INFO)
