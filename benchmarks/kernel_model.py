"""A model of the NKI expert kernel's cost on Trainium2, from counted work and documented rates.

Nothing here ran on such a chip.

python -m benchmarks.kernel_model [--tokens N ...] [--channels N ...]

One line per token count, as docs/fp8_kernel.md has them: one visit (one expert's weights through
one physical core) at the real size, hidden 3072 and intermediate 1536, averaged over 8 visits in
the interpreter of tests/nki_interpreter. With --channels the line has a rank's share of the
intermediate size, and the scales of both layouts that such a share can have.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.shared import parser_of
from benchmarks.table import Row, row
from neuron_minimax.kernels import reference
from neuron_minimax.planner.memory import BLOCK_SCALES, EXPANDED_SCALES
from tests import nki_interpreter

HIDDEN = 3072
INTERMEDIATE = 1536
TOP_K = 8
TOKENS = (1, 8, 19, 20, 32, 64, 80, 81, 128)
SHARES = (1536, 192, 24)
COMMON = "MB moved|moved / floor|DMA us|tensor us|vector us|scalar us"
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
    """Return the interpreter's counts per visit of `tokens` tokens, bfloat16, averaged over 8.

    Visits are alike, so two of them are run, and one: the rest is what they have in common.
    """
    one, two = (_counts(visits, tokens, channels, scale_layout) for visits in (1, 2))
    return {
        name: two[name] - one[name] + (2 * one[name] - two[name]) / TOP_K
        for name in two
        if name.endswith(("_bytes", "_cycles"))
    }


def _counts(visits: int, tokens: int, channels: int, scale_layout: str) -> Counter[str]:
    module, machine = nki_interpreter.load(KERNEL)
    generator = torch.Generator().manual_seed(0)
    codes = [
        torch.randint(0, 0x78, (visits, *shape), generator=generator, dtype=torch.uint8)
        for shape in shapes(channels)
    ]
    codes = [each.view(torch.float8_e4m3fn) for each in codes]
    scales = [
        torch.rand(visits, *shape, generator=generator)
        for shape in scale_shapes(channels, scale_layout)
    ]
    hidden_TH = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    index_TK = torch.arange(visits).repeat(tokens, 1)
    affinity_TK = torch.full((tokens, visits), 1 / visits)
    weights = reference.ExpertWeights(codes[0], scales[0], codes[1], scales[1])
    module.expert_mlp(hidden_TH, index_TK, affinity_TK, weights)
    return machine.counts


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


def visit_cells(tokens: int) -> list[str]:
    """Return the line of a whole expert."""
    counts = count(tokens)
    microseconds = engine_times(counts)
    bound = max(microseconds, key=microseconds.__getitem__)
    # Dequantizing in front of the kernel reads FP8, writes BF16 and reads BF16 back; at best the
    # BF16 copy is kept.
    kept, every_step = (floor_bytes(tokens, width) / HBM_BYTES_PER_SECOND * 1e6 for width in (2, 5))
    ratios = [f"{other / microseconds[bound]:.2f}" for other in (kept, every_step)]
    return [str(tokens), *common_cells(counts, floor_bytes(tokens)), bound, *ratios]


def share_cells(tokens: int, channels: int, scale_layout: str) -> list[str]:
    """Return the line of a rank's share of the channels."""
    counts = count(tokens, channels, scale_layout)
    microseconds = engine_times(counts)
    bound = max(microseconds, key=microseconds.__getitem__)
    common = common_cells(counts, floor_bytes(tokens, channels=channels))
    return [str(channels), scale_layout, str(tokens), *common, bound]


def common_cells(counts: dict[str, float], floor: float) -> list[str]:
    moved = counts["hbm_read_bytes"] + counts["hbm_written_bytes"]
    times = [f"{time:.1f}" for time in engine_times(counts).values()]
    return [f"{moved / 1e6:.2f}", f"{moved / floor:.3f}", *times]


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


def visits_table(tokens: Sequence[int] = TOKENS) -> str:
    """Return one line per number of tokens, of a whole expert."""
    headings = f"tokens|{COMMON}|bound by|BF16 kept / this|BF16 each step / this"
    return markdown(headings.split("|"), [visit_cells(number) for number in tokens])


def shares_table(channels: Sequence[int], tokens: Sequence[int]) -> str:
    """Return both layouts of scales one below the other, where a share can have both."""
    cells = [
        share_cells(number, share, scale_layout)
        for share in channels
        for number in tokens
        for scale_layout in (BLOCK_SCALES, EXPANDED_SCALES)
        if scale_layout == EXPANDED_SCALES or share % 128 == 0
    ]
    return markdown(f"channels|scales|tokens|{COMMON}|bound by".split("|"), cells)


def markdown(headings: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---:"] * len(headings), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--channels", type=int, nargs="+", help="of a rank's share")
    arguments = parser.parse_args(argv)
    if arguments.channels:
        print(shares_table(arguments.channels, arguments.tokens))
    else:
        print(visits_table(arguments.tokens))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
