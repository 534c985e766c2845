"""The contract of every kernel, in torch: linear layers and expert MLPs over FP8, attention.

Shapes: N rows of input, O output and I input features of a linear layer; T tokens, K chosen experts
per token, E experts, H hidden, I intermediate; a scale covers one block of its weight. Attention
has its own letters.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from neuron_minimax.fp8 import OCP_MAX, block_grid

FP8_DTYPES = (torch.float8_e4m3fn, torch.uint8)  # E4M3 codes, or the same bytes
# Format: OCP 8-bit floating point specification 1.0, E4M3: sign, 4 exponent bits (bias 7), 3
# mantissa bits. As the top bits of a float32 (8 exponent bits, bias 127) the same bits mean value *
# 2^(7 - 127), subnormals included.
FLOAT32_BITS = 20
SIGN_AND_MAGNITUDE = 0x87F00000 - 2**32
# What is wanting, split in two for the loops, so that neither an activation nor a scale leaves
# float32's range.
HALF_REBIAS = 2.0**60


def decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes (uint8 or float8_e4m3fn, any shape) to exactly equal float32.

    The two NaN codes, 0x7f and 0xff, must not occur (conversion refuses them): they would decode to
    +-480.
    """
    bits = codes.view(torch.int8).to(torch.int32)
    return ((bits << FLOAT32_BITS) & SIGN_AND_MAGNITUDE).view(torch.float32) * HALF_REBIAS**2


def expand_scale(
    scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int], parts: int = 1
) -> torch.Tensor:
    """Block scales [..., R, C] to one scale per element [..., rows, columns].

    `parts` weights may lie side by side in the columns, each with block columns of its own (gate
    and up: 2), so that the last block of each may be partial.
    """
    tall = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    wide = [
        part.repeat_interleave(block[1], dim=-1)[..., : columns // parts]
        for part in tall.chunk(parts, dim=-1)
    ]
    return torch.cat(wide, dim=-1)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int], parts: int = 1
) -> torch.Tensor:
    """The float32 weight [..., rows, columns]: codes times block scales, or a dense weight (no
    scale) widened.
    """
    if scale is None:
        return weight.to(torch.float32)
    return decode(weight) * expand_scale(scale, weight.shape[-2], weight.shape[-1], block, parts)


def linear(
    hidden_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
) -> torch.Tensor:
    """`hidden @ weight.T` [..., O] in the input's dtype: the weight is expanded, rounded to that
    dtype, multiplied.
    """
    if weight_OI.dtype == hidden_NI.dtype:
        return F.linear(hidden_NI, weight_OI)
    return F.linear(hidden_NI, dequantize(weight_OI, scale, block).to(hidden_NI.dtype))


BLOCK = (128, 128)


class ExpertWeights(NamedTuple):
    """The stacked weights of E experts, transposed: inputs are rows.

    gate_up         [E,H,2I] E4M3 codes as uint8 or float8_e4m3fn, gate columns, then up columns
    gate_up_scale   [E,ceil(H/128),2*ceil(I/128)] float32, gate blocks, then up blocks
    down            [E,I,H] codes
    down_scale      [E,ceil(I/128),ceil(H/128)] float32
    block           rows and columns of a scale block, 128 of each above

    weight = code * scale of its block; scales are positive and finite. A dense weight (float32 or
    bfloat16) comes with scale None.
    """

    gate_up: torch.Tensor
    gate_up_scale: torch.Tensor | None
    down: torch.Tensor
    down_scale: torch.Tensor | None
    block: tuple[int, int] = BLOCK

    def expert(self, index: int | torch.Tensor) -> "ExpertWeights":
        """One expert's weights, without the first dimension."""
        return ExpertWeights(
            self.gate_up[index],
            None if self.gate_up_scale is None else self.gate_up_scale[index],
            self.down[index],
            None if self.down_scale is None else self.down_scale[index],
            self.block,
        )

    def experts(self) -> "list[ExpertWeights]":
        """Every expert's weights. Their gradients come back in one tensor, each written once, where
        those of single experts would be a whole tensor for each expert.
        """
        nones = [None] * len(self.down)
        return [
            ExpertWeights(*parts, self.block)
            for parts in zip(
                self.gate_up.unbind(),
                nones if self.gate_up_scale is None else self.gate_up_scale.unbind(),
                self.down.unbind(),
                nones if self.down_scale is None else self.down_scale.unbind(),
                strict=True,
            )
        ]


class ExpertMLP(Protocol):
    """`out[t] = sum over k of affinity[t,k] * MLP of expert_index[t,k] (hidden[t])`.

    hidden_TH         [T,H] float32 or bfloat16
    expert_index_TK   [T,K] integer; an index outside 0..E-1 (-1 by convention) contributes nothing:
                      the expert lives on another rank, or the token is padding
    affinity_TK       [T,K] float32
    Returns           [T,H] in the dtype of hidden

    Arithmetic order: weight to float32, rounded once to the dtype of hidden; gate and up products
    accumulate in float32 and are rounded to the dtype of hidden; silu(gate) * up in that dtype;
    down product the same way; times affinity and summed over k in float32; rounded once to the
    dtype of hidden. With float32 hidden nothing is rounded twice. Raises ValueError on shapes that
    do not belong together.
    """

    def __call__(
        self,
        hidden_TH: torch.Tensor,
        expert_index_TK: torch.Tensor,
        affinity_TK: torch.Tensor,
        weights: ExpertWeights,
    ) -> torch.Tensor: ...


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
) -> torch.Tensor:
    """The eager implementation: each expert that was chosen is expanded once and sees its tokens.
    Differentiable.
    """
    check_shapes(hidden_TH, expert_index_TK, weights)
    out_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
    learns = torch.is_grad_enabled() and weights.down.requires_grad
    weights_of = weights.experts().__getitem__ if learns else weights.expert
    for expert in expert_index_TK.unique().tolist():
        if not 0 <= expert < len(weights.down):
            continue
        tokens, places = torch.where(expert_index_TK == expert)
        product = one_expert(hidden_TH[tokens], weights_of(expert))
        out_TH.index_add_(0, tokens, product.float() * affinity_TK[tokens, places, None])
    return out_TH.to(hidden_TH.dtype)


