"""A document of titled parts, rendered as text, Markdown or a self-contained HTML page."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files

from neuron_minimax.inspection.text import WIDTH, table


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
    """GitHub's Markdown; a figure is a link to its file."""
    sections = [f"# {title}"]
    for part in parts:
        sections += [f"## {part.title}", *_paragraphs(part)]
        if part.rows:
            lines = [part.head, ("---",) * len(part.head), *part.rows]
            escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
            sections.append("\n".join(f"| {' | '.join(line)} |" for line in escaped))
        if part.figure:
            sections.append(f"![{part.title}]({part.figure_file})")
    return "\n\n".join(sections) + "\n"


def to_html(title: str, parts: Sequence[Part]) -> str:
    """One page without network or script; figures are in it."""
    style = files("neuron_minimax.inspection").joinpath("page.css").read_text(encoding="utf-8")
    sections = []
    for part in parts:
        content = "".join(f"<p>{escape(paragraph)}</p>" for paragraph in _paragraphs(part))
        if part.rows:
            top = "".join(f"<th>{escape(cell)}</th>" for cell in part.head)
            body = "".join(
                f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in part.rows
            )
            content += (
                f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
                f"<tbody>{body}</tbody></table></div>"
            )
        sections.append(f"<section><h2>{escape(part.title)}</h2>{content}{part.figure}</section>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n"
        f"<body><main><header><h1>{escape(title)}</h1></header>\n{''.join(sections)}</main></body></html>\n"
    )


def _paragraphs(part: Part) -> list[str]:
    return [
        " ".join(paragraph.split()) for paragraph in part.text.split("\n\n") if paragraph.strip()
    ]
