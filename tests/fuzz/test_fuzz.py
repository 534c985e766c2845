"""Six hundred cases from a fixed seed, and all that fuzzing has found, do no harm: no traceback, no
hang, no memory beyond its limit, nothing damaged accepted. `make fuzz` runs an hour of others.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.found import FOUND
from tests.fuzz.table import QUICK, TARGETS

ROOT = Path(__file__).parents[2]
CASES = 600
SEED = 34


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a campaign of this seed says, in a process of its own: cases are forked from it."""
    folder = tmp_path_factory.mktemp("fuzz")
    options = f"--seed {SEED} --cases {CASES} --examples 6 --limit 300 --quick".split()
    places = ("--report", str(folder / "report.json"), "--faults", str(folder / "faults"))
    run = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *options, *places],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (folder / "report.json").exists(), run.stdout + run.stderr
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", QUICK)
def test_no_input_does_harm(report: dict[str, Any], name: str) -> None:
    faults = [fault for fault in report["faults"] if fault["target"] == name]
    assert report["cases"].get(name, 0) > 0
    assert not faults, "\n".join(f"{fault['seed']}: {fault['what']}" for fault in faults)


def test_so_many_cases_ran(report: dict[str, Any]) -> None:
    assert sum(report["cases"].values()) >= CASES


def test_every_judge_can_fail(report: dict[str, Any]) -> None:
    assert report["blind"] == []


def test_what_was_found_is_of_targets_that_are_there() -> None:
    assert FOUND.keys() <= TARGETS.keys()
