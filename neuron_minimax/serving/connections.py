"""The server's connections: how many there may be, and how long a client may keep one waiting."""

import asyncio
import errno
import fcntl
import json
import logging
import os
import resource
import socket
import struct
import termios
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from neuron_minimax.errors import BackendError
from neuron_minimax.serving.protocol import RequestError

logger = logging.getLogger(__name__)

# Descriptors that connections leave to everything else: files, pipes of worker processes.
RESERVED_DESCRIPTORS = 32
# Connections beyond the limit that are open just to be told so.
SPARE_CONNECTIONS = 8
# After a refusal a client's bytes are still taken for some seconds: closing before would reset the
# connection, and the refusal with it.
LINGER_SECONDS = 2.0
# Unfinished requests hold no more than this in all, in bytes: eight of the largest by default.
UNFINISHED_BYTES = 64 << 20
# A client that reads slower than this, in bytes per `client_timeout`, has stalled.
LEAST_PROGRESS = 16 << 10
# The kernel asks a silent peer from 60 s on, and gives it up after four questions in a minute: a
# client whose machine is gone holds no slot for longer.
DEAD_PEERS = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4),
)
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
STOPPING = RequestError(
    "the server is shutting down; try another one", status=503, kind="unavailable", retry_after=10
)
FULL = RequestError(
    "all connections are in use; try again later",
    status=503,
    kind="connection_limit",
    retry_after=1,
)


