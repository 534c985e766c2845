"""Torch operators that graphs call: products with FP8 weights, and attention, by Numba's loops.

There is one operator per loop and dtypes, `loop_stored_panels`; it takes and gives contiguous
float32 activations. Each private function here makes the kernel of a loop for stored numbers and
panels of these dtypes, which compiled code takes as constants; jit.py describes the stack it is
called with. Shapes: N rows, O output and I input features of a linear layer; T tokens, K chosen
experts per token, P pairs of token and expert, H hidden; S slots, N heads, D head_dim.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import cache
from threading import Lock
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from neuron_minimax.fp8 import block_grid
from neuron_minimax.kernels import reference
from neuron_minimax.kernels.cpu.attention import attend_to_filled, attend_to_prompt
from neuron_minimax.kernels.cpu.jit import (
    NAMESPACE,
    Code,
    answer,
    cube,
    flat,
    inlined,
    matrix,
    new_matrix,
    register,
    registered,
    sizes,
    strides,
    threads,
    words_of,
)
from neuron_minimax.kernels.cpu.linear import linear_of_few, linear_of_many
from neuron_minimax.kernels.cpu.microkernels import DEPTH, NARROW_STRIP, WIDE_STRIP
from neuron_minimax.kernels.cpu.moe import add_expert_products
from neuron_minimax.kernels.cpu.vectors import HAS_PAIRS
from neuron_minimax.kernels.reference import FP8_DTYPES, ExpertWeights, check_shapes


def _few(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def linear_of_few_rows(stack, inputs, outputs):
        words = words_of(stack, inputs)
        hidden_NI = matrix(words[0], np.float32)
        weight_OI = matrix(words[1], stored)
        scale = np.ones((1, 1), np.float32)
        block = (weight_OI.shape[0], weight_OI.shape[1])
        if scaled:
            scale = matrix(words[2], np.float32)
            block = (words[3], words[4])
        made, out_NO = new_matrix(len(hidden_NI), len(weight_OI))
        out_NO[:] = np.float32(0)
        linear_of_few(threads(), hidden_NI, weight_OI, scale, block, out_NO)
        answer(stack, words, 3 if scaled else 2, made)

    return linear_of_few_rows


def _many(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def linear_of_many_rows(stack, inputs, outputs):
        words = words_of(stack, inputs)
        hidden_NI = matrix(words[0], np.float32)
        weight_OI = matrix(words[1], stored)
        scale = matrix(words[2], np.float32)
        block = (words[3], words[4])
        made, out_NO = new_matrix(len(hidden_NI), len(weight_OI))
        linear_of_many(
            threads(), hidden_NI, weight_OI, scale, block, np.empty(0, panels), out_NO.reshape(-1)
        )
        answer(stack, words, 3, made)

    return linear_of_many_rows


def _experts(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def multiply_experts(stack, inputs, outputs):
        words = words_of(stack, inputs)
        hidden_TH = matrix(words[0], np.float32)
        affinity_TK = matrix(words[2], np.float32)
        gate_up = cube(words[3], stored)
        down = cube(words[4], stored)
        gate_up_scale = np.ones((len(down), 1, 2), np.float32)
        down_scale = np.ones((len(down), 1, 1), np.float32)
        block = (gate_up.shape[1], gate_up.shape[2] // 2)
        down_block = (down.shape[1], down.shape[2])
        if scaled:
            gate_up_scale = cube(words[5], np.float32)
            down_scale = cube(words[6], np.float32)
            block = (words[7], words[8])
            down_block = block
        made, out_TH = new_matrix(len(hidden_TH), down.shape[2])
        out_TH[:] = np.float32(0)
        gate_up_view = (gate_up, gate_up_scale, block, 2)
        down_view = (down, down_scale, down_block, 1)
        choice = (matrix(words[1], np.int64), affinity_TK)
        made_of = np.empty(0, panels)
        add_expert_products(threads(), hidden_TH, choice, gate_up_view, down_view, made_of, out_TH)
        answer(stack, words, 7 if scaled else 5, made)

    return multiply_experts


@inlined
def _attention(words: Any, dtype: Any) -> Any:
    """Queries [R,D] and positions; what is stored, as the loops take it; the result, zeros."""
    query_RD = matrix(words[0], np.float32)
    positions_ST = matrix(words[3], np.int64)
    size = sizes(words[1], 4)
    stride = strides(words[1], 4)
    reach = (size[0] - 1) * stride[0] + (size[1] - 1) * stride[1] + size[2] * size[3]
    stored = (
        flat(words[1], reach, dtype),
        flat(words[2], reach, dtype),
        (size[1], size[2], stride[0], stride[1]),
    )
    made, out_RD = new_matrix(len(query_RD), query_RD.shape[1])
    out_RD[:] = np.float32(0)
    return query_RD, positions_ST, stored, made, out_RD


def _filled(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def attend_of_one_token(stack, inputs, outputs):
        words = words_of(stack, inputs)
        query_RD, positions_ST, cached, made, out_RD = _attention(words, stored)
        shape = (len(positions_ST), len(query_RD) // len(positions_ST), query_RD.shape[1])
        query_SND = query_RD.reshape(shape)
        out_SND = out_RD.reshape(shape)
        attend_to_filled(threads(), query_SND, cached, positions_ST.reshape(-1), out_SND)
        answer(stack, words, 4, made)

    return attend_of_one_token


def _prompt(stored: Any, panels: Any, scaled: bool) -> Callable[..., None]:
    def attend_of_prompt(stack, inputs, outputs):
        words = words_of(stack, inputs)
        query_RD, positions_ST, cached, made, out_RD = _attention(words, stored)
        made_of = np.empty(0, panels)
        attend_to_prompt(threads(), query_RD, cached, positions_ST, made_of, out_RD)
        answer(stack, words, 4, made)

    return attend_of_prompt


KERNELS = {
    "linear_of_few": _few,
    "linear_of_many": _many,
    "expert_mlp": _experts,
    "attend_to_filled": _filled,
    "attend_to_prompt": _prompt,
}


# Up to so many rows a linear layer's weight is read as it lies, in float32; for more it is
# transposed on the way, or, if it is dense, left to the library. Here they are equally fast.
FEW_ROWS = {torch.float32: 64, torch.bfloat16: 24}

DENSE_DTYPES = (torch.float32, torch.bfloat16)
# As what the loops take stored numbers: bits, of what NumPy has no dtype of.
STORED = {torch.float32: np.float32, torch.bfloat16: np.int16} | dict.fromkeys(FP8_DTYPES, np.int8)
# Not torch.library.custom_op, whose first call imports Dynamo before the first token.
TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
_one_at_a_time = Lock()  # an operator is defined, and gets its kernel, once


def linear(
    hidden: torch.Tensor,
    weight_OI: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
    pairs: bool = HAS_PAIRS,
) -> torch.Tensor:
    """`reference.linear` for graphs: FP8 weights are not rounded, float32 sums are, once.

    `pairs` allows products of pairs of bfloat16 numbers, which not every processor has.

    Raises ValueError when the scales are not one per block: loops would read beside them. Raises
    TypeError when a weight has no scale and is not dense, or has one and is not FP8.
    """
    grid = block_grid(tuple(weight_OI.shape), block)
    if scale is not None and tuple(scale.shape) != grid:
        raise ValueError(
            f"scale has shape {list(scale.shape)}; expected {list(grid)} beside "
            f"{list(weight_OI.shape)}"
        )
    _check_dtypes(weight_OI, scale)
    rows = hidden.numel() // weight_OI.shape[1]
    few = FEW_ROWS[hidden.dtype]
    if rows > few and weight_OI.dtype == hidden.dtype:
        return F.linear(hidden, weight_OI)
    hidden_NI = _float32(hidden).view(-1, weight_OI.shape[1])
    weight_OI = weight_OI.contiguous()
    if scale is None:
        few_rows = _operator("linear_of_few", weight_OI.dtype)
        out_NO = torch.cat([few_rows(part, weight_OI) for part in hidden_NI.split(few)])
    else:
        operator = _operator(*_of_linear(hidden.dtype, weight_OI.dtype, rows > few, pairs))
        out_NO = operator(hidden_NI, weight_OI, _float32(scale), *block)
    return out_NO.view(*hidden.shape[:-1], -1).to(hidden.dtype)


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
    pairs: bool = HAS_PAIRS,
) -> torch.Tensor:
    """`reference.ExpertMLP` for graphs: weights are not rounded, sums and silu are float32's.

    With bfloat16 hidden and `pairs`, as in `linear`, experts with many tokens round silu(gate) * up
    to bfloat16; otherwise nothing is rounded before the sum over k. Two weights of different kinds
    are left to torch. Raises TypeError as `linear`.
    """
    check_shapes(hidden_TH, expert_index_TK, weights)
    gate_up, gate_up_scale, down, down_scale, block = weights
    for weight, scale in ((gate_up, gate_up_scale), (down, down_scale)):
        _check_dtypes(weight, scale)
    if STORED[gate_up.dtype] is not STORED[down.dtype]:
        return torch.ops.neuron_minimax.expert_mlp_by_torch(
            hidden_TH, expert_index_TK, affinity_TK, *weights[:4], *block
        )
    scales = (
        ()
        if gate_up_scale is None or down_scale is None
        else (_float32(gate_up_scale), _float32(down_scale))
    )
    stacked = (gate_up.contiguous(), down.contiguous(), *scales, *(block if scales else ()))
    operator = _operator(
        "expert_mlp", gate_up.dtype, _by_pairs(hidden_TH.dtype, gate_up.dtype, pairs)
    )
    out_TH = operator(_float32(hidden_TH), _int64(expert_index_TK), _float32(affinity_TK), *stacked)
    return out_TH.to(hidden_TH.dtype)


def attend(
    query_BTND: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    positions_BT: torch.Tensor,
    pairs: bool = HAS_PAIRS,
) -> torch.Tensor:
    """`reference.attend` for graphs, whose keys and values are the first positions of a cache.

    A token whose position is behind them attends to nothing: zeros. Sums are float32's; a prompt's
    products are of bfloat16 numbers where hidden and keys are, with `pairs` as in `linear`.
    Odd head sizes are left to torch. Raises ValueError when keys and values lie differently.
    """
    batch, tokens, heads, size = query_BTND.shape
    fits = size % WIDE_STRIP == 0 if tokens == 1 else size % NARROW_STRIP == 0 and size <= DEPTH
    if not fits or key_BKCD.dtype not in DENSE_DTYPES:
        return torch.ops.neuron_minimax.attend_by_torch(
            query_BTND, key_BKCD, value_BKCD, positions_BT
        )
    keys, values = (each.stride() for each in (key_BKCD, value_BKCD))
    if keys != values or keys[2:] != (size, 1) or key_BKCD.dtype != value_BKCD.dtype:
        raise ValueError(
            f"keys {key_BKCD.dtype} with strides {keys} and values {value_BKCD.dtype} with strides "
            f"{values}; expected the same of both, and positions that lie {size} numbers apart"
        )
    operator = _operator(*_of_attention(query_BTND.dtype, key_BKCD.dtype, tokens > 1, pairs))
    attended = operator(
        _float32(query_BTND).view(-1, size), key_BKCD, value_BKCD, _int64(positions_BT)
    )
    return attended.view(batch, tokens, heads * size).to(query_BTND.dtype)


def _check_dtypes(weight: torch.Tensor, scale: torch.Tensor | None) -> None:
    if weight.dtype not in (DENSE_DTYPES if scale is None else FP8_DTYPES):
        what, expected = ("no scale", DENSE_DTYPES) if scale is None else ("a scale", FP8_DTYPES)
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        raise TypeError(
            f"a weight {list(weight.shape)} in {weight.dtype} has {what}; expected {names}"
        )


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float().contiguous()


def _int64(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.long().contiguous()


def _by_pairs(hidden: torch.dtype, stored: torch.dtype, pairs: bool = HAS_PAIRS) -> bool:
    """Multiply many rows as pairs of bfloat16 numbers? Only where nothing is lost."""
    return pairs and hidden == torch.bfloat16 and stored != torch.float32


def _of_linear(
    hidden: torch.dtype, stored: torch.dtype, many: bool, pairs: bool = HAS_PAIRS
) -> tuple[str, torch.dtype, bool]:
    if many:
        return "linear_of_many", stored, _by_pairs(hidden, stored, pairs)
    return "linear_of_few", stored, False


def _of_attention(
    query: torch.dtype, stored: torch.dtype, many: bool, pairs: bool = HAS_PAIRS
) -> tuple[str, torch.dtype, bool]:
    if many:
        return "attend_to_prompt", stored, _by_pairs(query, stored, pairs)
    return "attend_to_filled", stored, False


def _operator(loop: str, stored: torch.dtype, pairs: bool = False) -> Any:
    """The operator of a loop for weights, or keys, in this dtype. Graphs are made without its
    kernel.
    """
    make = _define if torch.compiler.is_exporting() else _compile
    with _one_at_a_time:
        name = make(*_numbers(loop, stored, pairs))
    return getattr(torch.ops.neuron_minimax, name).default


def _numbers(loop: str, stored: torch.dtype, pairs: bool) -> tuple[str, Any, Any]:
    """A loop, and NumPy's dtypes of its stored numbers and of its panels."""
    return loop, STORED[stored], np.int32 if pairs else np.float32


