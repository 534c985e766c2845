"""FP8 e4m3fn codes and 128 x 128 block scales as plain bytes: decode, dequantize, quantize, halve,
and check.

Shapes: R rows, C columns of a weight; a scale grid is [ceil(R / block rows), ceil(C / block
columns)]. A code is one byte, sign(1) exponent(4) mantissa(3), bias 7, no infinities, NaN at 0x7f
and 0xff (OCP 8-bit floating point specification, revision 1.0). A scale is the float32 factor of
its block: weight = code * scale.
"""

import numpy as np

from neuron_minimax.errors import CheckpointError, counted

OCP_MAX = 448.0
NEURON_MAX = 240.0
CODE_NAN = 0x7F


def _decode_table() -> np.ndarray:
    codes = np.arange(256, dtype=np.int32)
    exponent = (codes >> 3) & 0xF
    mantissa = codes & 0x7
    normal = (8 + mantissa) * np.exp2(exponent - 10.0)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    magnitude[(codes & 0x7F) == CODE_NAN] = np.nan
    return np.where(codes & 0x80, -magnitude, magnitude).astype(np.float32)


DECODED = _decode_table()


def decode(codes: np.ndarray) -> np.ndarray:
    """Float32 values of uint8 codes, any shape; exact."""
    return DECODED[codes]


def encode(values: np.ndarray) -> np.ndarray:
    """Codes nearest to float32 values (ties to even), saturating at +-448; NaN becomes 0x7f."""
    magnitude = np.minimum(np.abs(values.astype(np.float32)), np.float32(OCP_MAX))
    # One unit in the last place is 2^(exponent - 3) for normal numbers, 2^-9 below 2^-6.
    exponent = np.maximum(np.where(magnitude > 0, np.frexp(magnitude)[1] - 1, -6), -6)
    steps = np.rint(np.ldexp(magnitude, 3 - exponent))
    with np.errstate(invalid="ignore"):
        codes = steps.astype(np.int32) + ((exponent + 6) << 3)
    codes = np.where(np.isnan(values), CODE_NAN, codes)
    return (codes | (np.signbit(values) << 7)).astype(np.uint8)


def ceil_div(count: int, size: int) -> int:
    """The number of parts of `size` that hold `count`; the last may be partial."""
    return (count + size - 1) // size


def block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a [rows, columns] weight: one per block, partial last blocks
    included.
    """
    return tuple(ceil_div(size, step) for size, step in zip(shape, block, strict=True))


def expand_scales(scales: np.ndarray, shape: tuple[int, int], block: tuple[int, int]) -> np.ndarray:
    """Scales [.., ceil(R/b0), ceil(C/b1)] repeated to the weight's [.., R, C]; the last blocks may
    be partial.
    """
    rows, columns = shape
    return np.repeat(np.repeat(scales, block[0], axis=-2)[..., :rows, :], block[1], axis=-1)[
        ..., :columns
    ]


def dequantize(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Float32 weight [.., R, C] = decode(codes) * scale of the block: one rounding, as transformers
    does it.
    """
    rows, columns = codes.shape[-2:]
    return decode(codes) * expand_scales(scales, (rows, columns), block)


def decode_scaled(codes: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """Put code * scale into `out`, in float32, rounded once, without a table.

    As the top bits of a float32 (8 exponent bits, bias 127) the bits of an E4M3 code (4, bias 7)
    mean its value times 2^-120, subnormal codes included.
    """
    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int8))
    bits <<= 20
    bits &= np.int32(0x87F00000 - 2**32)
    if scale.max(initial=0) < 2.0**7:
        out *= scale * np.float32(2.0**120)
    else:  # that factor would overflow
        out *= np.float32(2.0**120)
        out *= scale


def quantize(weight: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Codes uint8 [R, C] and scales float32 [ceil(R/b0), ceil(C/b1)] of a float32 weight; block
    maxima become 448.
    """
    rows, columns = weight.shape
    row_starts = np.arange(0, rows, block[0])
    column_starts = np.arange(0, columns, block[1])
    maxima = np.maximum.reduceat(
        np.maximum.reduceat(np.abs(weight), row_starts, axis=0), column_starts, axis=1
    )
    scales = np.where(maxima > 0, maxima / np.float32(OCP_MAX), 1.0).astype(np.float32)
    return encode(weight / expand_scales(scales, (rows, columns), block)), scales


def halve(codes: np.ndarray) -> np.ndarray:
    """Codes of half the values, so that none exceeds 240 and a doubled scale gives the same weight.

    Rounds to nearest even; exact for every |code| above 15 * 2^-9 (count_rounded counts the
    others). NaN codes must have been refused before.
    """
    halved = np.empty(codes.shape, np.uint8)
    halve_into(halved, codes, np.empty(codes.shape, np.uint8))
    return halved


def halve_into(out: np.ndarray, codes: np.ndarray, spare: np.ndarray) -> tuple[int, bool]:
    """`halve` without allocating: how many codes were rounded, and whether any is NaN; `spare` is
    overwritten.

    From magnitude 0x10 on, halving lowers the exponent field by one, a step of 8; below, a code is
    its value in units of 2^-9, and the step is half of it, odd ones up to the next odd number.
    """
    magnitude = np.bitwise_and(codes, 0x7F, out=spare)
    nan = magnitude.max(initial=0) == CODE_NAN
    # A row of sixteens, because numpy takes the minimum with a scalar fifteen times as slowly.
    np.minimum(magnitude, np.full(codes.shape[-1:], 16, np.uint8), out=magnitude)
    odd = np.bitwise_and(magnitude, 1, out=out)
    rounded = int(np.count_nonzero(odd))
    magnitude >>= 1
    magnitude |= odd
    np.subtract(codes, magnitude, out=out)
    return rounded, bool(nan)


def count_rounded(codes: np.ndarray) -> int:
    """The number of codes that `halve` rounds: the odd ones with |value| <= 15 * 2^-9."""
    return int(np.count_nonzero((codes & 0x71) == 1))


def has_nan(codes: np.ndarray) -> bool:
    """True when any code is NaN (0x7f or 0xff)."""
    return bool(((codes & 0x7F) == CODE_NAN).any())


def check_codes(name: str, codes: np.ndarray) -> None:
    """Raise CheckpointError naming the tensor when a code is NaN."""
    if has_nan(codes):
        count = int(np.count_nonzero((codes & 0x7F) == CODE_NAN))
        raise CheckpointError(
            f"{name} has {count} NaN codes (0x7f or 0xff); expected none: download its shard again"
        )


def check_scales(name: str, scales: np.ndarray, maxima: np.ndarray | None = None) -> None:
    """Raise CheckpointError naming the tensor, the first bad block and its value when a scale is
    not a positive number. Given the largest codes of the blocks, 0 is right where that is 0.
    """
    good = np.isfinite(scales) & (scales > 0)
    if not good.all() and maxima is not None:
        good |= (scales == 0) & (maxima == 0)
    if not good.all():
        bad = np.argwhere(~good)
        place = tuple(int(index) for index in bad[0])
        raise CheckpointError(
            f"{name} has {counted(len(bad), 'scale')} of no positive finite value, the first "
            f"{scales[place]} at block {list(place)}; every weight of such a block would be wrong: "
            "download its shard again"
        )
