"""The precision report as one self-contained HTML page: no script, no network, light and dark,
narrow and wide.
"""

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.errors import counted
from neuron_minimax.inspection import charts
from neuron_minimax.inspection.document import html_page, html_table, html_text
from neuron_minimax.inspection.findings import ABSENT, Finding, KindRow, ModuleList
from neuron_minimax.inspection.modules import EntryVerdict
from neuron_minimax.inspection.values import SAMPLE, ScaleRow, ValueReport

if TYPE_CHECKING:
    from neuron_minimax.inspection.precision import PrecisionReport

SHOWN_PER_KIND = 12
DTYPE_CLASSES = {
    "F8_E4M3": "fp8",
    "BF16": "bf16",
    "F32": "f32",
    "mixed": "mixed",
    "missing": "missing",
    ABSENT: "absent",
}
VERDICT_CLASSES = {"breaks": "error", "right": "good", "no effect": "note"}
DTYPE_NAMES = {
    "F8_E4M3": "FP8 e4m3fn",
    "BF16": "BF16",
    "F32": "float32",
    "mixed": "mixed",
    "missing": "missing",
    ABSENT: "not in this layer",
}


def render_page(report: "PrecisionReport") -> str:
    """The whole page as text."""
    name = report.directory.rstrip("/").rpartition("/")[2] or report.directory
    return html_page(f"Precision of {name}", _head(report, name), _sections(report))


def _head(report: "PrecisionReport", name: str) -> str:
    verdict = ("good", "Usable as it is") if report.usable else ("error", "Not usable as it is")
    fp8 = report.dtypes.get("F8_E4M3", (0, 0))[1]
    numbers = (
        (f"{report.tensors:,}", "tensor" if report.tensors == 1 else "tensors"),
        (size_text(report.bytes), "of tensor data"),
        (f"{report.parameters:,}", "parameters"),
        (f"{100 * fp8 / max(1, report.bytes):.1f} %", "of bytes in FP8"),
        (f"{report.layers} &times; {report.experts}", "layers &times; experts"),
        (f"{report.block[0]} &times; {report.block[1]}", "values per scale"),
    )
    tiles = "".join(f"<div><b>{value}</b><span>{what}</span></div>" for value, what in numbers)
    return (
        f'<header><h1>{escape(name)}</h1><p class="path">{escape(report.directory)}</p><p '
        f'class="verdict {verdict[0]}">{verdict[1]}</p><div class="tiles">{tiles}</div></header>'
    )


def _sections(report: "PrecisionReport") -> Iterator[tuple[str, str]]:
    yield "Findings", _findings(report.findings)
    if report.comparison:
        yield "Comparison", f"<pre>{escape(report.comparison.render())}</pre>"
    yield "Bytes by kind of weight", _bytes_by_kind(report)
    yield "Precision by layer", _grid(report)
    yield "modules_to_not_convert", _module_lists(report)
    if report.values:
        yield from _value_sections(report.values, report.kinds)
    rows = [(escape(row.name), f"{row.tensors:,}", size_text(row.bytes)) for row in report.shards]
    table = html_table(("file", "tensors", "bytes"), rows)
    files = counted(len(report.shards), "file")
    yield "Files", f"<details><summary>{files}</summary>{table}</details>"


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return '<p class="quiet">Nothing is wrong.</p>'
    items = []
    for (severity, kind), group in groupby(
        findings, key=lambda finding: (finding.severity, finding.kind)
    ):
        listed = list(group)
        messages = [html_text(finding.message) for finding in listed[:SHOWN_PER_KIND]]
        if len(listed) > SHOWN_PER_KIND:
            more = len(listed) - SHOWN_PER_KIND
            messages.append(f"and {more:,} more ({escape(kind)}); --json lists all")
        items += [
            f'<li class="{severity}"><b>{severity}</b><span>{message}</span></li>'
            for message in messages
        ]
    return f'<ul class="findings">{"".join(items)}</ul>'


