"""The meaning of `weight_scale_inv` in a checkpoint, read off the size of block maxima.

Shapes: R rows, C columns of a weight; a scale grid is [ceil(R / block rows), ceil(C / block
columns)].
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from neuron_minimax.fp8.codes import check_scales, decode

# Largest absolute value in a block of a trained weight, under the right reading of its scale (see
# decide_convention).
TRAINED_BLOCK_MAX = (1e-4, 1e2)


class ScaleConvention(StrEnum):
    """`weight_scale_inv` holds the factor itself (published checkpoints), or one over it."""

    MULTIPLIER = "multiplier"
    RECIPROCAL = "reciprocal"


class ConventionChoice(StrEnum):
    """A user's choice of convention: one of them, or the one that the values show."""

    AUTO = "auto"
    MULTIPLIER = "multiplier"
    RECIPROCAL = "reciprocal"


@dataclass(frozen=True, kw_only=True)
class ScaleEvidence:
    """The number of sampled tensors that speak for each reading, and the block maxima that either
    reading implies.
    """

    multiplier: int
    reciprocal: int
    neither: int
    median_if_multiplier: float
    median_if_reciprocal: float
    dissenters: tuple[str, ...] = ()

    def render(self) -> str:
        return (
            f"of {self.multiplier + self.reciprocal + self.neither} sampled weights, read as "
            f"multiplier {self.multiplier} have block maxima of trained-weight size "
            f"({TRAINED_BLOCK_MAX[0]:g} to {TRAINED_BLOCK_MAX[1]:g}; median "
            f"{self.median_if_multiplier:.3g}), read as reciprocal {self.reciprocal} (median "
            f"{self.median_if_reciprocal:.3g}), and {self.neither} fit neither"
        )

    def __str__(self) -> str:
        return self.render()


def block_maxima(
    codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Largest absolute value of each non-zero block, [blocks], read as multiplier and as
    reciprocal.
    """
    return _read_both_ways(largest_codes(codes, block), scales)


def largest_codes(codes: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The largest code of each block without its sign, on the grid of the scales; codes [R, C] are
    read once.
    """
    magnitude = np.empty(
        (min(block[0], len(codes)), codes.shape[1]), np.uint8
    )  # one block row stays in the cache
    strips = (codes[row : row + block[0]] for row in range(0, len(codes), block[0]))
    return largest_magnitudes(
        (np.bitwise_and(strip, 0x7F, out=magnitude[: len(strip)]) for strip in strips), block[1]
    )


def largest_magnitudes(strips: Iterable[np.ndarray], width: int) -> np.ndarray:
    """`largest_codes` of codes without their signs that come block row by block row; blocks have so
    many columns.
    """
    # The maximum over an axis is many times as fast as reduceat.
    of_columns = np.stack([strip.max(axis=0) for strip in strips])
    return np.maximum.reduceat(of_columns, np.arange(0, of_columns.shape[1], width), axis=1)


def _read_both_ways(maxima: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = decode(maxima)
    used = largest > 0
    largest = largest[used].astype(np.float64)
    scales = scales[used].astype(np.float64)
    with np.errstate(divide="ignore"):
        return largest * scales, largest / scales


def median_maxima(maxima: np.ndarray, scales: np.ndarray) -> tuple[float, float] | None:
    """The median of a weight's block maxima, read as multiplier and as reciprocal; None when it is
    all zero.

    `maxima` are its `largest_codes`; `scales` must have passed `check_scales`: others fit no
    reading.
    """
    both = _read_both_ways(maxima, scales)
    return (median(both[0]), median(both[1])) if both[0].size else None


def decide_convention(
    samples: Iterable[tuple[str, np.ndarray, np.ndarray]], block: tuple[int, int]
) -> tuple[ScaleConvention | None, ScaleEvidence]:
    """`convention_of_medians` of sampled (name, codes [R, C], scales).

    Raises CheckpointError naming the scales of a sample that are no positive numbers, unless its
    codes are all zero.
    """
    found = []
    for name, codes, scales in samples:
        maxima = largest_codes(codes, block)
        if maxima.any():
            check_scales(f"{name}_scale_inv", scales, maxima)
        found.append((name, median_maxima(maxima, scales)))
    return convention_of_medians(found)


def convention_of_medians(
    found: Iterable[tuple[str, tuple[float, float] | None]],
) -> tuple[ScaleConvention | None, ScaleEvidence]:
    """Read the convention off (name, `median_maxima`) of weights and say why; None when the
    evidence is mixed.

    The largest code of a block is near 448, so the right reading puts block maxima at
    trained-weight size. The two readings cannot both: that takes a scale in [2e-7, 0.23] and one in
    [4.4, 4.5e6].
    """
    votes: dict[str, list[str]] = {"multiplier": [], "reciprocal": [], "neither": []}
    medians: tuple[list[float], list[float]] = ([], [])
    for name, pair in found:
        if pair is None:  # an all-zero weight says nothing
            continue
        medians[0].append(pair[0])
        medians[1].append(pair[1])
        if_multiplier, if_reciprocal = (
            TRAINED_BLOCK_MAX[0] <= value <= TRAINED_BLOCK_MAX[1] for value in pair
        )
        if if_multiplier == if_reciprocal:
            votes["neither"].append(name)
        else:
            votes["multiplier" if if_multiplier else "reciprocal"].append(name)
    winner = max(
        (ScaleConvention.MULTIPLIER, ScaleConvention.RECIPROCAL),
        key=lambda reading: len(votes[reading]),
    )
    dissenters = [name for reading, names in votes.items() if reading != winner for name in names]
    evidence = ScaleEvidence(
        **{reading: len(names) for reading, names in votes.items()},
        median_if_multiplier=median(medians[0]),
        median_if_reciprocal=median(medians[1]),
        dissenters=tuple(dissenters[:5]),
    )
    return (None if dissenters or not votes[winner] else winner), evidence


def median(values: Sequence[float] | np.ndarray) -> float:
    """The median, NaN of nothing; np.median's first call would import numpy.ma, which is slow."""
    if not len(values):
        return float("nan")
    middle = [(len(values) - 1) // 2, len(values) // 2]
    return float(np.partition(np.asarray(values, np.float64), middle)[middle].sum()) / 2
