"""A conversion as data: its plan, the run that writes it, and the directory that it leaves.

A checkpoint is streamed into a directory that resumes (checkpoint/output.py); `conversion.json`
says what every tensor was made of.
"""

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.finished import (
    Files,
    examine,
    locked,
    source_files,
    stamped,
    try_to_renew,
)
from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.hub_files import HubFiles
from neuron_minimax.checkpoint.kinds import CONVERSION_NAME
from neuron_minimax.checkpoint.output import Recipe, fill_directory
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.records import (
    TensorRecord,
    damaged_tensors,
    read_records,
    records_as_json,
)
from neuron_minimax.checkpoint.shards import StreamedShard, StreamedTensor
from neuron_minimax.checkpoint.tokenizer_file import (
    NO_TEMPLATE,
    NO_TOKENIZER,
    has_template,
    has_tokenizer,
    require_whole_companions,
)
from neuron_minimax.checkpoint.writer import COMPANION_FILES
from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.convert.binding import (
    ConvertedTensor,
    Transform,
    bind_rules,
    files_of,
    unquantized_modules,
)
from neuron_minimax.convert.comparison import compare_outputs, small_file_differences
from neuron_minimax.convert.layout import Layout
from neuron_minimax.convert.manifest import (
    FORMAT_VERSION,
    ConversionManifest,
    read_manifest,
)
from neuron_minimax.convert.pieces import pieces
from neuron_minimax.errors import ConversionError, counted, some_of
from neuron_minimax.files import differences
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.progress import SILENT, Advance, Progress, nothing


