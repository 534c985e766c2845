"""Signals and processes: SIGTERM is taken as Ctrl-C is, no code of others swallows either, and
children end when their parent does.

`python -m neuron_minimax.processes PARENT COMMAND...` becomes a command that does so.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SWALLOWED_PAUSE = 0.01  # seconds, for the callback to end
PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The folder that holds this package.
_ROOT = str(Path(__file__).resolve().parents[1])
_RUN = "import runpy; runpy.run_module({!r}, run_name='__main__', alter_sys=True)"
_LIBC = ctypes.CDLL(None, use_errno=True)


class Terminated(KeyboardInterrupt):
    """SIGTERM: what handles Ctrl-C handles both."""


@dataclass
class Noted:
    """The signal that came, if one did."""

    number: int | None = None

    def interruption(self) -> KeyboardInterrupt:
        """Return what its handler would have raised."""
        return Terminated() if self.number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def signals_interrupt() -> Iterator[Noted]:
    """Raise KeyboardInterrupt in the main thread when SIGINT comes, Terminated when SIGTERM does,
    and note it: an extension module that is being imported makes another error of either. Where one
    is swallowed, in a callback or a destructor, it is raised again.

    An own handler from before the block gets a signal that comes amid an import: native code may
    abort where it is raised. A signal that is ignored stays so; other threads leave signals alone.
    """
    noted = Noted()

    def interrupt(number: int, frame: FrameType | None) -> None:
        noted.number = number
        handler = before[signal.Signals(number)]
        if callable(handler) and handler is not signal.default_int_handler and _imports(frame):
            handler(number, frame)
        raise noted.interruption()

    def again(number: int, frame: FrameType | None) -> None:
        raise noted.interruption()

    def on_swallowed(found: "sys.UnraisableHookArgs") -> None:
        if noted.number is not None and issubclass(found.exc_type, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, SWALLOWED_PAUSE)
        else:
            hook(found)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = {number: signal.getsignal(number) for number in numbers}
    if threading.current_thread() is not threading.main_thread() or None in before.values():
        yield noted
        return
    hook = sys.unraisablehook
    sys.unraisablehook = on_swallowed
    for number in numbers:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, again if number == signal.SIGALRM else interrupt)
    try:
        yield noted
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _imports(frame: FrameType | None) -> bool:
    """Return whether an import is under way in a frame or in those that called it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


@contextmanager
def first_signal_noted() -> Iterator[Noted]:
    """Note the first SIGINT or SIGTERM, for the block to end at a good place; a second one is
    handled as before the block. What the block has not obeyed is raised behind it. A signal that is
    ignored stays so.
    """
    noted = Noted()
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.getsignal(number) for number in numbers}
    before = {number: found for number, found in handlers.items() if found != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        noted.number = number
        restore()

    if threading.current_thread() is not threading.main_thread() or None in before.values():
        yield noted
        return
    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        restore()
    if noted.number is not None:
        raise noted.interruption()


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process as soon as its parent, of that process id, has ended.

    Called by a child for itself. The kernel takes the thread that started the child for its parent:
    that thread has to wait for it.
    """
    _signal_at_death_of(parent, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os._exit(1)


def end_children_too() -> None:
    """Lead a process group that is killed when this process ends, however it ends.

    For a process whose children start others, as a compiler does. Called before it has threads; it
    holds one more process, asleep, until then.
    """
    leader = os.getpid()
    if os.getpgrp() != leader:
        os.setpgid(0, 0)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    if os.fork():
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return
    _signal_at_death_of(leader, signal.SIGTERM)
    if os.getppid() == leader:
        signal.sigwait({signal.SIGTERM})
    os.killpg(leader, signal.SIGKILL)


def bound(command: Sequence[str]) -> list[str]:
    """Return a command to start in its place, as a child of the thread that waits for it: it and
    all that it starts are killed when this process ends.

    A module of Python (this interpreter, "-m", its name) runs as `isolated` says.
    """
    words = list(command)
    if words[:2] == [sys.executable, "-m"]:
        words = isolated(_RUN.format(words[2]), *words[3:])
    return isolated(_RUN.format("neuron_minimax.processes"), str(os.getpid()), *words)


def isolated(code: str, *arguments: str) -> list[str]:
    """Return a command that runs Python code, with these arguments in sys.argv[1:].

    It imports from where this process does, except from the current folder, which may hold files of
    somebody else under the names of modules.
    """
    paths = [path for path in sys.path if os.path.isabs(path)]
    # Where a program that was started in a checkout, by `python -c`, has only the current folder.
    if _ROOT not in paths:
        paths.append(_ROOT)
    return [sys.executable, "-P", "-c", f"import sys; sys.path[:] = {paths!r}; {code}", *arguments]


def _signal_at_death_of(parent: int, number: signal.Signals) -> None:
    if _LIBC.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0):
        problem = ctypes.get_errno()
        raise OSError(problem, f"prctl for the end of process {parent}: {os.strerror(problem)}")


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    end_children_too()
    os.execvp(sys.argv[2], sys.argv[2:])
