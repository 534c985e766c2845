"""Findings of an inspection: where config.json, a list of modules and the tensors disagree."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.inspection.modules import Framework, Module, uncovered

if TYPE_CHECKING:
    from neuron_minimax.inspection.precision import KindRow, ModuleList

CONVERTED_SECTION = "neuron_minimax"  # what a conversion adds to config.json
Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know: an error makes the checkpoint unusable as it is, a warning does not."""

    severity: Severity
    kind: str
    subject: str
    message: str


def configuration_findings(
    checkpoint: Checkpoint, kinds: Sequence["KindRow"], modules: Sequence[Module]
) -> Iterator[Finding]:
    """Where config.json and the tensors disagree, and what is unusual without being wrong."""
    if CONVERTED_SECTION in checkpoint.config.raw:
        message = (
            f"config.json has a {CONVERTED_SECTION} section: this directory is the output of a "
            "conversion, with Neuron's names and shapes. Inspect the checkpoint it was made of; "
            "`neuron-minimax verify` compares the two"
        )
        yield Finding(severity="error", kind="converted", subject="config.json", message=message)
    fp8 = sum(row.dtypes.get("F8_E4M3", 0) for row in kinds)
    if fp8 and not checkpoint.config.declares_fp8:
        message = (
            f"config.json has no quantization_config, but {fp8} weights are FP8: transformers "
            "would load their codes as values, silently; the tensors decide here. Restore the "
            "section from the published config.json"
        )
        yield Finding(severity="warning", kind="config", subject="config.json", message=message)
    if checkpoint.config.declares_fp8 and not fp8 and any(row.found for row in kinds):
        message = (
            "config.json declares FP8, but no weight is FP8: NxDI would look for scales that do "
            "not exist; the tensors decide here. Remove quantization_config"
        )
        yield Finding(severity="warning", kind="config", subject="config.json", message=message)
    for module in modules:
        if module.odd_weight is None:
            continue
        found = ", ".join(f"{count} {dtype}" for dtype, count in module.dtypes)
        message = (
            f"{module.odd_weight} is {checkpoint.entry(module.odd_weight).dtype}, but it is stored "
            f"in one tensor with others as {module.path}, whose weights are of several dtypes "
            f"({found}); expected one"
        )
        yield Finding(severity="error", kind="dtype", subject=module.odd_weight, message=message)
    for row in kinds:
        if len(row.dtypes) > 1:
            message = f"{row.kind} is {row.precision}: not the same everywhere"
            yield Finding(severity="note", kind="dtype", subject=row.kind, message=message)
    if checkpoint.mtp_names:
        message = (
            f"{len(checkpoint.mtp_names)} multi-token-prediction tensors (for one "
            f"{checkpoint.mtp_names[0]}) are not part of the model and are left out of a conversion"
        )
        yield Finding(severity="note", kind="mtp", subject=checkpoint.mtp_names[0], message=message)


def end_token_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A note when no file of the checkpoint names the token that ends an answer."""
    path = checkpoint.directory / "generation_config.json"
    try:
        generation = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        message = f"{path.name} cannot be read as JSON ({error}); download it again"
        yield Finding(severity="warning", kind="generation", subject=path.name, message=message)
        return
    named = generation.get("eos_token_id") if isinstance(generation, dict) else None
    if not checkpoint.config.eos_token_ids and named in (None, []):
        message = (
            f"neither config.json nor {path.name} names eos_token_id: transformers would not stop; "
            "here an answer ends at the tokenizer's end-of-turn token (MiniMax-M2: 200020)"
        )
        yield Finding(severity="note", kind="generation", subject="eos_token_id", message=message)


def list_findings(
    lists: Sequence["ModuleList"], modules: Mapping[Framework, list[Module]]
) -> Iterator[Finding]:
    for listed in lists:
        given = listed.origin != "config.json"
        if not given and not listed.entries:
            continue  # nothing is said, so nothing is wrong: `needed` says what to list
        for verdict in listed.verdicts:
            if verdict.verdict != "breaks" or (given and verdict.framework is not Framework.NXDI):
                continue
            advice = (
                "leave this file as it is: `neuron-minimax convert` writes NxDI's own list"
                if not given and verdict.framework is Framework.NXDI
                else "take it off the list"
            )
            message = f"{listed.origin}, {verdict.framework}: {verdict.reason}; {advice}"
            severity: Severity = "error" if given else "warning"
            yield Finding(
                severity=severity,
                kind="modules_to_not_convert",
                subject=verdict.entry,
                message=message,
            )
        lacking = uncovered(Framework.NXDI, listed.entries, modules[Framework.NXDI])
        if lacking and any(module.fp8 for module in modules[Framework.NXDI]):
            message = (
                f"{listed.origin}, NxDI: no entry reaches {lacking[0].path}"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + ", which has no scales: NxDI stops with `Cannot find ... .scale`; add the "
                "entries listed as needed"
            )
            yield Finding(
                severity="error" if given else "warning",
                kind="modules_to_not_convert",
                subject=lacking[0].path,
                message=message,
            )
