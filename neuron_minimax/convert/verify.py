"""Proof of a conversion: every output taken apart again and compared with its sources, byte by
byte.

It goes the other way round than the conversion: outputs are split back into the shapes of the
checkpoint, and what is compared there is what a reader of the checkpoint sees. Nothing is taken
from the manifest on trust but the digests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.page_cache import Trail
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.records import damaged_tensors, read_records
from neuron_minimax.checkpoint.workers import in_processes
from neuron_minimax.convert import ops
from neuron_minimax.convert.ops import Treatment
from neuron_minimax.convert.plan import ConversionPlan, Layout, Output
from neuron_minimax.convert.write import plan_conversion, read_manifest
from neuron_minimax.errors import ConversionError
from neuron_minimax.fp8 import ScaleConvention, bfloat16


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was compared, and every difference found."""

    tensors: int
    source_tensors: int
    rounded_codes: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        return not self.differences

    def render(self) -> str:
        if self.equal:
            return (
                f"verified: {self.tensors} tensors equal their {self.source_tensors} sources; "
                f"digests match; {self.rounded_codes} subnormal codes rounded by halving, each by "
                "2^-9 of its block's stored scale"
            )
        shown = "\n".join(f"  {difference}" for difference in self.differences[:20])
        return f"NOT equal, {len(self.differences)} differences:\n{shown}"


def verify(
    source_dir: str | Path,
    converted_dir: str | Path,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> Verification:
    """Compare a converted directory with the checkpoint it was made of, all of it.

    `progress` is called with the bytes of each output read (twice: once for digests, once for
    values). Raises ConversionError when the directory is unfinished or was made of another
    checkpoint.
    """
    manifest = read_manifest(converted_dir)
    source = Checkpoint(source_dir)
    if source.fingerprint != manifest["identity"]["source_fingerprint"]:
        raise ConversionError(
            f"{converted_dir} was not made of {source_dir} (its manifest names another source "
            "fingerprint); verify it against its own source, or convert again"
        )
    conversion, _ = plan_conversion(source, Layout.from_options(manifest["identity"]["options"]))
    converted = TensorDirectory(converted_dir)
    converted.require_usable()
    wanted = {output.name for output in conversion.outputs}
    differences = [
        f"{name} is in the output, but in no rule"
        for name in converted.entries
        if name not in wanted
    ]
    damaged = damaged_tensors(
        converted.directory, read_records(manifest["tensors"]), progress=progress
    )
    differences += [f"{name} does not match the digest in its manifest" for name in damaged]
    rounded = 0
    trail = Trail((source, converted), max(source.nbytes, converted.nbytes))
    compare = _Comparison(conversion, source, converted, trail)
    tasks = [partial(compare, output) for output in conversion.outputs]
    for output, (found, count) in zip(
        conversion.outputs, in_processes(tasks, conversion.nbytes), strict=True
    ):
        differences += found
        rounded += count
        progress(output.nbytes)
        trail.advance(output.nbytes)
    trail.finish()
    if rounded != manifest["rounded_codes"]:
        differences.append(
            f"{rounded} codes are rounded, the manifest says {manifest['rounded_codes']}"
        )
    return Verification(
        tensors=len(wanted),
        source_tensors=sum(len(group) for output in conversion.outputs for group in output.groups),
        rounded_codes=rounded,
        differences=tuple(differences),
    )


@dataclass(frozen=True)
class _Comparison:
    """Compares one output with its sources: the differences found, and how many codes halving
    rounded.
    """

    conversion: ConversionPlan
    source: Checkpoint
    converted: TensorDirectory
    trail: Trail

    def __call__(self, output: Output) -> tuple[list[str], int]:
        entry = self.converted.entries.get(output.name)
        if entry is None:
            return [f"{output.name} is missing from the output"], 0
        if (entry.dtype, entry.shape) != (output.dtype, output.shape):
            found = (
                f"{entry.dtype} {list(entry.shape)}; expected {output.dtype} {list(output.shape)}"
            )
            return [f"{output.name} is {found}"], 0
        stored = self.converted.array(output.name)
        differences = []
        rounded = 0
        for number, group in enumerate(output.groups):
            row_counts = [self.source.entry(name).shape[0] for name in group]
            piece = stored[number] if output.rule.per_expert else stored
            parts = ops.take_apart(output.rule.operation, piece, row_counts)
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
        del stored, piece, parts, part
        self.trail.unmap()
        return differences, rounded

    def _count_wrong(
        self, output: Output, name: str, part: np.ndarray, scale_name: str | None
    ) -> tuple[int, int]:
        original = self.source.array(name)
        if output.treatment is Treatment.HALVE:
            return _count_wrong_halves(part, original)
        if output.treatment is Treatment.KEEP:
            return _count_unequal(part, original), 0
        if output.is_scale:
            factor = 2.0 if "doubled" in output.treatment else 1.0
            multiplier = np.float32(1) / original if "inverted" in output.treatment else original
            return _count_unequal(
                part, (multiplier.astype(np.float64) * factor).astype(np.float32)
            ), 0
        if scale_name is not None:
            scales = self.source.array(scale_name)
            if self.conversion.convention is ScaleConvention.RECIPROCAL:
                scales = np.float32(1) / scales
            original = fp8.dequantize(original, scales, self.conversion.config.weight_block_size)
        # Correct to half a unit in the last of BF16's 8 bits, whichever way it was rounded.
        error = np.abs(bfloat16.to_float32(part).astype(np.float64) - original)
        return int(np.count_nonzero(~(error <= np.abs(original) * 2.0**-8 + 2.0**-134))), 0


def _count_wrong_halves(part: np.ndarray, original: np.ndarray) -> tuple[int, int]:
    """Elements whose value is not half the original's, and those that may differ: odd subnormals
    half a step away.
    """
    wrong = rounded = 0
    for row in range(0, original.shape[0], 256):  # float32 temporaries stay small
        halves = fp8.decode(part[row : row + 256])
        values = fp8.decode(original[row : row + 256])
        error = np.abs(2 * halves - values)
        allowed = (error == 2.0**-9) & (np.abs(values) <= 15 * 2.0**-9)
        rounded += int(np.count_nonzero(allowed))
        wrong += int(np.count_nonzero((error != 0) & ~allowed))
    return wrong, rounded


def _count_unequal(part: np.ndarray, original: np.ndarray) -> int:
    """Bitwise, so that NaN equals NaN and -0 differs from 0."""
    word = np.dtype(f"u{original.itemsize}")
    return int(
        np.count_nonzero(
            np.ascontiguousarray(part).view(word) != np.ascontiguousarray(original).view(word)
        )
    )
