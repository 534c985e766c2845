"""The expert MLP over FP8 weights with block scales in the Neuron layout: its interface, and its torch implementations.

Shapes: T tokens, K chosen experts per token, E experts, H hidden, I intermediate.
"""

from typing import Protocol

import torch
import torch.nn.functional as F

from neuron_minimax.kernels.fp8 import dequantize

BLOCK = (128, 128)


class ExpertMLP(Protocol):
    """`out[t] = sum over k of affinity[t,k] * MLP of expert_index[t,k] (hidden[t])`.

    hidden_TH         [T,H] float32 or bfloat16
    expert_index_TK   [T,K] integer; an index outside 0..E-1 (-1 by convention) contributes nothing: the expert lives on
                      another rank, or the token is padding
    affinity_TK       [T,K] float32
    gate_up           [E,H,2I] E4M3 codes as uint8 or float8_e4m3fn, gate columns, then up columns
    gate_up_scale     [E,ceil(H/128),2*ceil(I/128)] float32, gate blocks, then up blocks; positive and finite
    down, down_scale  [E,I,H] codes and [E,ceil(I/128),ceil(H/128)] float32
    Returns           [T,H] in the dtype of hidden.

    A dense weight (float32 or bfloat16) comes with scale None. weight = code * scale of its block.
    Arithmetic order: weight to float32, rounded once to the dtype of hidden; gate and up products accumulate in float32
    and are rounded to the dtype of hidden; silu(gate) * up in that dtype; down product the same way; times affinity and
    summed over k in float32; rounded once to the dtype of hidden. With float32 hidden nothing is rounded twice.
    Raises ValueError on shapes that do not belong together.
    """

    def __call__(
        self,
        hidden_TH: torch.Tensor,
        expert_index_TK: torch.Tensor,
        affinity_TK: torch.Tensor,
        gate_up: torch.Tensor,
        gate_up_scale: torch.Tensor | None,
        down: torch.Tensor,
        down_scale: torch.Tensor | None,
        block: tuple[int, int] = BLOCK,
    ) -> torch.Tensor: ...


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """The eager implementation: each expert that was chosen is expanded once and sees its tokens. Differentiable."""
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    out_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    for expert in expert_index_TK.unique().tolist():
        if not 0 <= expert < gate_up.shape[0]:
            continue
        tokens, places = torch.where(expert_index_TK == expert)
        weights = (gate_up[expert], _one(gate_up_scale, expert), down[expert], _one(down_scale, expert))
        product = one_expert(hidden_TH[tokens], *weights, block)
        out_TH = out_TH.index_add(0, tokens, product.float() * affinity_TK[tokens, places, None])
    return out_TH.to(hidden_TH.dtype)


def one_expert(
    hidden_TH: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """One expert's SwiGLU on its tokens: [T,H] through [H,2I] and [I,H] to [T,H], in the dtype of hidden."""
    gate_up_TI = hidden_TH @ dequantize(gate_up, gate_up_scale, block, parts=2).to(hidden_TH.dtype)
    gate_TI, up_TI = gate_up_TI.chunk(2, dim=-1)
    return (F.silu(gate_TI) * up_TI) @ dequantize(down, down_scale, block).to(hidden_TH.dtype)


def check_shapes(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int],
) -> None:
    """Raises ValueError naming the argument that does not fit the others."""
    experts, intermediate, hidden = down.shape
    tokens = hidden_TH.shape[0]
    grid = [-(-size // step) for size, step in zip((hidden, intermediate), block, strict=True)]
    down_grid = [-(-size // step) for size, step in zip((intermediate, hidden), block, strict=True)]
    expected = {
        "hidden_TH": (hidden_TH, [tokens, hidden]),
        "expert_index_TK": (expert_index_TK, [tokens, expert_index_TK.shape[-1]]),
        "gate_up": (gate_up, [experts, hidden, 2 * intermediate]),
        "gate_up_scale": (gate_up_scale, [experts, grid[0], 2 * grid[1]]),
        "down_scale": (down_scale, [experts, *down_grid]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; expected {shape} beside down {list(down.shape)}")


def _one(scale: torch.Tensor | None, index: int | torch.Tensor) -> torch.Tensor | None:
    return None if scale is None else scale[index]
