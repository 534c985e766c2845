"""Products of a few tokens with FP8 weights, written so that a compiler expands codes inside of the sums.

Shapes: N tokens, O output and I input features of a linear layer; K experts, H rows and W columns of a stacked weight.
Eagerly these hold whole weights in float32 and are slow; compiled they run near the speed of memory.
"""

import torch

from neuron_minimax.kernels.fp8 import decode, dequantize, expand_scale

# Running sums that a loop keeps at a time. One alone waits for each addition to finish before the next can start; more
# rows also share the loads of the tokens. Beyond about 16 the vector registers are full.
RUNNING_SUMS = 16
MOST_ROWS = 4


def streamed_linear(
    hidden: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`hidden @ weight.T` [..., O] in the input's dtype; sums in float32."""
    hidden_NI = _computed_once(hidden.reshape(-1, hidden.shape[-1]).float())
    outputs, inputs = weight_OI.shape
    scale_OI = None if scale is None else expand_scale(scale, outputs, inputs, block)
    products = []
    for rows in _parts(outputs, len(hidden_NI)):
        wide_OI = weight_OI[rows].float() if scale_OI is None else decode(weight_OI[rows]) * scale_OI[rows]
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

    Sums run down the rows of one block, so that its cache lines are used whole, then over blocks with their scales.
    """
    rows, width = weight_KHW.shape[-2:]
    tokens = hidden_KNH.shape[1]
    hidden_KNH = _computed_once(hidden_KNH.float())
    height = block[0] if rows % block[0] == 0 else rows
    products = []
    scale_KRW = (
        None
        if scale is None or height != block[0]
        else expand_scale(scale, rows // height, width, (1, block[1]), parts)
    )
    for columns in _parts(width, tokens):
        if scale_KRW is not None:
            wide_KHW = decode(weight_KHW[..., columns])
        else:
            wide_KHW = dequantize(weight_KHW, scale, block, parts)[..., columns]
        wide_KRHW = wide_KHW.unflatten(1, (-1, height))
        for token in range(tokens):
            partial_KRW = (hidden_KNH[:, token].unflatten(1, (-1, height))[..., None] * wide_KRHW).sum(dim=2)
            scaled_KRW = partial_KRW if scale_KRW is None else partial_KRW * scale_KRW[..., columns]
            products.append(scaled_KRW.sum(dim=1))
    by_part = torch.stack(products, dim=1).unflatten(1, (-1, tokens))
    return by_part.permute(0, 2, 1, 3).flatten(2)


def _computed_once(hidden: torch.Tensor) -> torch.Tensor:
    """The same tensor in memory: Inductor stores what as_strided sees, and else recomputes it in the innermost loop."""
    hidden = hidden.contiguous()
    return hidden.as_strided(hidden.shape, hidden.stride())


def _parts(size: int, tokens: int) -> list[slice]:
    """Cut a dimension into equal parts whose sums are computed side by side, as many as keep the registers busy."""
    most = max(1, min(MOST_ROWS, RUNNING_SUMS // tokens))
    count = next(parts for parts in range(most, 0, -1) if size % parts == 0)
    return [slice(size // count * part, size // count * (part + 1)) for part in range(count)]
