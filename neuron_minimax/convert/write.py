"""Run a conversion: a checkpoint directory streamed into a converted one, resumable, with a
manifest.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.output import OutputDirectory
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.records import TensorRecord
from neuron_minimax.checkpoint.writer import StreamedShard, StreamedTensor, copy_companions
from neuron_minimax.convert.pieces import pieces
from neuron_minimax.convert.plan import ConventionChoice, ConversionPlan, Layout, Sources, plan
from neuron_minimax.errors import ConversionError
from neuron_minimax.fp8 import ScaleConvention

MANIFEST_NAME = "conversion.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ConversionResult:
    """What a conversion did: its plan, how many shards an earlier run had left, and whether all was
    there already.
    """

    plan: ConversionPlan
    reused_shards: int = 0
    was_finished: bool = False
    rounded_codes: int = 0

    def render(self, output: Path) -> str:
        lines = [f"{output} is up to date"] if self.was_finished else []
        if self.reused_shards:
            lines.append(f"resumed: {self.reused_shards} finished shards were checked and kept")
        lines.append(f"FP8 scales converted: {self.plan.scale_count}")
        if self.plan.left_out:
            lines.append(
                f"left out: {len(self.plan.left_out)} multi-token-prediction tensors, which are "
                "not run"
            )
        return "\n".join(lines)


def plan_conversion(source: Checkpoint, layout: Layout) -> tuple[ConversionPlan, dict[str, Any]]:
    """The plan for a checkpoint and what the manifest says of its scale convention.

    Raises CheckpointError when the checkpoint is unusable, ConversionError when its convention is
    mixed.
    """
    source.require_usable()
    convention, record = _choose_convention(source, layout)
    tensors: Sources = {entry.name: (entry.dtype, entry.shape) for entry in source.entries.values()}
    return plan(tensors, source.config, layout, convention, tolerated=source.mtp_names), record


def _choose_convention(
    source: Checkpoint, layout: Layout
) -> tuple[ScaleConvention, dict[str, Any]]:
    found, evidence = source.scale_convention()
    record: dict[str, Any] = {
        "chosen_by": str(layout.scale_convention),
        "evidence": asdict(evidence),
    }
    has_fp8 = any(entry.dtype == "F8_E4M3" for entry in source.entries.values())
    if layout.scale_convention is not ConventionChoice.AUTO:
        convention = ScaleConvention(layout.scale_convention)
    elif found is not None or not has_fp8:
        convention = found or ScaleConvention.MULTIPLIER
    else:
        raise ConversionError(
            f"{source.directory}: what weight_scale_inv means is unclear: {evidence.render()} "
            f"(such as {', '.join(evidence.dissenters) or 'none'}); look at these tensors, or say "
            "it with --scale-convention"
        )
    return convention, {"convention": str(convention), **record}


def convert(
    source_dir: str | Path,
    output_dir: str | Path,
    layout: Layout | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> ConversionResult:
    """Stream a Hugging Face checkpoint into a converted directory; an interrupted run is resumed by
    the next one.

    `progress` is called with the bytes of each piece written. Raises ConfigError, CheckpointError
    or ConversionError naming what is wrong; the directory then has no manifest, and what was
    finished is kept for the next run.
    """
    layout = layout or Layout()
    source = Checkpoint(source_dir)
    output_path = Path(output_dir)
    if output_path.resolve() == source.directory.resolve():
        raise ConversionError(
            f"{output_path} is the source itself; choose another output directory"
        )
    conversion, convention_record = plan_conversion(source, layout)
    identity = {
        "source_fingerprint": source.fingerprint,
        "options": layout.as_options() | {"scale_convention": str(conversion.convention)},
        "format_version": FORMAT_VERSION,
    }
    with OutputDirectory(output_path, MANIFEST_NAME, identity, overwrite) as output:
        if output.finished:
            return ConversionResult(plan=conversion, was_finished=True)
        records = output.write_shards(list(_shards(conversion, source)), source, progress)
        copy_companions(source.directory, output_path)
        output.finish(
            converted_config(conversion), records, _manifest(conversion, convention_record, records)
        )
    rounded = sum(record.rounded_codes for record in records.values())
    return ConversionResult(
        plan=conversion, reused_shards=output.reused_shards, rounded_codes=rounded
    )


def _shards(conversion: ConversionPlan, source: Checkpoint) -> Iterator[StreamedShard]:
    """One shard for the tensors outside the layers, then one per layer."""
    layers = (None, *range(conversion.config.num_hidden_layers))
    for number, layer in enumerate(layers, start=1):
        tensors = tuple(
            StreamedTensor(
                output.name, output.dtype, output.shape, list(pieces(conversion, output, source))
            )
            for output in conversion.outputs
            if output.layer == layer
        )
        yield StreamedShard(f"model-{number:05d}-of-{len(layers):05d}.safetensors", tensors)


def converted_config(conversion: ConversionPlan) -> dict[str, Any]:
    """config.json of the output: the source's, with the quantization that its tensors really
    have.
    """
    config = {
        key: value for key, value in conversion.config.raw.items() if key != "quantization_config"
    }
    if any(output.dtype == "F8_E4M3" for output in conversion.outputs):
        config["quantization_config"] = dict(
            conversion.config.raw.get("quantization_config") or {}
        ) | {
            "quant_method": "fp8",
            "weight_block_size": list(conversion.config.weight_block_size),
            "modules_to_not_convert": list(conversion.modules_to_not_convert),
        }
    config["neuron_minimax"] = {"format_version": FORMAT_VERSION, **conversion.layout.as_options()}
    return config


def _manifest(
    conversion: ConversionPlan,
    convention_record: Mapping[str, Any],
    records: Mapping[str, TensorRecord],
) -> dict[str, Any]:
    return {
        "scale_convention": dict(convention_record),
        "modules_to_not_convert": list(conversion.modules_to_not_convert),
        "scales_converted": conversion.scale_count,
        "left_out": list(conversion.left_out),
        "experts": conversion.config.num_local_experts,
        "rounded_codes": sum(record.rounded_codes for record in records.values()),
        "operations": {
            output.name: {
                "sources": output.source_templates,
                "operation": str(output.rule.operation),
                "treatment": str(output.treatment),
            }
            for output in conversion.outputs
        },
    }


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """conversion.json of a finished converted directory.

    Raises ConversionError when there is none (the directory is no converted checkpoint, or an
    unfinished one).
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["identity"]["format_version"] != FORMAT_VERSION:
            raise ConversionError(
                f"{path} has another format version; run `neuron-minimax convert` again"
            )
        return manifest
    except FileNotFoundError:
        raise ConversionError(
            f"{directory} has no {MANIFEST_NAME}: it is no converted checkpoint, or its conversion "
            "did not finish; run `neuron-minimax convert CKPT OUT` (again, to resume)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(
            f"{path} cannot be read ({error!r}); convert again with --overwrite"
        ) from None
