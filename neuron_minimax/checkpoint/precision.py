"""The precision report of a checkpoint, from its headers alone: what is FP8, what is not, and what will go wrong.

Nothing here reads tensor data; `neuron_minimax.checkpoint.values` does, for `--check-values`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal

from neuron_minimax.checkpoint import precision_text, schema
from neuron_minimax.checkpoint.modules import (
    EntryVerdict,
    Framework,
    Module,
    judge,
    modules_of,
    needed,
    uncovered,
)
from neuron_minimax.checkpoint.reader import Checkpoint

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
    """All weights of one kind (q_proj, w1, ...): counts by dtype, shapes and bytes of what is there."""

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
    layers: tuple[
        str, ...
    ]  # dtype of each layer's weights, "F8_E4M3", "mixed", "missing"; one entry when not per layer

    @property
    def precision(self) -> str:
        """What the weights of this kind are, in words."""
        if not self.found:
            return "missing"
        if set(self.dtypes) == {"F8_E4M3"}:
            return "FP8 with scales" if self.scaled == self.found else f"FP8, {self.found - self.scaled} WITHOUT scale"
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
    """A `modules_to_not_convert`, where it came from, and the verdict on each entry for each framework."""

    origin: str
    entries: tuple[str, ...]
    verdicts: tuple[EntryVerdict, ...]


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What a checkpoint holds and what is wrong with it. Bytes are bytes of tensor data, counts are tensors."""

    directory: str
    layers: int
    experts: int
    block: tuple[int, int]
    declares_fp8: bool
    parameters: int
    dtypes: dict[str, tuple[int, int]]
    kinds: tuple[KindRow, ...]
    shards: tuple[ShardRow, ...]
    mtp: tuple[str, ...]
    needed: dict[str, tuple[str, ...]]
    module_lists: tuple[ModuleList, ...]
    findings: tuple[Finding, ...] = field(default=())

    @property
    def usable(self) -> bool:
        """Whether the checkpoint can be converted and run as it is."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def tensors(self) -> int:
        return sum(count for count, _ in self.dtypes.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.dtypes.values())

    def render(self) -> str:
        """The report as plain text, at most 120 columns."""
        return precision_text.render(self)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values; the keys are described in docs/inspect.md."""
        return {
            "schema": 1,
            "directory": self.directory,
            "usable": self.usable,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "layers": self.layers,
            "experts": self.experts,
            "block": list(self.block),
            "declares_fp8": self.declares_fp8,
            "dtypes": {dtype: {"tensors": count, "bytes": size} for dtype, (count, size) in self.dtypes.items()},
            "kinds": [
                {
                    "kind": row.kind,
                    "group": row.group,
                    "precision": row.precision,
                    "expected": row.expected,
                    "found": row.found,
                    "dtypes": row.dtypes,
                    "shapes": [list(shape) for shape in row.shapes],
                    "scaled": row.scaled,
                    "scale_shapes": [list(shape) for shape in row.scale_shapes],
                    "bytes": row.bytes,
                    "scale_bytes": row.scale_bytes,
                    "layers": list(row.layers),
                }
                for row in self.kinds
            ],
            "shards": [vars(row) for row in self.shards],
            "multi_token_prediction": list(self.mtp),
            "modules_to_not_convert": {
                "needed": {framework: list(entries) for framework, entries in self.needed.items()},
                "judged": [
                    {
                        "origin": listed.origin,
                        "entries": list(listed.entries),
                        "verdicts": [vars(verdict) for verdict in listed.verdicts],
                    }
                    for listed in self.module_lists
                ],
            },
            "findings": [vars(finding) for finding in self.findings],
        }


def inspect(directory: str | Path, modules_to_not_convert: Sequence[str] | None = None) -> PrecisionReport:
    """Read every header of a checkpoint directory and report what it holds and what is wrong.

    `modules_to_not_convert` is a list to judge for NxDI; None judges the one in config.json alone. Faults of the
    checkpoint are findings of the report; ConfigError and CheckpointError are raised only when there is no MiniMax-M2
    checkpoint to read at all.
    """
    checkpoint = Checkpoint(directory)
    return report_of(checkpoint, modules_to_not_convert)


