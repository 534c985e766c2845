"""One case in a child of a process that has imported everything, under limits, and what became of
it.
"""

import contextlib
import os
import pickle
import resource
import select
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MEMORY = 1 << 30  # bytes over what the parent has
CASES = 100  # of one child
LARGEST_FILE = 256 << 20  # bytes; a copy of /dev/zero ends there
TRACEBACK = 70  # exit code of a child whose work raised
SHOWN = 4000
# What a terminal obeys: control and format characters, lone surrogates, and other line ends.
OBEYED = ("Cc", "Cf", "Cs", "Zl", "Zp")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a child did: its exit code (negative: its signal; None: it was ended for its time), its
    output, the most memory it took over its parent (bytes), and what its work returned.
    """

    code: int | None
    stdout: bytes
    stderr: bytes
    seconds: float
    memory: int
    value: Any

    @property
    def fault(self) -> str | None:
        """What no input may lead to; None for a success, a refusal with one message, or a usage
        error.
        """
        if self.code is None:
            return f"hang: not done after {self.seconds:.0f} s"
        if self.code < 0:
            return f"signal: ended by {signal.Signals(-self.code).name}"
        if self.code == TRACEBACK or b"Traceback (most recent call last)" in self.stderr:
            return f"traceback: {last_lines(self.stderr)}"
        if self.memory > MEMORY:
            return f"memory: {self.memory >> 20} MiB more than before"
        raw = _obeyed(self.stdout) or _obeyed(self.stderr)
        if raw:
            return f"escapes: {raw!r} in the output"
        if self.code not in (0, 1, 2):
            return f"exit code {self.code}"
        if self.code and not (self.stdout + self.stderr).strip():
            return f"silent: exit code {self.code} without a message"
        if self.stderr.count(b"error: ") and not self.code:
            return "an error message, but exit code 0"
        return None


def last_lines(stderr: bytes) -> str:
    """The place and the text of an exception."""
    lines = [line for line in stderr.decode(errors="replace").splitlines() if line.strip()]
    places = [line.strip() for line in lines if line.strip().startswith("File ")]
    ours = [place for place in places if "neuron_minimax/" in place] or places or ["?"]
    return f"{lines[-1][:200] if lines else ''} [{ours[-1][-120:]}]"


def _obeyed(output: bytes) -> str | None:
    text = output.decode("utf-8", "surrogateescape")
    return next(
        (mark for mark in text if mark not in "\n\t" and unicodedata.category(mark) in OBEYED), None
    )


class Worker:
    """A child that runs one case after the other: `work(name)` returns an exit code and a value, in
    so many seconds. Its output and the value are left in `directory`.

    It is forked again after `CASES` of them, after a fault and after a death; it leads a process
    group, all of which is ended with it.
    """

    def __init__(
        self, work: Callable[[str], tuple[int, Any]], directory: Path, seconds: float
    ) -> None:
        self.work = work
        self.seconds = seconds
        self.directory = directory
        self._child = 0
        self._left = 0

    def run(self, name: str, fresh: bool = False, patience: int = 1) -> Outcome:
        """Run one case, in a new child where `fresh`; it may take `patience` times as long."""
        if fresh or not self._left:
            self.end()
            self._start()
        self._left -= 1
        started = time.monotonic()
        os.write(self._requests, name.encode() + b"\n")
        in_time = bool(select.select([self._answers], [], [], patience * self.seconds)[0])
        answer = os.read(self._answers, 100) if in_time else b""
        seconds = time.monotonic() - started
        memory = 0
        code = None
        if answer:
            code, memory = map(int, answer.split())
        else:  # it is dead, or will be
            status = self.end()
            code = os.waitstatus_to_exitcode(status) if in_time else None
        outcome = Outcome(
            code=code,
            stdout=(self.directory / "stdout").read_bytes(),
            stderr=(self.directory / "stderr").read_bytes(),
            seconds=seconds,
            memory=max(0, memory - self._before) << 10,
            value=self._value(),
        )
        if outcome.fault:
            self.end()
        return outcome

    def end(self) -> int:
        """End the child and all that it started; return its wait status."""
        if not self._child:
            return 0
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        os.close(self._requests)
        os.close(self._answers)
        self._child = 0
        self._left = 0
        return status

    def _start(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        requests, self._requests = os.pipe()
        self._answers, answers = os.pipe()
        self._before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self._child = os.fork()
        if not self._child:
            os.close(self._requests)
            os.close(self._answers)
            _be_the_child(self.work, self.directory, requests, answers)
        os.close(requests)
        os.close(answers)
        with contextlib.suppress(PermissionError):  # where the child was faster
            os.setpgid(self._child, self._child)
        self._left = CASES

    def _value(self) -> Any:
        with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError):
            return pickle.loads((self.directory / "value").read_bytes())
        return None


def _be_the_child(
    work: Callable[[str], tuple[int, Any]], directory: Path, requests: int, answers: int
) -> None:
    try:
        os.setpgid(0, 0)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
        for descriptor, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, descriptor)
        while name := os.read(requests, 200).decode().strip():
            code = _one(work, name, directory)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            os.write(answers, f"{code} {memory}".encode())
    finally:
        os._exit(0)


def _one(work: Callable[[str], tuple[int, Any]], name: str, directory: Path) -> int:
    os.truncate(directory / "stdout", 0)
    os.truncate(directory / "stderr", 0)
    (directory / "value").unlink(missing_ok=True)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="strict", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    try:
        code, value = work(name)
        sys.stdout.flush()
        (directory / "value").write_bytes(pickle.dumps(value))
    except BaseException:
        code = TRACEBACK
        os.write(2, traceback.format_exc().encode(errors="backslashreplace")[-SHOWN:])
    with contextlib.suppress(BaseException):
        sys.stderr.flush()
    return code
