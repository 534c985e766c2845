"""Rows and findings of an inspection: kinds of weights, files and module lists, and where
config.json, a list of modules and the tensors disagree.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import CONVERTED_SECTION
from neuron_minimax.inspection.modules import EntryVerdict, Framework, Module, uncovered

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know: an error makes the checkpoint unusable as it is, a warning does not."""

    severity: Severity
    kind: str
    subject: str
    message: str


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """All weights of one kind (q_proj, w1, ...): counts by dtype, shapes and bytes of what is
    there.
    """

    kind: str
    group: str
    expected: int
    found: int
    dtypes: dict[str, int]
    shapes: tuple[tuple[int, ...], ...]
    scaled: int
    scale_shapes: tuple[tuple[int, ...], ...]
    bytes: int
    scale_bytes: int
    # Dtype of each layer's weights, "F8_E4M3", "mixed", "missing"; one entry when not per layer.
    layers: tuple[str, ...]
    per_layer: bool = True

    @property
    def precision(self) -> str:
        """The dtypes of this kind's weights in words."""
        if not self.found:
            return "missing"
        if set(self.dtypes) == {"F8_E4M3"}:
            return (
                "FP8 with scales"
                if self.scaled == self.found
                else f"FP8, {self.found - self.scaled} WITHOUT scale"
            )
        return (
            " + ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
            if len(self.dtypes) > 1
            else next(iter(self.dtypes))
        )


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One file: tensors and bytes of data in it, and the file's size."""

    name: str
    tensors: int
    bytes: int
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModuleList:
    """A `modules_to_not_convert`, where it came from, and the verdict on each entry for each
    framework.
    """

    origin: str
    entries: tuple[str, ...]
    verdicts: tuple[EntryVerdict, ...]


def kind_rows(checkpoint: Checkpoint) -> Iterator[KindRow]:
    """Yield one row for each kind of weight in the family's table."""
    entries = checkpoint.entries
    config = checkpoint.config
    rows: dict[str, dict[str, Any]] = {}
    for wanted in schema.expected(config):
        row = rows.setdefault(
            wanted.weight.kind, {"weight": wanted.weight, "expected": 0, "scales": [], "found": []}
        )
        entry = entries.get(wanted.name)
        if wanted.is_scale:
            row["scales"] += [entry] if entry else []
        else:
            row["expected"] += 1
            row["found"] += [(wanted.layer or 0, entry)] if entry else []
    for kind, row in rows.items():
        found = [entry for _, entry in row["found"]]
        by_layer: dict[int, set[str]] = {}
        for layer, entry in row["found"]:
            by_layer.setdefault(layer, set()).add(entry.dtype)
        count = config.num_hidden_layers if row["weight"].per_layer else 1
        yield KindRow(
            kind=kind,
            group=row["weight"].module_group,
            expected=row["expected"],
            found=len(found),
            dtypes=dict(Counter(entry.dtype for entry in found).most_common()),
            shapes=_by_frequency(entry.shape for entry in found),
            scaled=len(row["scales"]),
            scale_shapes=_by_frequency(entry.shape for entry in row["scales"]),
            bytes=sum(entry.nbytes for entry in found),
            scale_bytes=sum(entry.nbytes for entry in row["scales"]),
            layers=tuple(_one_dtype(by_layer.get(layer, set())) for layer in range(count)),
            per_layer=row["weight"].per_layer,
        )


def _by_frequency(shapes: Iterator[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for shape, _ in Counter(shapes).most_common())


def _one_dtype(dtypes: set[str]) -> str:
    if not dtypes:
        return "missing"
    return "mixed" if len(dtypes) > 1 else next(iter(dtypes))


def shard_rows(checkpoint: Checkpoint) -> Iterator[ShardRow]:
    """Yield one row for each file."""
    counts = Counter(entry.shard for entry in checkpoint.entries.values())
    sizes: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        sizes[entry.shard] += entry.nbytes
    for shard in checkpoint.shards:
        path = checkpoint.directory / shard
        yield ShardRow(
            name=shard,
            tensors=counts[shard],
            bytes=sizes[shard],
            file_bytes=path.stat().st_size if path.exists() else 0,
        )


def configuration_findings(
    checkpoint: Checkpoint, kinds: Sequence[KindRow], modules: Sequence[Module]
) -> Iterator[Finding]:
    """Yield where config.json and the tensors disagree, and what is unusual without being wrong."""
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
    lists: Sequence[ModuleList], modules: Mapping[Framework, list[Module]]
) -> Iterator[Finding]:
    """Yield what a list breaks, and which modules without FP8 weights no entry of it reaches."""
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
