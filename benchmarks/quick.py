"""Guards in two minutes: fail when a ratio fell by more than a third against the kept one.

python -m benchmarks.quick [--directory DIR] [--keep]

The kept ratios are in benchmarks/results/. Small models and few rounds: the ratios are steady
enough to guard, and do not say how fast anything is.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cache, conversion, inspection
from benchmarks.machine import this_machine
from benchmarks.processes import Side
from benchmarks.shared import checkpoint, compiled, empty_scratch, parser_of
from benchmarks.sides import ours, transformers
from benchmarks.suite import RESULTS, Table, collect
from benchmarks.synthetic import SMALL, real_layers
from benchmarks.table import Row, read_rows, row

KEPT = "quick"
MOST_LOST = 1 / 3
MODEL = ("quick-model", real_layers(layers=4, experts=16, vocabulary=1280) | SMALL)
FILES = ("quick-files", real_layers(layers=1, experts=8, vocabulary=1024))  # 170 MB
ROUNDS = 7
STEPS = 40
PROMPT = 128
FILE_ROUNDS = 3  # each with pauses


@dataclass(frozen=True, kw_only=True)
class Fall:
    """A ratio that is lost, or more than a third lower than it was kept."""

    what: str
    kept: float
    found: float | None

    def render(self) -> str:
        if self.found is None:
            return (
                f"{self.what}: ratio {self.kept:.3f} was kept, and now there is none; see why the "
                "row is missing"
            )
        lost = 1 - self.found / self.kept
        return (
            f"{self.what}: ratio {self.kept:.3f} was kept, {self.found:.3f} found ({lost:.0%} "
            f"lost, at most {MOST_LOST:.0%} expected); find what became slower, or keep the new "
            "ratio with --keep"
        )


def falls(kept: Sequence[Row], found: Sequence[Row]) -> list[Fall]:
    """Return the ratios that fell, in the order of `kept`.

    Rows without a ratio are not guarded, new rows not yet.
    """
    ratios = {each.what: each.ratio for each in found}
    guarded = [
        (each.what, each.ratio, ratios.get(each.what)) for each in kept if each.ratio is not None
    ]
    return [
        Fall(what=what, kept=before, found=now)
        for what, before, now in guarded
        if now is None or now < before * (1 - MOST_LOST)
    ]


def best(what: str, unit: str, ours: Sequence[float], peer: str, theirs: Sequence[float]) -> Row:
    """Return each side's least disturbed round: steadier than a median of few rounds."""
    return row(what, [max(ours)], unit, peer=(peer, [max(theirs)]))


def model_rows(directory: Path) -> list[Row]:
    """Return tokens per second of both engines against transformers in float32."""
    options: dict[str, Any] = {"slots": 1, "seq_len": 512, "buckets": (PROMPT,)}
    sources = {
        name: compiled(directory, *MODEL, name, engine=name, **options)
        for name in ("compiled", "eager")
    }
    with ExitStack() as stack:
        peer = stack.enter_context(
            Side(transformers, checkpoint(directory, *MODEL), "float32", STEPS, PROMPT)
        )
        sides = {
            name: stack.enter_context(Side(ours, path, STEPS, PROMPT))
            for name, path in sources.items()
        }
        turns = [
            ({name: side.measure() for name, side in sides.items()}, peer.measure())
            for _ in range(ROUNDS)
        ]
    table = []
    for name in sources:
        for figure, what, tokens in (
            ("step", "decode", 1),
            ("encode", f"encode {PROMPT} tokens", PROMPT),
        ):
            rates = [tokens / mine[name][figure] for mine, _ in turns]
            theirs = [tokens / peers[figure] for _, peers in turns]
            table.append(
                best(
                    f"{what}, small model, {name}",
                    "tokens/s",
                    rates,
                    "transformers float32",
                    theirs,
                )
            )
    return table


def file_rows(directory: Path) -> list[Row]:
    """Return gigabytes per second of everything that reads or writes a checkpoint."""
    source = checkpoint(directory, *FILES)
    scratch = empty_scratch(directory)
    converting, copying, _ = conversion.measure(source, scratch, FILE_ROUNDS)
    checking, reading = inspection.measure(source, ROUNDS)
    building, writing, *_ = cache.measure(source, scratch, "float32", FILE_ROUNDS)
    return [
        best("convert 0.2 GB, warm", "GB/s", converting, "cp + sync", copying),
        best("inspect --check-values 0.2 GB, warm", "GB/s", checking, "cat", reading),
        best(
            "cache of 0.2 GB, float32, written", "GB/s", building, "plain writing + sync", writing
        ),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--keep", action="store_true", help=f"write benchmarks/results/{KEPT}.json and .md"
    )
    arguments = parser.parse_args(argv)
    # Threads that wait for each other are slowed down by whatever else runs.
    os.environ["OMP_NUM_THREADS"] = "1"
    parts = [
        (name, partial(work, arguments.directory))
        for name, work in (("model", model_rows), ("files", file_rows))
    ]
    rows, seconds = collect(parts, lambda line: None)
    table = Table(rows=tuple(rows), machine=this_machine(), seconds=seconds)
    print(table.render())
    if any(each.failure for each in rows):
        return 1
    if arguments.keep:
        table.write(RESULTS, KEPT)
        return 0
    path = RESULTS / f"{KEPT}.json"
    if not path.exists():
        print(
            f"{path} does not exist: nothing is guarded; run with --keep on a commit that is good",
            file=sys.stderr,
        )
        return 1
    fallen = falls(read_rows(path), rows)
    for fall in fallen:
        print(fall.render(), file=sys.stderr)
    return 1 if fallen else 0


if __name__ == "__main__":
    sys.exit(main())