@dataclass(frozen=True, kw_only=True)
class Converted(Rendered):
    """A finished converted directory and its manifest; `reused_shards`, `was_finished` and
    `changes` say how the run went that gave it, `leftovers` which files of the checkpoint it did
    not read.
    """

    directory: Path
    manifest: ConversionManifest
    files: Files  # as they are now
    reused_shards: int = 0
    was_finished: bool = False
    changes: tuple[str, ...] = ()
    leftovers: tuple[str, ...] = ()

    @classmethod
    def open(
        cls, directory: str | Path, *, read_shards: bool = True, progress: Progress = SILENT
    ) -> "Converted":
        """Open a finished conversion; headers are read later.

        Files that have another time stamp than recorded, as copies have, are read again, and
        their stamps recorded anew where the directory can be written; shards are not, unless
        `read_shards`: for a caller who reads all of them anyway. Raises ConversionError without a
        finished conversion, naming files that are missing or have other bytes.
        """
        path = Path(directory)
        manifest = read_manifest(path)
        with progress.stage(f"opening {path}") as advance:
            found = examine(path, manifest, shards=read_shards, advance=advance)
        found.require_whole(path, f"`neuron-minimax convert CKPT {path}` again")
        if read_shards:
            try_to_renew(path / CONVERSION_NAME, manifest, found.files)
        return cls(directory=path, manifest=manifest, files=found.files)

    def reading(self) -> AbstractContextManager[None]:
        """Hold the directory against runs that write into it, while its files are read.

        Raises ConversionError when one does.
        """
        return locked(self.directory, fcntl.LOCK_SH)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over its identity and the digests of every tensor and every small file: of all
        that it holds, but not of time stamps and the version that wrote it.
        """
        identity = asdict(self.manifest.identity)
        identity.pop("made_by")
        digests = {name: record.sha256 for name, record in self.files.items() if record.sha256}
        everything = [identity, digests, records_as_json(self.records)]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()

    @cached_property
    def tensors(self) -> TensorDirectory:
        """The stored tensors; their headers are read when they are first asked for.

        Raises CheckpointError when files are not what the index says.
        """
        tensors = TensorDirectory(self.directory)
        tensors.require_usable()
        return tensors

    @cached_property
    def config(self) -> ModelConfig:
        return ModelConfig.from_dir(self.directory)

    @cached_property
    def records(self) -> Mapping[str, TensorRecord]:
        """The manifest's record of every tensor."""
        return read_records(self.manifest.tensors)

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records.values())

    @property
    def layout(self) -> Layout:
        """The options that it was made with."""
        options = self.manifest.identity.options
        return Layout(
            attention=options.attention,
            fp8_range=options.fp8_range,
            keep_in_bf16=options.keep_in_bf16,
        )

    @property
    def convention(self) -> ScaleConvention:
        """The meaning that its source's scales were taken to have."""
        return self.manifest.identity.options.scale_convention

    @property
    def rounded_codes(self) -> int:
        return self.manifest.rounded_codes

    def require_source(self, source: Checkpoint) -> None:
        """Raise ConversionError when the directory was made of another checkpoint."""
        if source.fingerprint != self.manifest.identity.source_fingerprint:
            raise ConversionError(
                f"{self.directory} was not made of {source.files.title} (its manifest names "
                "another source fingerprint); verify it against its own source, or convert again"
            )

    def accept(self, source: Checkpoint) -> bool:
        """Record that all bytes were compared with the source's, and the time stamps that the files
        of both had when they were opened. Return whether that is recorded, which another run, a
        change meanwhile or a directory that may only be read prevents.
        """
        made_of = source_files(source, companions=False)
        # The small files that were copied stay as recorded, so that a change of them is seen.
        made_of |= {
            name: record
            for name, record in (self.manifest.source_files or {}).items()
            if name in COMPANION_FILES
        }
        own = {name: record.stamp for name, record in self.files.items()}
        for directory, recorded in ((self.directory, own), (source.directory, stamped(made_of))):
            if any(name not in COMPANION_FILES for name in differences(directory, recorded)):
                return False
        path = self.directory / CONVERSION_NAME
        return try_to_renew(path, self.manifest, self.files, made_of, verified=True)

    def render(self) -> str:
        """The course of the run, and the number of converted scales."""
        lines = list(self.changes)
        if self.reused_shards:
            kept = counted(self.reused_shards, "finished shard")
            lines.append(f"resumed: {kept} checked and kept")
        state = "is up to date" if self.was_finished else "is written"
        lines.append(f"{self.directory} {state}")
        if self.manifest.verified:
            lines.append("verified: each tensor was compared with its sources")
        lines.append(f"FP8 scales converted: {self.manifest.scales_converted}")
        treatments = Counter(origin.treatment for origin in self.manifest.operations.values())
        if treatments[Transform.WIDEN]:
            tensors = counted(treatments[Transform.WIDEN], "tensor")
            lines.append(f"widened to float32, exactly: {tensors} (inspect says of which dtypes)")
        if not has_tokenizer(self.directory):
            lines.append(NO_TOKENIZER)
        elif not has_template(self.directory):
            lines.append(NO_TEMPLATE)
        left_out = self.manifest.left_out
        if left_out:
            lines.append(f"left out, since not run: {counted(len(left_out), 'tensor')}")
        return "\n".join([*lines, *_warnings(self.leftovers)])


