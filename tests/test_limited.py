"""Work in a limited process: its result comes back, and when it takes too much only it ends."""

import ast
import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest

from neuron_minimax import limited
from neuron_minimax.errors import GenerationError
from neuron_minimax.limited import LimitedProcess, Limits, OverLimitError, Setup
from tests.waiting import wait_until

ROOT = Path(__file__).parents[1]
# Hardly any time, which on no machine suffices for work without an end.
LIMITS = Limits(cpu_seconds=0.5, memory=64 << 20)


def begin(word):
    return [word]


def said(state, more):
    return [*state, more, os.getpid()]


def file_of_numpy(state):
    import numpy

    return numpy.__file__


def refuse(state):
    raise GenerationError("not this")


def fail(state):
    raise ZeroDivisionError("a fault of ours")


def go_on_for_ever(state):
    while True:
        pass


def take_memory(state):
    return len(bytearray(1 << 30))


def take_memory_in_the_end(state):
    return bytes(1 << 25) * 3


def crash(state):
    os.kill(os.getpid(), signal.SIGSEGV)


def recurse(state):
    return recurse(state) + 1


@pytest.fixture(scope="module")
def process():
    process = LimitedProcess(Setup(begin, "one"), LIMITS)
    yield process
    process.close()


def test_one_process_does_one_piece_of_work_after_the_other(process):
    *words, pid = process.call(said, "two")
    assert words == ["one", "two"]
    assert process.call(said, "three") == ["one", "three", pid]
    assert pid != os.getpid()


def test_a_forked_program_gets_a_process_of_its_own(process):
    """Also while a thread of the first program waits for its process."""
    *_, pid = process.call(said, "two")
    reader, writer = os.pipe()
    with process._lock:
        child = os.fork()
        if child == 0:
            try:
                os.write(writer, repr(process.call(said, "child")).encode())
            finally:
                os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        first, second, other = ast.literal_eval(answer.read())
    os.waitpid(child, 0)
    assert (first, second) == ("one", "child")
    assert other != pid
    assert process.call(said, "three") == ["one", "three", pid]


def test_errors_come_back_as_they_are_and_faults_with_their_traceback(process):
    with pytest.raises(GenerationError, match="not this"):
        process.call(refuse)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        process.call(fail)
    with pytest.raises(RuntimeError, match="recursion"):
        process.call(recurse)


@pytest.mark.parametrize(
    "work",
    [go_on_for_ever, take_memory, take_memory_in_the_end, crash],
    ids=lambda work: work.__name__,
)
def test_work_that_takes_too_much_ends_and_the_next_is_done_by_another_process(process, work):
    before = process.call(said, "")
    with pytest.raises(OverLimitError, match="seconds of processor time or 64 MiB"):
        process.call(work)
    assert process.call(said, "")[-1] != before[-1]


def test_a_process_that_ended_while_it_was_idle_is_replaced(process):
    pid = process.call(said, "")[-1]
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}").exists():
        time.sleep(0.01)
    assert process.call(said, "")[:-1] == ["one", ""]


def test_the_nursery_is_started_again_when_it_has_ended(process):
    pid = process.call(said, "")[-1]
    nursery = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.killpg(nursery, signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())
    stat = Path(f"/proc/{nursery}/stat")
    wait_until(lambda: not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z")
    assert process.call(said, "")[:-1] == ["one", ""]


def test_an_event_loop_goes_on_meanwhile_and_cancelling_gives_the_work_up():
    patient = Limits(cpu_seconds=1000, memory=64 << 20)
    process = LimitedProcess(Setup(begin, "one"), patient)
    pid = process.call(said, "")[-1]

    async def run():
        endless = asyncio.create_task(process.call_async(go_on_for_ever))
        other = LimitedProcess(Setup(begin, "other"), patient)
        assert (await other.call_async(said, ""))[0] == "other"
        other.close()
        assert not endless.done()
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        wait_until(lambda: not Path(f"/proc/{pid}").exists())
        return await process.call_async(said, "")

    assert asyncio.run(run())[:-1] == ["one", ""]
    process.close()
    with pytest.raises(OverLimitError):
        process.call(said, "")


SCRIPT = """
import sys
from neuron_minimax.limited import LimitedProcess, Limits, Setup
from tests.test_limited import begin, go_on_for_ever, said
process = LimitedProcess(Setup(begin, "one"), Limits(cpu_seconds=1000, memory=64 << 20))
print(process.call(said, "")[-1], flush=True)
process.call(go_on_for_ever)
"""


def test_a_script_needs_no_guard_and_nothing_outlives_it(tmp_path):
    """A plain script: multiprocessing would run it again in every process."""
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, text=True, env=environment
    ) as script:
        pid = int(script.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        script.kill()
        assert script.stdout.read() == ""
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "the process goes on without its program"
        time.sleep(0.01)


def test_a_process_imports_nothing_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("numpy", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('code of the current folder')")
    monkeypatch.syspath_prepend("")  # as `python -c` has it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(limited, "_NURSERY", limited._Nursery())
    process = LimitedProcess(Setup(begin, "one"), Limits(cpu_seconds=60, memory=512 << 20))
    try:
        assert process.call(file_of_numpy) == numpy.__file__
    finally:
        process.close()
        limited._NURSERY._end()
