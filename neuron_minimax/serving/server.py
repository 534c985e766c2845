"""The server's process: the model it serves, the port it binds, who may use it, how it stops."""

import asyncio
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from neuron_minimax.backends import compile_model, verify_compiled
from neuron_minimax.backends.made_demo import MADE_DEMO, is_made_demo
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import BackendError
from neuron_minimax.files import read_bytes, user_cache
from neuron_minimax.progress import SILENT, Progress
from neuron_minimax.serving.app import create_app
from neuron_minimax.serving.connections import (
    UNFINISHED_BYTES,
    Config,
    Connections,
    Listener,
    connections_that_fit,
)
from neuron_minimax.serving.engine_thread import Metrics
from neuron_minimax.serving.log import json_log
from neuron_minimax.serving.service import Service, Settings

logger = logging.getLogger("neuron_minimax.serving")
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
DEMO_OPTIONS: Mapping[str, Any] = {"slots": 8}


@dataclass(frozen=True, kw_only=True)
class ServerOptions(Settings):
    """The options of a server; without a `model_name` the compiled directory's name is taken.

    `api_key_file` holds one key per line, beside those in `api_keys`. `allowed_hosts` and `hosts`
    are accepted in the Host header beside loopback and `host`. `verify` reads every byte of the
    compiled directory first.
    """

    model_name: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    api_key_file: Path | None = None
    allow_anonymous: bool = False
    allowed_hosts: tuple[str, ...] = ()
    verify: bool = False

    @property
    def refusal(self) -> str:
        """Say why a server would let in anyone whom nobody meant to; "" when it would not."""
        local = self.host in ("127.0.0.1", "localhost", "::1")
        if local or self.api_keys or self.api_key_file or self.allow_anonymous:
            return ""
        return f"serving on {self.host} needs --api-key-file, or --allow-anonymous to let anyone in"

    def settled(self, traced: Path) -> "ServerOptions":
        """Return the options with the model's name, the keys and the accepted hosts filled in.

        Raises BackendError when anyone could use a server that is not on loopback, or the keys
        cannot be read.
        """
        if self.refusal:
            raise BackendError(self.refusal)
        keys = self.api_keys + (read_api_keys(self.api_key_file) if self.api_key_file else ())
        hosts = frozenset(name.lower() for name in (*self.hosts, *self.allowed_hosts))
        if hosts or self.host not in ("0.0.0.0", "::"):
            hosts |= LOOPBACK | {self.host.lower()}
        name = self.model_name or Path(os.path.realpath(traced)).name
        return replace(self, model_name=name, api_keys=keys, hosts=hosts)


class WebServer(uvicorn.Server):
    """Drains before it stops: one signal lets running requests finish, a second ends at once.

    When the drain's time is over, what still runs ends with an error. Clients have half of the time
    to exit to read it; who does not is cut off. A process that something else holds up for all of
    that time is ended all the same.
    """

    config: Config

    def __init__(
        self, config: Config, service: Service, on_started: Callable[[], None] = lambda: None
    ) -> None:
        super().__init__(config)
        self.ended = threading.Event()
        self._service = service
        self._on_started = on_started
        self._end: float | None = None  # of the drain
        self._cut: float | None = None  # of connections that are open then

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        settings = self._service.settings
        now = time.monotonic()
        if self._end is None:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
            self._end = now + settings.drain_timeout
            self._cut = self._end + settings.exit_timeout / 2
            target = self._drain
        else:
            self._end = now
            self._cut = now
            target = self._give_up
        threading.Thread(target=target, name="drain", daemon=True).start()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let clients read what is left of the drain's time, and of the time to exit."""
        if self._cut is None:
            self._cut = time.monotonic() + self._service.settings.exit_timeout / 2
        cut = asyncio.create_task(self._cut_off())
        await super().shutdown(sockets)
        cut.cancel()

    async def _cut_off(self) -> None:
        while self._cut is None or time.monotonic() < self._cut:  # a second signal makes it now
            await asyncio.sleep(0.05)
        connections = list(self.config.connections.open)
        if connections:
            logger.warning("%d clients did not read in time", len(connections))
        for connection in connections:
            connection.transport.abort()

    def _drain(self) -> None:
        logger.info("draining")
        if not self._service.drain():
            logger.warning("some requests did not finish in time")
        self._give_up()

    def _give_up(self) -> None:
        self._service.give_up()
        self.should_exit = True

    def _watch(self) -> None:
        """End the process when it should have ended long ago."""
        allowed = self._service.settings.exit_timeout
        while not self.ended.wait(0.5):
            if self._end is not None and time.monotonic() > self._end + allowed:
                logger.error("the server does not end; the process is ended")
                os._exit(1)


