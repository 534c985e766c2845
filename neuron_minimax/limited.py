"""Work whose size somebody else decides, done in a process that ends at a limit.

The kernel holds the limits, whatever language the work is in: a timer of processor time, whose
signal ends the process, and a limit of its address space. Processes are forked from a nursery,
which has imported what they need and has no threads; it is started once, with nothing of the
program that asks. All of them end with that program.
"""

import asyncio
import atexit
import contextlib
import fcntl
import importlib
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import threading
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.processes import isolated

# A process that is stopped, or gets next to no processor time, is given up after this many times
# its limit: for good work on a machine that is busy with other things this is never short.
PATIENCE = 60
SIZE = struct.Struct("!Q")
TRACE = 20_000  # characters of a traceback: its exception may quote all of the work
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
START = "from neuron_minimax.limited import run_nursery; run_nursery(int(sys.argv[1]))"


class OverLimitError(NeuronMiniMaxError):
    """Work that took more time or memory than it may."""


class SetupError(NeuronMiniMaxError):
    """What a process works with cannot be made there."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one piece of work may take: seconds of processor time, and bytes of memory beyond what
    its process has when it is ready. `niceness` is how far it stands back behind other processes.
    """

    cpu_seconds: float
    memory: int
    niceness: int = 0

    def refusal(self) -> OverLimitError:
        return OverLimitError(
            f"this takes more than the {self.cpu_seconds:g} seconds of processor time or "
            f"{self.memory >> 20} MiB of memory that it may; ask for less at once"
        )


class Setup:
    """How processes of one kind get ready: `setup(*arguments)`, whose value is their state.

    `preload` names modules that the nursery should import, beside that of `setup`.
    """

    def __init__(
        self, setup: Callable[..., Any], *arguments: Any, preload: Iterable[str] = ()
    ) -> None:
        self.modules = " ".join((setup.__module__, *preload)).encode()
        # A file in memory: nobody has to wait until a new process has read a large tokenizer.
        self.descriptor = os.memfd_create("setup")
        weakref.finalize(self, os.close, self.descriptor)
        with open(self.descriptor, "wb", closefd=False) as file:
            pickle.dump((setup, arguments), file)


def itself(state: Any) -> Any:
    """Return the argument: a setup whose state was made by the program that asks."""
    return state


class LimitedProcess:
    """A process that does one piece of work at a time: `function(state, *arguments)`.

    Functions, arguments and results are pickled; functions stand in modules. A process that went
    over a limit is replaced. A program that forks keeps its process; its child gets another one.
    """

    def __init__(self, setup: Setup, limits: Limits) -> None:
        self.limits = limits
        self._setup = setup
        self._connection: socket.socket | None = None
        self._lock = threading.Lock()
        self._closed = False
        self._busy = False
        _PROCESSES.add(self)

    def start(self) -> None:
        """Make the process ready, without waiting for it, unless it is, or is closed for good."""
        if self._closed:
            return
        if self._connection is None or _has_ended(self._connection):
            self._drop()
            self._connection = _NURSERY.fork(self._setup)
            _send(self._connection, pickle.dumps(self.limits))

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return `function(state, *arguments)`, or raise the NeuronMiniMaxError that it raised.

        Raises OverLimitError, and RuntimeError with the traceback of any other exception.
        """
        work = pickle.dumps((function, arguments))
        with self._lock:
            with self._at_work() as connection:
                connection.settimeout(PATIENCE * self.limits.cpu_seconds)
                _send(connection, work)
                answer = _receive(connection)
            return self._result(answer)

    async def call_async(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Do what `call` does while an event loop goes on; cancelling gives the work up."""
        work = pickle.dumps((function, arguments))
        with self._at_work() as connection:
            connection.setblocking(False)
            async with asyncio.timeout(PATIENCE * self.limits.cpu_seconds):
                loop = asyncio.get_running_loop()
                await loop.sock_sendall(connection, SIZE.pack(len(work)) + work)
                answer = await _receive_async(connection)
        return self._result(answer)

    def close(self) -> None:
        """Give up what the process does; whoever waits for it gets OverLimitError."""
        self._closed = True
        self._drop()

    @contextlib.contextmanager
    def _at_work(self) -> Iterator[socket.socket]:
        """Give the connection for one piece of work; replace a process that ends in its midst."""
        self.start()
        if self._connection is None:
            raise self.limits.refusal()
        connection = self._connection
        self._busy = True
        try:
            yield connection
        except OSError:
            self._drop()
            self.start()
            raise self.limits.refusal() from None
        except BaseException:
            self._drop()
            raise
        finally:
            self._busy = False
            if self._connection is not connection:
                connection.close()

    def _drop(self) -> None:
        if self._connection is None:
            return
        if self._busy:
            # Whoever waits for it, perhaps in another thread, sees the end and closes it.
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
        else:
            self._connection.close()
        self._connection = None

    def leave(self) -> None:
        """Leave the process to the program that this one was forked from."""
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._lock = threading.Lock()  # a thread that is not here may hold it
        self._busy = False

    def __del__(self) -> None:
        self._drop()

    def _result(self, answer: bytes) -> Any:
        succeeded, value, last = pickle.loads(answer)
        if last:
            self._drop()
            self.start()
        if not succeeded:
            raise value
        return value


