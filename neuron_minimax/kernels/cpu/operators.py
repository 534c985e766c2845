"""Torch operators that graphs call: products with FP8 weights, and attention.

Each takes and gives contiguous float32 activations. Their kernels are C++ (operators.cpp, loaded by
library.py); where those are not loaded, or do not take what is given, they are `reference.py`.
Shapes: N rows, O output and I input features of a linear layer; T tokens, K chosen experts per
token, H hidden; B slots, N heads, C cache positions, D head_dim.
"""

from typing import Any

import torch
import torch.nn.functional as F

from neuron_minimax.fp8 import block_grid
from neuron_minimax.kernels import reference
from neuron_minimax.kernels.reference import FP8_DTYPES, ExpertWeights, check_shapes

DENSE_DTYPES = (torch.float32, torch.bfloat16)


def linear(
    hidden: torch.Tensor,
    weight_OI: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
    pairs: bool = True,
) -> torch.Tensor:
    """`reference.linear` for graphs: FP8 weights are not rounded, float32 sums are, once.

    `pairs` allows products of pairs of bfloat16 numbers, which not every processor has.

    Raises ValueError when the scales are not one per block: kernels would read beside them. Raises
    TypeError when a weight has no scale and is not dense, or has one and is not FP8.
    """
    grid = block_grid(tuple(weight_OI.shape), block)
    if scale is not None and tuple(scale.shape) != grid:
        raise ValueError(
            f"scale has shape {list(scale.shape)}; expected {list(grid)} beside "
            f"{list(weight_OI.shape)}"
        )
    _check_dtypes(weight_OI, scale)
    out_NO = torch.ops.neuron_minimax.linear(
        _float32(hidden).view(-1, weight_OI.shape[1]),
        weight_OI.contiguous(),
        None if scale is None else _float32(scale),
        *block,
        _by_pairs(hidden.dtype, weight_OI.dtype, pairs),
    )
    return out_NO.view(*hidden.shape[:-1], weight_OI.shape[0]).to(hidden.dtype)


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
    pairs: bool = True,
) -> torch.Tensor:
    """`reference.ExpertMLP` for graphs: weights are not rounded, sums and silu are float32's.

    With bfloat16 hidden and `pairs`, as in `linear`, experts round silu(gate) * up to bfloat16;
    otherwise nothing is rounded before the sum over k. Two weights of different kinds are left to
    torch. Raises ValueError on shapes that do not belong together, and TypeError as `linear`.
    """
    check_shapes(hidden_TH, expert_index_TK, weights)
    if affinity_TK.shape != expert_index_TK.shape:
        raise ValueError(
            f"affinity_TK has shape {list(affinity_TK.shape)}; expected one per chosen expert, "
            f"{list(expert_index_TK.shape)}"
        )
    gate_up, gate_up_scale, down, down_scale, block = weights
    for weight, scale in ((gate_up, gate_up_scale), (down, down_scale)):
        _check_dtypes(weight, scale)
    if (gate_up_scale is None) != (down_scale is None) or gate_up.dtype != down.dtype:
        return torch.ops.neuron_minimax.expert_mlp_by_torch(
            hidden_TH, expert_index_TK, affinity_TK, *weights[:4], *block
        )
    out_TH = torch.ops.neuron_minimax.expert_mlp(
        _float32(hidden_TH),
        expert_index_TK.long().contiguous(),
        _float32(affinity_TK),
        gate_up.contiguous(),
        None if gate_up_scale is None else _float32(gate_up_scale),
        down.contiguous(),
        None if down_scale is None else _float32(down_scale),
        *block,
        _by_pairs(hidden_TH.dtype, gate_up.dtype, pairs),
    )
    return out_TH.to(hidden_TH.dtype)