def _bytes_by_kind(report: "PrecisionReport") -> str:
    largest = max((row.bytes + row.scale_bytes for row in report.kinds), default=1) or 1
    lines = []
    for row in sorted(report.kinds, key=lambda row: -row.bytes - row.scale_bytes):
        css = (
            DTYPE_CLASSES.get(next(iter(row.dtypes), "missing"), "mixed")
            if len(row.dtypes) < 2
            else "mixed"
        )
        shape = " &times; ".join(str(size) for size in row.shapes[0]) if row.shapes else "-"
        scale = (
            f", scale {' &times; '.join(map(str, row.scale_shapes[0]))}" if row.scale_shapes else ""
        )
        width = 100 * (row.bytes + row.scale_bytes) / largest
        lines.append(
            f'<div class="bar"><span class="name">{escape(row.kind)}</span>'
            f'<span class="track"><i class="{css}" style="width:{width:.2f}%"></i></span>'
            f'<span class="amount">{size_text(row.bytes + row.scale_bytes)}</span>'
            f'<span class="detail">{row.found:,} &times; [{shape}] '
            f"{escape(row.precision)}{scale}</span></div>"
        )
    return _legend(report) + "".join(lines)


def _legend(report: "PrecisionReport") -> str:
    present = {layer for row in report.kinds for layer in row.layers}
    items = [
        f'<span><i class="{css}"></i>{DTYPE_NAMES[dtype]}</span>'
        for dtype, css in DTYPE_CLASSES.items()
        if dtype in present
    ]
    others = sorted(present - set(DTYPE_CLASSES))
    items += [f'<span><i class="mixed"></i>{escape(dtype)}</span>' for dtype in others]
    return f'<p class="legend">{"".join(items)}</p>'


def _grid(report: "PrecisionReport") -> str:
    lines = []
    for row in report.kinds:
        if not row.per_layer:
            continue
        classes = [DTYPE_CLASSES.get(dtype, "mixed") for dtype in row.layers]
        titles = [f"layer {layer}: {row.kind} {dtype}" for layer, dtype in enumerate(row.layers)]
        chart = charts.cell_row(classes, titles, f"{row.kind}: {row.precision}")
        lines.append(f'<div class="row"><span class="name">{escape(row.kind)}</span>{chart}</div>')
    axis = (
        '<div class="row axis"><span '
        f'class="name">layer</span><span>0</span><span>{report.layers - 1}</span></div>'
    )
    return _legend(report) + "".join(lines) + axis


def _module_lists(report: "PrecisionReport") -> str:
    needs = "".join(
        f"<li>needed by {escape(framework)}: "
        f"<code>{escape(', '.join(entries) or 'none')}</code></li>"
        for framework, entries in report.needed.items()
    )
    lists = []
    for listed in report.module_lists:
        items = "".join(
            f'<li class="{_verdict_class(listed, verdict)}"><b>{verdict.verdict}</b>'
            f"<span>{verdict.framework}: {html_text(verdict.reason)}</span></li>"
            for verdict in listed.verdicts
        )
        note = f'<p class="quiet">{html_text(listed.note)}</p>' if listed.note else ""
        lists.append(f'<h3>{escape(listed.origin)}</h3>{note}<ul class="findings">{items}</ul>')
    return f"<ul>{needs}</ul>{''.join(lists)}"


def _verdict_class(listed: ModuleList, verdict: EntryVerdict) -> str:
    if listed.is_rewritten(verdict):
        return "note"
    return VERDICT_CLASSES[verdict.verdict]


