"""Growth of cost with context, batch, experts, experts per token and layers, beside its laws.

python -m benchmarks.scaling [--directory DIR] [--reduced]

The full grid writes benchmarks/results/scaling.md and scaling.svg; `python -m benchmarks` runs the
reduced one. The models of curves over shapes are alive together, 23 of them in the full grid: 12 GB
of memory, else pages come and go.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import comb
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.curves import Curve, fitted, plot
from benchmarks.decoding import bytes_per_step
from benchmarks.machine import this_machine
from benchmarks.processes import Side, run_apart
from benchmarks.shared import compiled, parser_of
from benchmarks.sides import median_seconds, prompt_ids, random_ids, seconds_of
from benchmarks.suite import RESULTS
from benchmarks.synthetic import real_layers
from benchmarks.table import Goal, Row, render, row
from neuron_minimax.config import ModelConfig

# Half the real width: an expert is 3.5 MB, so that no model of the grid fits into a processor's
# cache.
HALF_WIDTH = {
    "hidden_size": 1536,
    "intermediate_size": 768,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
LONG = 8192
CHUNK = 512
SHORT = 256
BUCKET = 64
STEPS = 15
ROUNDS = 9
PROMPT_ROUNDS = 3
# Multiplications and additions of the kernels over FP8 codes that take as long as reading a byte
# (README.md says how it was found).
SUMS_PER_BYTE = 3.4
WORST = Goal(figure="ours", value=1.25, at_most=True)


@dataclass(frozen=True, kw_only=True, order=True)
class Shape:
    """A model of the grid and the slots it is compiled for."""

    layers: int = 2
    experts: int = 32
    per_token: int = 4
    slots: int = 1

    def config(self) -> dict[str, Any]:
        config = real_layers(layers=self.layers, experts=self.experts, vocabulary=1280)
        return config | HALF_WIDTH | {"num_experts_per_tok": self.per_token}

    def compiled(self, directory: Path, seq_len: int = SHORT, bucket: int = BUCKET) -> Path:
        name = f"scaling-{self.layers}-layers-{self.experts}-experts-{self.per_token}-per-token"
        options: dict[str, Any] = {"slots": self.slots, "seq_len": seq_len, "buckets": (bucket,)}
        return compiled(directory, name, self.config(), f"{self.slots}-slots-{seq_len}", **options)

    def work(self) -> float:
        """Return what a step costs, in bytes.

        It is the sum over attention, the distinct experts, the head and the router's float32 rows;
        each weight costs its bytes, or the sums of all tokens that use it where these take longer.
        """
        config = ModelConfig.from_dict(self.config())
        share = self.per_token / self.experts
        chance = [
            comb(self.slots, n) * share**n * (1 - share) ** (self.slots - n)
            for n in range(self.slots + 1)
        ]
        experts = self.experts * sum(
            chance[n] * max(1, n / SUMS_PER_BYTE) for n in range(1, self.slots + 1)
        )
        common = max(1, self.slots / SUMS_PER_BYTE)
        router = 4 * self.layers * self.experts * config.hidden_size
        return common * bytes_per_step(config, experts / common) + router


@dataclass(frozen=True, kw_only=True)
class Grid:
    context: tuple[int, ...]
    batch: tuple[int, ...]
    experts: tuple[int, ...]
    per_token: tuple[int, ...]
    layers: tuple[int, ...]


FULL = Grid(
    context=(128, 256, 512, 1024, 2048, 4096, 8192),
    batch=(1, 2, 4, 8, 16, 32),
    experts=(8, 16, 32, 64, 128, 256),
    per_token=(1, 2, 4, 8, 16),
    layers=(1, 2, 4, 8),
)
REDUCED = Grid(
    context=(512, 2048, 8192),
    batch=(1, 8, 32),
    experts=(8, 32, 256),
    per_token=(1, 4, 16),
    layers=(1, 2, 4),
)
BASE = Shape()


def stepping(traced: Path, positions: Sequence[int]) -> Iterator[dict[str, list[float]]]:
    """Take turns: milliseconds per step with so many positions filled in every slot."""
    import torch

    from neuron_minimax.backends import load
    from neuron_minimax.backends.cpu.backend import CompiledBackend

    backend = load(traced)
    assert isinstance(backend, CompiledBackend)
    # Every page is mapped before the clock starts, else a model of many experts is charged for its
    # first touches.
    for tensor in backend.model.state_dict().values():
        tensor.contiguous().view(torch.uint8).sum()
    slots = backend.capabilities.slots
    ids = random_ids(backend.capabilities.vocab_size, STEPS, slots)
    active = torch.ones(slots, dtype=torch.bool)

    def milliseconds(filled: int) -> float:
        at = torch.full((slots,), filled - 1)
        return 1000 * median_seconds(
            lambda number: backend.step(ids[number], at, active), range(STEPS)
        )

    while True:
        yield {"step": [milliseconds(filled) for filled in positions]}


def in_turns(tracings: Sequence[Path], positions: Sequence[int]) -> list[list[float]]:
    """Return, for each compiled model, the milliseconds per step at these positions.

    They are medians of rounds in which each model has its turn, so that all of them see the
    machine's slow and fast moments alike.
    """
    with ExitStack() as stack:
        sides = [stack.enter_context(Side(stepping, traced, positions)) for traced in tracings]
        rounds = [[side.measure()["step"] for side in sides] for _ in range(ROUNDS)]
    return [
        [median(column) for column in zip(*side_rounds, strict=True)]
        for side_rounds in zip(*rounds, strict=True)
    ]


def encode_milliseconds(traced: Path, lengths: Sequence[int]) -> list[float]:
    """Return the milliseconds of whole prompts, by chunks of one bucket: medians of rounds."""
    from neuron_minimax.backends import load

    backend = load(traced)
    ids = prompt_ids(backend.capabilities.vocab_size, max(lengths))
    backend.encode(0, ids[:CHUNK])
    rounds = [
        [seconds_of(backend.encode, 0, ids[:length]) for length in lengths]
        for _ in range(PROMPT_ROUNDS)
    ]
    return [1000 * median(column) for column in zip(*rounds, strict=True)]


def encode_flops(tokens: int) -> float:
    """Return the FLOPs of a prompt.

    They are those of projections and chosen experts for every token, and of every query with
    the keys up to its own.
    """
    config = ModelConfig.from_dict(BASE.config())
    attention = 2 * config.hidden_size * (config.query_size + config.key_value_size)
    mlp = 3 * config.hidden_size * config.intermediate_size * config.num_experts_per_tok
    scores = 2 * config.query_size * tokens * tokens / 2
    return 2 * config.num_hidden_layers * (tokens * (attention + mlp) + scores)


def context_curves(directory: Path, lengths: tuple[int, ...]) -> list[Curve]:
    traced = BASE.compiled(directory, LONG, CHUNK)
    (decode,) = in_turns([traced], lengths)
    prompts = [length for length in lengths if length >= CHUNK]
    encode = run_apart(encode_milliseconds, traced, prompts)
    law = "constant plus the filled positions' keys and values"
    flops = [encode_flops(length) for length in prompts]
    encode_law = "constant plus FLOPs (linear in tokens, attention's scores quadratic)"
    return [
        fitted(
            "decode over context", "filled positions", "ms per step", law, lengths, decode, lengths
        ),
        fitted("encode over prompt", "tokens", "ms per prompt", encode_law, prompts, encode, flops),
    ]


def shape_curves(directory: Path, grid: Grid) -> list[Curve]:
    """Return one curve per row of the table below; shapes that rows share are measured once."""
    bytes_law = "constant plus the bytes of"
    work_law = (
        f"{bytes_law} the weights in use, or their sums, {SUMS_PER_BYTE} for a byte, where these "
        "take longer"
    )
    table = (
        ("batch", "slots", work_law, "slots", grid.batch, BASE),
        (
            "experts, batch 1",
            "experts",
            f"{bytes_law} k experts and the router's rows",
            "experts",
            grid.experts,
            BASE,
        ),
        ("experts, batch 8", "experts", work_law, "experts", grid.experts, replace(BASE, slots=8)),
        (
            "experts per token",
            "experts per token",
            f"{bytes_law} k experts",
            "per_token",
            grid.per_token,
            BASE,
        ),
        ("layers", "layers", f"{bytes_law} the layers", "layers", grid.layers, BASE),
    )
    shapes = {
        name: [replace(base, **{field: at}) for at in places]
        for name, _, _, field, places, base in table
    }
    distinct = sorted({shape for line in shapes.values() for shape in line})
    found = in_turns([shape.compiled(directory) for shape in distinct], [BUCKET])
    measured = {shape: step for shape, (step,) in zip(distinct, found, strict=True)}
    return [
        fitted(
            f"decode over {name}",
            axis,
            "ms per step",
            law,
            places,
            [measured[shape] for shape in shapes[name]],
            [shape.work() for shape in shapes[name]],
        )
        for name, axis, law, _, places, _ in table
    ]


def rows(directory: Path, full: bool = False) -> list[Row]:
    """Return one row per curve; the full grid's tables and plot go to benchmarks/results/."""
    grid = FULL if full else REDUCED
    started = time.monotonic()
    curves = context_curves(directory, grid.context) + shape_curves(directory, grid)
    print("\n\n".join(curve.render_markdown() for curve in curves), file=sys.stderr, flush=True)
    if full:
        write(curves, time.monotonic() - started)
    return [
        row(
            f"{curve.name}, worst measured / expected "
            f"({'superlinear' if curve.superlinear else 'not superlinear'})",
            [curve.worst],
            "",
            less_is_better=True,
            goal=WORST,
        )
        for curve in curves
    ]


def write(curves: Sequence[Curve], seconds: float) -> None:
    RESULTS.mkdir(exist_ok=True)
    plot(curves, RESULTS / "scaling.svg")
    heading = (
        "# How cost grows\n\n`python -m benchmarks.scaling`: 2 layers x 32 experts, 4 per token, "
        "half the real width "
        "where nothing else is said; one token per slot and step. The expectation is a + b * "
        "law, fitted.\n\n"
        f"{this_machine().render()}; took {seconds:.0f} s\n\n![curves](scaling.svg)"
    )
    parts = [heading, *(curve.render_markdown() for curve in curves)]
    (RESULTS / "scaling.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--reduced", action="store_true", help="three points per curve; writes nothing"
    )
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, full=not arguments.reduced)))


if __name__ == "__main__":
    main()
