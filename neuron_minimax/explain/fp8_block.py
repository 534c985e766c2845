"""What one FP8 block is made of, and what each way to bring it to a chip with a largest code of 240 costs.

Shapes: a weight is R rows by C columns of codes, its scales [ceil(R / block rows), ceil(C / block columns)].
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuron_minimax.checkpoint import fp8, schema
from neuron_minimax.checkpoint.fp8 import ScaleConvention
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The weight looked at, and which of its blocks. `original` is there where the weight was quantized here."""

    name: str
    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    place: tuple[int, int]
    original: np.ndarray | None = None

    @property
    def rows_and_columns(self) -> tuple[slice, slice]:
        starts = [index * step for index, step in zip(self.place, self.block, strict=True)]
        return slice(starts[0], starts[0] + self.block[0]), slice(starts[1], starts[1] + self.block[1])

    @property
    def block_codes(self) -> np.ndarray:
        return self.codes[self.rows_and_columns]

    @property
    def block_scale(self) -> np.float32:
        return self.scales[self.place]


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A way to bring the weight to a chip whose largest code is 240, and what it costs against the published weight."""

    name: str
    relative_rms: float
    largest_relative: float
    changed: float  # share of elements whose value differs
    from_original: float | None


def from_checkpoint(directory: str | Path, tensor: str | None, place: tuple[int, int]) -> Subject:
    """A block of a checkpoint's weight, of the first FP8 weight where none is named.

    Raises CheckpointError naming the tensor when it is not there, not FP8, has no scales, or has no such block.
    """
    checkpoint = Checkpoint(directory)
    fp8_names = [name for name in checkpoint.entries if checkpoint.is_fp8(name)]
    if not fp8_names:
        raise CheckpointError(f"{directory} has no FP8 weights; there are no scales to explain")
    name = tensor or fp8_names[0]
    if checkpoint.entry(name).dtype != "F8_E4M3":
        raise CheckpointError(f"{name} is {checkpoint.entry(name).dtype}; name an FP8 weight, such as {fp8_names[0]}")
    codes, scales = checkpoint.array(name), checkpoint.array(schema.scale_name(name))
    _check_place(name, scales, place)
    return Subject(name=name, codes=codes, scales=scales, block=checkpoint.config.weight_block_size, place=place)


def made_here(seed: int = 0, place: tuple[int, int] = (0, 0)) -> Subject:
    """A normally distributed 256 x 384 weight of trained size, quantized here, so that its original is known.

    Raises CheckpointError when it has no such block.
    """
    original = np.random.default_rng(seed).normal(0, 0.02, (256, 384)).astype(np.float32)
    codes, scales = fp8.quantize(original, (128, 128))
    name = f"A normal weight made here (seed {seed})"
    _check_place(name, scales, place)
    return Subject(name=name, codes=codes, scales=scales, block=(128, 128), place=place, original=original)


def _check_place(name: str, scales: np.ndarray, place: tuple[int, int]) -> None:
    if not all(0 <= index < count for index, count in zip(place, scales.shape, strict=True)):
        raise CheckpointError(f"{name} has {scales.shape[0]} x {scales.shape[1]} blocks; there is no block {place}")


def convention_of(subject: Subject) -> ScaleConvention:
    """The reading under which this weight has trained size.

    Raises CheckpointError when neither reading does.
    """
    convention, evidence = fp8.decide_convention([(subject.name, subject.codes, subject.scales)], subject.block)
    if convention is None:
        raise CheckpointError(f"{subject.name}: what its scales mean is unclear: {evidence.render()}")
    return convention


def multipliers(subject: Subject) -> np.ndarray:
    """The factors of the codes, under the right reading."""
    inverted = convention_of(subject) is ScaleConvention.RECIPROCAL
    return np.float32(1) / subject.scales if inverted else subject.scales


def ieee_e4m3(codes: np.ndarray) -> np.ndarray:
    """What a chip with IEEE-style e4m3 (largest finite 240) reads: exponent 15 is infinity, or NaN with a mantissa."""
    magnitude = codes & 0x7F
    special = np.where(magnitude == 0x78, np.float32(np.inf), np.float32(np.nan))
    special = np.where(codes & 0x80, -special, special)
    return np.where(magnitude >= 0x78, special, fp8.decode(codes)).astype(np.float32)


def alternatives(subject: Subject) -> list[Alternative]:
    """Halving, the documented rescale by 240/448, and one scale per row, each against the published weight."""
    factors = fp8.expand_scales(multipliers(subject), subject.codes.shape, subject.block)  # type: ignore[arg-type]
    published = fp8.decode(subject.codes) * factors
    halved = fp8.decode(fp8.halve(subject.codes)) * (factors * np.float32(2))
    ratio = np.float32(fp8.NEURON_MAX / fp8.OCP_MAX)
    rescaled = fp8.decode(fp8.encode(fp8.decode(subject.codes) * ratio)) * (factors / ratio)
    largest = np.abs(published).max(axis=1, keepdims=True)
    row_scales = np.where(largest > 0, largest / np.float32(fp8.NEURON_MAX), 1).astype(np.float32)
    per_row = fp8.decode(fp8.encode(published / row_scales)) * row_scales
    return [
        _alternative("codes halved, scales doubled (this project)", halved, published, subject.original),
        _alternative("values times 240/448, rounded again", rescaled, published, subject.original),
        _alternative("one scale per row, rounded again", per_row, published, subject.original),
    ]


def _alternative(name: str, values: np.ndarray, published: np.ndarray, original: np.ndarray | None) -> Alternative:
    return Alternative(
        name=name,
        relative_rms=_relative_rms(values, published),
        largest_relative=float(np.abs(values - published).max() / np.abs(published).max()),
        changed=float(np.mean(values != published)),
        from_original=None if original is None else _relative_rms(values, original),
    )


def _relative_rms(values: np.ndarray, reference: np.ndarray) -> float:
    reference = reference.astype(np.float64)
    return float(np.sqrt(np.sum((values - reference) ** 2) / np.sum(reference**2)))
