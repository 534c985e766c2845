"""The precision report of a checkpoint, from its headers alone: what is FP8, what is not, and what
will go wrong.

Tensor data is read only when values are checked too (`neuron_minimax.inspection.values`).
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.inspection import text
from neuron_minimax.inspection.findings import (
    SEVERITIES,
    Finding,
    configuration_findings,
    end_token_findings,
    list_findings,
)
from neuron_minimax.inspection.modules import (
    EntryVerdict,
    Framework,
    Module,
    judge,
    modules_of,
    needed,
)
from neuron_minimax.inspection.values import ValueReport
from neuron_minimax.inspection.values import check_values as read_values


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
    layers: tuple[
        str, ...
    ]  # dtype of each layer's weights, "F8_E4M3", "mixed", "missing"; one entry when not per layer

    per_layer: bool = True

    @property
    def precision(self) -> str:
        """What the weights of this kind are, in words."""
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


@dataclass(frozen=True, kw_only=True)
class PrecisionReport:
    """What a checkpoint holds and what is wrong with it. Bytes are bytes of tensor data, counts are
    tensors.
    """

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
    findings: tuple[Finding, ...] = ()
    values: ValueReport | None = None

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

    def summary(self) -> str:
        """The first lines of `render`: what it is, how large, and whether it can be used."""
        return text.headline(self)

    def render(self) -> str:
        """The report as plain text, at most 120 columns."""
        return text.render(self)

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
            "dtypes": {
                dtype: {"tensors": count, "bytes": size}
                for dtype, (count, size) in self.dtypes.items()
            },
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
            "values": self.values.to_json() if self.values else None,
        }


def inspect(
    checkpoint: Checkpoint,
    modules_to_not_convert: Sequence[str] | None = None,
    check_values: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> PrecisionReport:
    """Report what an opened checkpoint holds and what is wrong with it; all faults are findings.

    `modules_to_not_convert` is a list to judge for NxDI; None judges the one in config.json alone.
    `check_values` also reads every weight and scale, calling `progress` with bytes read.
    """
    values = read_values(checkpoint, progress) if check_values else None
    return report_of(checkpoint, modules_to_not_convert, values)


def report_of(
    checkpoint: Checkpoint,
    modules_to_not_convert: Sequence[str] | None = None,
    values: ValueReport | None = None,
) -> PrecisionReport:
    """The report of an opened checkpoint; see `inspect`."""
    config = checkpoint.config
    dtypes: dict[str, tuple[int, int]] = {}
    for entry in checkpoint.entries.values():
        count, size = dtypes.get(entry.dtype, (0, 0))
        dtypes[entry.dtype] = (count + 1, size + entry.nbytes)
    kinds = tuple(_kind_rows(checkpoint))
    modules = modules_of(checkpoint.entries, config)
    lists = [_judged("config.json", config.modules_to_not_convert, modules)]
    if modules_to_not_convert is not None:
        lists.append(_judged("--modules-to-not-convert", tuple(modules_to_not_convert), modules))
    findings = [
        *configuration_findings(checkpoint, kinds, modules[Framework.NXDI]),
        *(
            Finding(severity="error", kind=p.kind, subject=p.subject, message=p.message)
            for p in checkpoint.problems
        ),
        *list_findings(lists, modules),
        *end_token_findings(checkpoint),
        *(values.findings if values else ()),
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
            if not name.endswith(schema.SCALE_SUFFIX) and not schema.is_mtp(name, checkpoint.config)
        ),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        kinds=kinds,
        shards=tuple(_shard_rows(checkpoint)),
        mtp=tuple(checkpoint.mtp_names),
        needed={str(framework): needed(framework, found) for framework, found in modules.items()},
        module_lists=tuple(lists),
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
        values=values,
    )


def _kind_rows(checkpoint: Checkpoint) -> Iterator[KindRow]:
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


def _judged(
    origin: str, entries: tuple[str, ...], modules: dict[Framework, list[Module]]
) -> ModuleList:
    verdicts = tuple(
        verdict
        for framework in Framework
        for verdict in judge(framework, entries, modules[framework])
    )
    return ModuleList(origin=origin, entries=entries, verdicts=verdicts)
