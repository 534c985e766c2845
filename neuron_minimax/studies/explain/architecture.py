"""The architecture as a tree: of a checkpoint by its weights, and of a conversion by its plan.

Parameters and bytes of a node are those of the whole model (all layers, all experts); active
parameters are what one token is multiplied with: all of a layer but its experts,
num_experts_per_tok of those, one row of the embedding, or all of it where it is the head too.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.checkpoint.kinds import Wanted, require
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import ConvertedTensor, Specs, bind_rules
from neuron_minimax.convert.layout import Layout
from neuron_minimax.errors import CheckpointError, ConfigError
from neuron_minimax.families.family import Operation, Role
from neuron_minimax.inspection.document import Rendered


@dataclass
class Node(Rendered):
    """A module: a leaf with a shape and dtypes, or a group of `times` equal ones."""

    name: str
    times: int = 1
    chosen: int | None = None  # how many of `times` one token uses
    layers: int = 0  # how many layers have this weight
    note: str = ""
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
        """Return the child of that name; make it when it is not there."""
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
        """Render the tree as text, with shapes, dtypes, parameters and bytes."""
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
    """A weight to hang into the tree, by its dotted template over `{l}` and `{e}`."""

    template: str
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    parameters: int
    bytes: int
    active_share: float  # of the parameters, for one token
    layers: int  # that have it


def sources_of(directory: str | Path) -> tuple[ModelConfig, Specs]:
    """Return the spec of every tensor by name.

    They come from a checkpoint's headers, or from the family's table where there is only a
    config.json. Raises ConfigError without a config.json, CheckpointError when the files there are
    not those of the model.
    """
    directory = local_directory(directory)
    require(directory, Wanted.CONFIG, ConfigError)
    config = ModelConfig.from_dir(directory)
    if not list(Path(directory).glob("*.safetensors*")):
        return config, {wanted.name: wanted.spec for wanted in schema.declared(config)}
    checkpoint = Checkpoint.open(directory)
    checkpoint.require_usable()
    left_out = set(checkpoint.left_out)
    specs = {name: spec for name, spec in checkpoint.specs.items() if name not in left_out}
    return checkpoint.config, specs


def published_tree(config: ModelConfig, sources: Specs) -> Node:
    """Return the tree of a Hugging Face checkpoint, from the table and what is stored."""
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
                layers=len({wanted.layer for wanted in weights}),
            )
        )
    return _tree(f"{config.family.title} as published", leaves, config)


def converted_tree(config: ModelConfig, sources: Specs, layout: Layout | None = None) -> Node:
    """Return the tree of what a conversion of these sources would store, by the rules."""
    outputs = bind_rules(sources, config, layout or Layout())
    leaves = [
        _converted_leaf(config, [output for output in outputs if output.rule.target == template])
        for template in _in_model_order(config, outputs)
    ]
    return _tree(f"{config.family.title} as converted", leaves, config)


def _in_model_order(config: ModelConfig, outputs: Sequence[ConvertedTensor]) -> list[str]:
    """Return target templates in the order of use, which is that of the family's table."""
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
        layers=len({output.layer for output in weights}),
    )


def _active_share(source_template: str, experts: bool, config: ModelConfig) -> float:
    if experts:
        return config.num_experts_per_tok / config.num_local_experts
    if source_template != config.family.weight_of(Role.EMBEDDING).template:
        return 1.0
    return 1.0 if config.tie_word_embeddings else 1 / config.vocab_size


def _tree(title: str, leaves: Sequence[Leaf], config: ModelConfig) -> Node:
    root = Node(name=title)
    templates = {leaf.template for leaf in leaves}
    for leaf in leaves:
        node = root
        _add(node, leaf)
        for part in _path(leaf.template, templates):
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
        node.layers = leaf.layers if "{l}" in leaf.template else config.num_hidden_layers
        if config.tie_word_embeddings and leaf.template in _names_of_embedding(config):
            node.note = "also the head"
    if not root.parameters:
        raise CheckpointError("the model has no weights; check the checkpoint directory")
    _note_layers(root, config.num_hidden_layers)
    return root


def _path(template: str, templates: Collection[str]) -> list[str]:
    """Return the names on the way to a weight; without its own where its module has no other."""
    module, _, name = template.rpartition(".")
    alone = name == "weight" and f"{module}.bias" not in templates
    return (module if alone else template).split(".")


def _names_of_embedding(config: ModelConfig) -> tuple[str, str]:
    family = config.family
    return family.weight_of(Role.EMBEDDING).template, family.rule_of(Role.EMBEDDING).target


def _note_layers(node: Node, layers: int) -> None:
    """Note which modules belong to some of the layers only, once above all that they hold."""
    counts = {leaf.layers for leaf in node.leaves()}
    if counts == {layers}:
        return
    if len(counts) == 1:
        node.note = f"in {counts.pop()} of {layers} layers"
        return
    for child in node.children:
        _note_layers(child, layers)


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
    """Return the name, how many there are, how many of them one token uses, and what is noted."""
    name = f"{node.name} x {node.times}" if node.times > 1 else node.name
    used = f"{node.chosen} per token" if node.chosen is not None else ""
    return ", ".join(part for part in (name, used, node.note) if part)


def _shape_text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in shape)


def count_text(count: float) -> str:
    """Return a number of parameters as text, with three or more digits."""
    for unit, divisor in ((" B", 1e9), (" M", 1e6), (" k", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.2f}{unit}"
    return f"{count:.0f}"
