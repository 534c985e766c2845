"""Products of a few tokens with FP8 weights, written so that a compiler expands codes inside of the sums.

Shapes: N tokens, O output and I input features of a linear layer; K experts, H rows and W columns of a stacked weight.
Eagerly these hold whole weights in float32 and are slow; compiled they run near the speed of memory.
"""

import torch

from neuron_minimax.kernels.fp8 import HALF_REBIAS, bits_as_float, dequantize, expand_scale

# Running sums that a linear layer's loop keeps. One alone waits for each addition to finish before the next can start;
# more rows also share the loads of the tokens. Beyond about 16 the vector registers are full.
RUNNING_SUMS = 16
MOST_ROWS = 4


def streamed_linear(
    hidden: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`hidden @ weight.T` [..., O] in the input's dtype; sums in float32."""
    hidden_NI = hidden.reshape(-1, hidden.shape[-1]).float()
    outputs, inputs = weight_OI.shape
    if scale is not None:
        hidden_NI = hidden_NI * HALF_REBIAS
        scale_OI = expand_scale(_computed_once(scale * HALF_REBIAS), outputs, inputs, block)
    hidden_NI = _computed_once(hidden_NI)
    products = []
    for rows in _parts(outputs, len(hidden_NI)):
        wide_OI = weight_OI[rows].float() if scale is None else bits_as_float(weight_OI[rows]) * scale_OI[rows]
        products.append(torch.stack([(wide_OI * hidden_I).sum(dim=1) for hidden_I in hidden_NI]))
    return torch.cat(products, dim=1).reshape(*hidden.shape[:-1], outputs).to(hidden.dtype)


def streamed_columns(
    hidden_KNH: torch.Tensor,
    weight_KHW: torch.Tensor,
    scale: torch.Tensor | None,
    block: tuple[int, int],
    parts: int = 1,
) -> torch.Tensor:
    """`hidden @ weight` [K,N,W] in float32, for weights that lie row by input row; `parts` as of expand_scale.

    Sums run down the rows of one block, which the caches and the address translation hold until the next columns of
    the same rows are read; then over blocks with their scales.
    """
    rows, width = weight_KHW.shape[-2:]
    tokens = hidden_KNH.shape[1]
    whole_blocks = rows % block[0] == 0
    height = block[0] if whole_blocks else rows
    if scale is None or not whole_blocks:
        wide_KHW, scale_KRW = dequantize(weight_KHW, scale, block, parts), None
    else:
        wide_KHW = bits_as_float(weight_KHW)
        scale_KRW = expand_scale(scale * HALF_REBIAS, rows // height, width, (1, block[1]), parts)
        hidden_KNH = hidden_KNH.float() * HALF_REBIAS
    wide_KRBW = wide_KHW.unflatten(1, (-1, height))
    hidden_KNRB = _computed_once(hidden_KNH.float()).unflatten(2, (-1, height))
    sums_at_a_time = 2 if tokens == 1 else 1  # per token
    products = []
    for token in range(tokens):
        hidden_parts = hidden_KNRB[:, token].chunk(sums_at_a_time, dim=2)
        wide_parts = wide_KRBW.chunk(sums_at_a_time, dim=2)
        pairs = zip(hidden_parts, wide_parts, strict=True)
        sum_KRW = sum((hidden_KRB[..., None] * wide_KRBW).sum(dim=2) for hidden_KRB, wide_KRBW in pairs)
        products.append((sum_KRW if scale_KRW is None else sum_KRW * scale_KRW).sum(dim=1))
    return torch.stack(products, dim=1)


def _computed_once(hidden: torch.Tensor) -> torch.Tensor:
    """The same tensor in memory: Inductor stores what as_strided sees, and else recomputes it in the innermost loop."""
    hidden = hidden.contiguous()
    return hidden.as_strided(hidden.shape, hidden.stride())


def _parts(size: int, tokens: int) -> list[slice]:
    """Cut a dimension into equal parts whose sums are computed side by side, as many as keep the registers busy."""
    most = max(1, min(MOST_ROWS, RUNNING_SUMS // tokens))
    count = next(parts for parts in range(most, 0, -1) if size % parts == 0)
    return [slice(size // count * part, size // count * (part + 1)) for part in range(count)]
