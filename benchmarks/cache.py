"""The dequantized cache: writing against plain writing, memory, opening, and transformers' load.

python -m benchmarks.cache [--directory DIR] [--rounds N] [--transformers]
"""

import os
import shutil
import time
from pathlib import Path

from benchmarks.conversion import watched
from benchmarks.files import pause, read_into_cache, shards_bytes, time_plain_write
from benchmarks.processes import run_apart
from benchmarks.shared import REAL, checkpoint, empty_scratch, parser_of
from benchmarks.table import Goal, Row, render, row

SIXTY_PERCENT = Goal(figure="ratio", value=0.6)
FOUR_TIMES = Goal(figure="ratio", value=4)


def run_build(source: Path, target: Path, dtype: str) -> tuple[float, float]:
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.convert.cache import build_cache

    return watched(lambda: build_cache(Checkpoint.open(source), target, dtype))


def time_opening(source: Path, target: Path) -> float:
    """Return the seconds until all tensors of a finished cache are mapped, checks included."""
    from neuron_minimax.checkpoint.reader import Checkpoint
    from neuron_minimax.convert.cache import open_cache

    start = time.perf_counter()
    cache = open_cache(target, Checkpoint(source))
    if not sum(cache.tensor(name).numel() for name in cache.entries):
        raise RuntimeError(f"the cache {target} holds no element")
    return time.perf_counter() - start


def time_transformers(source: Path, target: Path, dtype: str) -> float:
    """Return the seconds of what there is without a cache: load, dequantize, save and sync."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    wanted = getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=wanted).to(wanted)
    save_file(model.state_dict(), target)
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return time.perf_counter() - start


def measure(
    source: Path, scratch: Path, dtype: str, rounds: int
) -> tuple[list[float], list[float], list[float], float]:
    """Return GB/s of the cache, GB/s of plain writing, seconds of each build, and peak MB.

    The memory is anonymous memory. The rates are of the bytes of the cache that is written.
    """
    ours = []
    plain = []
    builds = []
    peaks = []
    for _ in range(rounds):
        read_into_cache(source)
        pause()
        seconds, peak = run_apart(run_build, source, scratch / "cache", dtype)
        sizes = [path.stat().st_size for path in (scratch / "cache").glob("*.safetensors")]
        shutil.rmtree(scratch / "cache")
        ours.append(sum(sizes) / 1e9 / seconds)
        pause()
        plain.append(sum(sizes) / 1e9 / time_plain_write(sizes, scratch / "plain"))
        builds.append(seconds)
        peaks.append(peak)
    return ours, plain, builds, max(peaks)


def rows_of(
    source: Path, scratch: Path, dtype: str, rounds: int
) -> tuple[list[Row], list[float], list[float]]:
    """Return the rows of rate and memory, and the seconds of each build and plain writing."""
    ours, plain, builds, peak = measure(source, scratch, dtype, rounds)
    what = f"cache of {shards_bytes(source) / 1e9:.1f} GB, {dtype}"
    found = [
        row(
            f"{what}, written",
            ours,
            "GB/s",
            peer=("plain writing + sync", plain),
            goal=SIXTY_PERCENT,
        ),
        row(f"{what}, peak anonymous memory", [peak], "MB", less_is_better=True),
    ]
    return (
        found,
        builds,
        [rate * seconds / other for rate, seconds, other in zip(ours, builds, plain, strict=True)],
    )


def rows(
    directory: Path, rounds: int = 3, transformers: bool = True, bfloat16: bool = True
) -> list[Row]:
    source = checkpoint(directory, *REAL)
    scratch = empty_scratch(directory)
    found, seconds, plain = rows_of(source, scratch, "float32", rounds)
    if bfloat16:
        found += rows_of(source, scratch, "bfloat16", rounds)[0]
    run_apart(run_build, source, scratch / "cache", "float32")
    opening = run_apart(time_opening, source, scratch / "cache")
    shutil.rmtree(scratch / "cache")
    what = f"cache of {shards_bytes(source) / 1e9:.1f} GB, float32"
    found.append(row(f"{what}, opened", [opening], "s", less_is_better=True))
    if transformers:
        peer = run_apart(time_transformers, source, scratch / "saved.safetensors", "float32")
        (scratch / "saved.safetensors").unlink()
        built = row(
            f"{what}, built",
            seconds,
            "s",
            less_is_better=True,
            peer=("transformers load + save + sync", [peer]),
            limit=("plain writing + sync", plain),
            goal=FOUR_TIMES,
        )
        found.append(built)
    return found


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--transformers", action="store_true", help="also time transformers (14 GB of memory)"
    )
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, arguments.rounds, arguments.transformers)))


if __name__ == "__main__":
    main()
