"""Forked tasks: results in order, failures in their turn, and no process outlives its caller."""

import os
import signal
import subprocess
import sys
import time
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from neuron_minimax.checkpoint.records import joined_crc32
from neuron_minimax.checkpoint.streaming import PARALLEL_FROM, in_processes
from neuron_minimax.errors import CheckpointError, NeuronMiniMaxError
from tests.waiting import wait_until


def work(number):
    time.sleep(0.001 * (number % 3))
    return number, os.getpid()


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_results_come_in_order_and_from_other_processes(at_once):
    results = list(
        in_processes([partial(work, number) for number in range(50)], PARALLEL_FROM, at_once)
    )
    assert [number for number, _ in results] == list(range(50))
    assert os.getpid() not in {process for _, process in results}


def test_few_bytes_are_streamed_in_the_callers_process():
    assert list(in_processes([partial(work, 0), partial(work, 1)], 1000)) == [
        (0, os.getpid()),
        (1, os.getpid()),
    ]


@pytest.mark.parametrize("at_once", [1, 2])
def test_an_error_is_raised_in_its_turn_with_the_place_where_it_happened(at_once):
    def fail():
        raise CheckpointError("model.norm.weight is bad")

    more = [partial(work, number) for number in range(4, 12)]
    results = in_processes(
        [partial(work, 0), partial(work, 1), fail, fail, *more], PARALLEL_FROM, at_once
    )
    assert [next(results)[0] for _ in range(2)] == [0, 1]
    with pytest.raises(CheckpointError, match=r"norm\.weight is bad") as raised:
        next(results)
    assert "in fail" in raised.value.__notes__[0]


def test_a_killed_process_is_an_error_and_not_a_hang():
    tasks = [
        partial(work, 0),
        lambda: os.kill(os.getpid(), signal.SIGKILL),
        *[partial(work, n) for n in range(9)],
    ]
    with pytest.raises(NeuronMiniMaxError, match="ended from outside"):
        list(in_processes(tasks, PARALLEL_FROM))


def test_leaving_early_ends_the_processes():
    results = in_processes([os.getpid, os.getpid, partial(time.sleep, 60)], PARALLEL_FROM)
    process = next(results)
    results.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


ORPHANS = """
import os, signal, time
from functools import partial
from neuron_minimax.checkpoint.streaming import PARALLEL_FROM, in_processes
results = in_processes([os.getpid, *[partial(time.sleep, 1000)] * 9], PARALLEL_FROM)
print(next(results), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_task_is_no_result():
    assert list(in_processes([], PARALLEL_FROM)) == []


def test_processes_of_a_killed_caller_end_in_the_middle_of_a_task():
    command = [sys.executable, "-c", ORPHANS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as killed:
        orphan = int(killed.stdout.readline())
        assert killed.wait() == -signal.SIGKILL
    stat = Path(f"/proc/{orphan}/stat")
    try:
        wait_until(lambda: not stat.exists() or stat.read_text().split()[2] == "Z")
    finally:
        with suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)


@given(st.lists(st.binary(max_size=300)), st.integers(0, 1 << 16))
@example([], 0)
@example([b""], 0)
@example([b"a", b"", b"b"], 1 << 20)
def test_digests_of_stretches_join_into_that_of_all(pieces, zeros):
    pieces = [*pieces, bytes(zeros), b"end"]
    joined = 0
    for piece in pieces:
        joined = joined_crc32(joined, zlib.crc32(piece), len(piece))
    assert joined == zlib.crc32(b"".join(pieces))
