"""Runs commands in forked processes, disturbs them, and judges what the next run leaves.

This process holds what the commands import and has no threads, so that a fork costs milliseconds.
"""

import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from tests.interruptions import power, runs, shim
from tests.interruptions.runs import Run
from tests.interruptions.shim import Call, Fault

SET_CHILD_SUBREAPER = 36  # of prctl: orphans become this process's children
HANG = 900  # seconds, also on a slow machine
UMASK = 0o027
STRIDE = 31  # from the call where a run is killed to that where the next one is
KEPT_MODE = 0o751  # of an output directory that was there before
INTERNAL_ERROR = 70
# Interrupted, these are called again by whoever keeps to POSIX; names are never interrupted.
REPEATED = ("open", "write", "fsync", "truncate")


@dataclass(frozen=True)
class Outcome:
    """What became of a command; the code is negative when a signal ended it."""

    code: int
    said: str
    hung: bool = False

    def problem(self) -> str | None:
        """Say what is wrong with how it ended, None when it succeeded or gave one message."""
        if self.hung:
            return f"it hung for {HANG} s"
        if "Traceback" in self.said or self.code not in (0, 1):
            return f"it ended with {self.code} and said {self.last_line!r}"
        messages = self.said.count("error: ")
        if self.code == 1 and messages != 1:
            return f"it gave {messages} messages: {self.said.strip()[-500:]!r}"
        return None

    @property
    def last_line(self) -> str:
        return (self.said.strip().splitlines() or [""])[-1]


@dataclass(frozen=True)
class Case:
    """A fault, the call that it concerns, and the function that says what is wrong after it."""

    fault: str
    what: str
    problems: Callable[[], list[str]]


@dataclass(frozen=True)
class Verdict:
    """One case: the command, the fault, the call, and what is wrong ([]: nothing)."""

    run: str
    fault: str
    call: str
    problems: list[str]

    def as_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Undisturbed:
    """A command, the calls that it makes undisturbed, what it then leaves, and how many calls one
    more run takes: of most commands, none.
    """

    run: Run
    calls: list[Call]
    left: dict[str, str]
    calls_once_more: int


