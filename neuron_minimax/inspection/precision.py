"""The precision report of a checkpoint, from its headers alone: what is FP8, what is not, and what
will go wrong.

Tensor data is read only when values are checked too (`neuron_minimax.inspection.values`), or
compared with those of another checkpoint.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import counted, printable
from neuron_minimax.inspection.compare import Comparison, compare
from neuron_minimax.inspection.document import Rendered, table, wrapped
from neuron_minimax.inspection.findings import (
    SEVERITIES,
    Finding,
    KindRow,
    ModuleList,
    ShardRow,
    companion_findings,
    configuration_findings,
    end_token_findings,
    kind_rows,
    list_findings,
    shard_rows,
)
from neuron_minimax.inspection.modules import Framework, Module, judge, modules_of, needed
from neuron_minimax.inspection.values import SAMPLE, ValueReport
from neuron_minimax.inspection.values import check_values as read_values
from neuron_minimax.progress import SILENT, Progress

SHOWN_PER_KIND = 10  # findings of one kind that are printed; to_json has all
# Magnitudes of zero, of what trn1, inf2 and trn2 cannot read (256 to 448), and of 448.
CODE_GROUPS = ((0x00,), tuple(range(0x78, 0x7F)), (0x7E,))
MARKS = {"error": "ERROR", "warning": "warning", "note": "note"}


@dataclass(frozen=True, kw_only=True)
class PrecisionReport(Rendered):
    """The contents and faults of a checkpoint, and its comparison with another where there is one.

    Bytes are bytes of tensor data, counts are tensors.
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
    comparison: Comparison | None = None

    @property
    def usable(self) -> bool:
        """True when the checkpoint can be converted and run as it is."""
        return not any(finding.severity == "error" for finding in self.findings)

    @property
    def tensors(self) -> int:
        return sum(count for count, _ in self.dtypes.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.dtypes.values())

    def summary(self) -> str:
        """The first lines of `render`: what it is, how large, and whether it can be used."""
        return headline(self)

    def render(self) -> str:
        """The report as plain text of at most 120 columns: sections parted by an empty line."""
        text = "\n\n".join(_sections(self)) + "\n"
        return printable(f"{text}\n{self.comparison.render()}" if self.comparison else text)

    def render_page(self) -> str:
        """One self-contained HTML page."""
        from neuron_minimax.inspection.page import render_page

        return render_page(self)

    def _repr_html_(self) -> str:
        return self.render_page()

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
            "comparison": self.comparison.to_json() if self.comparison else None,
        }


def inspect(
    checkpoint: Checkpoint,
    modules_to_not_convert: Sequence[str] | None = None,
    check_values: bool = False,
    against: Checkpoint | None = None,
    progress: Progress = SILENT,
) -> PrecisionReport:
    """Report what an opened checkpoint holds and what is wrong with it; all faults are findings.

    `modules_to_not_convert` is a list to judge for NxDI; None judges the one in config.json alone.
    With `check_values` every weight and scale is read, and compared with those of `against` where
    that is given too.
    """
    values = None
    comparison = None
    if check_values:
        with progress.stage("reading values", checkpoint.nbytes) as advance:
            values = read_values(checkpoint, advance)
    if against is not None:
        total = checkpoint.nbytes if check_values else None
        with progress.stage("comparing", total) as advance:
            comparison = compare(checkpoint, against, check_values, advance)
    return _report(checkpoint, modules_to_not_convert, values, comparison)


def _report(
    checkpoint: Checkpoint,
    modules_to_not_convert: Sequence[str] | None,
    values: ValueReport | None,
    comparison: Comparison | None,
) -> PrecisionReport:
    config = checkpoint.config
    left_out = set(checkpoint.left_out)
    dtypes: dict[str, tuple[int, int]] = {}
    for entry in checkpoint.entries.values():
        count, size = dtypes.get(entry.dtype, (0, 0))
        dtypes[entry.dtype] = (count + 1, size + entry.nbytes)
    kinds = tuple(kind_rows(checkpoint))
    modules = modules_of(checkpoint.entries, config)
    lists = [_judged("config.json", config.modules_to_not_convert, modules)]
    if modules_to_not_convert is not None:
        lists.append(_judged("--modules-to-not-convert", tuple(modules_to_not_convert), modules))
    findings = [
        *(
            Finding(severity="error", kind=p.kind, subject=p.subject, message=p.message)
            for p in checkpoint.problems
        ),
        *configuration_findings(checkpoint, kinds),
        *list_findings(lists, modules),
        *end_token_findings(checkpoint),
        *companion_findings(checkpoint),
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
            if not name.endswith(schema.SCALE_SUFFIX) and name not in left_out
        ),
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1][1])),
        kinds=kinds,
        shards=tuple(shard_rows(checkpoint)),
        mtp=tuple(checkpoint.mtp_names),
        needed={str(framework): needed(framework, found) for framework, found in modules.items()},
        module_lists=tuple(lists),
        findings=tuple(sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))),
        values=values,
        comparison=comparison,
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