@cache
def _define(loop: str, stored: Any, panels: Any) -> str:
    name = f"{loop}_{stored.__name__}_{panels.__name__}"
    inputs, scaled_inputs, (tensor, dimension) = LOOPS[loop]
    schema = f"({inputs}{scaled_inputs if stored is np.int8 else ''}) -> Tensor"
    torch.library.define(f"{NAMESPACE}::{name}", schema, tags=TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{name}")(
        lambda *given: given[0].new_empty(given[0].shape[0], given[tensor].shape[dimension])
    )
    return name


def _compile(loop: str, stored: Any, panels: Any, code: Mapping[str, Code] = {}) -> str:
    name = _define(loop, stored, panels)
    if name not in registered:
        register(name, KERNELS[loop](stored, panels, stored is np.int8), code.get(name))
    return name


# Loop to the inputs of its operator, those that FP8 weights add, and which input's which dimension
# is the width of the result; it has as many rows as the first input.
BLOCKS = "int block_rows, int block_columns"
LINEAR = "Tensor hidden, Tensor weight", f", Tensor scale, {BLOCKS}", (1, 0)
ROUTED = "Tensor hidden, Tensor expert_index, Tensor affinity"
EXPERTS = (
    f"{ROUTED}, Tensor gate_up, Tensor down",
    f", Tensor gate_up_scale, Tensor down_scale, {BLOCKS}",
    (0, 1),
)
ATTENTION = "Tensor query, Tensor keys, Tensor values, Tensor positions", "", (0, 1)
LOOPS: dict[str, Any] = {
    "linear_of_few": LINEAR,
    "linear_of_many": LINEAR,
    "expert_mlp": EXPERTS,
    "attend_to_filled": ATTENTION,
    "attend_to_prompt": ATTENTION,
}

