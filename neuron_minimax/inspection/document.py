"""A document of titled parts, rendered as text, Markdown or a self-contained HTML page, and the
tables and the page that all reports share.
"""

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path

from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import NeuronMiniMaxError, printable

WIDTH = 120  # columns of a report in plain text
STACKED = 8  # columns at most of a table whose cells a narrow screen shows below each other


class Rendered:
    """A result that prints as what `render` returns, and shows it in a notebook's cell."""

    def render(self) -> str:
        """The result as plain text."""
        raise NotImplementedError

    def __str__(self) -> str:
        return self.render()

    def _repr_html_(self) -> str:
        return f"<pre>{escape(self.render())}</pre>"


@dataclass(frozen=True, kw_only=True)
class Part:
    """A title, paragraphs, a table and an SVG figure; each but the title may be absent."""

    title: str
    text: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    figure: str = ""
    figure_file: str = ""


def to_text(title: str, parts: Sequence[Part]) -> str:
    """Plain text, paragraphs wrapped at 120 columns; figures are left out."""
    sections = [f"{title}\n{'=' * len(title)}"]
    for part in parts:
        lines = [f"{part.title}\n{'-' * len(part.title)}"]
        lines += [
            textwrap.fill(paragraph, WIDTH, break_long_words=False)
            for paragraph in _paragraphs(part)
        ]
        if part.rows:
            lines.append(table("", part.head, part.rows))
        sections.append("\n\n".join(lines))
    return "\n\n".join(sections) + "\n"


def to_markdown(title: str, parts: Sequence[Part]) -> str:
    """GitHub's Markdown, in which no name becomes HTML; a figure is a link to its file."""
    sections = [f"# {title}"]
    for part in parts:
        sections += [f"## {part.title}", *map(_without_html, _paragraphs(part))]
        if part.rows:
            lines = [part.head, ("---",) * len(part.head), *part.rows]
            escaped = [
                [_cell(_without_html(x)).replace("|", "\\|") for x in line] for line in lines
            ]
            sections.append("\n".join(f"| {' | '.join(line)} |" for line in escaped))
        if part.figure:
            sections.append(f"![{part.title}]({part.figure_file})")
    return "\n\n".join(sections) + "\n"


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One page without network or script; figures are in it."""
    sections = []
    for part in parts:
        content = "".join(f"<p>{html_text(paragraph)}</p>" for paragraph in _paragraphs(part))
        if part.rows:
            rows = [tuple(html_text(cell) for cell in row) for row in part.rows]
            content += html_table(part.head, rows)
        sections.append((part.title, content + part.figure))
    return html_page(title, f"<header><h1>{escape(title)}</h1></header>", sections)


def html_page(title: str, head: str, sections: Iterable[tuple[str, str]]) -> str:
    """A whole page of (title, HTML) sections below `head`, HTML too, without network or script."""
    style = files("neuron_minimax.inspection").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(
        f"<section><h2>{escape(name)}</h2>{content}</section>" for name, content in sections
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main>{head}\n{body}</main></body></html>\n"
    )


def html_text(text: str) -> str:
    """Text as HTML; what stands between backticks is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose cells, HTML already, stand below each other on a narrow screen, each beside its
    column's name; one of many columns scrolls.
    """
    names = [escape(cell) for cell in head]
    top = "".join(f"<th>{name}</th>" for name in names)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td data-head="{name}"><span>{cell}</span></td>'
            for name, cell in zip(names, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    css = "stacks" if len(names) <= STACKED else ""
    return (
        f'<div class="scroll"><table class="{css}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain text table: title (where there is one), header, rule, rows, two spaces between
    columns. A line end in a cell is escaped.
    """
    head = tuple(map(_cell, head))
    rows = [tuple(map(_cell, row)) for row in rows]
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


def wrapped(text: str, indent: str) -> str:
    """A paragraph wrapped at WIDTH columns, further lines two columns deeper."""
    lines = textwrap.wrap(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent + "  ", break_long_words=False
    )
    return "\n".join(lines)


def write_text(path: str | Path, text: str) -> None:
    """Write a report, whole or not at all, or into the pipe or device of that name; what a terminal
    would obey is escaped. Raises NeuronMiniMaxError naming it when that is impossible.
    """
    path = Path(path)
    data = printable(text, kept="\n\t").encode()
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(data)
        else:
            with replacing(path) as file:
                file.write(data)
    except OSError as error:
        raise NeuronMiniMaxError(
            f"{path} cannot be written ({error.strerror}); name another file"
        ) from None


def _cell(text: str) -> str:
    return printable(text, kept="")


def _without_html(text: str) -> str:
    return text.replace("<", "&lt;")


def _paragraphs(part: Part) -> list[str]:
    return [
        " ".join(paragraph.split()) for paragraph in part.text.split("\n\n") if paragraph.strip()
    ]