def report_of(checkpoint: Checkpoint, modules_to_not_convert: Sequence[str] | None = None) -> PrecisionReport:
    """The report of an opened checkpoint; see `inspect`."""
    config = checkpoint.config
    dtypes: dict[str, tuple[int, int]] = {}
    for entry in checkpoint.entries.values():
        count, size = dtypes.get(entry.dtype, (0, 0))
        dtypes[entry.dtype] = (count + 1, size + entry.nbytes)
    kinds = tuple(_kind_rows(checkpoint))
    modules = {framework: modules_of(framework, checkpoint.entries, config) for framework in Framework}
    lists = [_judged("config.json", config.modules_to_not_convert, modules)]
    if modules_to_not_convert is not None:
        lists.append(_judged("--modules-to-not-convert", tuple(modules_to_not_convert), modules))
    findings = [
        *(Finding(severity="error", kind=p.kind, subject=p.subject, message=p.message) for p in checkpoint.problems),
        *_configuration_findings(checkpoint, kinds),
        *_list_findings(lists, modules),
    ]
    return PrecisionReport(
        directory=str(checkpoint.directory),
        layers=config.num_hidden_layers,
        experts=config.num_local_experts,
        block=config.weight_block_size,
        declares_fp8=config.declares_fp8,
        parameters=sum(
            prod(entry.shape)
            for name, entry in checkpoint.entries.items()
            if not name.endswith(schema.SCALE_SUFFIX) and not schema.is_mtp(name)
        ),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        kinds=kinds,
        shards=tuple(_shard_rows(checkpoint)),
        mtp=tuple(checkpoint.mtp_names),
        needed={str(framework): needed(framework, found) for framework, found in modules.items()},
        module_lists=tuple(lists),
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
    )


def _kind_rows(checkpoint: Checkpoint) -> Iterator[KindRow]:
    entries, config = checkpoint.entries, checkpoint.config
    rows: dict[str, dict[str, Any]] = {}
    for wanted in schema.expected(config):
        row = rows.setdefault(wanted.weight.kind, {"weight": wanted.weight, "expected": 0, "scales": [], "found": []})
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
        )


def _by_frequency(shapes: Iterator[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for shape, _ in Counter(shapes).most_common())


def _one_dtype(dtypes: set[str]) -> str:
    return next(iter(dtypes)) if len(dtypes) == 1 else "mixed" if dtypes else "missing"


def _shard_rows(checkpoint: Checkpoint) -> Iterator[ShardRow]:
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


def _judged(origin: str, entries: tuple[str, ...], modules: dict[Framework, list[Module]]) -> ModuleList:
    verdicts = tuple(verdict for framework in Framework for verdict in judge(framework, entries, modules[framework]))
    return ModuleList(origin=origin, entries=entries, verdicts=verdicts)


def _configuration_findings(checkpoint: Checkpoint, kinds: Sequence[KindRow]) -> Iterator[Finding]:
    """Where config.json and the tensors disagree, and what is unusual without being wrong."""
    fp8 = sum(row.dtypes.get("F8_E4M3", 0) for row in kinds)
    if fp8 and not checkpoint.config.declares_fp8:
        message = (
            f"config.json has no quantization_config, but {fp8} weights are FP8: transformers would load their codes "
            "as values, silently; the tensors decide here. Restore the section from the published config.json"
        )
        yield Finding(severity="warning", kind="config", subject="config.json", message=message)
    if checkpoint.config.declares_fp8 and not fp8 and any(row.found for row in kinds):
        message = (
            "config.json declares FP8, but no weight is FP8: NxDI would look for scales that do not exist; the tensors "
            "decide here. Remove quantization_config"
        )
        yield Finding(severity="warning", kind="config", subject="config.json", message=message)
    for row in kinds:
        if "mixed" in row.layers:
            layer = row.layers.index("mixed")
            message = f"{row.kind} of layer {layer} has weights of several dtypes; one stacked tensor can have only one"
            yield Finding(severity="error", kind="dtype", subject=f"layer {layer} {row.kind}", message=message)
        elif len(row.dtypes) > 1:
            message = f"{row.kind} is {row.precision}: not the same in every layer"
            yield Finding(severity="note", kind="dtype", subject=row.kind, message=message)
    if checkpoint.mtp_names:
        message = (
            f"{len(checkpoint.mtp_names)} multi-token-prediction tensors (for one {checkpoint.mtp_names[0]}) are not "
            "part of the model and are left out of a conversion"
        )
        yield Finding(severity="note", kind="mtp", subject=checkpoint.mtp_names[0], message=message)


def _list_findings(lists: Sequence[ModuleList], modules: dict[Framework, list[Module]]) -> Iterator[Finding]:
    for listed in lists:
        given = listed.origin != "config.json"
        if not given and not listed.entries:
            continue  # nothing is said, so nothing is wrong: `needed` says what to list
        for verdict in listed.verdicts:
            if verdict.verdict != "breaks" or (given and verdict.framework is not Framework.NXDI):
                continue
            message = f"{listed.origin}, {verdict.framework}: {verdict.reason}; take it off the list"
            severity: Severity = "error" if given else "warning"
            yield Finding(severity=severity, kind="modules_to_not_convert", subject=verdict.entry, message=message)
        lacking = uncovered(Framework.NXDI, listed.entries, modules[Framework.NXDI])
        if lacking and needed(Framework.NXDI, modules[Framework.NXDI]):
            message = (
                f"{listed.origin}, NxDI: no entry reaches {lacking[0].path}"
                + (f" and {len(lacking) - 1} more" if len(lacking) > 1 else "")
                + ", which has no scales: NxDI stops with `Cannot find ... .scale`; add the entries listed as needed"
            )
            yield Finding(
                severity="error" if given else "warning",
                kind="modules_to_not_convert",
                subject=lacking[0].path,
                message=message,
            )