# What loops do not take is left to torch, as a whole: graphs would have its shapes as they are when
# exported.
torch.library.define(f"{NAMESPACE}::attend_by_torch", f"({ATTENTION[0]}) -> Tensor", tags=TAGS)
torch.library.define(
    f"{NAMESPACE}::expert_mlp_by_torch",
    f"({ROUTED}, Tensor gate_up, Tensor? gate_up_scale, Tensor down, Tensor? down_scale, {BLOCKS}) "
    "-> Tensor",
    tags=TAGS,
)


@torch.library.register_fake(f"{NAMESPACE}::attend_by_torch")
def _(query: torch.Tensor, *others: Any) -> torch.Tensor:
    return query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3])


@torch.library.register_fake(f"{NAMESPACE}::expert_mlp_by_torch")
def _(hidden: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.impl(f"{NAMESPACE}::attend_by_torch", "CPU")
def _attend_by_torch(*arguments: torch.Tensor) -> torch.Tensor:
    return reference.attend(*arguments).contiguous()


@torch.library.impl(f"{NAMESPACE}::expert_mlp_by_torch", "CPU")
def _expert_mlp_by_torch(*arguments: Any) -> torch.Tensor:
    hidden, index, affinity, gate_up, gate_up_scale, down, down_scale, *block = arguments
    weights = ExpertWeights(gate_up, gate_up_scale, down, down_scale, (block[0], block[1]))
    return reference.expert_mlp(hidden, index, affinity, weights).contiguous()


def compile_loops(
    dtype: torch.dtype,
    linears: Iterable[torch.dtype],
    experts: Iterable[torch.dtype],
    code: Mapping[str, Code] = {},
) -> list[str]:
    """Compile what graphs of these dtypes call (activations, weights), as far as not in `code`.

    `code` is what `jit.registered` has of them in a process with the same Numba and kind of
    processor. Returns the operators' names.
    """
    wanted = [_of_attention(dtype, dtype, many) for many in (False, True)]
    wanted += [
        _of_linear(dtype, stored, many)
        for stored in linears
        for many in (False, stored in FP8_DTYPES)
    ]
    wanted += [("expert_mlp", stored, _by_pairs(dtype, stored)) for stored in experts]
    with _one_at_a_time:
        return [_compile(*_numbers(*each), code) for each in wanted]
