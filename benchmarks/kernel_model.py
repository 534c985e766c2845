"""A model of the NKI expert kernel's cost on Trainium2, from counted work and documented rates.

Nothing here ran on such a chip.

python -m benchmarks.kernel_model [--tokens N ...] [--channels N ...]

One line per token count: one visit (one expert's weights through one physical core) at the real
size, or a rank's share of it, averaged over 8 visits in the interpreter of tests/nki_interpreter.
With --channels the line has a rank's share of the intermediate size, and the scales of both layouts
that such a share can have.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.shared import parser_of
from benchmarks.table import Row, row
from neuron_minimax.kernels import reference
from neuron_minimax.planner.memory import BLOCK_SCALES, EXPANDED_SCALES
from tests import nki_interpreter

HIDDEN = 3072
INTERMEDIATE = 1536
TOP_K = 8
KERNEL = str(Path(reference.__file__).parent / "nki" / "expert_mlp.py")
# AWS documentation, "Trainium2 Architecture": 2.9 TB/s of HBM and 8 cores per chip; NKI
# architecture guide: clocks.
HBM_BYTES_PER_SECOND = 2.9e12 / 8
# Clock in Hz, and the instructions that each engine runs here.
ENGINES = {
    "tensor": (2.4e9, ("nc_matmul", "nc_transpose")),
    "vector": (
        0.96e9,
        (
            "tensor_tensor",
            "tensor_copy",
            "tensor_scalar",
            "tensor_reduce",
            "memset",
            "nc_stream_shuffle",
        ),
    ),
    "scalar": (1.2e9, ("activation",)),
}


def count(
    tokens: int, channels: int = INTERMEDIATE, scale_layout: str = BLOCK_SCALES
) -> dict[str, float]:
    """Return the interpreter's counts per visit of `tokens` tokens, bfloat16, averaged over 8."""
    module, machine = nki_interpreter.load(KERNEL)
    generator = torch.Generator().manual_seed(0)
    codes = [
        torch.randint(0, 0x78, (TOP_K, *shape), generator=generator, dtype=torch.uint8)
        for shape in shapes(channels)
    ]
    codes = [each.view(torch.float8_e4m3fn) for each in codes]
    scales = [
        torch.rand(TOP_K, *shape, generator=generator)
        for shape in scale_shapes(channels, scale_layout)
    ]
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    index_TK = torch.arange(TOP_K).repeat(tokens, 1)
    affinity_TK = torch.full((tokens, TOP_K), 1 / TOP_K)
    weights = reference.ExpertWeights(codes[0], scales[0], codes[1], scales[1])
    module.expert_mlp(hidden_TH, index_TK, affinity_TK, weights)
    return {name: amount / TOP_K for name, amount in machine.counts.items()}


def shapes(channels: int = INTERMEDIATE) -> tuple[tuple[int, int], tuple[int, int]]:
    return (HIDDEN, 2 * channels), (channels, HIDDEN)


