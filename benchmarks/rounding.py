"""What rounding costs: experts in float32 and bfloat16, and as Q8_0 would compute them, in float64.

python -m benchmarks.rounding [--directory DIR]

Experts of real size with the same FP8 weights. Q8_0 (ggml's block_q8_0) has int8 and one float16
scale for 32 numbers along the inputs, of weights and of what they are multiplied with.
Shapes: T tokens, K chosen experts, H hidden.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.shared import parser_of
from benchmarks.synthetic import REAL_LAYER
from benchmarks.table import Goal, Row, render, row
from neuron_minimax import fp8
from neuron_minimax.fp8 import block_grid
from neuron_minimax.kernels.cpu import library, operators
from neuron_minimax.kernels.reference import BLOCK, ExpertWeights, dequantize

EXPERTS = 4
CHOSEN = 2
TOKENS = 16
HIDDEN = REAL_LAYER["hidden_size"]
INTERMEDIATE = REAL_LAYER["intermediate_size"]


def quantized(values: torch.Tensor) -> torch.Tensor:
    """Round float64 [..., I] to Q8_0 along the last dimension, and expand it again."""
    blocks = values.unflatten(-1, (-1, 32))
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).half().double()
    return (torch.round(blocks / scale).clamp(-128, 127) * scale).flatten(-2)


def exact_mlp(
    hidden_TH: torch.Tensor,
    index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
    q8_0: bool = False,
) -> torch.Tensor:
    """Return the experts' sum [T,H] in float64, with what Q8_0 rounds if that is asked for."""
    rounded = quantized if q8_0 else torch.clone
    out_TH = torch.zeros_like(hidden_TH, dtype=torch.float64)
    for number, expert in enumerate(weights.experts()):
        tokens, places = torch.where(index_TK == number)
        first = dequantize(expert.gate_up, expert.gate_up_scale, BLOCK, parts=2).double()
        second = dequantize(expert.down, expert.down_scale, BLOCK).double()
        inputs = rounded(hidden_TH[tokens].double())
        gate, up = (inputs @ rounded(first.T.contiguous()).T).chunk(2, dim=-1)
        product = rounded(F.silu(gate) * up) @ rounded(second.T.contiguous()).T
        out_TH.index_add_(0, tokens, product * affinity_TK[tokens, places, None])
    return out_TH


def random_experts(generator: np.random.Generator) -> ExpertWeights:
    """Return experts whose codes are of gaussian weights, with scales that differ by block."""

    def stacked(rows: int, columns: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
        codes, _ = fp8.quantize(generator.normal(0, 1, (rows, columns)).astype(np.float32), BLOCK)
        tall, wide = block_grid((rows, columns // parts), BLOCK)
        scale = generator.uniform(1, 2, (EXPERTS, tall, parts * wide)) / 10 / rows**0.5
        rolled = [np.roll(codes, 7 * expert, 0) for expert in range(EXPERTS)]
        return torch.from_numpy(np.stack(rolled)), torch.from_numpy(scale.astype(np.float32))

    return ExpertWeights(*stacked(HIDDEN, 2 * INTERMEDIATE, 2), *stacked(INTERMEDIATE, HIDDEN, 1))


def rows(directory: Path) -> list[Row]:
    """Nothing is kept in `directory`; errors are root mean squares relative to the result's."""
    library.load_built()
    weights = random_experts(np.random.default_rng(0))
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(TOKENS, HIDDEN, generator=generator)
    index_TK = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:CHOSEN] for _ in range(TOKENS)]
    )
    arguments = index_TK, torch.rand(TOKENS, CHOSEN, generator=generator), weights
    exact = exact_mlp(hidden_TH, *arguments)

    def off(found: torch.Tensor) -> float:
        return float((found.double() - exact).norm() / exact.norm())

    q8_0 = off(exact_mlp(hidden_TH, *arguments, q8_0=True))
    return [
        row(
            f"experts, compute {name}, off by",
            [off(operators.expert_mlp(hidden_TH.to(dtype), *arguments))],
            "",
            less_is_better=True,
            peer=("Q8_0, simulated", [q8_0]),
            goal=Goal(figure="ratio", value=1),
        )
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16))
    ]


def main() -> None:
    print(render(rows(parser_of(__doc__).parse_args().directory)))


if __name__ == "__main__":
    main()