def one_expert(hidden_TH: torch.Tensor, weights: ExpertWeights) -> torch.Tensor:
    """One expert's SwiGLU on its tokens: [T,H] through [H,2I] and [I,H] to [T,H], in the dtype of
    hidden.
    """
    gate_up = dequantize(weights.gate_up, weights.gate_up_scale, weights.block, parts=2)
    down = dequantize(weights.down, weights.down_scale, weights.block)
    gate_TI, up_TI = (hidden_TH @ gate_up.to(hidden_TH.dtype)).chunk(2, dim=-1)
    return (F.silu(gate_TI) * up_TI) @ down.to(hidden_TH.dtype)


def check_shapes(
    hidden_TH: torch.Tensor, expert_index_TK: torch.Tensor, weights: ExpertWeights
) -> None:
    """Raise ValueError naming the argument that does not fit the others."""
    experts, intermediate, hidden = weights.down.shape
    tokens = hidden_TH.shape[0]
    rows, columns = block_grid((hidden, intermediate), weights.block)
    down_grid = block_grid((intermediate, hidden), weights.block)
    expected = {
        "hidden_TH": (hidden_TH, [tokens, hidden]),
        "expert_index_TK": (expert_index_TK, [tokens, expert_index_TK.shape[-1]]),
        "gate_up": (weights.gate_up, [experts, hidden, 2 * intermediate]),
        "gate_up_scale": (weights.gate_up_scale, [experts, rows, 2 * columns]),
        "down_scale": (weights.down_scale, [experts, *down_grid]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; expected {shape} beside down "
                f"{list(weights.down.shape)}"
            )


KV_CACHE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "fp8": torch.uint8}

SCALE_BYTES = 4


def cached_width(head_dim: int, dtype: torch.dtype) -> int:
    """Elements of a head's row in a cache of this dtype: in FP8 codes as bytes, then their scale,
    float32.
    """
    return head_dim + SCALE_BYTES if dtype == torch.uint8 else head_dim


def as_cached(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., D] as a cache of this dtype holds them, [..., cached_width]: rounded; in
    FP8 each row to E4M3 codes of row / scale, where scale = largest magnitude / 448.
    """
    if dtype != torch.uint8:
        return rows.to(dtype)
    wide = rows.float()
    scale = (wide.abs().amax(-1, keepdim=True) / OCP_MAX).clamp(min=2.0**-126)
    codes = (wide / scale).to(torch.float8_e4m3fn)
    return torch.cat((codes.view(torch.uint8), scale.view(torch.uint8)), dim=-1)


def from_cached(cached: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values [..., D] in `dtype` from what `as_cached` has made."""
    if cached.dtype != torch.uint8:
        return cached.to(dtype)
    codes = cached[..., :-SCALE_BYTES]
    scale = cached[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return (decode(codes) * scale).to(dtype)


AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(
    query_BTND: torch.Tensor,
    key_BKCD: torch.Tensor,
    value_BKCD: torch.Tensor,
    positions_BT: torch.Tensor,
    mask_BTC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Causal attention to [B,T,N*D] over keys and values as `as_cached` has made them; the key at
    index c is at position c, or below the query's position if c is. A `mask_BTC` of who sees whom,
    or of floats that are added to scores, is in place of that; every token has to see a key.

    The G query heads that share a key head become G times as many query rows, so that keys are
    never repeated.
    """
    batch, tokens, heads, head_dim = query_BTND.shape
    key_BKCD, value_BKCD = (from_cached(each, query_BTND.dtype) for each in (key_BKCD, value_BKCD))
    key_heads = key_BKCD.shape[1]
    group = heads // key_heads
    query = query_BTND.unflatten(2, (key_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if mask_BTC is None:
        mask_BTC = (
            torch.arange(key_BKCD.shape[2], device=positions_BT.device) <= positions_BT[:, :, None]
        )
    elif mask_BTC.is_floating_point():
        mask_BTC = mask_BTC.to(query.dtype)
    mask = mask_BTC[:, None].repeat(1, 1, group, 1)
    attended = F.scaled_dot_product_attention(query, key_BKCD, value_BKCD, attn_mask=mask)
    return (
        attended.unflatten(2, (group, tokens))
        .permute(0, 3, 1, 2, 4)
        .reshape(batch, tokens, heads * head_dim)
    )


def attend_documents(
    query_BTND: torch.Tensor,
    key_BKTD: torch.Tensor,
    value_BKTD: torch.Tensor,
    positions_BT: torch.Tensor,
) -> torch.Tensor:
    """Causal attention to [B,T,N*D] within each of several documents in a row, for use without a
    cache: a document begins where the position is 0, and sees itself alone.
    """
    documents_BT = (positions_BT == 0).cumsum(1)
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return attend(query_BTND, key_BKTD, value_BKTD, positions_BT, same_BTT.tril())