def scale_shapes(channels: int, scale_layout: str) -> tuple[tuple[int, int], tuple[int, int]]:
    if scale_layout == EXPANDED_SCALES:
        return (HIDDEN // 128, 2 * channels), (channels, HIDDEN // 128)
    return (HIDDEN // 128, 2 * channels // 128), (channels // 128, HIDDEN // 128)


def floor_bytes(tokens: int, bytes_per_weight: int = 1, channels: int = INTERMEDIATE) -> float:
    """Return the bytes that one visit cannot do without.

    One expert's weights, and a scale for 128 x 128 of them, are read once; an eighth of the hidden
    states goes in and of the float32 result out.
    """
    weights = sum(
        rows * columns * bytes_per_weight + rows * columns / 128**2 * 4
        for rows, columns in shapes(channels)
    )
    return weights + tokens * HIDDEN * (2 + 4) / TOP_K


def engine_times(counts: dict[str, float]) -> dict[str, float]:
    """Return the microseconds of one visit per engine.

    The engines work side by side, so the slowest is the time of the visit.
    """
    moved = counts["hbm_read_bytes"] + counts["hbm_written_bytes"]
    microseconds = {"DMA": moved / HBM_BYTES_PER_SECOND * 1e6}
    for engine, (hertz, names) in ENGINES.items():
        microseconds[engine] = sum(counts.get(f"{name}_cycles", 0) for name in names) / hertz * 1e6
    return microseconds


def cells(tokens: int) -> list[str]:
    counts = count(tokens)
    moved = counts["hbm_read_bytes"] + counts["hbm_written_bytes"]
    microseconds = engine_times(counts)
    bound = max(microseconds, key=microseconds.__getitem__)
    # Dequantizing in front of the kernel reads FP8, writes BF16 and reads BF16 back; at best the
    # BF16 copy is kept.
    every_step, kept = (floor_bytes(tokens, width) / HBM_BYTES_PER_SECOND * 1e6 for width in (5, 2))
    times = [f"{time:.1f}" for time in microseconds.values()]
    ratios = [f"{other / microseconds[bound]:.2f}" for other in (kept, every_step)]
    return [
        str(tokens),
        f"{moved / 1e6:.2f}",
        f"{moved / floor_bytes(tokens):.3f}",
        *times,
        bound,
        *ratios,
    ]


def share_cells(tokens: int, channels: int, scale_layout: str) -> list[str]:
    """Return the line of a rank's share of the channels."""
    counts = count(tokens, channels, scale_layout)
    moved = counts["hbm_read_bytes"] + counts["hbm_written_bytes"]
    microseconds = engine_times(counts)
    bound = max(microseconds, key=microseconds.__getitem__)
    return [
        str(channels),
        scale_layout,
        str(tokens),
        f"{moved / 1e6:.2f}",
        f"{moved / floor_bytes(tokens, channels=channels):.3f}",
        *(f"{time:.1f}" for time in microseconds.values()),
        f"{bound} {microseconds[bound]:.1f}",
    ]


def rows(directory: Path, tokens: Sequence[int] = (1, 8, 64)) -> list[Row]:
    """Return modelled microseconds per visit.

    The peer reads a BF16 copy; the limit is moving the floor's bytes.
    """
    table = []
    for number in tokens:
        seconds = [max(engine_times(count(number)).values())]
        kept, floor = (floor_bytes(number, width) / HBM_BYTES_PER_SECOND * 1e6 for width in (2, 1))
        peer = ("reading BF16", [kept])
        limit = ("moving the floor", [floor])
        what = f"trn2 kernel, {number} token{'s' * (number > 1)} (model, not measured)"
        table.append(row(what, seconds, "us", less_is_better=True, peer=peer, limit=limit))
    return table


def shares_table(channels: Sequence[int], tokens: Sequence[int]) -> Table:
    """Return both layouts of scales side by side, where a share can have both."""
    table = Table(
        title=f"One visit of a rank's share of an expert, hidden {HIDDEN}, one trn2 core (model, "
        "not a measurement)"
    )
    headings = "channels|scales|tokens|MB moved|moved / floor|DMA us|tensor us|vector us|scalar us"
    for heading in [*headings.split("|"), "bound by, us"]:
        table.add_column(heading, justify="right")
    for share in channels:
        for number in tokens:
            for scale_layout in (BLOCK_SCALES, EXPANDED_SCALES):
                if scale_layout == EXPANDED_SCALES or share % 128 == 0:
                    table.add_row(*share_cells(number, share, scale_layout))
    return table


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--channels", type=int, nargs="+", help="of a rank's share")
    arguments = parser.parse_args(argv)
    if arguments.channels:
        Console().print(shares_table(arguments.channels, arguments.tokens))
        return 0
    table = Table(
        title=f"One visit of an expert {HIDDEN} x {INTERMEDIATE}, one trn2 core (model, not a "
        "measurement)"
    )
    headings = "tokens|MB moved|moved / floor|DMA us|tensor us|vector us|scalar us|bound by"
    for heading in [*headings.split("|"), "BF16 kept / this", "BF16 each step / this"]:
        table.add_column(heading, justify="right")
    for tokens in arguments.tokens:
        table.add_row(*cells(tokens))
    Console().print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
