"""Processes that end with their parent, however it ends, and SIGTERM taken as Ctrl-C is."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy
import pytest

from neuron_minimax.processes import Terminated, bound, first_signal_noted, signals_interrupt

# A parent, its child, and a command of the child's that knows nothing of either.
CHILD = """
import os, subprocess, sys, time
from neuron_minimax.processes import end_children_too, end_with_parent
end_with_parent(int(sys.argv[1]))
end_children_too()
command = subprocess.Popen(["sleep", "1000"])
print(os.getpid(), command.pid, flush=True)
time.sleep(1000)
"""
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""


def is_running(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_the_end(processes: list[int]) -> None:
    limit = time.monotonic() + 60
    while any(map(is_running, processes)):
        assert time.monotonic() < limit, f"of {processes} some still run"
        time.sleep(0.02)


@pytest.mark.parametrize("killed", ["parent", "child"])
def test_children_and_their_children_end_with_a_killed_process(killed: str) -> None:
    command = [sys.executable, "-c", PARENT, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child, sleeper = map(int, parent.stdout.readline().split())
        assert is_running(child)
        assert is_running(sleeper)
        os.kill(parent.pid if killed == "parent" else child, signal.SIGKILL)
        wait_for_the_end([child, sleeper])


def test_a_child_whose_parent_has_ended_already_ends_at_once() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    command = [sys.executable, "-c", CHILD, str(gone.pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def test_sigterm_is_an_interruption_within_the_block_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), signals_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    assert issubclass(Terminated, KeyboardInterrupt)


def test_an_interruption_that_a_destructor_swallows_is_raised_again() -> None:
    class Interrupted:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def work() -> None:
        limit = time.monotonic() + 60
        with signals_interrupt():
            Interrupted()
            while time.monotonic() < limit:
                time.sleep(0.01)

    with pytest.raises(Terminated):
        work()


def test_another_thread_leaves_signals_alone() -> None:
    seen = []

    def work() -> None:
        with signals_interrupt():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


def test_the_first_signal_is_noted_and_the_second_obeyed() -> None:
    done: list[int | None] = []

    def work() -> None:
        with first_signal_noted() as noted:
            done.append(noted.number)
            signal.raise_signal(signal.SIGINT)
            done.append(noted.number)
            signal.raise_signal(signal.SIGINT)
            done.append(0)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [None, signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_that_is_ignored_is_not_noted() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with first_signal_noted() as noted:
            signal.raise_signal(signal.SIGINT)
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert noted.number is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_noted_signal_that_nobody_obeyed_is_raised_behind_the_block() -> None:
    done = []

    def work() -> None:
        with first_signal_noted():
            signal.raise_signal(signal.SIGTERM)
            done.append("all")

    with pytest.raises(Terminated):
        work()
    assert done == ["all"]


def test_a_module_runs_without_what_lies_in_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = tmp_path / "places"
    places.mkdir()
    (places / "asking.py").write_text(
        "import sys, numpy\nassert __name__ == '__main__'\nprint(numpy.__file__, *sys.argv[1:])\n"
    )
    hostile = tmp_path / "checkpoint"
    hostile.mkdir()
    for name in ("numpy", "runpy", "ctypes"):
        (hostile / f"{name}.py").write_text("raise SystemExit('code of the current folder')")
    monkeypatch.syspath_prepend(places)
    monkeypatch.syspath_prepend("")  # as `python -c` has it
    monkeypatch.chdir(hostile)
    done = subprocess.run(
        bound([sys.executable, "-m", "asking", "one", "two words"]), capture_output=True, text=True
    )
    assert done.stderr == ""
    assert done.stdout == f"{numpy.__file__} one two words\n"