def _value_sections(values: ValueReport, kinds: Sequence[KindRow]) -> Iterator[tuple[str, str]]:
    convention = (
        f"<p>weight_scale_inv is the <b>{values.convention or 'unclear'}</b>: "
        f"{escape(values.evidence)}.</p>"
    )
    if values.layer_scales:
        yield (
            "Scales by layer",
            convention + _scale_bands(values.layer_scales) + _scale_table(values.scales),
        )
        yield "Codes", _histogram(values)
    norms = np.array(values.expert_norms)
    if norms.size and norms.any():
        image = (
            f'<img class="heat" src="{charts.heat_map(norms)}" alt="Norm of each expert, layers '
            f'down, experts across, from {norms.min():.3g} to {norms.max():.3g}">'
        )
        layer, expert = np.unravel_index(int(norms.argmin()), norms.shape)
        *others, last = [row.kind for row in kinds if row.group == "experts"]
        names = f"{', '.join(others)} and {last}"
        yield (
            "Expert norms",
            f"<p>Frobenius norm of {names} together (from {SAMPLE}): experts across, layers "
            f"down; dark {norms.min():.3g} (layer {layer}, expert {expert}) to bright "
            f"{norms.max():.3g}.</p>{image}",
        )
    if values.router_bias:
        lines = [
            (str(i), f"{low:.3f}", f"{high:.3f}")
            for i, (low, high) in enumerate(values.router_bias)
        ]
        table = html_table(("layer", "lowest", "highest"), lines)
        low = min(pair[0] for pair in values.router_bias)
        high = max(pair[1] for pair in values.router_bias)
        summary = f"{low:.3f} to {high:.3f}; by layer"
        yield "Router bias", f"<details><summary>{summary}</summary>{table}</details>"


def _scale_bands(rows: Sequence[ScaleRow]) -> str:
    good = [row for row in rows if np.isfinite(row.minimum)]
    if not good:
        return "<p>No scale is a positive number.</p>"
    limits = min(row.minimum for row in good), max(row.maximum for row in good)
    lines = []
    for kind in dict.fromkeys(row.kind for row in good):
        of_kind = [row for row in good if row.kind == kind]
        label = (
            f"{kind}: scales from {min(r.minimum for r in of_kind):.3g} to "
            f"{max(r.maximum for r in of_kind):.3g}"
        )
        band = charts.log_band(
            [row.minimum for row in of_kind],
            [row.median for row in of_kind],
            [row.maximum for row in of_kind],
            limits,
            label,
        )
        lines.append(f'<div class="row"><span class="name">{escape(kind)}</span>{band}</div>')
    note = (
        "Median (line) and range (band) of each layer's scales, first layer left, one logarithmic "
        f"axis from {limits[0]:.3g} (bottom) to {limits[1]:.3g} (top)."
    )
    return f'<p class="quiet">{note}</p>' + "".join(lines)


def _scale_table(rows: Sequence[ScaleRow]) -> str:
    cells = [
        (
            escape(row.kind),
            f"{row.blocks:,}",
            f"{row.minimum:.3e}",
            f"{row.median:.3e}",
            f"{row.maximum:.3e}",
            f"{row.low_range_blocks:,}",
        )
        for row in rows
    ]
    return html_table(
        ("kind", "blocks", "minimum", "median", "maximum", "largest code under 112"), cells
    )


def _histogram(values: ValueReport) -> str:
    counts = [values.histogram[code] + values.histogram[code | 0x80] for code in range(0x7F)]
    total = max(1, sum(counts))
    largest = max(*counts, 1)
    classes = ["beyond" if code > 0x77 else "fp8" for code in range(0x7F)]
    chart = charts.bars(
        [count / largest for count in counts], classes, "How often each magnitude code is used"
    )
    beyond = 100 * sum(counts[0x78:]) / total
    end = 100 * counts[0x7E] / total
    return (
        f'{chart}<p class="axis wide"><span>0</span><span>magnitude code</span><span>0x7e = '
        "448</span></p>"
        f"<p>{beyond:.3f} % of codes are above 240 (marked), which trn1, inf2 and trn2 read as "
        "infinity or NaN unless "
        f"halved; {end:.3f} % are at the range end, 448; {100 * counts[0] / total:.3f} % are zero. "
        f"Counted in {SAMPLE}.</p>"
    )
