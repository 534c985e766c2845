"""A sample of the sweep, and what says that the sweep can fail; `make interruptions` runs all."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.interruptions import runs, shim, traced

pytestmark = pytest.mark.skipif(
    shim.compiler() is None or sys.platform != "linux", reason="needs Linux and a C++ compiler"
)
SAMPLE = 197  # a prime, so that every kind of fault has its turn
# Training imports for seconds; it is in the whole sweep.
TITLES = [run.title for run in runs.RUNS if run.every == 1 and run.title != "train"]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What the sweep has printed, line by line, of a sample and of all cases of a careless command;
    one process, since imports take most of the time.
    """
    command = [sys.executable, "-m", "tests.interruptions", "--processes", "1"]
    command += ["--every", str(SAMPLE), "--runs", ",".join([*TITLES, "careless"])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_the_next_run_ends_as_an_undisturbed_one(said: list[str]) -> None:
    problems = [line for line in said if line.startswith(tuple(f"{title}, " for title in TITLES))]
    assert problems == []
    tested = {title for title in TITLES if any(line.startswith(f"{title}  ") for line in said)}
    assert tested == set(TITLES)


@pytest.mark.parametrize(
    "problem",
    [
        "careless, none: out/data has mode 600, not 640",
        "careless, kill after: again: out/tmp",
        "careless, EIO: again: out/tmp",
        "careless, Ctrl-C: again: out/tmp",
        "careless, power loss: again: out/data is missing",
    ],
)
def test_a_careless_command_is_found(said: list[str], problem: str) -> None:
    assert any(line.startswith(problem) for line in said), "\n".join(said)


@pytest.mark.skipif(not traced.is_possible(), reason="needs strace, and leave to use it")
def test_the_library_sees_every_call_that_the_kernel_sees(tmp_path: Path) -> None:
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    runs.write_inputs(inputs)
    (tmp_path / "work").mkdir()
    (run,) = [run for run in runs.RUNS if run.title == "experts without plots"]
    words = list(runs.words(run.arguments, inputs, tmp_path / "work"))
    kernel, seen = traced.count(words, tmp_path / "work", tmp_path)
    assert {"open", "write", "fsync", "rename"} <= kernel.keys()
    assert seen == kernel.total()
