"""Block diagrams of the architecture as SVG, and the files that show it."""

from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path

from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.inspection.document import write_text
from neuron_minimax.studies.explain.architecture import (
    Node,
    converted_tree,
    count_text,
    label,
    published_tree,
    sources_of,
)

WIDTH = 820
LEAF_WIDTH = 168
NOTED_WIDTH = 230
LEAF_HEIGHT = 58
HEAD = 30
GAP = 10
PAD = 12
MARGIN = 40
STYLE = """
text { font: 12px system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #16191d; }
.name { font-weight: 600; font-size: 13px; } .quiet { fill: #5a6270; font-size: 11.5px; }
.page { fill: #f6f7f9; } .group { fill: #ffffff; fill-opacity: 0.75; stroke: #c3cad3; }
.leaf { fill: #ffffff; stroke: #c3cad3; }
.F8_E4M3 { fill: #2b6cb0; } .BF16 { fill: #d97706; }
.F32 { fill: #0f8a6d; } .mixed { fill: #a3389f; }
.flow { stroke: #5a6270; fill: none; stroke-width: 1.5; } .head { fill: #5a6270; }
.residual { stroke: #8a94a3; fill: none; stroke-width: 1.5; stroke-dasharray: 5 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #e8ebef; } .quiet { fill: #a3adba; } .page { fill: #101317; }
  .group { fill: #191e24; stroke: #3a434e; } .leaf { fill: #20262d; stroke: #3a434e; }
  .F8_E4M3 { fill: #5aa2e8; } .BF16 { fill: #f2a541; } .F32 { fill: #37c8a0; }
  .flow { stroke: #a3adba; } .head { fill: #a3adba; } .residual { stroke: #6b7583; }
}
"""


@dataclass(frozen=True)
class Drawing:
    """A drawn part and its height."""

    svg: str
    height: float


def render_diagram(tree: Node) -> str:
    """Render a standalone SVG file, light and dark."""
    body = _stack(tree, MARGIN, 64, WIDTH - 2 * MARGIN, flow=True)
    title = f"{tree.name}: {count_text(tree.parameters)} parameters, {size_text(tree.bytes, 2)}"
    active = f"{count_text(tree.active)} parameters active per token"
    height = 64 + body.height + 24
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(title)}"><style>{STYLE}</style><rect class="page" width="{WIDTH}" '
        f'height="{height:g}"/>'
        f"{_text(MARGIN, 28, title, 'name')}{_text(MARGIN, 46, active, 'quiet')}"
        f"{_legend()}{body.svg}</svg>\n"
    )


def _legend() -> str:
    parts = []
    for place, (css, name) in enumerate(
        (("F8_E4M3", "FP8 with scales"), ("BF16", "BF16"), ("F32", "float32"))
    ):
        x = WIDTH - MARGIN - 290 + (0, 140, 215)[place]
        parts.append(
            f'<rect class="{css}" x="{x}" y="19" width="11" height="11" '
            f'rx="2"/>{_text(x + 17, 29, name, "quiet")}'
        )
    return "".join(parts)


def _collapsed(node: Node) -> Node:
    """Make a chain of single children one node with a dotted name."""
    while len(node.children) == 1 and node.times == 1:
        child = node.children[0]
        named = {"name": f"{node.name}.{child.name}", "note": node.note or child.note}
        node = Node(**{**vars(child), **named})
    return node


def _stack(node: Node, x: float, y: float, width: float, flow: bool) -> Drawing:
    """Draw the children below each other; runs of leaves side by side where no data flows."""
    parts: list[str] = []
    top = y
    places: list[tuple[Node, float, float]] = []
    for run in _runs([_collapsed(child) for child in node.children], flow):
        block = _row(run, x, y, width) if run[0].is_leaf else _group(run[0], x, y, width)
        if flow and y > top:
            parts.append(_arrow(x + width / 2, y - 2 * GAP, y))
        parts.append(block.svg)
        places.append((run[0], y, y + block.height))
        y += block.height + (2 * GAP if flow else GAP)
    if flow:
        parts += _residuals(places, x + width)
    return Drawing("".join(parts), y - top - (2 * GAP if flow else GAP))