@dataclass(frozen=True, kw_only=True)
class ConversionPlan(Rendered):
    """Every tensor of a conversion, in order, and what of the source is left out on purpose."""

    source: Checkpoint
    layout: Layout
    outputs: tuple[ConvertedTensor, ...]
    left_out: tuple[str, ...] = ()

    @property
    def config(self) -> ModelConfig:
        return self.source.config

    @cached_property
    def modules_to_not_convert(self) -> tuple[str, ...]:
        """NxDI's list of what is not FP8."""
        return unquantized_modules(self.outputs)

    @property
    def scale_count(self) -> int:
        """The number of `weight_scale_inv` tensors that are converted."""
        return sum(
            len(group)
            for output in self.outputs
            for group in (output.groups if output.is_scale else output.scale_groups)
        )

    @property
    def leftovers(self) -> tuple[str, ...]:
        """What is said of files beside the checkpoint that are not read."""
        return tuple(problem.message for problem in self.source.leftovers)

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def render(self) -> str:
        """A table with one row per kind of output."""
        rows: dict[tuple[str, ...], list[ConvertedTensor]] = {}
        for output in self.outputs:
            name = (
                output.name
                if output.layer is None
                else output.name.replace(f".{output.layer}.", ".N.", 1)
            )
            key = (name, output.dtype, str(list(output.shape)), str(output.transform))
            rows.setdefault(key, []).append(output)
        width = max(len(key[0]) for key in rows)
        lines = [
            f"{name:{width}}  {dtype:8} {shape:20} x {len(outputs):<4} "
            f"{size_text(sum(output.nbytes for output in outputs), 2):>12}  {what}"
            for (name, dtype, shape, what), outputs in rows.items()
        ]
        lines.append(counted(len(self.outputs), "tensor"))
        lines.append(f"space needed: {size_text(self.nbytes, 2)}")
        if isinstance(self.source.files, HubFiles):
            lines.append(self._room(self.source.files))
        if self.left_out:
            lines.append(f"left out, since not run: {counted(len(self.left_out), 'tensor')}")
        return "\n".join([*lines, *_warnings(self.leftovers)])

    def _room(self, files: HubFiles) -> str:
        """Say what a streamed conversion needs beside its output."""
        targets = dict(self._targets())
        needs = {name: files_of(outputs, self.source) for name, outputs in targets.items()}
        sizes = {name: sum(each.nbytes for each in outputs) for name, outputs in targets.items()}
        most = files.room(needs, sizes)
        return (
            f"disk needed: at most {size_text(most, 2)} with the checkpoint's files that are there "
            f"at once, of {size_text(sum(files.stamps[name].nbytes for name in files.names()), 2)} "
            "that are downloaded one after another"
        )

    def write(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        check: bool = False,
        advance: Advance = nothing,
    ) -> Converted:
        """Stream the checkpoint into a directory; an interrupted run is resumed by the next one.

        `check` reads every byte of a finished one, computes again what the checkpoint gives, and
        writes the shards that differ. `advance` is called with the bytes of each piece, in all
        `nbytes`. Raises CheckpointError or ConversionError naming what is wrong; an output that was
        not finished then has no manifest, and what was done is kept for the next run.

        Of a checkpoint that is streamed from the hub, each shard that is written is compared with
        its sources, as `verify` does, before these are removed.
        """
        path = Path(directory)
        if os.path.realpath(path) == os.path.realpath(self.source.directory):
            raise ConversionError(f"{path} is the source itself; choose another output directory")
        options = self.layout.as_options() | {"scale_convention": str(self.source.convention)}
        identity = {
            "source_fingerprint": self.source.fingerprint,
            "options": options,
            "format_version": FORMAT_VERSION,
        }
        recipe = Recipe(
            manifest_name=CONVERSION_NAME,
            identity=identity,
            source=self.source,
            shards=lambda: list(self._shards()),
            config=self.converted_config,
            manifest=self._manifest,
            compare=(
                f"run `neuron-minimax verify {self.source.files.title} {path}"
                f"{self.source.files.stream_option}`, which compares every byte and takes the "
                "checkpoint as it is now when all are equal"
            ),
            prove=partial(self._prove, path) if isinstance(self.source.files, HubFiles) else None,
        )
        try:
            filled = fill_directory(path, recipe, overwrite=overwrite, check=check, advance=advance)
        except ConversionError:
            if (path / CONVERSION_NAME).exists():  # there is nothing to go on with
                self.source.files.remove()
            raise
        converted = Converted.open(path)
        if recipe.prove is not None:
            _require_no(small_file_differences(self.source.directory, path), path)
        self.source.files.remove()
        return replace(
            converted,
            reused_shards=filled.reused_shards,
            was_finished=filled.was_finished,
            changes=filled.changes,
            leftovers=self.leftovers,
        )

    def converted_config(self) -> dict[str, Any]:
        """The output's config.json: the source's, with the quantization that its tensors have."""
        raw = self.config.raw
        config = {key: value for key, value in raw.items() if key != "quantization_config"}
        if any(output.dtype == "F8_E4M3" for output in self.outputs):
            config["quantization_config"] = dict(raw.get("quantization_config") or {}) | {
                "quant_method": "fp8",
                "weight_block_size": list(self.config.weight_block_size),
                "modules_to_not_convert": list(self.modules_to_not_convert),
            }
        config[CONVERTED_SECTION] = {
            "format_version": FORMAT_VERSION,
            **self.layout.as_options(),
        }
        return config

    def _targets(self) -> Iterator[tuple[str, list[ConvertedTensor]]]:
        """Yield each file and its tensors: one for those outside the layers, then one per layer."""
        layers = (None, *range(self.config.num_hidden_layers))
        for number, layer in enumerate(layers, start=1):
            outputs = [output for output in self.outputs if output.layer == layer]
            yield f"model-{number:05d}-of-{len(layers):05d}.safetensors", outputs

    def _shards(self) -> Iterator[StreamedShard]:
        for name, outputs in self._targets():
            tensors = tuple(
                StreamedTensor(output.spec, list(pieces(output, self.source))) for output in outputs
            )
            yield StreamedShard(name, tensors, files_of(outputs, self.source))

    def _prove(
        self, directory: Path, shard: StreamedShard, records: Mapping[str, TensorRecord]
    ) -> None:
        """Raise ConversionError when a written shard is not what its sources give."""
        outputs = [output for output in self.outputs if output.name in records]
        stored = TensorDirectory(directory, shards=[shard.name])
        differences = [f"{name} has other bytes" for name in damaged_tensors(stored, records)]
        for output, found, rounded in compare_outputs(
            outputs, self.source.convention, self.source, stored
        ):
            differences += found
            if rounded != records[output.name].rounded_codes:
                differences.append(f"{output.name} has another number of rounded codes")
        _require_no(differences, directory / shard.name)

    def _manifest(self, records: Mapping[str, TensorRecord]) -> dict[str, Any]:
        return {
            "scale_convention": self.source.convention_record,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "scales_converted": self.scale_count,
            "left_out": list(self.left_out),
            "experts": self.config.num_local_experts,
            "rounded_codes": sum(record.rounded_codes for record in records.values()),
            "operations": {
                output.name: {
                    "sources": output.source_templates,
                    "operation": str(output.rule.operation),
                    "treatment": str(output.transform),
                }
                for output in self.outputs
            },
        }


def _warnings(leftovers: Sequence[str]) -> list[str]:
    return [f"warning: {message}" for message in leftovers]


def _require_no(differences: Sequence[str], path: Path) -> None:
    if differences:
        raise ConversionError(
            f"{path} does not equal its sources ({some_of(differences)}); run again, and look at "
            "the machine's memory and disk if that is said again"
        )


def plan_conversion(checkpoint: Checkpoint, layout: Layout | None = None) -> ConversionPlan:
    """The plan for an opened checkpoint.

    Raises CheckpointError when the checkpoint is unusable, its scale convention is mixed, or a file
    that is copied is no readable one within it, ConversionError when its tensors do not fit the
    rules or the layout names no module.
    """
    checkpoint.require_usable()
    require_whole_companions(checkpoint.directory, checkpoint.config)
    layout = layout or Layout()
    outputs = bind_rules(
        checkpoint.specs,
        checkpoint.config,
        layout,
        checkpoint.convention,
        tolerated=checkpoint.left_out,
    )
    return ConversionPlan(
        source=checkpoint,
        layout=layout,
        outputs=outputs,
        left_out=tuple(checkpoint.left_out),
    )
