"""FP8 codes to numbers in torch, by bit pattern instead of by cast, and linear layers over such weights.

Shapes: N rows of input, O output and I input features; a scale covers one block of its weight.
"""

import torch
import torch.nn.functional as F

# Format: OCP 8-bit floating point specification 1.0, E4M3: sign, 4 exponent bits (bias 7), 3 mantissa bits.
# As the top bits of a float32 (8 exponent bits, bias 127) the same bits mean value * 2^(7 - 127), subnormals included.
_FLOAT32_BITS = 20
_SIGN_AND_MAGNITUDE = 0x87F00000 - 2**32
# What is wanting is split in two, so that neither an activation nor a scale leaves float32's range.
HALF_REBIAS = 2.0**60
# Elements of a weight that are expanded at a time, 6 MB in float32: few calls of the library, whose product still reads
# them from the cache. Larger ones are fresh memory each time, whose first touch costs more than it saves.
SCRATCH_ELEMENTS = 3072 * 512


def decode(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes (uint8 or float8_e4m3fn, any shape) to exactly equal float32.

    The two NaN codes, 0x7f and 0xff, must not occur (conversion refuses them): they would decode to +-480.
    """
    return bits_as_float(codes) * HALF_REBIAS**2


def bits_as_float(codes: torch.Tensor) -> torch.Tensor:
    """E4M3 codes to float32 times 2^-120, exactly; HALF_REBIAS on both factors of a product makes up for it."""
    bits = codes.view(torch.int8).to(torch.int32)
    return ((bits << _FLOAT32_BITS) & _SIGN_AND_MAGNITUDE).view(torch.float32)


def expand_scale(scale: torch.Tensor, rows: int, columns: int, block: tuple[int, int], parts: int = 1) -> torch.Tensor:
    """Block scales [..., R, C] to one scale per element [..., rows, columns].

    `parts` weights may lie side by side in the columns, each with block columns of its own (gate and up: 2), so that
    the last block of each may be partial.
    """
    return _repeat(_repeat(scale, -2, rows, block[0], 1), -1, columns, block[1], parts)


def _repeat(scale: torch.Tensor, dimension: int, size: int, step: int, parts: int) -> torch.Tensor:
    whole, rest = size // parts // step, size // parts % step
    if not rest:
        return scale.repeat_interleave(step, dim=dimension)
    # Not one longer expansion, cut: Inductor (torch 2.13) simplifies `i % size // step` as if step divided size.
    pieces = []
    for part in scale.chunk(parts, dim=dimension):
        pieces.append(part.narrow(dimension, 0, whole).repeat_interleave(step, dim=dimension))
        pieces.append(part.narrow(dimension, whole, 1).repeat_interleave(rest, dim=dimension))
    return torch.cat(pieces, dim=dimension)


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


# Not torch.library.custom_op, whose first call imports Dynamo: 1.5 s before the first token.
torch.library.define(
    "neuron_minimax::library_linear",
    "(Tensor hidden_NI, Tensor weight_OI) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.impl("neuron_minimax::library_linear", "CPU")
def _(hidden_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    weight_OI = weight_OI.to(hidden_NI.dtype)
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(hidden_NI, weight_OI, None, "none", [], "")
    return F.linear(hidden_NI, weight_OI)


@torch.library.register_fake("neuron_minimax::library_linear")
def _(hidden_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    return hidden_NI.new_empty(hidden_NI.shape[0], weight_OI.shape[0])


def library_linear(hidden_NI: torch.Tensor, weight_OI: torch.Tensor) -> torch.Tensor:
    """`hidden @ weight.T` by oneDNN where torch has it: for few rows of float32 up to twice as fast as MKL.

    The weight is rounded to the input's dtype in there: Inductor would expand codes 32 at a time to write bfloat16,
    byte by byte, which takes longer than this second pass.
    """
    return torch.ops.neuron_minimax.library_linear(hidden_NI, weight_OI)


def expanded_linear(
    hidden: torch.Tensor, weight_OI: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`linear` for compiled graphs and many rows: the weight is expanded part by part into a scratch."""
    hidden_NI = hidden.reshape(-1, hidden.shape[-1])
    products = []
    for rows, scale_rows in _parts(weight_OI.shape[0], weight_OI.shape[1], block[0]):
        wide_OI = dequantize(weight_OI[rows], None if scale is None else scale[scale_rows], block)
        products.append(library_linear(hidden_NI, wide_OI))
    return torch.cat(products, dim=1).reshape(*hidden.shape[:-1], -1)


def expanded_matmul(
    hidden_NI: torch.Tensor, weight_IO: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]
) -> torch.Tensor:
    """`hidden @ weight` [N,O] the same way, for a weight that lies input row by input row."""
    products = []
    for columns, scale_columns in _parts(weight_IO.shape[1], weight_IO.shape[0], block[1]):
        wide_IO = dequantize(weight_IO[:, columns], None if scale is None else scale[:, scale_columns], block)
        products.append(library_linear(hidden_NI, wide_IO.t()))
    return torch.cat(products, dim=1)


def _parts(outputs: int, inputs: int, step: int) -> list[tuple[slice, slice]]:
    """Slices of whole blocks of outputs that fit the scratch, each with its slice of the scales."""
    size = SCRATCH_ELEMENTS // inputs // step or 1
    # Counted, not stepped: as Dynamo (torch 2.13) traces it, range(0, blocks, size) takes steps of one.
    firsts = [size * part for part in range(-(-outputs // (size * step)))]
    return [(slice(first * step, (first + size) * step), slice(first, first + size)) for first in firsts]
