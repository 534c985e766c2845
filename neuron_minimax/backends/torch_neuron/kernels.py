"""Products and attention with static shapes and without a branch on values, for whole graphs.

kernels/reference.py says what each computes; rounding differs where sums are in another order.
Shapes: T tokens, K chosen experts per token, E experts of the rank, H hidden, I intermediate.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from neuron_minimax.fp8 import DECODED
from neuron_minimax.kernels.reference import ExpertWeights, expand_scale
from neuron_minimax.model.layers import Kernels


def decoded_codes() -> torch.Tensor:
    """[256] float32, the value of each FP8 code."""
    return torch.from_numpy(DECODED)


def static_kernels(table: torch.Tensor) -> Kernels:
    """Kernels that decode FP8 codes (uint8) by `table`, which is on the device of the weights."""
    return Kernels(
        linear=partial(linear, table), attend=attend, expert_mlp=partial(expert_mlp, table)
    )


def expanded(
    table: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
    parts: int = 1,
) -> torch.Tensor:
    """The weight as numbers: codes by the table times their scales in float32, others as stored."""
    if scale is None:
        return weight
    rows, columns = weight.shape[-2:]
    return table[weight.to(torch.int32)] * expand_scale(scale, rows, columns, block, parts)


def linear(
    table: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
) -> torch.Tensor:
    """`hidden @ weight.T` in the input's dtype."""
    return F.linear(hidden, expanded(table, weight, scale, block).to(hidden.dtype))


def expert_mlp(
    table: torch.Tensor,
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
) -> torch.Tensor:
    """The chosen experts' weights where these are fewer than the rank's experts, else all of them.

    An index of -1 is of another rank, or padding: it counts nothing.
    """
    chosen = expert_index_TK >= 0
    affinity_TK = torch.where(chosen, affinity_TK, 0.0)
    if expert_index_TK.numel() < len(weights.down):
        index = torch.where(chosen, expert_index_TK, 0).flatten()
        inputs = hidden_TH.repeat_interleave(expert_index_TK.shape[1], dim=0)[:, None]
        outputs = _swiglu(table, inputs, weights.expert(index))[:, 0]
        shares = outputs.float() * affinity_TK.flatten()[:, None]
        return shares.unflatten(0, expert_index_TK.shape).sum(1).to(hidden_TH.dtype)
    numbers_E = torch.arange(len(weights.down), device=hidden_TH.device)
    taken_TKE = expert_index_TK[..., None] == numbers_E
    shares_TE = torch.where(taken_TKE, affinity_TK[..., None], 0.0).sum(1)
    outputs_ETH = _swiglu(table, hidden_TH[None], weights)
    return (outputs_ETH.float() * shares_TE.T[..., None]).sum(0).to(hidden_TH.dtype)


def _swiglu(table: torch.Tensor, inputs: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """One MLP per expert: [E,T,H], or [1,T,H] for each, to [E,T,H]."""
    gate_up = expanded(table, weights.gate_up, weights.gate_up_scale, weights.block, parts=2)
    down = expanded(table, weights.down, weights.down_scale, weights.block)
    gate, up = torch.matmul(inputs, gate_up.to(inputs.dtype)).chunk(2, dim=-1)
    return torch.matmul(F.silu(gate) * up, down.to(inputs.dtype))


def attend(
    query_BTND: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    positions_BT: torch.Tensor,
) -> torch.Tensor:
    """Causal attention to [B,T,N*D], softmax in float32; the key at index c is at position c."""
    batch, tokens, heads, head_dim = query_BTND.shape
    key_heads = key_BKCD.shape[1]
    grouped = query_BTND.unflatten(2, (key_heads, heads // key_heads)).permute(0, 2, 3, 1, 4)
    scores = torch.matmul(grouped.flatten(2, 3), key_BKCD.transpose(2, 3)).float()
    places_C = torch.arange(key_BKCD.shape[2], device=positions_BT.device)
    seen_BTC = places_C <= positions_BT[:, :, None]
    by_group = (scores / math.sqrt(head_dim)).unflatten(2, (heads // key_heads, tokens))
    shares = by_group.masked_fill(~seen_BTC[:, None, None], float("-inf")).softmax(-1)
    mixed = torch.matmul(shares.to(value_BKCD.dtype).flatten(2, 3), value_BKCD)
    by_head = mixed.unflatten(2, (heads // key_heads, tokens)).permute(0, 3, 1, 2, 4)
    return by_head.reshape(batch, tokens, heads * head_dim)
