"""`inspect --check-values` against `cat` of the same files, warm and cold; the headers alone.

python -m benchmarks.inspection [--directory DIR] [--checkpoint CKPT] [--rounds N]
"""

import shutil
import time
from pathlib import Path

from benchmarks.files import STATES, shards_bytes, time_cat
from benchmarks.processes import run_apart
from benchmarks.shared import REAL, checkpoint, empty_scratch, parser_of
from benchmarks.table import Goal, Row, render, row

HALF = Goal(figure="ratio", value=0.5)
FIVE_SECONDS = Goal(figure="ours", value=5, at_most=True)


def time_values(source: Path) -> float:
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.inspection.values import check_values

    start = time.perf_counter()
    check_values(Checkpoint(source))
    return time.perf_counter() - start


def time_headers(directory: Path) -> float:
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.inspection.precision import inspect

    start = time.perf_counter()
    inspect(Checkpoint.open(directory))
    return time.perf_counter() - start


def measure(source: Path, rounds: int, state: str = "warm") -> tuple[list[float], list[float]]:
    """Return GB/s of check_values and of cat, one figure per round."""
    gigabytes = shards_bytes(source) / 1e9
    ours = []
    peer = []
    for _ in range(rounds):
        STATES[state](source)
        ours.append(gigabytes / run_apart(time_values, source))
        STATES[state](source)
        peer.append(gigabytes / time_cat(source))
    return ours, peer


def rows_of(source: Path, rounds: int) -> list[Row]:
    """Return one row per state of the page cache."""
    what = f"inspect --check-values {shards_bytes(source) / 1e9:.1f} GB"
    found = []
    for state in STATES:
        ours, peer = measure(source, rounds, state)
        found.append(row(f"{what}, {state}", ours, "GB/s", peer=("cat", peer), goal=HALF))
    return found


def rows(directory: Path, rounds: int = 3, source: Path | None = None) -> list[Row]:
    from tests.full_size import write_sparse

    source = source or checkpoint(directory, *REAL)
    found = rows_of(source, rounds)
    full = write_sparse(empty_scratch(directory) / "full_size")
    seconds = [run_apart(time_headers, full) for _ in range(rounds)]
    shutil.rmtree(full)
    what = "inspect, headers of 230 GB (96,103 tensors)"
    return [*found, row(what, seconds, "s", less_is_better=True, goal=FIVE_SECONDS)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--checkpoint", type=Path, help="check this one instead of the seeded one of 2.0 GB"
    )
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, arguments.rounds, arguments.checkpoint)))


if __name__ == "__main__":
    main()
