"""Conversion against `cp -r` and sync of the same files, warm and cold; peak anonymous memory.

python -m benchmarks.conversion [--directory DIR] [--rounds N] [--full-layer]
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.files import STATES, pause, shards_bytes, time_copy
from benchmarks.processes import anonymous_bytes_of_tree, run_apart
from benchmarks.shared import REAL, checkpoint, empty_scratch, parser_of
from benchmarks.synthetic import real_layers
from benchmarks.table import Goal, Row, render, row

FULL_LAYER = ("1-layer-256-experts", real_layers(layers=1, experts=256))
# At most 2 times as long as cp + sync when the source is cached, 1.5 times when it is not.
GOALS = {"warm": Goal(figure="ratio", value=1 / 2), "cold": Goal(figure="ratio", value=1 / 1.5)}
ONE_GIGABYTE = Goal(figure="ours", value=1000, at_most=True)


def watched(work: Callable[..., Any], *arguments: Any) -> tuple[float, float]:
    """Return the seconds of one call and the peak anonymous megabytes, imports included.

    The memory is that of this process and its children.
    """
    peak = 0
    stop = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not stop.wait(0.01):
            peak = max(peak, anonymous_bytes_of_tree())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    start = time.perf_counter()
    work(*arguments)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    return seconds, max(peak, anonymous_bytes_of_tree()) / 1e6


def run_conversion(source: Path, destination: Path) -> tuple[float, float]:
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.convert.plan import plan_conversion

    def convert() -> None:
        plan_conversion(Checkpoint.open(source)).write(destination)

    return watched(convert)


def measure(
    source: Path, scratch: Path, rounds: int, state: str = "warm"
) -> tuple[list[float], list[float], float]:
    """Return GB/s of conversion and of cp + sync, one per round, and the peak anonymous MB."""
    gigabytes = shards_bytes(source) / 1e9
    ours = []
    peer = []
    peaks = []
    for _ in range(rounds):
        STATES[state](source)
        pause()
        seconds, peak = run_apart(run_conversion, source, scratch / "out")
        shutil.rmtree(scratch / "out")
        STATES[state](source)
        pause()
        ours.append(gigabytes / seconds)
        peer.append(gigabytes / time_copy(source, scratch / "copy"))
        peaks.append(peak)
    return ours, peer, max(peaks)


def rows_of(source: Path, scratch: Path, rounds: int) -> list[Row]:
    """Return one row per state of the page cache, and the peak memory."""
    what = f"convert {shards_bytes(source) / 1e9:.1f} GB"
    rows = []
    peaks = []
    for state in STATES:
        ours, peer, peak = measure(source, scratch, rounds, state)
        peaks.append(peak)
        rows.append(
            row(f"{what}, {state}", ours, "GB/s", peer=("cp + sync", peer), goal=GOALS[state])
        )
    what += ", peak anonymous memory"
    return [*rows, row(what, [max(peaks)], "MB", less_is_better=True, goal=ONE_GIGABYTE)]


def rows(directory: Path, rounds: int = 3, full_layer: bool = True) -> list[Row]:
    found = []
    for name, config in (REAL, FULL_LAYER) if full_layer else (REAL,):
        source = checkpoint(directory, name, config)
        found += rows_of(source, empty_scratch(directory), rounds)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--full-layer", action="store_true", help="also one layer of 256 experts, 3.9 GB"
    )
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, arguments.rounds, arguments.full_layer)))


if __name__ == "__main__":
    main()