def headline(report: PrecisionReport) -> str:
    """Three lines: the directory, its size, and whether it can be used."""
    experts = counted(report.experts, "expert") if report.experts else "no experts"
    block = " x ".join(map(str, report.block))
    config = f"{counted(report.layers, 'layer')}, {experts}, blocks of {block}"
    return (
        f"{report.directory}\n{counted(report.tensors, 'tensor')}, {size_text(report.bytes)}, "
        f"{report.parameters:,} parameters; {config}\n"
        + ("Usable as it is." if report.usable else "NOT usable as it is: see the errors below.")
    )


def _sections(report: PrecisionReport) -> Iterator[str]:
    yield headline(report)
    if report.findings:
        yield "Findings\n" + "\n".join(_finding_lines(report.findings))
    rows = [
        (dtype, f"{count:,}", size_text(size), f"{100 * size / max(report.bytes, 1):.1f} %")
        for dtype, (count, size) in report.dtypes.items()
    ]
    yield table("By dtype", ("dtype", "tensors", "bytes", "share"), rows)
    yield table(
        "By kind of weight",
        ("group", "kind", "found", "shape", "precision", "scale shape", "bytes"),
        [
            (
                row.group,
                row.kind,
                f"{row.found:,}"
                if row.found == row.expected
                else f"{row.found:,} of {row.expected:,}",
                _shapes(row.shapes),
                row.precision,
                _shapes(row.scale_shapes),
                size_text(row.bytes + row.scale_bytes),
            )
            for row in report.kinds
        ],
    )
    yield "\n".join(_list_lines(report))
    if report.values:
        yield from _value_sections(report.values)
    files = [(row.name, f"{row.tensors:,}", size_text(row.bytes)) for row in report.shards]
    yield table("Files", ("file", "tensors", "bytes"), files)


def _value_sections(values: ValueReport) -> Iterator[str]:
    rows = [
        (
            row.kind,
            f"{row.blocks:,}",
            f"{row.minimum:.3e}",
            f"{row.median:.3e}",
            f"{row.maximum:.3e}",
            f"{row.low_range_blocks:,}",
        )
        for row in values.scales
    ]
    if rows:
        yield table(
            "Scales",
            ("kind", "blocks", "minimum", "median", "maximum", "largest code under 112"),
            rows,
        )
    lines = [f"Values ({size_text(values.bytes_read)} read; shares are of {SAMPLE})"]
    if values.codes:
        sampled = max(1, sum(values.histogram))
        histogram = values.histogram
        zeros, beyond, end = (
            sum(histogram[code] + histogram[code | 0x80] for code in codes) for codes in CODE_GROUPS
        )
        lines += [
            wrapped(
                f"weight_scale_inv is the {values.convention or 'UNCLEAR'}: {values.evidence}", "  "
            ),
            f"  zero codes {100 * zeros / sampled:.3f} %, codes above 240 "
            f"{100 * beyond / sampled:.3f} %, at the range end (448) {100 * end / sampled:.3f} %",
        ]
    if values.router_bias:
        low = min(pair[0] for pair in values.router_bias)
        high = max(pair[1] for pair in values.router_bias)
        lines.append(
            f"  router bias from {low:.3f} to {high:.3f} over "
            f"{counted(len(values.router_bias), 'layer')}"
        )
    yield "\n".join(lines)


def _finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    shown: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        key = (finding.severity, finding.kind)
        shown[key] += 1
        if shown[key] <= SHOWN_PER_KIND:
            yield wrapped(f"{MARKS[finding.severity]}: {finding.message}", "  ")
    for (severity, kind), count in shown.items():
        if count > SHOWN_PER_KIND:
            yield (
                f"  ... and {count - SHOWN_PER_KIND:,} more of {severity} ({kind}); --json lists "
                "all"
            )


def _list_lines(report: PrecisionReport) -> Iterator[str]:
    yield "modules_to_not_convert"
    for framework, entries in report.needed.items():
        yield f"  needed by {framework}: {list(entries)}"
    for listed in report.module_lists:
        yield wrapped(f"{listed.origin} has {list(listed.entries)}", "  ")
        if listed.note:
            yield wrapped(listed.note, "    ")
        for verdict in listed.verdicts:
            yield wrapped(f"{verdict.framework}: {verdict.verdict}: {verdict.reason}", "    ")


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    if not shapes:
        return "-"
    first = " x ".join(str(size) for size in shapes[0]) or "scalar"
    return first if len(shapes) == 1 else f"{first} and {len(shapes) - 1} other"
