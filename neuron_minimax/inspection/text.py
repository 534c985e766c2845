"""The precision report as plain text of at most 120 columns."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from neuron_minimax.inspection.values import SAMPLE

if TYPE_CHECKING:
    from neuron_minimax.inspection.precision import Finding, PrecisionReport
    from neuron_minimax.inspection.values import ValueReport

WIDTH = 120
SHOWN_PER_KIND = 10  # findings of one kind that are printed; to_json has all
# Magnitudes of zero, of what trn1, inf2 and trn2 cannot read (256 to 448), and of 448.
CODE_GROUPS = ((0x00,), tuple(range(0x78, 0x7F)), (0x7E,))
MARKS = {"error": "ERROR", "warning": "warning", "note": "note"}


def render(report: "PrecisionReport") -> str:
    """Sections parted by an empty line."""
    return "\n\n".join(_sections(report)) + "\n"


def headline(report: "PrecisionReport") -> str:
    """What it is, how large, and whether it can be used: three lines."""
    config = (
        f"{report.layers} layers, {report.experts} experts, blocks of {report.block[0]} x "
        f"{report.block[1]}"
    )
    return (
        f"{report.directory}\n{report.tensors:,} tensors, {size_text(report.bytes)}, "
        f"{report.parameters:,} parameters; {config}\n"
        + ("Usable as it is." if report.usable else "NOT usable as it is: see the errors below.")
    )


def _sections(report: "PrecisionReport") -> Iterator[str]:
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


def _value_sections(values: "ValueReport") -> Iterator[str]:
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
            _wrapped(
                f"weight_scale_inv is the {values.convention or 'UNCLEAR'}: {values.evidence}", "  "
            ),
            f"  zero codes {100 * zeros / sampled:.3f} %, codes above 240 "
            f"{100 * beyond / sampled:.3f} %, at the range end (448) {100 * end / sampled:.3f} %",
        ]
    if values.router_bias:
        low = min(pair[0] for pair in values.router_bias)
        high = max(pair[1] for pair in values.router_bias)
        lines.append(
            f"  router bias from {low:.3f} to {high:.3f} over {len(values.router_bias)} layers"
        )
    yield "\n".join(lines)


def _finding_lines(findings: Sequence["Finding"]) -> Iterator[str]:
    shown: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        key = (finding.severity, finding.kind)
        shown[key] += 1
        if shown[key] <= SHOWN_PER_KIND:
            yield _wrapped(f"{MARKS[finding.severity]}: {finding.message}", "  ")
    for (severity, kind), count in shown.items():
        if count > SHOWN_PER_KIND:
            yield (
                f"  ... and {count - SHOWN_PER_KIND:,} more of {severity} ({kind}); --json lists "
                "all"
            )


def _list_lines(report: "PrecisionReport") -> Iterator[str]:
    yield "modules_to_not_convert"
    for framework, entries in report.needed.items():
        yield f"  needed by {framework}: {list(entries)}"
    for listed in report.module_lists:
        yield _wrapped(f"{listed.origin} has {list(listed.entries)}", "  ")
        for verdict in listed.verdicts:
            yield _wrapped(f"{verdict.framework}: {verdict.verdict}: {verdict.reason}", "    ")


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    if not shapes:
        return "-"
    first = " x ".join(str(size) for size in shapes[0]) or "scalar"
    return first if len(shapes) == 1 else f"{first} and {len(shapes) - 1} other"


def size_text(count: int) -> str:
    """Decimal units, as disks and the model card count."""
    for unit, divisor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:,.1f} {unit}"
    return f"{count} B"


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: title (where there is one), header, rule, rows, two spaces between
    columns.
    """
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in rows
    ]
    top = "  ".join(cell.ljust(width) for cell, width in zip(head, widths, strict=True)).rstrip()
    first = [title] if title else []
    return "\n".join(
        [
            *first,
            f"  {top}",
            "  " + "-" * (sum(widths) + 2 * len(widths) - 2),
            *(f"  {x}" for x in lines),
        ]
    )


def _wrapped(text: str, indent: str) -> str:
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False
    )
    return "\n".join(lines)
