"""The arithmetic of a conversion on numpy arrays of stored bytes: arrange weights, treat their
codes and scales.

R rows and C columns of a source weight, E experts. Codes are uint8, BF16 is uint16, scales are
float32. Arranging a grid of block scales is arranging its weight: the same function serves both.
"""

from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np

from neuron_minimax.families.family import Operation
from neuron_minimax.fp8 import ScaleConvention


class Treatment(StrEnum):
    """What happens to the elements of a source on its way."""

    KEEP = "kept"
    HALVE = "codes halved"
    SCALE = "scales as they are"
    SCALE_DOUBLED = "scales doubled"
    SCALE_INVERTED = "scales inverted (1/x)"
    SCALE_INVERTED_DOUBLED = "scales inverted (1/x) and doubled"
    DEQUANTIZE = "dequantized to BF16"
    ROUND = "rounded to BF16"


SCALE_TREATMENTS = {
    (ScaleConvention.MULTIPLIER, False): Treatment.SCALE,
    (ScaleConvention.MULTIPLIER, True): Treatment.SCALE_DOUBLED,
    (ScaleConvention.RECIPROCAL, False): Treatment.SCALE_INVERTED,
    (ScaleConvention.RECIPROCAL, True): Treatment.SCALE_INVERTED_DOUBLED,
}


def piece_shape(operation: Operation, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of what is made of sources of these shapes: [R, C] as it is, or one expert's [C, sum of
    R].
    """
    return (
        shapes[0]
        if operation is Operation.COPY
        else (shapes[0][1], sum(rows for rows, _ in shapes))
    )


def arranged_shape(
    operation: Operation, shapes: Sequence[tuple[int, ...]], experts: int
) -> tuple[int, ...]:
    """Shape of the whole target: [E, C, sum of R] when stacked."""
    shape = piece_shape(operation, shapes)
    return shape if operation is Operation.COPY else (experts, *shape)


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
    """Pairs of rows [2R, C] as one row [R, C] of elements twice as wide, the first row in the lower
    half.
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


def treat_scales(scales: np.ndarray, treatment: Treatment) -> np.ndarray:
    """Neuron's multiplier from stored scales; doubling is exact, inverting rounds once."""
    if treatment in (Treatment.SCALE_INVERTED, Treatment.SCALE_INVERTED_DOUBLED):
        scales = np.float32(1) / scales
    if treatment in (Treatment.SCALE_DOUBLED, Treatment.SCALE_INVERTED_DOUBLED):
        scales = scales * np.float32(2)
    return scales
