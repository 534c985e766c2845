"""Torch operators that graphs call as they are: products with FP8 weights by Numba's loops, or expanded for a library.

Shapes: N rows, O output and I input features of a linear layer; T tokens, K chosen experts per token, P pairs of token
and expert, H hidden.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from neuron_minimax.kernels import expert_loops, linear_loops
from neuron_minimax.kernels.fp8_mlp import BLOCK, check_shapes

# With fewer tokens an expert is streamed through the loops, once for all of them; with more it is expanded. Here they
# are equally fast: 26 tokens in float32, 12 in bfloat16, whose library products are twice as fast.
EXPANDED_FROM = {torch.float32: 26, torch.bfloat16: 12}
# With fewer rows a linear layer is streamed.
STREAMED_ROWS = 16
# Tokens of an expert that one pass of the loops takes: their sums stay in the second cache.
TOKENS_PER_PASS = 8
# Elements of a weight that are expanded at a time: few calls of the library, which reads them from the cache.
SCRATCH_ELEMENTS = 3072 * 768
# Items of work per thread, so that none waits long for the others.
ITEMS_PER_THREAD = 4

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


@torch.library.register_fake("neuron_minimax::linear")
def _(
    hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, block_rows: int, block_columns: int
) -> torch.Tensor:
    return hidden.new_empty(*hidden.shape[:-1], weight.shape[0])


@torch.library.register_fake("neuron_minimax::expert_mlp")
def _(hidden: torch.Tensor, *others: object) -> torch.Tensor:
    return torch.empty_like(hidden)


def linear(
    hidden: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`fp8.linear` for graphs: for few rows the weight is streamed, in float32; for many expanded for a library."""
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
    """ExpertMLP of fp8_mlp.py for graphs: an expert with few tokens is streamed, one with many expanded for a library.

    Of a streamed expert neither weights nor products are rounded in between: ExpertMLP's order in float32, whatever the
    dtype of hidden. An expanded weight goes to the library in strips of rows, whose products are added in float32.
    """
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    return torch.ops.neuron_minimax.expert_mlp(
        hidden_TH, expert_index_TK, affinity_TK, gate_up, gate_up_scale, down, down_scale, *block
    )


@torch.library.impl("neuron_minimax::linear", "CPU")
def _linear(
    hidden: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, block_rows: int, block_columns: int
) -> torch.Tensor:
    hidden_NI = hidden.reshape(-1, weight.shape[1])
    if len(hidden_NI) < STREAMED_ROWS:
        return _streamed_linear(hidden_NI, weight, scale, (block_rows, block_columns)).reshape(*hidden.shape[:-1], -1)
    scratch = _scratch(weight, block_rows, hidden.dtype)
    strips = _expanded_strips(weight, scale, (block_rows, block_columns), scratch)
    return torch.cat([_library_linear(hidden_NI, wide_OI) for _, wide_OI in strips], dim=1).reshape(
        *hidden.shape[:-1], -1
    )