def _runs(nodes: list[Node], flow: bool) -> Iterator[list[Node]]:
    run: list[Node] = []
    for node in nodes:
        if run and (flow or not node.is_leaf or not run[-1].is_leaf):
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def _row(leaves: list[Node], x: float, y: float, width: float) -> Drawing:
    """Draw leaf boxes, as many side by side as fit."""
    least = NOTED_WIDTH if any(leaf.note for leaf in leaves) else LEAF_WIDTH
    across = max(1, min(len(leaves), int((width + GAP) // (least + GAP))))
    box = (width - (across - 1) * GAP) / across
    parts = [
        _leaf(
            leaf,
            x + (place % across) * (box + GAP),
            y + (place // across) * (LEAF_HEIGHT + GAP),
            box,
        )
        for place, leaf in enumerate(leaves)
    ]
    rows = ceil_div(len(leaves), across)
    return Drawing("".join(parts), rows * LEAF_HEIGHT + (rows - 1) * GAP)


def _leaf(leaf: Node, x: float, y: float, width: float) -> str:
    css = leaf.dtypes[0] if len(leaf.dtypes) == 1 else "mixed"
    shape = " × ".join(str(size) for size in leaf.shape)
    noted = f"{shape}, {leaf.note}" if leaf.note else shape
    size = f"{count_text(leaf.parameters)}, {size_text(leaf.bytes, 2)}"
    return (
        f'<rect class="leaf" x="{x:g}" y="{y:g}" width="{width:g}" height="{LEAF_HEIGHT}" rx="6"/>'
        f'<rect class="{css}" x="{x:g}" y="{y:g}" width="5" height="{LEAF_HEIGHT}" rx="2"/>'
        f"{_text(x + 14, y + 18, leaf.name, 'name')}{_text(x + 14, y + 35, noted)}"
        f"{_text(x + 14, y + 51, size, 'quiet')}"
    )


def _group(node: Node, x: float, y: float, width: float) -> Drawing:
    # The data passes through a layer's parts, and through layers, one after another.
    is_layer = _is_layer(node)
    flow = is_layer or any(_is_layer(child) for child in node.children)
    head_height = HEAD + (GAP if is_layer else 0)
    inner = _stack(node, x + PAD, y + head_height, width - 2 * PAD - (24 if is_layer else 0), flow)
    height = head_height + inner.height + PAD
    active = count_text(node.active)
    sums = f"{count_text(node.parameters)}, {size_text(node.bytes, 2)}, {active} active"
    head = (
        f'<rect class="group" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"/>'
        f"{_text(x + PAD, y + 20, label(node), 'name')}"
        f"{_text(x + width - PAD, y + 20, sums, 'quiet', 'end')}"
    )
    return Drawing(head + inner.svg, height)


def _is_layer(node: Node) -> bool:
    return node.times > 1 and node.chosen is None


def _residuals(places: list[tuple[Node, float, float]], right: float) -> list[str]:
    """Draw a dashed path around every norm and the group behind it, into the sum below."""
    paths = []
    for (norm, top, _), (group, _, bottom) in pairwise(places):
        if norm.is_leaf and len(norm.shape) == 1 and not group.is_leaf:
            paths.append(
                f'<path class="residual" d="M{right:g} {top - 8:g} h14 V{bottom + 8:g} h-14"/>'
                f"{_text(right - 2, bottom + 12, '+', 'name', 'end')}"
            )
    return paths


def _arrow(x: float, start: float, end: float) -> str:
    return (
        f'<path class="flow" d="M{x:g} {start:g} V{end - 5:g}"/><path class="head" d="M{x - 4:g} '
        f'{end - 7:g} h8 l-4 7 z"/>'
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    return f'<text class="{css}" x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def write_structure(directory: str | Path, output: Path) -> str:
    """Write both trees to `output` and both diagrams beside it as SVG; return the text.

    Raises ConfigError or CheckpointError when the model cannot be read, NeuronMiniMaxError for a
    file that cannot be written.
    """
    config, sources = sources_of(directory)
    trees = {"": published_tree(config, sources), "_converted": converted_tree(config, sources)}
    text = "\n\n".join(tree.render() for tree in trees.values()) + "\n"
    write_text(output, text)
    drawings = {output.with_name(f"{output.stem}{end}.svg"): tree for end, tree in trees.items()}
    for path, tree in drawings.items():
        write_text(path, render_diagram(tree))
    return f"{text}\nwritten: {', '.join(str(path) for path in (output, *drawings))}\n"
