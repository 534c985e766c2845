"""The architecture as a tree: of a checkpoint, from the table of weights, and of a conversion, from
its plan.

Parameters and bytes of a node are those of the whole model (all layers, all experts); active
parameters are what one token is multiplied with: all of a layer but its experts,
num_experts_per_tok of those, one row of the embedding.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise
from math import prod
from pathlib import Path

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import ConvertedTensor, Specs, bind_rules
from neuron_minimax.convert.layout import Layout
from neuron_minimax.errors import CheckpointError
from neuron_minimax.families.family import Operation
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.inspection.document import write_text


@dataclass
class Node:
    """A module: a leaf with a shape and dtypes, or a group of `times` equal ones."""

    name: str
    times: int = 1
    chosen: int | None = None  # how many of `times` one token uses
    shape: tuple[int, ...] = ()
    scale_shape: tuple[int, ...] = ()
    dtypes: tuple[str, ...] = ()
    parameters: int = 0
    bytes: int = 0
    active: float = 0
    children: list["Node"] = field(default_factory=list)

    @property
    def is_leaf(self) -> bool:
        return not self.children

    def child(self, name: str) -> "Node":
        """The child of that name, made when it is not there."""
        found = next((node for node in self.children if node.name == name), None)
        if found is None:
            found = Node(name=name)
            self.children.append(found)
        return found

    def leaves(self) -> Iterator["Node"]:
        if self.is_leaf:
            yield self
        for node in self.children:
            yield from node.leaves()

    def render(self) -> str:
        """The tree as text: name, shape, scale shape, dtype, parameters, bytes, active
        parameters.
        """
        rows = [
            ("", "shape", "scales", "dtype", "parameters", "bytes", "active"),
            *_rows(self, "", ""),
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if column < 4 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


@dataclass(frozen=True)
class Leaf:
    """A weight to hang into the tree: dotted template over `{l}` and `{e}`, and what is stored
    under it.
    """

    template: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    active_share: float  # of the parameters, for one token


def sources_of(directory: str | Path) -> tuple[ModelConfig, Specs]:
    """Every tensor by name: those of a checkpoint's headers, or the table's where there is only a
    config.json.

    Raises ConfigError without a config.json, CheckpointError when the files there are not those of
    the model.
    """
    config = ModelConfig.from_dir(directory)
    if not list(Path(directory).glob("*.safetensors*")):
        return config, {wanted.name: wanted.spec for wanted in schema.expected(config)}
    checkpoint = Checkpoint.open(directory)
    checkpoint.require_usable()
    left_out = set(checkpoint.mtp_names)
    return config, {name: spec for name, spec in checkpoint.specs.items() if name not in left_out}


def published_tree(config: ModelConfig, sources: Specs) -> Node:
    """The tree of a Hugging Face checkpoint, from the table and what is stored."""
    grouped: dict[str, list[schema.Expected]] = {}
    for wanted in schema.expected(config):
        grouped.setdefault(wanted.weight.template, []).append(wanted)
    leaves = []
    for template, all_wanted in grouped.items():
        weights = [wanted for wanted in all_wanted if not wanted.is_scale]
        scales = [wanted for wanted in all_wanted if wanted.is_scale and wanted.name in sources]
        leaves.append(
            Leaf(
                template=template,
                shape=weights[0].shape,
                scale_shape=scales[0].shape if scales else (),
                dtypes=tuple(dict.fromkeys(sources[wanted.name].dtype for wanted in weights)),
                parameters=sum(wanted.elements for wanted in weights),
                bytes=sum(sources[wanted.name].nbytes for wanted in (*weights, *scales)),
                active_share=_active_share(template, "{e}" in template, config),
            )
        )
    return _tree("MiniMax-M2 as published", leaves, config)


def converted_tree(config: ModelConfig, sources: Specs, layout: Layout | None = None) -> Node:
    """The tree of what a conversion of these sources would store, by the rules."""
    outputs = bind_rules(sources, config, layout or Layout())
    leaves = [
        _converted_leaf(config, [output for output in outputs if output.rule.target == template])
        for template in _in_model_order(config, outputs)
    ]
    return _tree("MiniMax-M2 as converted", leaves, config)


def write_structure(directory: str | Path, output: Path) -> str:
    """Write both trees to `output` and both diagrams beside it as SVG; returns the text.

    Raises ConfigError or CheckpointError when there is no such model, NeuronMiniMaxError for a file
    that cannot be written.
    """

    config, sources = sources_of(directory)
    trees = {"": published_tree(config, sources), "_converted": converted_tree(config, sources)}
    text = "\n\n".join(tree.render() for tree in trees.values()) + "\n"
    write_text(output, text)
    drawings = {output.with_name(f"{output.stem}{end}.svg"): tree for end, tree in trees.items()}
    for path, tree in drawings.items():
        write_text(path, render_diagram(tree))
    return f"{text}\nwritten: {', '.join(str(path) for path in (output, *drawings))}\n"


def _in_model_order(config: ModelConfig, outputs: Sequence[ConvertedTensor]) -> list[str]:
    """Target templates in the order in which the model uses them, which is the table's."""
    order = {weight.template: place for place, weight in enumerate(config.family.weights)}
    first_source = {output.rule.target: output.rule.sources[0] for output in outputs}
    return sorted(first_source, key=lambda target: order[first_source[target]])


def _converted_leaf(config: ModelConfig, outputs: Sequence[ConvertedTensor]) -> Leaf:
    weights = [output for output in outputs if not output.is_scale]
    scales = [output for output in outputs if output.is_scale]
    rule = weights[0].rule
    return Leaf(
        template=rule.target,
        shape=weights[0].shape,
        scale_shape=scales[0].shape if scales else (),
        dtypes=tuple(dict.fromkeys(output.dtype for output in weights)),
        parameters=sum(prod(output.shape) for output in weights),
        bytes=sum(output.nbytes for output in outputs),
        active_share=_active_share(
            rule.sources[0], rule.operation is Operation.STACK_TRANSPOSED, config
        ),
    )


