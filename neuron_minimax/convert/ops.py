"""The arithmetic of a conversion on numpy arrays of stored bytes: arrange weights, treat their codes and scales.

R rows and C columns of a source weight, E experts. Codes are uint8, BF16 is uint16, scales are float32. Arranging a
grid of block scales is arranging its weight: the same function serves both.
"""

from collections.abc import Sequence
from enum import StrEnum
from itertools import accumulate
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.fp8 import ScaleConvention
from neuron_minimax.convert.rules import Operation


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


def arranged_shape(operation: Operation, shapes: Sequence[tuple[int, ...]], experts: int) -> tuple[int, ...]:
    """Shape of the target made of sources of these shapes: [E, C, sum of R] when stacked."""
    if operation is Operation.COPY:
        return shapes[0]
    return (experts, shapes[0][1], sum(rows for rows, _ in shapes))


def arrange(operation: Operation, sources: Sequence[np.ndarray]) -> np.ndarray:
    """A source as it is, or one expert's [C, sum of R] from its [R, C] sources, in order."""
    if operation is Operation.COPY:
        return sources[0]
    rows = sum(source.shape[0] for source in sources)
    arranged = np.empty((sources[0].shape[1], rows), dtype=sources[0].dtype)
    start = 0
    for source in sources:
        for row in range(0, source.shape[0], 64):  # strips of 64 rows keep both sides in the cache
            strip = source[row : row + 64]
            arranged[:, start : start + strip.shape[0]] = strip.T
            start += strip.shape[0]
    return arranged


def take_apart(operation: Operation, piece: Any, row_counts: Sequence[int]) -> list[Any]:
    """The inverse of `arrange`, for numpy arrays and torch tensors alike: one expert's [C, sum of R] back into its
    [R, C] sources, as views."""
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
