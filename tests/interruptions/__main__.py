"""Disturbs every command at every call, and prints a table of cases and of those that passed.

python -m tests.interruptions [--runs convert,cache] [--every 7] [--part 1/2] [--json]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.interruptions import shim

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sweep; 1 when a case failed."""
    options = parse(arguments)
    if shim.VARIABLE not in os.environ:
        return start(options)
    for line in sweep(options):
        print(line, flush=True)
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.interruptions")
    parser.add_argument("--runs", default="", help="commands, separated by commas; default: all")
    parser.add_argument("--leave-out", default="", help="commands, separated by commas")
    parser.add_argument("--faults", default="", help="kinds, separated by commas; default: all")
    parser.add_argument("--every", type=int, default=1, help="take every n-th case only")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--part", default="0/1", help=argparse.SUPPRESS)
    parser.add_argument("--root", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.given = sys.argv[1:] if arguments is None else list(arguments)
    return options


def sweep(options: argparse.Namespace) -> Iterator[str]:
    """Yield a line of JSON per case; runs under the library."""
    from neuron_minimax.processes import end_with_parent
    from tests.interruptions.runs import CARELESS, RUNS
    from tests.interruptions.sweep import Sweep

    end_with_parent(options.parent)
    part, parts = map(int, options.part.split("/"))
    titles = options.runs.split(",") if options.runs else [run.title for run in RUNS]
    left_out = options.leave_out.split(",")
    kinds = options.faults.split(",") if options.faults else None
    bench = Sweep(Path(options.root))
    number = 0
    for run in (*RUNS, CARELESS):
        if run.title not in titles or run.title in left_out:
            continue
        for case in bench.cases(run):
            number += 1
            if kinds and case.fault not in kinds:
                continue
            every = 1 if run is CARELESS else options.every * run.every
            if number % (every * parts) == part:
                yield bench.judge(case).as_json()


def start(options: argparse.Namespace) -> int:
    """Start the processes that sweep, and print what they find."""
    with tempfile.TemporaryDirectory() as folder:
        library = shim.build(Path(folder))
        parts = [Path(folder) / str(part) for part in range(options.processes)]
        running = [start_part(options, library, root, number) for number, root in enumerate(parts)]
        failed = sum(process.wait() for process in running)
        found = [json.loads(line) for root in parts for line in (root / "found").open()]
    print_table(found)
    return int(bool(failed) or any(verdict["problems"] for verdict in found))


def start_part(
    options: argparse.Namespace, library: Path, root: Path, number: int
) -> "subprocess.Popen[bytes]":
    """Start one of the processes that share the cases; it writes a line for each to root/found."""
    root.mkdir()
    variables = shim.environment(library, root / "control")
    command = [sys.executable, "-m", "tests.interruptions", *options.given]
    command += ["--part", f"{number}/{options.processes}", "--root", str(root)]
    command += ["--parent", str(os.getpid())]
    with (root / "found").open("wb") as found:
        return subprocess.Popen(
            command, env={**os.environ, **ENVIRONMENT, **variables}, stdout=found
        )


def print_table(found: Sequence[dict[str, Any]]) -> None:
    """Print what is wrong, then cases and those that passed by command and kind of fault."""
    cases: Counter[tuple[str, str]] = Counter()
    passed: Counter[tuple[str, str]] = Counter()
    calls: dict[tuple[str, str, str], list[str]] = {}
    for verdict in found:
        key = (verdict["run"], verdict["fault"])
        cases[key] += 1
        passed[key] += not verdict["problems"]
        for problem in verdict["problems"]:
            calls.setdefault((*key, problem), []).append(verdict["call"])
    for (run, fault, problem), places in calls.items():
        print(f"{run}, {fault}: {problem}")
        print(f"  {len(places)} cases: {'; '.join(places[:6])}")
    print(f"{'command':24} {'fault':26} {'cases':>6} {'passed':>6}")
    for key in cases:
        print(f"{key[0]:24} {key[1]:26} {cases[key]:6} {passed[key]:6}")
    print(f"{'all':51} {cases.total():6} {passed.total():6}")


if __name__ == "__main__":
    sys.exit(main())