def connections_that_fit(wanted: int) -> int:
    """Raise the process's soft limit of open files to the hard one; return how many of `wanted`
    connections it has room for.

    Raises BackendError when that is none.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard == resource.RLIM_INFINITY:
        return wanted
    needed = len(os.listdir("/proc/self/fd")) + RESERVED_DESCRIPTORS + SPARE_CONNECTIONS
    if hard <= needed:
        raise BackendError(
            f"this process may open {hard} files, and needs {needed} without any connection; raise "
            "the limit (ulimit -n, or LimitNOFILE of a systemd unit)"
        )
    return min(wanted, hard - needed)


class Connections:
    """Who is connected. At most `limit` connections do something; where more come, those that wait
    for a request make room, the longest waiting one first.

    A client has `client_timeout` seconds to send a whole request, and to read on where an answer
    has filled all buffers. Where unfinished requests hold more than `most_unfinished` bytes, the
    oldest of them makes room. `on_error` gets the kind of each refusal.
    """

    def __init__(
        self,
        limit: int,
        client_timeout: float,
        on_error: Callable[[str], None],
        most_unfinished: int = UNFINISHED_BYTES,
    ) -> None:
        self.limit = limit
        self.client_timeout = client_timeout
        self.on_error = on_error
        self.most_unfinished = most_unfinished
        self.unfinished = 0
        self.open: set[Connection] = set()
        # Dictionaries for their order: who came first stands first.
        self.waiting: dict[Connection, None] = {}
        self.leaving: dict[Connection, None] = {}

    @property
    def full(self) -> bool:
        return len(self.open) - len(self.leaving) > self.limit

    def close_a_waiting_one(self) -> bool:
        """Close the connection that has waited longest, or see that one is about to be read.

        Returns False when none waits for its client.
        """
        about_to_be_read = False
        for connection in self.waiting:
            if connection.held_up:
                continue
            if not connection.unread:
                connection.make_room()
                return True
            about_to_be_read = True
        return about_to_be_read

    def limit_memory(self) -> None:
        """Close the oldest unfinished requests until the others fit."""
        for connection in list(self.waiting):
            if self.unfinished <= self.most_unfinished:
                return
            if connection.received:
                connection.make_room()

    def close_a_leaving_one(self) -> None:
        connection = next(iter(self.leaving), None)
        if connection is not None:
            connection.transport.abort()

    def forget(self, connection: "Connection") -> None:
        self.open.discard(connection)
        self.waiting.pop(connection, None)
        self.leaving.pop(connection, None)


class Listener(socket.socket):
    """A listening socket that accepts no more than `connections` have room for.

    When there is no room it seems for a moment as if nobody had called: what is closed then has
    given its descriptor back by the time the event loop comes again.
    """

    def __init__(self, family: socket.AddressFamily, connections: Connections) -> None:
        # It says that it is TCP. Otherwise asyncio leaves Nagle's algorithm on, and on a connection
        # that is kept open the first token waits for the client to acknowledge the headers.
        super().__init__(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        for level, option, value in DEAD_PEERS:  # accepted sockets inherit these
            self.setsockopt(level, option, value)
        self._connections = connections
        self._accepted: set[socket.socket] = set()
        self._pausing = False

    def accept(self) -> tuple[socket.socket, Any]:
        if self._pausing:  # asyncio pauses after a failure, but asks on until it sees nobody
            self._pausing = False
            raise BlockingIOError
        self._make_room()
        try:
            accepted, address = super().accept()
        except OSError as error:
            self._pausing = error.errno in OUT_OF_RESOURCES
            raise
        self._accepted.add(accepted)
        return accepted, address

    def _make_room(self) -> None:
        """Raises BlockingIOError when there is none yet."""
        connections = self._connections
        if len(self._accepted) < connections.limit:
            return
        self._accepted = {one for one in self._accepted if one.fileno() != -1}
        if len(self._accepted) < connections.limit:
            return
        if len(self._accepted) > len(connections.open):  # some are not set up yet
            raise BlockingIOError
        if connections.close_a_waiting_one():
            raise BlockingIOError
        if len(self._accepted) >= connections.limit + SPARE_CONNECTIONS:
            connections.close_a_leaving_one()
            raise BlockingIOError


class Config(uvicorn.Config):
    """uvicorn's, for one kind of HTTP connection on one kind of loop, whatever else is installed.

    Logging is left to the process.
    """

    def __init__(self, app: Any, connections: Connections, **options: Any) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            **options,
        )
        self.connections = connections


class Connection(H11Protocol):
    """One connection. Beside what uvicorn does it bounds how long a client may take."""

    config: Config

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._all = self.config.connections
        self._patience: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._unsent = 0
        self.received = 0  # bytes of an unfinished request

    @property
    def unread(self) -> bool:
        """Say whether there are bytes that have arrived and were not read yet."""
        descriptor = self.transport.get_extra_info("socket").fileno()
        if descriptor == -1:
            return False
        count = fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4)
        return bool(struct.unpack("i", count)[0])

    @property
    def held_up(self) -> bool:
        """Say whether the server reads no more for now, or has not sent all of an answer."""
        return self.flow.read_paused or self.transport.get_write_buffer_size() > 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._all.open.add(self)
        super().connection_made(transport)
        if self._all.full:
            logger.warning("a connection is refused: %s", FULL)
            self._refuse(FULL)
        else:
            self._look()

    def data_received(self, data: bytes) -> None:
        if self not in self._all.leaving:
            self._count(self.received + len(data))
            super().data_received(data)
            self._look()
            self._all.limit_memory()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._count(0)
        self._stop_patience()
        self.resume_writing()
        self._all.forget(self)

    def timeout_keep_alive_handler(self) -> None:
        if not self.unread:  # else the next request is here already
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self._all.client_timeout, self._check_progress)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def shutdown(self) -> None:
        if self.transport.is_closing() or self in self._all.leaving:
            return
        if self in self._all.waiting and self.unread and not self.held_up:
            self.loop.call_soon(self.shutdown)  # what has just come gets an answer
        elif self._partial:
            self._refuse(STOPPING)
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:
        self._refuse(RequestError(msg, kind="invalid_http"))

    def make_room(self) -> None:
        """Close this connection, which waits for a request, in favour of another."""
        logger.warning("a waiting connection is closed: all connections are in use")
        self._all.on_error(FULL.kind)
        if self._partial:
            self.transport.write(_response(FULL))
        self._count(0)
        self._disconnect()
        self._all.waiting.pop(self, None)
        self.transport.close()

    @property
    def _complete(self) -> bool:
        """Say whether a whole request has come that is being answered."""
        return self.conn.their_state not in (h11.IDLE, h11.SEND_BODY)

    @property
    def _partial(self) -> bool:
        """Say whether a request has begun, and nothing of its answer."""
        begun = self.conn.their_state is h11.SEND_BODY or bool(self.conn.trailing_data[0])
        return begun and self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE)

    def _look(self) -> None:
        """Measure the client's time while it owes a request, or the rest of one."""
        if self.transport.is_closing() or self in self._all.leaving:
            return
        if not self._partial:  # or nothing of what comes is kept
            self._count(0)
        if self._complete:
            self._all.waiting.pop(self, None)
            self._stop_patience()
        else:
            self._all.waiting.setdefault(self)
            if self._patience is None and self.timeout_keep_alive_task is None:
                self._patience = self.loop.call_later(self._all.client_timeout, self._give_up)

    def _give_up(self) -> None:
        """End a connection whose client has not sent a whole request in time.

        Bytes that the server has left unread are not held against the client.
        """
        if self._partial and (self.unread or self.held_up):
            self._patience = self.loop.call_later(1.0, self._give_up)
        elif self._partial:
            late = f"expected a whole request within {self._all.client_timeout:g} s"
            logger.warning("a request is refused: %s", late)
            self._refuse(RequestError(late, status=408, kind="client_timeout"))
        else:
            self.transport.close()

    def _check_progress(self) -> None:
        """Cut off a client that has hardly read since the last look."""
        unsent = self.transport.get_write_buffer_size()
        if self._unsent - unsent < LEAST_PROGRESS:
            logger.warning("a client does not read its answer")
            self._all.on_error("client_timeout")
            self.transport.abort()
            return
        self._unsent = unsent
        self._stall = self.loop.call_later(self._all.client_timeout, self._check_progress)

    def _refuse(self, error: RequestError) -> None:
        """Send an error and the end, and drop what the client still sends for a while."""
        self._all.on_error(error.kind)
        self._count(0)
        self._stop_patience()
        self._disconnect()
        self._all.waiting.pop(self, None)
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # an answer has begun
            self.transport.close()
            return
        self._all.leaving[self] = None
        self.transport.write(_response(error))
        self.transport.write_eof()
        self.transport.resume_reading()
        self._patience = self.loop.call_later(LINGER_SECONDS, self.transport.abort)

    def _disconnect(self) -> None:
        """Let the application know that nobody waits for its answer."""
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _count(self, received: int) -> None:
        self._all.unfinished += received - self.received
        self.received = received

    def _stop_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


def _response(error: RequestError) -> bytes:
    """Return a whole HTTP response in OpenAI's form, after which the connection ends."""
    body = json.dumps(error.body()).encode()
    lines = [
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if error.retry_after is not None:
        lines.append(f"retry-after: {error.retry_after}")
    return "\r\n".join([*lines, "", ""]).encode() + body