def attend(
    query_BTND: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    positions_BT: torch.Tensor,
    pairs: bool = True,
) -> torch.Tensor:
    """`reference.attend` for graphs, whose keys and values are the first positions of a cache, in
    float32, bfloat16 or FP8.

    A token whose position is behind them attends to nothing: zeros. Sums are float32's;
    products are of bfloat16 numbers where hidden has them and keys are not float32, with `pairs` as
    in `linear`: the softmax's weights are then rounded.
    Raises ValueError when keys and values lie differently, or are not of as many sequences and of
    heads that divide the query's: kernels would read beside them.
    """
    batch, tokens, heads, size = query_BTND.shape
    sequences, key_heads, *_ = key_BKCD.shape
    if (
        value_BKCD.shape != key_BKCD.shape
        or tuple(positions_BT.shape) != (batch, tokens)
        or sequences != batch
        or heads % key_heads
    ):
        raise ValueError(
            f"keys have shape {list(key_BKCD.shape)}, values {list(value_BKCD.shape)} and "
            f"positions {list(positions_BT.shape)}; expected those of {batch} sequences of "
            f"{tokens} tokens, with heads that divide {heads}"
        )
    keys, values = (each.stride() for each in (key_BKCD, value_BKCD))
    width = reference.cached_width(size, key_BKCD.dtype)
    if keys != values or keys[2:] != (width, 1) or key_BKCD.dtype != value_BKCD.dtype:
        raise ValueError(
            f"keys {key_BKCD.dtype} with strides {keys} and values {value_BKCD.dtype} with strides "
            f"{values}; expected the same of both, and positions that lie {width} elements apart"
        )
    attended = torch.ops.neuron_minimax.attend(
        _float32(query_BTND).view(-1, size),
        key_BKCD,
        value_BKCD,
        positions_BT.long().contiguous(),
        _by_pairs(query_BTND.dtype, key_BKCD.dtype, pairs),
    )
    return attended.view(batch, tokens, heads * size).to(query_BTND.dtype)


def has_pairs() -> bool:
    """Whether the kernels that are loaded multiply pairs of bfloat16 numbers on this processor."""
    return hasattr(torch.ops.neuron_minimax, "has_pairs") and torch.ops.neuron_minimax.has_pairs()


def _check_dtypes(weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    if weight.dtype not in (DENSE_DTYPES if scale is None else FP8_DTYPES):
        what, expected = ("no scale", DENSE_DTYPES) if scale is None else ("a scale", FP8_DTYPES)
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(
            f"a weight {list(weight.shape)} in {weight.dtype} has {what}; expected {names}"
        )


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().contiguous()


def _by_pairs(hidden: torch.dtype, stored: torch.dtype, pairs: bool) -> bool:
    """Multiply as pairs of bfloat16 numbers? Only where no stored number is rounded."""
    return pairs and hidden == torch.bfloat16 and stored != torch.float32


def _linear_by_torch(hidden: torch.Tensor, *arguments: Any) -> torch.Tensor:
    weight, scale, *block, pairs = arguments
    if scale is None and pairs:  # not widened: the result is rounded to its dtype anyway
        return F.linear(hidden.to(weight.dtype), weight).float()
    return reference.linear(hidden, weight, scale, (block[0], block[1]))


def _experts_by_torch(*arguments: Any) -> torch.Tensor:
    hidden, index, affinity, gate_up, gate_up_scale, down, down_scale, *block = arguments
    weights = ExpertWeights(gate_up, gate_up_scale, down, down_scale, (block[0], block[1]))
    return reference.expert_mlp(hidden, index, affinity, weights).contiguous()


def _attend_by_torch(query: torch.Tensor, *arguments: Any) -> torch.Tensor:
    keys, values, positions, _ = arguments
    shaped = query.view(*positions.shape, -1, query.shape[-1])
    attended = reference.attend(shaped, keys, values, positions)
    visible = (positions < keys.shape[2])[:, :, None]  # the others attend to nothing
    return torch.where(visible, attended, 0).view(query.shape)


def _rows_by_outputs(hidden: torch.Tensor, weight: torch.Tensor, *others: Any) -> torch.Tensor:
    return hidden.new_empty(hidden.shape[0], weight.shape[0])


def _like_the_first(first: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(first)


BLOCKS = "int block_rows, int block_columns"
EXPERTS = (
    "Tensor hidden, Tensor expert_index, Tensor affinity, Tensor gate_up, Tensor? gate_up_scale, "
    f"Tensor down, Tensor? down_scale, {BLOCKS}"
)
LINEAR = f"Tensor hidden, Tensor weight, Tensor? scale, {BLOCKS}, bool pairs"
ATTENTION = "Tensor query, Tensor keys, Tensor values, Tensor positions, bool pairs"
# Not torch.library.custom_op, whose first call imports Dynamo before the first token.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
# Operator to its inputs, its result's shape, and what it is where no library is loaded.
for _name, _inputs, _fake, _by_torch in (
    ("linear", LINEAR, _rows_by_outputs, _linear_by_torch),
    ("expert_mlp", f"{EXPERTS}, bool pairs", _like_the_first, _experts_by_torch),
    ("expert_mlp_by_torch", EXPERTS, _like_the_first, _experts_by_torch),
    ("attend", ATTENTION, _like_the_first, _attend_by_torch),
):
    torch.library.define(f"neuron_minimax::{_name}", f"({_inputs}) -> Tensor", tags=TAGS)
    torch.library.register_fake(f"neuron_minimax::{_name}", _fake)
    torch.library.impl(f"neuron_minimax::{_name}", "CompositeExplicitAutograd", _by_torch)