class _Nursery:
    """The process that others are forked from; started when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._control: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def fork(self, setup: Setup) -> socket.socket:
        """Return the connection to a new process, forked once its modules are imported."""
        ours, theirs = socket.socketpair()
        with self._lock, theirs:
            descriptors = [theirs.fileno(), setup.descriptor]
            try:
                socket.send_fds(self._started(), [setup.modules], descriptors)
            except OSError:  # somebody has ended it
                self._end()
                socket.send_fds(self._started(), [setup.modules], descriptors)
        return ours

    def import_modules(self, names: Iterable[str]) -> None:
        with self._lock:
            self._started().send(" ".join(names).encode())

    def leave(self) -> None:
        """Leave the nursery to the program that this one was forked from."""
        if self._control is not None:
            self._control.close()
        self._control = None
        self._lock = threading.Lock()

    def _started(self) -> socket.socket:
        if self._control is not None and self._owner == os.getpid():
            return self._control
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                isolated(START, str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                # A terminal's Ctrl-C is for us. The session stays ours: between sessions the
                # kernel shares the processors out evenly, however nice one is.
                process_group=0,
                env=os.environ | QUIET,
            )
        self._owner = os.getpid()
        self._control = ours
        atexit.register(self._end)
        return ours

    def _end(self) -> None:
        """End the nursery and all processes from it; a program that is killed leaves it to them."""
        if self._control is None or self._process is None or self._owner != os.getpid():
            return
        self._control.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._control = None


_NURSERY = _Nursery()
_PROCESSES: "weakref.WeakSet[LimitedProcess]" = weakref.WeakSet()


def _leave_all() -> None:
    """In the child of a fork: two programs on one connection would get each other's answers."""
    _NURSERY.leave()
    for process in list(_PROCESSES):
        process.leave()


os.register_at_fork(after_in_child=_leave_all)


def warm_up(*modules: str) -> None:
    """Have the nursery import modules while the caller goes on with something else."""
    _NURSERY.import_modules(modules)


def run_nursery(descriptor: int) -> None:
    """Fork a process for each connection and setup that come through the control socket, until it
    ends; then end them all.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as control:
        while True:
            names, descriptors, _, _ = socket.recv_fds(control, 1 << 16, 2)
            if not names:
                break
            for name in names.decode().split():
                with contextlib.suppress(Exception):  # the process itself will report it
                    importlib.import_module(name)
            if descriptors and os.fork() == 0:
                control.close()
                _run_process(*descriptors)
            for each in descriptors:
                os.close(each)
    os.killpg(0, signal.SIGKILL)


def _run_process(connection: int, setup: int) -> None:
    """Work until the connection ends; end this process."""
    try:
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)  # what a library says when it is out of memory
        with open(setup, "rb") as file:
            data = os.pread(setup, os.fstat(file.fileno()).st_size, 0)
        with socket.socket(fileno=connection) as open_connection:
            _work(open_connection, data)
    finally:
        os._exit(0)


def _work(connection: socket.socket, data: bytes) -> None:
    limits = pickle.loads(_receive(connection))
    state = None
    fault: BaseException | None = None
    try:
        setup, arguments = pickle.loads(data)
        state = setup(*arguments)
    except Exception as error:
        # Of a foreign error the message alone: it is about what the caller gave.
        known = isinstance(error, NeuronMiniMaxError)
        fault = error if known else SetupError(f"{type(error).__name__}: {error}")
    os.nice(limits.niceness)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    size = _address_space() + limits.memory
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    enough = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + (limits.memory >> 14)  # KiB
    while True:
        work = _receive(connection)
        signal.setitimer(signal.ITIMER_PROF, limits.cpu_seconds)
        with _ended_when_given_up(connection):
            answer = _answer(fault, state, work, enough)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _send(connection, answer)


@contextlib.contextmanager
def _ended_when_given_up(connection: socket.socket) -> Iterator[None]:
    """End this process as soon as the other end of the connection goes: nothing else happens to a
    connection while there is work, and the signal that tells of it ends who does not handle it.
    """
    idle = fcntl.fcntl(connection, fcntl.F_GETFL)
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(connection, fcntl.F_SETFL, idle | os.O_ASYNC)
    if select.select([connection], [], [], 0)[0]:  # it went before
        os._exit(1)
    yield
    fcntl.fcntl(connection, fcntl.F_SETFL, idle)


def _answer(fault: BaseException | None, state: Any, work: bytes, enough: int) -> bytes:
    """Do the work; return whether it succeeded, its result or exception, and whether this process
    has grown so much that it should be the last.

    Raises MemoryError, which ends the process.
    """
    succeeded = False
    value: Any = fault
    if fault is None:
        try:
            function, arguments = pickle.loads(work)
            value = function(state, *arguments)
            succeeded = True
        except MemoryError:
            raise
        except Exception as error:
            value = _portable(error)
    last = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > enough
    return pickle.dumps((succeeded, value, last))


def _portable(error: Exception) -> Exception:
    """Return an exception that can be pickled and tells where it comes from."""
    if isinstance(error, NeuronMiniMaxError):
        return error
    trace = traceback.format_exc()
    return RuntimeError(f"a limited process failed\n{trace[-TRACE:]}")


def _address_space() -> int:
    """Return the size of this process's address space in bytes."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _has_ended(connection: socket.socket) -> bool:
    """Say whether the other end of an idle connection has gone."""
    connection.setblocking(False)
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(SIZE.pack(len(data)) + data)


def _receive(connection: socket.socket) -> bytes:
    """Return the next piece of data. Raises ConnectionError at the end."""
    (size,) = SIZE.unpack(_read(connection, SIZE.size))
    return _read(connection, size)


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise ConnectionError("the other end has gone")
        view = view[count:]
    return bytes(data)


async def _receive_async(connection: socket.socket) -> bytes:
    (size,) = SIZE.unpack(await _read_async(connection, SIZE.size))
    return await _read_async(connection, size)


async def _read_async(connection: socket.socket, size: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray(size)
    view = memoryview(data)
    while view:
        count = await loop.sock_recv_into(connection, view)
        if not count:
            raise ConnectionError("the other end has gone")
        view = view[count:]
    return bytes(data)
