"""A conversion as data: its plan, the run that writes it, and the directory that it leaves.

A checkpoint is streamed into a directory that resumes (checkpoint/output.py); `conversion.json`
says what every tensor was made of.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.output import OutputDirectory
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.records import TensorRecord, read_records
from neuron_minimax.checkpoint.writer import StreamedShard, StreamedTensor, copy_companions
from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.convert.binding import ConvertedTensor, bind_rules, unquantized_modules
from neuron_minimax.convert.layout import Layout
from neuron_minimax.convert.pieces import pieces
from neuron_minimax.errors import ConversionError
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.inspection.document import Rendered

CONVERSION_NAME = "conversion.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Converted(Rendered):
    """A finished converted directory and its manifest; `reused_shards` and `was_finished` say how
    the run went that gave it.
    """

    directory: Path
    manifest: Mapping[str, Any]
    reused_shards: int = 0
    was_finished: bool = False

    @classmethod
    def open(cls, directory: str | Path) -> "Converted":
        """Raises ConversionError without a finished conversion; headers are read later."""
        return cls(directory=Path(directory), manifest=read_manifest(directory))

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
        return read_records(self.manifest["tensors"])

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.records.values())

    @property
    def layout(self) -> Layout:
        """The options that it was made with."""
        return Layout.from_options(self.manifest["identity"]["options"])

    @property
    def convention(self) -> ScaleConvention:
        """The meaning that its source's scales were taken to have."""
        return ScaleConvention(self.manifest["identity"]["options"]["scale_convention"])

    @property
    def rounded_codes(self) -> int:
        return int(self.manifest["rounded_codes"])

    def require_source(self, source: Checkpoint) -> None:
        """Raise ConversionError when the directory was made of another checkpoint."""
        if source.fingerprint != self.manifest["identity"]["source_fingerprint"]:
            raise ConversionError(
                f"{self.directory} was not made of {source.directory} (its manifest names another "
                "source fingerprint); verify it against its own source, or convert again"
            )

    def render(self) -> str:
        """The course of the run, and the number of converted scales."""
        lines = [f"{self.directory} is up to date"] if self.was_finished else []
        if self.reused_shards:
            lines.append(f"resumed: {self.reused_shards} finished shards were checked and kept")
        lines.append(f"FP8 scales converted: {self.manifest['scales_converted']}")
        left_out = self.manifest["left_out"]
        if left_out:
            lines.append(
                f"left out: {len(left_out)} multi-token-prediction tensors, which are not run"
            )
        return "\n".join(lines)


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
            f"{size_text(sum(output.nbytes for output in outputs), 3, 'GB'):>12}  {what}"
            for (name, dtype, shape, what), outputs in rows.items()
        ]
        lines.append(f"{len(self.outputs)} tensors, {size_text(self.nbytes, 3, 'GB')}")
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)} multi-token-prediction tensors")
        return "\n".join(lines)

    def write(
        self,
        directory: str | Path,
        *,
        overwrite: bool = False,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> Converted:
        """Stream the checkpoint into a directory; an interrupted run is resumed by the next one.

        `progress` is called with the bytes of each piece written, in all `nbytes`. Raises
        CheckpointError or ConversionError naming what is wrong; the directory then has no manifest,
        and what was finished is kept for the next run.
        """
        path = Path(directory)
        if path.resolve() == self.source.directory.resolve():
            raise ConversionError(f"{path} is the source itself; choose another output directory")
        options = self.layout.as_options() | {"scale_convention": str(self.source.convention)}
        identity = {
            "source_fingerprint": self.source.fingerprint,
            "options": options,
            "format_version": FORMAT_VERSION,
        }
        with OutputDirectory(path, CONVERSION_NAME, identity, overwrite) as output:
            if output.finished:
                progress(self.nbytes)
                return replace(Converted.open(path), was_finished=True)
            records = output.write_shards(list(self._shards()), self.source, progress)
            copy_companions(self.source.directory, path)
            output.finish(self.converted_config(), records, self._manifest(records))
        return replace(Converted.open(path), reused_shards=output.reused_shards)

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

    def _shards(self) -> Iterator[StreamedShard]:
        """Yield one shard for the tensors outside the layers, then one per layer."""
        layers = (None, *range(self.config.num_hidden_layers))
        for number, layer in enumerate(layers, start=1):
            tensors = tuple(
                StreamedTensor(output.spec, list(pieces(output, self.source)))
                for output in self.outputs
                if output.layer == layer
            )
            yield StreamedShard(f"model-{number:05d}-of-{len(layers):05d}.safetensors", tensors)

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


def plan_conversion(checkpoint: Checkpoint, layout: Layout | None = None) -> ConversionPlan:
    """The plan for an opened checkpoint.

    Raises CheckpointError when the checkpoint is unusable or its scale convention is mixed,
    ConversionError when its tensors do not fit the rules or the layout names no module.
    """
    checkpoint.require_usable()
    layout = layout or Layout()
    outputs = bind_rules(
        checkpoint.specs,
        checkpoint.config,
        layout,
        checkpoint.convention,
        tolerated=checkpoint.mtp_names,
    )
    return ConversionPlan(
        source=checkpoint,
        layout=layout,
        outputs=outputs,
        left_out=tuple(checkpoint.mtp_names),
    )


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """conversion.json of a finished converted directory.

    Raises ConversionError when there is none: the directory does not exist, is not a converted
    checkpoint, or is an unfinished one.
    """
    path = Path(directory) / CONVERSION_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["identity"]["format_version"] != FORMAT_VERSION:
            raise ConversionError(
                f"{path} has another format version; run `neuron-minimax convert` again"
            )
        return manifest
    except FileNotFoundError:
        if not Path(directory).is_dir():
            raise ConversionError(
                f"{directory} does not exist; expected a converted directory, which "
                "`neuron-minimax convert CKPT OUT` makes"
            ) from None
        raise ConversionError(
            f"{directory} has no {CONVERSION_NAME}: it is no converted checkpoint, or its "
            "conversion did not finish; run `neuron-minimax convert CKPT OUT` (again, to resume)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path} cannot be read ({error!r}); convert again with --overwrite"
        ) from None