def read_api_keys(path: Path) -> tuple[bytes, ...]:
    """Read one key per line; empty lines and lines that start with # do not count.

    Raises BackendError when the file cannot be read, or holds none.
    """
    try:
        lines = [line.strip() for line in read_bytes(path).splitlines()]
    except OSError as error:
        raise BackendError(
            f"{path} cannot be read ({error.strerror}); expected a file with one API key per line"
        ) from None
    keys = tuple(line for line in lines if line and not line.startswith(b"#"))
    if not keys:
        raise BackendError(f"{path} holds no API key; expected one per line")
    return keys


def demo_model(
    parent: Path | None = None,
    options: Mapping[str, Any] = DEMO_OPTIONS,
    progress: Progress = SILENT,
) -> Path:
    """Return where the embedded demo is compiled: `traced_model/demo` of the current directory,
    where this user's `make demo` has last made it and it can be loaded, else `parent`/demo-serving,
    where it is compiled or recognized. `progress` is told which.

    `parent` is the user's own cache directory unless given, and then alone looked at. There it
    serves eight requests at a time unless the CPU `options` say otherwise. Raises ConversionError
    or BackendError.
    """
    with resources.as_file(resources.files("neuron_minimax") / "demo") as checkpoint:
        source = Checkpoint.open(checkpoint)
        if parent is None and is_made_demo(source.fingerprint, progress):
            progress(f"the embedded demo model: {MADE_DEMO}, as `make demo` has made it")
            return MADE_DEMO
        parent = parent or user_cache()
        traced = parent / "demo-serving"
        converted = parent / "demo-serving-converted"
        plan_conversion(source).write(converted, overwrite=True)  # of another version's demo
    progress(f"the embedded demo model: compiled once into {traced}")
    compile_model(converted, traced, options=options, progress=progress)
    return traced


def serve(
    traced: str | Path | None,
    options: ServerOptions,
    on_listening: Callable[[str], None] = lambda url: None,
    progress: Progress = SILENT,
) -> None:
    """Serve a compiled directory, or the embedded demo for None, until SIGTERM or SIGINT.

    What can be refused is, before `progress` gets its first line: options, the port, the directory,
    the tokenizer. Connections are refused until loading begins, when health checks are answered.
    `on_listening` gets the address once the model is loaded. Raises BackendError or GenerationError
    when it cannot be loaded or served as asked.
    """
    options = options.settled(Path("demo" if traced is None else traced))
    options = replace(options, max_connections=connections_that_fit(options.max_connections))
    service = Service(options, Metrics())
    config = configure(service, host=options.host, port=options.port)
    with bind(config) as listener:
        directory = demo_model(progress=progress) if traced is None else Path(traced)
        service.check(directory, progress)
        if options.verify:
            verify_compiled(directory, progress)
        progress(f"loading {directory}")
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        listen(listener, config)
        _run(service, config, listener, directory, lambda: on_listening(url))
    if service.failure is not None:
        raise service.failure


def _run(
    service: Service,
    config: Config,
    listener: Listener,
    traced: Path,
    on_loaded: Callable[[], None],
) -> None:
    """Serve on a socket while the model is loaded, and from then on; the log is JSON, but for what
    `on_loaded` prints.
    """
    stream = sys.stderr

    def loaded() -> None:
        if not server.should_exit:
            with redirect_stderr(stream):
                on_loaded()

    def give_up() -> None:
        server.should_exit = True

    server = WebServer(config, service, lambda: service.load_in_background(traced, loaded, give_up))
    with json_log(stream):
        try:
            server.run(sockets=[listener])
            service.stop(service.settings.exit_timeout)
        finally:
            server.ended.set()


def configure(service: Service, **options: Any) -> Config:
    """Return how uvicorn serves the service; `options` are uvicorn's."""
    settings = service.settings

    def on_error(kind: str) -> None:
        service.metrics.errors.labels(kind).inc()

    connections = Connections(
        settings.max_connections,
        settings.client_timeout,
        on_error,
        max(UNFINISHED_BYTES, 2 * settings.max_body),
    )
    return Config(
        create_app(service), connections, timeout_keep_alive=settings.keep_alive, **options
    )


def bind(config: Config) -> Listener:
    """Return a socket that has the port and refuses connections until it listens.

    Raises BackendError when the port cannot be used.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = Listener(family, config.connections)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with _named_port(listener, config):
        listener.bind((config.host, config.port))
    return listener


def listen(listener: Listener, config: Config) -> None:
    """Let connections come. Raises BackendError when another socket listens on the port by now."""
    with _named_port(listener, config):
        listener.listen(config.backlog)


@contextmanager
def _named_port(listener: Listener, config: Config) -> Iterator[None]:
    """Close the socket and name the port in what the system refuses in the block."""
    try:
        yield
    except OSError as error:
        listener.close()
        raise BackendError(
            f"port {config.port} of {config.host} cannot be used: {error.strerror}"
        ) from None
