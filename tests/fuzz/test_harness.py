"""The fuzzers' own parts: each verdict is given where it is due, and mutations depend on their seed
alone.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.child import Worker
from tests.fuzz.mutations import EDITS, Kind, edit_count, mutate

JSON = b'{"a": [1, 2.5, "text", null], "b": {"c": true}}'
SAFETENSORS = (
    (48).to_bytes(8, "little")
    + b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}'[:48]
    + b"ab"
)


def good() -> tuple[int, Any]:
    print("all is well")
    return 0, {"answer": 42}


def raises() -> tuple[int, Any]:
    raise ValueError("no such thing")


def waits() -> tuple[int, Any]:
    threading.Event().wait()
    return 0, None


def kills() -> tuple[int, Any]:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0, None


def eats() -> tuple[int, Any]:
    return 0, len(bytes(2 << 30))


def paints() -> tuple[int, Any]:
    print("error: \x1b[31m", file=sys.stderr)
    return 1, None


def is_silent() -> tuple[int, Any]:
    return 1, None


def refuses() -> tuple[int, Any]:
    print("error: the file is empty; download it again", file=sys.stderr)
    return 1, None


WORKS = {
    work.__name__: work for work in (good, raises, waits, kills, eats, paints, is_silent, refuses)
}


@pytest.fixture
def worker(tmp_path: Path):
    worker = Worker(lambda name: WORKS[name](), tmp_path, 300)
    yield worker
    worker.end()


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("raises", "traceback: ValueError: no such thing"),
        ("kills", "signal: ended by SIGKILL"),
        ("eats", "traceback: MemoryError"),
        ("paints", "escapes: '\\x1b' in the output"),
        ("is_silent", "silent: "),
    ],
)
def test_harm_is_named(worker, name, verdict):
    assert str(worker.run(name).fault).startswith(verdict)
    assert worker.run("good").fault is None  # in another child


def test_a_case_that_does_not_end_is_ended(worker):
    worker.run("good")
    worker.seconds = 0.5
    hanging = worker.run("waits")
    assert str(hanging.fault).startswith("hang")


def test_an_answer_and_a_refusal_are_no_harm(worker):
    answer = worker.run("good")
    assert (answer.fault, answer.value, answer.stdout) == (None, {"answer": 42}, b"all is well\n")
    refusal = worker.run("refuses")
    assert (refusal.fault, refusal.code, refusal.stdout) == (None, 1, b"")


@pytest.mark.parametrize("kind", Kind)
def test_a_mutation_depends_on_its_seed_alone_and_seeds_differ(kind):
    data = SAFETENSORS if kind is Kind.SAFETENSORS else JSON
    first = [mutate(kind, data, f"x:{number}") for number in range(60)]
    assert first == [mutate(kind, data, f"x:{number}") for number in range(60)]
    assert len(set(first)) > 40
    seed = next(f"x:{number}" for number in range(60) if edit_count(f"x:{number}") > 1)
    assert mutate(kind, data, seed, ()) == data


def test_every_kind_is_mutated():
    assert EDITS.keys() == set(Kind)
