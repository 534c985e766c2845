"""Comparison of a conversion's outputs with their sources, the other way round than they are made.

Outputs are split back into the shapes of the checkpoint, and what is compared there is what a
reader of the checkpoint sees. Scales are read as they are stored and inverted here, in float64, not
by `Checkpoint.multipliers`, which the conversion uses.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.kinds import CONFIG_NAME
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.streaming import PageDropper, in_processes
from neuron_minimax.checkpoint.writer import COMPANION_FILES, companion
from neuron_minimax.config import CONVERTED_SECTION
from neuron_minimax.convert.binding import ConvertedTensor, Transform
from neuron_minimax.convert.pieces import DOUBLED, take_apart
from neuron_minimax.errors import ConversionError
from neuron_minimax.files import read_json, sha256_of
from neuron_minimax.fp8 import ScaleConvention, bfloat16


def small_file_differences(source: Path, converted: Path) -> list[str]:
    """Say which small files are not the source's, whatever the manifest's digests say. The next run
    of the conversion makes a file again that is missing.
    """
    found = []
    for name in COMPANION_FILES:
        original = companion(source, name)
        copy = converted / name
        if original is None:
            if copy.exists():
                found.append(f"{name} is in the output, but not in the checkpoint")
        elif not copy.exists():
            found.append(f"{name} of the checkpoint is missing from the output")
        elif sha256_of(copy) != sha256_of(original):
            found.append(f"{name} differs from the checkpoint's; remove the copy first")
    wanted = _config_fields(source)
    stored = _config_fields(converted)
    found += [
        f"config.json differs from the checkpoint's in {name}; remove the copy first"
        for name in sorted(wanted.keys() | stored.keys())
        if wanted.get(name) != stored.get(name)
    ]
    return found


def _config_fields(directory: Path) -> dict[str, str]:
    """Return the fields that a conversion keeps as they are, each as JSON: there 1 is not true."""
    advice = "put the checkpoint's config.json there again"
    fields = read_json(directory / CONFIG_NAME, dict[str, Any], ConversionError, advice)
    return {
        name: json.dumps(value, sort_keys=True)
        for name, value in fields.items()
        if name not in ("quantization_config", CONVERTED_SECTION)
    }


def compare_outputs(
    outputs: Sequence[ConvertedTensor],
    convention: ScaleConvention,
    source: Checkpoint,
    stored: TensorDirectory,
) -> Iterator[tuple[ConvertedTensor, list[str], int]]:
    """Yield each output, how it differs from its sources, and how many of its codes were rounded
    by halving.
    """
    dropper = PageDropper((source, stored), max(source.nbytes, stored.nbytes))
    compare = _Comparison(convention, source, stored, dropper)
    tasks = [partial(compare, output) for output in outputs]
    nbytes = sum(output.nbytes for output in outputs)
    for output, (found, rounded) in zip(outputs, in_processes(tasks, nbytes), strict=True):
        yield output, found, rounded
        dropper.advance(output.nbytes)
    dropper.finish()


@dataclass(frozen=True)
class _Comparison:
    """Compares one output with its sources: the differences found, and how many codes halving
    rounded.
    """

    convention: ScaleConvention
    source: Checkpoint
    stored: TensorDirectory
    dropper: PageDropper

    def __call__(self, output: ConvertedTensor) -> tuple[list[str], int]:
        entry = self.stored.entries.get(output.name)
        if entry is None:
            return [f"{output.name} is missing from the output"], 0
        if entry.spec != output.spec:
            return [f"{output.name} is {entry.spec.form}; expected {output.spec.form}"], 0
        differences = []
        rounded = 0
        for number, group in enumerate(output.groups):
            row_counts = [self.source.entry(name).shape[0] for name in group]
            piece = (
                self.stored.rows(output.name, slice(number, number + 1))[0]
                if output.rule.per_expert
                else self.stored.rows(output.name)
            )
            parts = take_apart(output.rule.operation, piece, row_counts)
            scale_names = (
                output.scale_groups[number] if output.scale_groups else [None] * len(group)
            )
            for name, part, scale_name in zip(group, parts, scale_names, strict=True):
                wrong, halved = self._count_wrong(output, name, part, scale_name)
                rounded += halved
                if wrong:
                    differences.append(
                        f"{output.name}: {wrong} of {part.size} elements differ from {name}"
                    )
        self.dropper.unmap()
        return differences, rounded

    def _count_wrong(
        self, output: ConvertedTensor, name: str, part: np.ndarray, scale_name: str | None
    ) -> tuple[int, int]:
        original = self.source.rows(name)
        if output.transform is Transform.HALVE:
            return _count_wrong_halves(part, original)
        if output.transform is Transform.KEEP:
            return _count_unequal(part, original), 0
        if output.transform is Transform.WIDEN:
            return _count_unequal(part, bfloat16.to_float32(original)), 0
        if output.is_scale:
            factor = 2.0 if output.transform in DOUBLED else 1.0
            wanted = self._factors(original).astype(np.float64) * factor
            return _count_unequal(part, wanted.astype(np.float32)), 0
        if scale_name is not None:
            factors = self._factors(self.source.rows(scale_name))
            original = fp8.dequantize(original, factors, self.source.config.weight_block_size)
        else:
            original = bfloat16.to_float32(original)
        # Correct to half a unit in the last of BF16's 8 bits, whichever way it was rounded.
        error = np.abs(bfloat16.to_float32(part).astype(np.float64) - original)
        return int(np.count_nonzero(~(error <= np.abs(original) * 2.0**-8 + 2.0**-134))), 0

    def _factors(self, stored: np.ndarray) -> np.ndarray:
        """Float32 factors of the codes; a quotient of float64 rounds to that of float32."""
        stored = bfloat16.scales_to_float32(stored)
        if self.convention is ScaleConvention.MULTIPLIER:
            return stored
        wide = stored.astype(np.float64)
        inverted = np.divide(1.0, wide, out=np.zeros_like(wide), where=wide != 0)
        return inverted.astype(np.float32)


def _count_wrong_halves(part: np.ndarray, original: np.ndarray) -> tuple[int, int]:
    """Count elements whose value is not half the original's, and those that may differ: odd
    subnormals half a step away.
    """
    wrong = 0
    rounded = 0
    for row in range(0, original.shape[0], 256):  # float32 temporaries stay small
        halves = fp8.decode(part[row : row + 256])
        values = fp8.decode(original[row : row + 256])
        error = np.abs(2 * halves - values)
        allowed = (error == 2.0**-9) & (np.abs(values) <= 15 * 2.0**-9)
        rounded += int(np.count_nonzero(allowed))
        wrong += int(np.count_nonzero((error != 0) & ~allowed))
    return wrong, rounded


def _count_unequal(part: np.ndarray, original: np.ndarray) -> int:
    """Count elements of other bits: NaN equals NaN, and -0 differs from 0."""
    word = np.dtype(f"u{original.itemsize}")
    return int(
        np.count_nonzero(
            np.ascontiguousarray(part).view(word) != np.ascontiguousarray(original).view(word)
        )
    )
