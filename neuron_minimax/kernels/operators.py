"""Torch operators that graphs call as they are: products with FP8 weights by Numba's loops.

Shapes: N rows, O output and I input features of a linear layer; T tokens, K chosen experts per token, P pairs of token
and expert, H hidden.
"""

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F

from neuron_minimax.checkpoint.schema import block_grid
from neuron_minimax.kernels import attention, attention_loops, expert_loops, linear_loops, prompt_loops
from neuron_minimax.kernels.fp8 import FP8_DTYPES
from neuron_minimax.kernels.fp8_mlp import BLOCK, check_shapes
from neuron_minimax.kernels.tiles import DEPTH, NARROW_STRIP, WIDE_STRIP
from neuron_minimax.kernels.vectors import HAS_PAIRS

# Up to so many rows a linear layer's weight is read as it lies, in float32; for more it is transposed on the way, or,
# if it is dense, left to the library. Here they are equally fast.
FEW_ROWS = {torch.float32: 64, torch.bfloat16: 24}

DENSE_DTYPES = (torch.float32, torch.bfloat16)
# Integers that the loops take bits as, for what NumPy has no dtype of.
STORED = {torch.bfloat16: torch.int16} | dict.fromkeys(FP8_DTYPES, torch.int8)

# Not torch.library.custom_op, whose first call imports Dynamo: 1.5 s before the first token.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
torch.library.define(
    "neuron_minimax::linear",
    "(Tensor hidden, Tensor weight, Tensor? scale, int block_rows, int block_columns) -> Tensor",
    tags=TAGS,
)
torch.library.define(
    "neuron_minimax::expert_mlp",
    "(Tensor hidden, Tensor expert_index, Tensor affinity, Tensor gate_up, Tensor? gate_up_scale, "
    "Tensor down, Tensor? down_scale, int block_rows, int block_columns) -> Tensor",
    tags=TAGS,
)
torch.library.define(
    "neuron_minimax::attend", "(Tensor query, Tensor keys, Tensor values, Tensor positions) -> Tensor", tags=TAGS
)


@torch.library.register_fake("neuron_minimax::linear")
def _(
    hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, block_rows: int, block_columns: int
) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


@torch.library.register_fake("neuron_minimax::attend")
def _(query: torch.Tensor, *others: object) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3])


