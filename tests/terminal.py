"""A command in a pseudo terminal: what is typed into it, and what it has shown."""

import os
import pty
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.waiting import WAIT

ROOT = Path(__file__).parents[1]
CTRL_C = "\x03"
CTRL_D = "\x04"
ENTER = "\r"


class Terminal:
    """A process whose standard input, output and error are one terminal."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self.pid, self._terminal = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            kept = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
            given = kept | {"TERM": "xterm", "INPUTRC": os.devnull, "PYTHONPATH": str(ROOT)}
            os.execve(sys.executable, [sys.executable, *arguments], given)
        self.shown = ""

    def type(self, text: str) -> None:
        """Type a text. Ctrl-C is typed when the process waits: between the last look at its signals
        and the wait for the next key, Python's own reading of a line would not hear it.
        """
        limit = time.monotonic() + WAIT
        while CTRL_C in text and self._state() != "S":
            assert time.monotonic() < limit, self.shown
        os.write(self._terminal, text.encode())

    def wait_for(self, words: str) -> str:
        """Return what was shown since the last time, up to these words."""
        limit = time.monotonic() + WAIT
        while words not in self.shown:
            assert time.monotonic() < limit, self.shown
            if not self._read():
                raise AssertionError(f"{words!r} was not shown before the end: {self.shown!r}")
        before, _, self.shown = self.shown.partition(words)
        return before + words

    def code(self) -> int:
        """Return the exit code, once the process has ended."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        """Take what is shown next; say whether there was any before the end."""
        assert select.select([self._terminal], [], [], WAIT)[0], self.shown
        try:
            found = os.read(self._terminal, 1 << 16)
        except OSError:  # as Linux tells the end
            return False
        self.shown += found.decode(errors="replace")
        return bool(found)

    def _state(self) -> str:
        """The main thread's state as Linux has it: "S" is asleep (proc_pid_stat(5))."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def close(self) -> None:
        os.close(self._terminal)
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@contextmanager
def terminal(*arguments: str) -> Iterator[Terminal]:
    """Run Python with these arguments in a terminal, until the block ends at the latest."""
    opened = Terminal(arguments)
    try:
        yield opened
    finally:
        opened.close()
