"""Proof of a conversion: every output taken apart again and compared with its sources, byte by
byte.

It goes the other way round than the conversion: outputs are split back into the shapes of the
checkpoint, and what is compared there is what a reader of the checkpoint sees. Scales are read as
they are stored and inverted here, in float64, not by `Checkpoint.multipliers`, which the conversion
uses. From the manifest come the digests, the options and the scale convention; whether that is the
right one the values of the checkpoint say (`neuron-minimax inspect --check-values`).
"""

import json
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.kinds import CONFIG_NAME
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.records import damaged_tensors
from neuron_minimax.checkpoint.streaming import PageDropper, in_processes
from neuron_minimax.checkpoint.writer import COMPANION_FILES, companion
from neuron_minimax.config import CONVERTED_SECTION
from neuron_minimax.convert.binding import ConvertedTensor, Transform, bind_rules
from neuron_minimax.convert.pieces import DOUBLED, take_apart
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import ConversionError, counted
from neuron_minimax.files import read_json, sha256_of
from neuron_minimax.fp8 import ScaleConvention, bfloat16
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.progress import Advance, nothing


@dataclass(frozen=True, kw_only=True)
class Verification(Rendered):
    """The number of tensors that were compared, and every difference found."""

    tensors: int
    source_tensors: int
    rounded_codes: int
    differences: tuple[str, ...]
    note: str = ""
    next_step: str = ""

    @property
    def equal(self) -> bool:
        return not self.differences

    def render(self) -> str:
        if self.equal:
            return (
                f"verified: {counted(self.tensors, 'tensor')} equal their "
                f"{self.source_tensors:,} sources; digests match; "
                f"{counted(self.rounded_codes, 'subnormal code')} rounded by halving, each by "
                "2^-9 of its block's stored scale" + (f"\n{self.note}" if self.note else "")
            )
        shown = "\n".join(f"  {difference}" for difference in self.differences[:20])
        return f"NOT equal, {counted(len(self.differences), 'difference')}:\n{shown}" + (
            f"\n{self.next_step}" if self.next_step else ""
        )


def verify(
    source: Checkpoint,
    converted: Converted,
    advance: Advance = nothing,
) -> Verification:
    """Compare a converted directory with the checkpoint it was made of, all of it.

    When all is equal, that and the time stamps of both are recorded in the directory, so that both
    are taken for what was compared here. `advance` is called with the bytes of each output read
    (twice: once for digests, once for values). Raises ConversionError when the directory was made
    of another checkpoint, or a run writes into it.
    """
    source.require_usable()
    converted.require_source(source)
    with converted.reading():
        found = _compare_all(source, converted, advance)
    if not found.equal or converted.accept(source):
        return found
    return replace(
        found, note="that could not be recorded: the files changed meanwhile, or may only be read"
    )


def _compare_all(source: Checkpoint, converted: Converted, advance: Advance) -> Verification:
    stored = converted.tensors
    outputs = bind_rules(
        source.specs, source.config, converted.layout, converted.convention, source.left_out
    )
    wanted = {output.name for output in outputs}
    differences = [
        f"{name} is in the output, but in no rule" for name in stored.entries if name not in wanted
    ]
    damaged = damaged_tensors(stored, converted.records, advance)
    damaged += [
        name
        for name, record in converted.files.items()
        if record.sha256 and sha256_of(converted.directory / name) != record.sha256
    ]
    differences += [f"{name} does not match the digest in its manifest" for name in damaged]
    differences += _small_file_differences(source, converted)
    rounded = 0
    dropper = PageDropper((source, stored), max(source.nbytes, stored.nbytes))
    compare = _Comparison(converted.convention, source, stored, dropper)
    tasks = [partial(compare, output) for output in outputs]
    nbytes = sum(output.nbytes for output in outputs)
    for output, (found, count) in zip(outputs, in_processes(tasks, nbytes), strict=True):
        differences += found
        differences += _record_differences(converted, output.name, count)
        rounded += count
        advance(output.nbytes)
        dropper.advance(output.nbytes)
    dropper.finish()
    if rounded != converted.rounded_codes:
        differences.append(
            f"{counted(rounded, 'code')} rounded, the manifest says {converted.rounded_codes}"
        )
    return Verification(
        tensors=len(wanted),
        source_tensors=sum(len(group) for output in outputs for group in output.groups),
        rounded_codes=rounded,
        differences=tuple(differences),
        next_step=(
            f"run `neuron-minimax convert {source.directory} {converted.directory} --check` with "
            "the options it was made with: it writes what differs again, from the checkpoint as it "
            "is now"
        ),
    )


def _small_file_differences(source: Checkpoint, converted: Converted) -> list[str]:
    """Say which small files are not the source's, whatever the manifest's digests say. The next run
    of the conversion makes a file again that is missing.
    """
    found = []
    for name in COMPANION_FILES:
        original = companion(source.directory, name)
        copy = converted.directory / name
        if original is None:
            if copy.exists():
                found.append(f"{name} is in the output, but not in the checkpoint")
        elif not copy.exists():
            found.append(f"{name} of the checkpoint is missing from the output")
        elif sha256_of(copy) != sha256_of(original):
            found.append(f"{name} differs from the checkpoint's; remove the copy first")
    wanted = _config_fields(source.directory)
    stored = _config_fields(converted.directory)
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


def _record_differences(converted: Converted, name: str, rounded: int) -> list[str]:
    """Say what the manifest's record of an output should say; its digest is compared elsewhere."""
    record = converted.records.get(name)
    if record is None:
        return [f"{name} has no record in its manifest"]
    if record.rounded_codes != rounded:
        return [
            f"{counted(rounded, 'code')} of {name} rounded, its record says {record.rounded_codes}"
        ]
    entry = converted.tensors.entries.get(name)
    if entry is not None and entry.shard != record.shard:
        return [f"{name} is in {entry.shard}, its record says {record.shard}"]
    return []


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