@torch.library.register_fake("neuron_minimax::expert_mlp")
def _(hidden: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(hidden)


def linear(
    hidden: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`fp8.linear` for graphs. FP8 weights are not rounded; sums are float32's, and rounded to hidden's dtype once.

    Raises ValueError when the scales are not one per block: loops would read beside them.
    """
    grid = block_grid(tuple(weight_OI.shape), block)
    if scale is not None and tuple(scale.shape) != grid:
        raise ValueError(f"scale has shape {list(scale.shape)}; expected {list(grid)} beside {list(weight_OI.shape)}")
    return torch.ops.neuron_minimax.linear(hidden, weight_OI, scale, *block)


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
    """ExpertMLP of fp8_mlp.py for graphs, in another order: weights are not rounded, sums and silu are float32's.

    With bfloat16 hidden, on processors that multiply it, experts with many tokens round silu(gate) * up to bfloat16;
    otherwise nothing is rounded before the sum over k.
    """
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    return torch.ops.neuron_minimax.expert_mlp(
        hidden_TH, expert_index_TK, affinity_TK, gate_up, gate_up_scale, down, down_scale, *block
    )


def attend(
    query_BTND: torch.Tensor, key_BKCD: torch.Tensor, value_BKCD: torch.Tensor, positions_BT: torch.Tensor
) -> torch.Tensor:
    """`attention.attend` for graphs, whose keys and values are the first positions of a cache.

    A token whose position is behind them attends to nothing: zeros. Sums are float32's; a prompt's products are of
    bfloat16 numbers where hidden and keys are and the processor multiplies them. Odd head sizes are left to torch.
    """
    return torch.ops.neuron_minimax.attend(query_BTND, key_BKCD, value_BKCD, positions_BT)


# Between loops, which have swept the caches, every call of Python costs microseconds: the less the better.
@torch.library.impl("neuron_minimax::linear", "CPU")
def _linear(
    hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, block_rows: int, block_columns: int
) -> torch.Tensor:
    weights = _stored(weight, scale, (block_rows, block_columns))
    outputs, features = weight.shape
    hidden_NI = _rows(hidden, features)
    rows, few = len(hidden_NI), FEW_ROWS[hidden.dtype]
    if rows > few and weight.dtype == hidden.dtype:
        return F.linear(hidden, weight)
    team, shape = torch.get_num_threads(), (*hidden.shape[:-1], outputs)
    if rows > few and scale is not None:
        out = torch.empty(shape)
        linear_loops.linear_of_many(team, hidden_NI, *weights, _panels(hidden), out.numpy().reshape(-1))
    else:
        out = torch.zeros(shape)
        out_NO = out.numpy().reshape(rows, outputs)
        for first in range(0, rows, few):
            part = slice(first, first + few)
            linear_loops.linear_of_few(team, hidden_NI[part], *weights, out_NO[part])
    return out.to(hidden.dtype)


@torch.library.impl("neuron_minimax::expert_mlp", "CPU")
def _expert_mlp(
    hidden: torch.Tensor,
    expert_index: torch.Tensor,
    affinity: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block_rows: int,
    block_columns: int,
) -> torch.Tensor:
    out = torch.zeros(hidden.shape)
    expert_loops.add_expert_products(
        torch.get_num_threads(),
        _rows(hidden, hidden.shape[1]),
        np.ascontiguousarray(expert_index.numpy()),
        np.ascontiguousarray(affinity.numpy()),
        _stored(gate_up, gate_up_scale, (block_rows, block_columns), parts=2),
        _stored(down, down_scale, (block_rows, block_columns)),
        _panels(hidden, gate_up, down),
        out.numpy(),
    )
    return out.to(hidden.dtype)


@torch.library.impl("neuron_minimax::attend", "CPU")
def _attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    slots, tokens, heads, size = query.shape
    fits = size % WIDE_STRIP == 0 if tokens == 1 else size % NARROW_STRIP == 0 and size <= DEPTH
    if not fits or keys.dtype not in DENSE_DTYPES:
        return attention.attend(query, keys, values, positions)
    key_heads, filled = keys.shape[1:3]
    strides = keys.stride()[:2]
    if keys.stride() != values.stride() or keys.stride()[2:] != (size, 1) or keys.dtype != values.dtype:
        raise ValueError(
            f"keys {keys.dtype} with strides {keys.stride()} and values {values.dtype} with strides {values.stride()}; "
            f"expected the same of both, and positions that lie {size} numbers apart"
        )
    reach = (slots - 1) * strides[0] + (key_heads - 1) * strides[1] + filled * size
    flat = [_bits(each.as_strided((reach,), (1,))) for each in (keys, values)]
    out = torch.zeros(slots, tokens, heads * size)
    query_RD, out_RD = _rows(query, size), out.numpy().reshape(-1, size)
    positions_ST = np.ascontiguousarray(positions.numpy())
    team, cache, shape = torch.get_num_threads(), (key_heads, filled, *strides), (slots, heads, size)
    if tokens == 1:
        query_SND, out_SND = query_RD.reshape(shape), out_RD.reshape(shape)
        attention_loops.attend_to_filled(team, query_SND, *flat, cache, positions_ST.ravel(), out_SND)
    else:
        prompt_loops.attend_to_prompt(team, query_RD, *flat, cache, positions_ST, _panels(query, keys), out_RD)
    return out.to(query.dtype)


def _rows(hidden: torch.Tensor, features: int) -> np.ndarray:
    """[N, features] float32, C-contiguous."""
    return np.ascontiguousarray(hidden.float().numpy()).reshape(-1, features)


def _stored(
    weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int], parts: int = 1
) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """A weight's stored numbers as the loops take them, its scales and blocks; a dense one is a block of scale 1.

    Raises TypeError when a weight has no scale and is not dense, or has one and is not FP8.
    """
    if weight.dtype not in (DENSE_DTYPES if scale is None else FP8_DTYPES):
        what, expected = ("no scale", DENSE_DTYPES) if scale is None else ("a scale", FP8_DTYPES)
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(f"a weight {list(weight.shape)} in {weight.dtype} has {what}; expected {names}")
    if scale is None:
        scale, block = torch.ones(*weight.shape[:-2], 1, parts), (weight.shape[-2], weight.shape[-1] // parts)
    return np.ascontiguousarray(_bits(weight)), np.ascontiguousarray(scale.numpy()), block


def _bits(stored: torch.Tensor) -> np.ndarray:
    """The same numbers as the loops take them."""
    integers = STORED.get(stored.dtype)
    return (stored if integers is None else stored.view(integers)).numpy()


def _panels(hidden: torch.Tensor, *weights: torch.Tensor) -> np.ndarray:
    """An array of the dtype in which many rows are multiplied: words of bfloat16 pairs only where nothing is lost."""
    by_pairs = HAS_PAIRS and hidden.dtype == torch.bfloat16 and all(weight.dtype != torch.float32 for weight in weights)
    return np.empty(0, np.int32 if by_pairs else np.float32)


def compile_loops(dtype: torch.dtype, linears: Iterable[torch.dtype], experts: Iterable[torch.dtype]) -> None:
    """Have Numba compile what the operators call, for activations in `dtype` and weights in these; it keeps the result
    on disk.
    """
    cache, positions = torch.zeros(1, 1, 2, WIDE_STRIP, dtype=dtype), torch.arange(2)[None]
    for tokens in (1, 2):
        attend(cache.transpose(1, 2)[:, :tokens], cache, cache, positions[:, :tokens])
    hidden = torch.zeros(FEW_ROWS[dtype] + 1, 8, dtype=dtype)
    for stored in linears:
        weight, scale = torch.zeros(8, 8, dtype=stored), torch.ones(1, 1) if stored in FP8_DTYPES else None
        linear(hidden[:1], weight, scale, BLOCK)
        linear(hidden, weight, scale, BLOCK)
    chosen = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    for stored in experts:
        gate_up, down = torch.zeros(1, 8, 16, dtype=stored), torch.zeros(1, 8, 8, dtype=stored)
        scales = (torch.ones(1, 1, 2), torch.ones(1, 1, 1)) if stored in FP8_DTYPES else (None, None)
        expert_mlp(hidden[:1], *chosen, gate_up, scales[0], down, scales[1])
