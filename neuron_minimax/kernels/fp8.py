"""FP8 codes to numbers in torch, by bit pattern instead of by cast, and linear layers over such weights.

Shapes: N rows of input, O output and I input features; a scale covers one block of its weight.
"""

import torch
import torch.nn.functional as F

FP8_DTYPES = (torch.float8_e4m3fn, torch.uint8)  # E4M3 codes, or the same bytes
# Format: OCP 8-bit floating point specification 1.0, E4M3: sign, 4 exponent bits (bias 7), 3 mantissa bits.
# As the top bits of a float32 (8 exponent bits, bias 127) the same bits mean value * 2^(7 - 127), subnormals included.
FLOAT32_BITS = 20
SIGN_AND_MAGNITUDE = 0x87F00000 - 2**32
# What is wanting, split in two for the loops, so that neither an activation nor a scale leaves float32's range.
HALF_REBIAS = 2.0**60


def decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes (uint8 or float8_e4m3fn, any shape) to exactly equal float32.

    The two NaN codes, 0x7f and 0xff, must not occur (conversion refuses them): they would decode to +-480.
    """
    bits = codes.view(torch.int8).to(torch.int32)
    return ((bits << FLOAT32_BITS) & SIGN_AND_MAGNITUDE).view(torch.float32) * HALF_REBIAS**2


def expand_scale(scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int], parts: int = 1) -> torch.Tensor:
    """Block scales [..., R, C] to one scale per element [..., rows, columns].

    `parts` weights may lie side by side in the columns, each with block columns of its own (gate and up: 2), so that
    the last block of each may be partial.
    """
    tall = scale.repeat_interleave(block[0], dim=-2)[..., :rows, :]
    wide = [part.repeat_interleave(block[1], dim=-1)[..., : columns // parts] for part in tall.chunk(parts, dim=-1)]
    return torch.cat(wide, dim=-1)


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int], parts: int = 1
) -> torch.Tensor:
    """The float32 weight [..., rows, columns]: codes times block scales, or a dense weight (no scale) widened."""
    if scale is None:
        return weight.to(torch.float32)
    return decode(weight) * expand_scale(scale, weight.shape[-2], weight.shape[-1], block, parts)


def linear(
    hidden_NI: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`hidden @ weight.T` [..., O] in the input's dtype: the weight is expanded, rounded to that dtype, multiplied."""
    if weight_OI.dtype == hidden_NI.dtype:
        return F.linear(hidden_NI, weight_OI)
    return F.linear(hidden_NI, dequantize(weight_OI, scale, block).to(hidden_NI.dtype))