def _active_share(source_template: str, experts: bool, config: ModelConfig) -> float:
    if experts:
        return config.num_experts_per_tok / config.num_local_experts
    embedding = next(
        weight.template for weight in config.family.weights if weight.module_group == "embedding"
    )
    return 1 / config.vocab_size if source_template == embedding else 1.0


def _tree(title: str, leaves: Iterable[Leaf], config: ModelConfig) -> Node:
    root = Node(name=title)
    for leaf in leaves:
        node = root
        _add(node, leaf)
        for part in leaf.template.removesuffix(".weight").split("."):
            if part == "{l}":
                node.times = config.num_hidden_layers
            elif part == "{e}":
                node.times = config.num_local_experts
                node.chosen = config.num_experts_per_tok
            else:
                node = node.child(part)
                _add(node, leaf)
        node.shape = leaf.shape
        node.scale_shape = leaf.scale_shape
        node.dtypes = leaf.dtypes
    if not root.parameters:
        raise CheckpointError("the model has no weights; check the checkpoint directory")
    return root


def _add(node: Node, leaf: Leaf) -> None:
    node.parameters += leaf.parameters
    node.bytes += leaf.bytes
    node.active += leaf.parameters * leaf.active_share


def _rows(node: Node, first: str, rest: str) -> Iterator[tuple[str, ...]]:
    yield (
        first + label(node),
        _shape_text(node.shape),
        _shape_text(node.scale_shape),
        "+".join(node.dtypes),
        count_text(node.parameters),
        size_text(node.bytes, 2),
        count_text(node.active),
    )
    for place, child in enumerate(node.children):
        last = place == len(node.children) - 1
        yield from _rows(
            child, rest + ("└── " if last else "├── "), rest + ("    " if last else "│   ")
        )


def label(node: Node) -> str:
    """Name, how many there are, and how many of them one token uses."""
    if node.chosen is not None:
        return f"{node.name} x {node.times}, {node.chosen} per token"
    return f"{node.name} x {node.times}" if node.times > 1 else node.name


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def count_text(count: float) -> str:
    """A number of parameters, three or more digits of it."""
    for unit, divisor in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.2f}{unit}"
    return f"{count:.0f}"


# The diagram.

WIDTH = 820
LEAF_WIDTH = 168
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
class Block:
    """A drawn part and its height."""

    svg: str
    height: float


def render_diagram(tree: Node) -> str:
    """A standalone SVG file, light and dark."""
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
    """A chain of single children as one node with a dotted name."""
    while len(node.children) == 1 and node.times == 1:
        child = node.children[0]
        node = Node(**{**vars(child), "name": f"{node.name}.{child.name}"})
    return node


def _stack(node: Node, x: float, y: float, width: float, flow: bool) -> Block:
    """The children below each other: runs of leaves side by side unless the data flows through one
    after another.
    """
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
    return Block("".join(parts), y - top - (2 * GAP if flow else GAP))


def _runs(nodes: list[Node], flow: bool) -> Iterator[list[Node]]:
    run: list[Node] = []
    for node in nodes:
        if run and (flow or not node.is_leaf or not run[-1].is_leaf):
            yield run
            run = []
        run.append(node)
    if run:
        yield run


def _row(leaves: list[Node], x: float, y: float, width: float) -> Block:
    """Leaf boxes, as many side by side as fit."""
    across = max(1, min(len(leaves), int((width + GAP) // (LEAF_WIDTH + GAP))))
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
    return Block("".join(parts), rows * LEAF_HEIGHT + (rows - 1) * GAP)


def _leaf(leaf: Node, x: float, y: float, width: float) -> str:
    css = leaf.dtypes[0] if len(leaf.dtypes) == 1 else "mixed"
    shape = " × ".join(str(size) for size in leaf.shape)
    size = f"{count_text(leaf.parameters)}, {size_text(leaf.bytes, 2)}"
    return (
        f'<rect class="leaf" x="{x:g}" y="{y:g}" width="{width:g}" height="{LEAF_HEIGHT}" rx="6"/>'
        f'<rect class="{css}" x="{x:g}" y="{y:g}" width="5" height="{LEAF_HEIGHT}" rx="2"/>'
        f"{_text(x + 14, y + 18, leaf.name, 'name')}{_text(x + 14, y + 35, shape)}"
        f"{_text(x + 14, y + 51, size, 'quiet')}"
    )


def _group(node: Node, x: float, y: float, width: float) -> Block:
    is_layer = _is_layer(
        node
    )  # the data passes through its parts, and through layers, one after another
    flow = is_layer or any(_is_layer(child) for child in node.children)
    head_height = HEAD + (GAP if is_layer else 0)
    inner = _stack(node, x + PAD, y + head_height, width - 2 * PAD - (24 if is_layer else 0), flow)
    height = head_height + inner.height + PAD
    sums = (
        f"{count_text(node.parameters)}, {size_text(node.bytes, 2)}, "
        f"{count_text(node.active)} active"
    )
    head = (
        f'<rect class="group" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"/>'
        f"{_text(x + PAD, y + 20, label(node), 'name')}"
        f"{_text(x + width - PAD, y + 20, sums, 'quiet', 'end')}"
    )
    return Block(head + inner.svg, height)


def _is_layer(node: Node) -> bool:
    return node.times > 1 and node.chosen is None


def _residuals(places: list[tuple[Node, float, float]], right: float) -> list[str]:
    """A dashed path around every norm and the group behind it, back into the sum below."""
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
