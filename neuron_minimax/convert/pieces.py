"""The elements of a converted tensor, piece by piece, for a conversion to disk and one in memory
alike.

R rows and C columns of a source weight. Codes are uint8, BF16 is uint16, scales are float32.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.checkpoint.scaled import ScaledWeights
from neuron_minimax.checkpoint.schema import SCALE_SUFFIX
from neuron_minimax.checkpoint.shards import Piece
from neuron_minimax.convert.binding import ConvertedTensor, Transform, piece_shape
from neuron_minimax.families.family import Operation
from neuron_minimax.fp8 import bfloat16

PIECE_BYTES = 4 << 20
# Of a weight with 3072 columns 192 KiB, which stay in the second-level cache from check to target
STRIP_ROWS = 64
DOUBLED = (Transform.SCALE_DOUBLED, Transform.SCALE_INVERTED_DOUBLED)


def pieces(tensor: ConvertedTensor, source: ScaledWeights) -> Iterator[Piece]:
    """Computations of a tensor's elements in order: one per expert, or row ranges of whole blocks
    for a copy.
    """
    if tensor.rule.per_expert:
        for group in range(len(tensor.groups)):
            fill = partial(_fill, tensor, source, group, slice(None))
            yield Piece(tensor.nbytes // len(tensor.groups), fill)
        return
    rows = tensor.shape[0]
    block = source.config.weight_block_size[0]
    whole = tensor.is_scale or len(tensor.shape) < 2
    step = rows if whole else max(1, PIECE_BYTES * rows // tensor.nbytes // block) * block
    for start in range(0, rows, step):
        taken = slice(start, min(start + step, rows))
        fill = partial(_fill, tensor, source, 0, taken)
        yield Piece(tensor.nbytes // rows * (taken.stop - taken.start), fill)


def _fill(
    tensor: ConvertedTensor, source: ScaledWeights, group: int, rows: slice, memory: np.ndarray
) -> int:
    return convert_piece(tensor, source, group, rows, memory)[1]


def convert_piece(
    tensor: ConvertedTensor,
    source: ScaledWeights,
    group: int,
    rows: slice,
    memory: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """The elements of one expert, or of a range of rows, and how many of their codes halving
    rounded.

    They are put into `memory` (uint8, of their size) when it is given. Values are checked on the
    way: CheckpointError names the tensor with NaN codes, bad scales or NaN elements.
    """
    operation = tensor.rule.operation
    names = tensor.groups[group]
    sources = [_elements(tensor, source, name, rows) for name in names]
    shape = piece_shape(operation, [elements.shape for elements in sources])
    dtype = STORED_DTYPES[tensor.dtype]
    piece = np.empty(shape, dtype) if memory is None else memory.view(dtype).reshape(shape)
    before = 0
    rounded = 0
    strips = np.empty((2, STRIP_ROWS, max(elements.shape[-1] for elements in sources)), np.uint8)
    for name, elements in zip(names, sources, strict=True):
        for row in range(0, len(elements), STRIP_ROWS):
            strip = elements[row : row + STRIP_ROWS]
            if tensor.transform is Transform.HALVE:
                halved, spare = strips[:, : len(strip), : strip.shape[1]]
                count, nan = fp8.halve_into(halved, strip, spare)
                if nan:
                    fp8.check_codes(name, elements)
                rounded += count
                strip = halved
            place(operation, piece, before + row, strip)
        before += len(elements)
    return piece, rounded


def _elements(tensor: ConvertedTensor, source: ScaledWeights, name: str, rows: slice) -> np.ndarray:
    """Rows of a source as they are stored in the converted tensor, but for halving."""
    if tensor.is_scale:
        return _scales(tensor, source, name)[rows]
    stored = source.rows(name, rows)
    match tensor.transform:
        case Transform.DEQUANTIZE:
            fp8.check_codes(name, stored)
            block = source.config.weight_block_size
            # The product is float32, the rounding the only one.
            return bfloat16.round_to_bfloat16(
                fp8.dequantize(stored, source.multipliers(name, rows), block)
            )
        case Transform.ROUND:
            bfloat16.check_finite(name, stored)
            return bfloat16.round_to_bfloat16(bfloat16.to_float32(stored))
        case Transform.WIDEN:
            bfloat16.check_finite(name, stored)
            return bfloat16.to_float32(stored)
        case Transform.KEEP if tensor.dtype == "F8_E4M3":
            fp8.check_codes(name, stored)
        case Transform.KEEP:
            bfloat16.check_finite(name, stored)
    return stored


def _scales(tensor: ConvertedTensor, source: ScaledWeights, name: str) -> np.ndarray:
    """Neuron's multipliers: doubling is exact, inverting rounds once."""
    scales = source.multipliers(name.removesuffix(SCALE_SUFFIX))
    scales = scales * np.float32(2) if tensor.transform in DOUBLED else scales
    # Of zeros alone are the blocks whose multiplier is 0; doubling keeps it.
    fp8.check_scales(f"{name} ({tensor.transform})", scales, maxima=scales)
    return scales


def place(operation: Operation, piece: np.ndarray, start: int, strip: np.ndarray) -> None:
    """Put rows of a source into its piece, `start` being the number of source rows before them."""
    end = start + len(strip)
    if operation is Operation.COPY:
        piece[start:end] = strip
    elif strip.dtype == np.uint8 and start % 4 == end % 4 == piece.shape[1] % 4 == 0:
        # Four rows of bytes travel as one row of 32-bit words: a quarter as many elements to
        # transpose.
        piece.view("<u4")[:, start // 4 : end // 4] = _pack_rows(_pack_rows(strip)).T
    else:
        piece[:, start:end] = strip.T


def _pack_rows(rows: np.ndarray) -> np.ndarray:
    """Return pairs of rows [2R, C] as rows [R, C] of elements twice as wide, the first row in the
    lower half.
    """
    width = rows.itemsize
    pairs = rows.reshape(-1, 2, rows.shape[1])
    packed = pairs[:, 1].astype(f"<u{2 * width}")
    packed <<= 8 * width
    packed |= pairs[:, 0]
    return packed


def take_apart(operation: Operation, piece: Any, row_counts: Sequence[int]) -> list[Any]:
    """The inverse of `place`, for numpy arrays and torch tensors alike: one expert's [C, sum of R]
    back into its [R, C] sources, as views.
    """
    if operation is Operation.COPY:
        return [piece]
    ends = list(accumulate(row_counts))
    return [piece[:, end - rows : end].T for rows, end in zip(row_counts, ends, strict=True)]