class Sweep:
    """A folder with the inputs of all commands, and one command at a time below it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.control = shim.map_control()
        self.inputs = root / "inputs"
        self.work = root / "work"
        self.base = root / "base"
        self.modules = root / "modules"
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        self.inputs.mkdir()
        runs.write_inputs(self.inputs)
        self.work.mkdir()
        _require(self.command("convert {inputs}/checkpoint {inputs}/converted"))

    def cases(self, run: Run) -> Iterator["Case"]:
        """Make what a command finds, run it undisturbed, and yield what can happen to it."""
        self.wanted = self._prepare(run)
        yield Case("none", "the modes of an undisturbed output", self._judge_modes)
        for call in self.wanted.calls:
            for fault in faults_of(run, call):
                what = f"{call.number} {call.name} {self._short(call.path)}"
                yield Case(fault.title, what, partial(self._disturb, fault, call))
        disk = power.Disk(self.work, self.base)
        found: set[power.Tree] = set()
        for call in self.wanted.calls:
            disk.apply(call)
            what = f"after {call.number} {call.name} {self._short(call.path)}"
            for tree in disk.trees():
                if tree not in found:
                    found.add(tree)
                    yield Case("power loss", what, partial(self._lose_power, tree))
        for tree in disk.trees():
            yield Case("power loss at the end", "when it has succeeded", partial(self._keep, tree))

    def judge(self, case: "Case") -> "Verdict":
        """Let it happen, and run the command again."""
        return Verdict(self.wanted.run.title, case.fault, case.what, case.problems())

    def _prepare(self, run: Run) -> Undisturbed:
        _empty(self.base)
        _empty(self.work)
        for arguments in run.before:
            _require(self.command(arguments))
        if run.exists:
            (self.work / "out").mkdir(exist_ok=True)
            (self.work / "out").chmod(KEPT_MODE)
        shutil.copytree(self.work, self.base, dirs_exist_ok=True)
        self._restore()
        log = self.root / "record"
        shim.record(self.control, self.work, log)
        _require(self.command(run.arguments))
        left = runs.contents(self.work)
        self._import_the_same()
        return Undisturbed(run, shim.read_record(log), left, self._calls_once_more(run))

    def _calls_once_more(self, run: Run) -> int:
        shim.arm(self.control, self.work)
        _require(self.command(run.arguments))
        return int(self.control.calls)

    def _judge_modes(self) -> list[str]:
        """Say which modes of an undisturbed output are not those of the user, or were changed."""
        problems = []
        for path in self.work.rglob("*"):
            mode = stat.S_IMODE(path.lstat().st_mode)
            wanted = (0o777 if path.is_dir() else 0o666) & ~UMASK
            if path == self.work / "out" and self.wanted.run.exists:
                wanted = KEPT_MODE
            if mode != wanted:
                place = path.relative_to(self.work)
                problems.append(f"{place} has mode {mode:o}, not {wanted:o}")
        return problems

    def _restore(self) -> None:
        """Put back what the command finds."""
        _empty(self.work)
        shutil.copytree(self.base, self.work, dirs_exist_ok=True)

    def _disturb(self, fault: Fault, call: Call) -> list[str]:
        self._restore()
        shim.arm(self.control, self.work, fault, call.number)
        outcome = self.command(self.wanted.run.arguments)
        struck = os.fsdecode(self.control.struck)
        problems = self._judge_disturbed(fault, outcome, struck)
        if fault == shim.KILL_TWICE:
            shim.arm(
                self.control, self.work, fault, call.number * STRIDE % len(self.wanted.calls) + 1
            )
            self.command(self.wanted.run.arguments)
        return [*problems, *self._run_again(), *_end_orphans()]

    def _lose_power(self, tree: power.Tree) -> list[str]:
        _empty(self.work)
        power.build(tree, self.work)
        return self._run_again()

    def _keep(self, tree: power.Tree) -> list[str]:
        """Say what of a finished output is lost."""
        _empty(self.work)
        power.build(tree, self.work)
        found = runs.differences(runs.contents(self.work), self.wanted.left)
        return [f"power was lost, and {difference}" for difference in found]

    def command(self, arguments: str) -> Outcome:
        """Run a command in a forked process; calls are disarmed when it has ended."""
        said = self.root / "said"
        words = runs.words(arguments, self.inputs, self.work)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            _become(self.control, words, said, self.modules)
        hung = not _wait(child, HANG)
        if hung:
            os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        with suppress(ChildProcessError):  # its processes that had ended before it
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        self.control.armed = 0
        text = said.read_text(errors="replace") if said.exists() else ""
        return Outcome(os.waitstatus_to_exitcode(status), text, hung)

    def _import_the_same(self) -> None:
        """Import what the last command has imported, so that the next one need not."""
        for name in self.modules.read_text().split():
            with suppress(ImportError):  # of the many that modules make up
                importlib.import_module(name)
        gc.collect()
        gc.freeze()  # or each child copies what it collects

    def _judge_disturbed(self, fault: Fault, outcome: Outcome, struck: str) -> list[str]:
        """Say what is wrong with a disturbed command; `struck` is the call, "" when there was none,
        which may be another than the one of that number in an undisturbed run.
        """
        if fault in (shim.CTRL_C, shim.TERM):
            good = outcome.code == 0 or (
                outcome.code == 128 + fault.detail and outcome.said.count("stopped by ") == 1
            )
            if good and not outcome.hung and "Traceback" not in outcome.said:
                return []
            return [f"stopped, it ended with {outcome.code} and said {outcome.last_line!r}"]
        killed = fault in (shim.KILL_BEFORE, shim.KILL_AFTER, shim.KILL_TWICE, shim.KILL_PARENT)
        if killed and struck:
            if outcome.code == -signal.SIGKILL:
                return []
            return [f"killed, it ended with {outcome.code}"]
        problem = outcome.problem()
        if problem:
            return [f"disturbed: {problem}"]
        repeats = fault == shim.SHORT or (
            fault == shim.EINTR and struck.partition(" ")[0] in REPEATED
        )
        if outcome.code and (repeats or not struck):
            return [f"disturbed: it failed: {self._message(outcome)}"]
        if outcome.code == 0:
            left = runs.differences(runs.contents(self.work), self.wanted.left)
            return [f"disturbed, it succeeded, but {difference}" for difference in left]
        return []

    def _short(self, path: Path) -> str:
        return str(path).replace(str(self.work), "")

    def _message(self, outcome: Outcome) -> str:
        """Return the end of what a command said, without the folder of this sweep."""
        return outcome.said.replace(str(self.root), "").strip().partition("error: ")[2][-400:]

    def _run_again(self) -> list[str]:
        outcome = self.command(self.wanted.run.arguments)
        if outcome.hung or "Traceback" in outcome.said:
            return [f"again: {outcome.problem()}"]
        if outcome.code:
            return [f"again: it ended with {outcome.code}: {self._message(outcome)}"]
        left = runs.differences(runs.contents(self.work), self.wanted.left)
        if left:
            return [f"again: {difference}" for difference in left]
        calls = self._calls_once_more(self.wanted.run)
        if calls == self.wanted.calls_once_more:
            return []
        return [f"once more: it took {calls} calls, not {self.wanted.calls_once_more}"]


def faults_of(run: Run, call: Call) -> Iterator[Fault]:
    """Yield the faults that a call of a command may have."""
    yield shim.EIO
    yield shim.EINTR
    if call.takes_space:
        yield shim.ENOSPC
        yield shim.FULL
    if call.is_write:
        yield shim.SHORT
    yield shim.KILL_BEFORE
    yield shim.KILL_AFTER
    yield shim.KILL_TWICE
    yield shim.CTRL_C
    yield shim.TERM
    if run.starts_processes:
        yield shim.KILL_PARENT


def _become(control: shim.Control, words: Sequence[str], said: Path, modules: Path) -> None:
    """Run a command as this process, which ends here; tell the modules that it has imported."""
    code = INTERNAL_ERROR
    try:
        os.setpgid(0, 0)
        control.first_process = os.getpid()
        os.umask(UMASK)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, 1)
        os.dup2(output, 2)
        code = runs.execute(words)
        modules.write_text("\n".join(sys.modules))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int, limit: float) -> bool:
    """Return whether a process ended within a limit in seconds; it is not reaped."""
    end = time.monotonic() + limit
    pause = 0.0005
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, 0.01)
    return True


def _end_orphans() -> list[str]:
    """Wait for processes that a command has left; say so when one did not end, or ended as if its
    command were still there.
    """
    end = time.monotonic() + HANG
    while True:
        try:
            child, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return []
        if child and status == 0:
            return ["a process that it has started worked on to its end", *_end_orphans()]
        if not child:
            if time.monotonic() > end:
                return [f"a process that it has started ran on for {HANG} s"]
            time.sleep(0.01)


def _require(outcome: Outcome) -> None:
    assert outcome.code == 0, f"an undisturbed command ended with {outcome.code}: {outcome.said}"


def _empty(directory: Path) -> None:
    """Make a directory that is there and holds nothing."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