def _streamed_linear(
    hidden_NI: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """[N,O] in the dtype of hidden, a dense weight as one block of scale 1."""
    if scale is None:
        stored = _dense(weight_OI).view(torch.int16) if weight_OI.dtype == torch.bfloat16 else _dense(weight_OI)
        scale, block = torch.ones(1, 1), (weight_OI.shape[0], weight_OI.shape[1])
    else:
        stored = weight_OI.view(torch.int8)
    out_NO = torch.zeros(len(hidden_NI), weight_OI.shape[0])
    arrays = (tensor.contiguous().numpy() for tensor in (hidden_NI.float(), stored, scale))
    linear_loops.linear(torch.get_num_threads(), *arrays, block, out_NO.numpy())
    return out_NO.to(hidden_NI.dtype)


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
    block, chosen = (block_rows, block_columns), expert_index.shape[1]
    is_dense = gate_up_scale is None or down_scale is None
    expanded_from = 0 if is_dense else EXPANDED_FROM[hidden.dtype]
    out_TH = torch.zeros_like(hidden, dtype=torch.float32)
    pair_P, first_E = expert_loops.sort_by_expert(expert_index.flatten().numpy(), gate_up.shape[0])
    groups_X3 = expert_loops.groups_below(first_E, expanded_from, TOKENS_PER_PASS)
    if gate_up_scale is not None and down_scale is not None and len(groups_X3):
        team = torch.get_num_threads()
        pieces = min(-(-ITEMS_PER_THREAD * team // len(groups_X3)), down_scale.shape[1])
        weights = gate_up.view(torch.int8), gate_up_scale, down.view(torch.int8), down_scale
        arrays = (tensor.contiguous().numpy() for tensor in (affinity, *weights))
        hidden_TH = hidden.float().contiguous().numpy()
        expert_loops.add_expert_products(team, hidden_TH, pair_P, groups_X3, *arrays, block, pieces, out_TH.numpy())
    counts = torch.from_numpy(first_E).diff()
    experts = ((counts > 0) & (counts >= expanded_from)).nonzero().flatten().tolist()
    scratch = _scratch(gate_up[0], block_rows, hidden.dtype) if experts else hidden
    for expert in experts:
        pairs = torch.from_numpy(pair_P[first_E[expert] : first_E[expert + 1]])
        tokens = pairs // chosen
        first_scale, second_scale = (None if scale is None else scale[expert] for scale in (gate_up_scale, down_scale))
        gate_up_NW = _expanded_matmul(hidden[tokens], gate_up[expert], first_scale, block, scratch, parts=2)
        gate_NI, up_NI = gate_up_NW.chunk(2, dim=1)
        product_NH = _expanded_matmul(F.silu(gate_NI) * up_NI, down[expert], second_scale, block, scratch)
        out_TH.index_add_(0, tokens, product_NH.float() * affinity.flatten()[pairs, None])
    return out_TH.to(hidden.dtype)


def _expanded_matmul(
    hidden_NI: torch.Tensor,
    weight_IO: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
    scratch: torch.Tensor,
    parts: int = 1,
) -> torch.Tensor:
    """`hidden @ weight` [N,O] in the dtype of hidden, for a weight that lies input row by input row."""
    out_NO = hidden_NI.new_zeros(hidden_NI.shape[0], weight_IO.shape[1], dtype=torch.float32)
    for rows, wide_IO in _expanded_strips(weight_IO, scale, block, scratch, parts):
        out_NO += _library_linear(hidden_NI[:, rows], wide_IO.t())
    return out_NO.to(hidden_NI.dtype)


def _scratch(weight: torch.Tensor, block_rows: int, dtype: torch.dtype) -> torch.Tensor:
    """Memory for strips of this weight, and of those with as many elements or fewer. New memory is slow to touch: made
    once per operator's call, not once per expert.
    """
    return torch.empty(min(max(SCRATCH_ELEMENTS, block_rows * max(weight.shape)), weight.numel()), dtype=dtype)


def _expanded_strips(
    weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int], scratch: torch.Tensor, parts: int = 1
) -> Iterator[tuple[slice, torch.Tensor]]:
    """(which rows, these rows of the weight in the dtype of `scratch`, and in its memory until the next)."""
    rows, width = weight.shape
    if scale is None:
        yield slice(0, rows), _dense(weight).to(scratch.dtype)
        return
    size = min(max(len(scratch) // width // block[0], 1) * block[0], rows)
    wide = scratch[: size * width].view(size, width)
    out = (wide.view(torch.int16) if wide.dtype == torch.bfloat16 else wide).numpy()
    codes, scales = weight.view(torch.int8).contiguous().numpy(), scale.contiguous().numpy()
    for first in range(0, rows, size):
        last = min(first + size, rows)
        scale_rows = slice(first // block[0], -(-last // block[0]))
        strip = codes[first:last], scales[scale_rows], block, parts, out[: last - first]
        linear_loops.expand(torch.get_num_threads(), *strip)
        yield slice(first, last), wide[: last - first]


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight that has no scale. Raises TypeError when it is not one whose bits are numbers by themselves."""
    if weight.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"a weight {list(weight.shape)} in {weight.dtype} has no scale; expected float32 or bfloat16")
    return weight


def _library_linear(hidden_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """`hidden @ weight.T` by oneDNN where torch has it: for few rows of float32 up to twice as fast as MKL."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(hidden_NI, weight_OI, None, "none", [], "")
    return F.linear(hidden_NI, weight_OI)


def compile_loops(dtype: torch.dtype) -> None:
    """Have Numba compile what the operators call, for activations in `dtype`; it keeps the result on disk."""
    codes, scale = torch.zeros(1, 8, 16, dtype=torch.uint8), torch.ones(1, 1, 2)
    square, one_scale = codes[..., :8].contiguous(), scale[..., :1].contiguous()
    for tokens in (1, EXPANDED_FROM[dtype]):
        hidden = torch.zeros(tokens, 8, dtype=dtype)
        pairs = torch.zeros(tokens, 1, dtype=torch.int64), torch.ones(tokens, 1)
        expert_mlp(hidden, *pairs, codes, scale, square, one_scale)
    linear(hidden[:1], square[0], one_scale[0], BLOCK)
    linear(hidden[:1], torch.zeros(8, 8, dtype=torch.bfloat16), None, BLOCK)
