"""The tensors that a config implies, from its family's table of weights, and what differs.

Reports, coverage checks, planners and tests are derived from it.
"""

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

from neuron_minimax.checkpoint.header import HasSpec, TensorEntry, TensorSpec
from neuron_minimax.config import ModelConfig
from neuron_minimax.families.family import Role, Weight
from neuron_minimax.fp8 import block_grid

SCALE_SUFFIX = "_scale_inv"
DENSE_DTYPES = ("BF16", "F32")


@dataclass(frozen=True, kw_only=True)
class Expected(HasSpec):
    """One tensor that a checkpoint of a given config holds, its row, layer and expert."""

    spec: TensorSpec
    weight: Weight
    is_scale: bool = False
    layer: int | None = None
    expert: int | None = None

    @cached_property
    def elements(self) -> int:
        return prod(self.shape)


def dimension_sizes(config: ModelConfig) -> dict[str, int]:
    """The size behind each dimension symbol."""
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "Q": config.query_size,
        "K": config.key_value_size,
        "E": config.num_local_experts,
        "D": config.head_dim,
    }


def shape_of(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    sizes = dimension_sizes(config)
    return tuple(sizes[symbol] for symbol in weight.dimensions)


def expected(config: ModelConfig) -> Iterator[Expected]:
    """Every tensor of the published format, scales included, in layer order: 96,103 for the real
    config. A tied head is not among them.
    """
    for weight in config.family.weights:
        if is_tied(weight, config):
            continue
        shape = shape_of(weight, config)
        grid = block_grid(shape, config.weight_block_size) if weight.quantized else ()
        for layer in range(config.num_hidden_layers) if weight.per_layer else (None,):
            for expert in range(config.num_local_experts) if weight.per_expert else (None,):
                name = weight.template.format(l=layer, e=expert)
                place = partial(Expected, weight=weight, layer=layer, expert=expert)
                yield place(spec=TensorSpec(name, weight.published_dtype, shape))
                if weight.quantized:
                    yield place(spec=TensorSpec(scale_name(name), "F32", grid), is_scale=True)


def is_tied(weight: Weight, config: ModelConfig) -> bool:
    """Return whether the embedding stands for this weight: the head, where config.json says so."""
    return config.tie_word_embeddings and weight.role is Role.HEAD


def with_stored_head(config: ModelConfig, names: Container[str]) -> ModelConfig:
    """The config of a checkpoint with tensors of these names.

    A head that is stored is used, as transformers does, though config.json ties it.
    """
    heads = {weight.template for weight in config.family.weights if weight.role is Role.HEAD}
    if not config.tie_word_embeddings or not any(head in names for head in heads):
        return config
    raw = {**config.raw, "tie_word_embeddings": False}
    return replace(config, tie_word_embeddings=False, raw=raw)


def scale_name(weight_name: str) -> str:
    return weight_name + SCALE_SUFFIX


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Return whether a tensor belongs to the multi-token-prediction modules, which this project
    does not run: named so, or a layer beyond the last where config.json declares such modules.
    """
    parts = name.split(".")
    if any(part.startswith(config.family.ignored_markers) for part in parts):
        return True
    in_layer = parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit()
    return (
        in_layer
        and int(parts[2]) >= config.num_hidden_layers
        and bool(config.raw.get("num_mtp_modules"))
    )


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a checkpoint: the file or tensor it concerns, and the sentence that says
    it.
    """

    subject: str
    message: str
    kind: str

    def __str__(self) -> str:
        return self.message


def check_against_schema(
    entries: Mapping[str, TensorEntry], config: ModelConfig, tolerated: set[str]
) -> Iterator[Problem]:
    """Yield every way in which the entries differ from what the table expects for this config."""
    known: set[str] = set()
    for wanted in expected(config):
        known.add(wanted.name)
        entry = entries.get(wanted.name)
        if wanted.is_scale:
            yield from _check_scale(
                entry, entries.get(wanted.name.removesuffix(SCALE_SUFFIX)), wanted
            )
        elif entry is None:
            yield Problem(
                wanted.name,
                f"{wanted.name} is missing; config.json implies {list(wanted.shape)}",
                "missing",
            )
        else:
            yield from _check_weight(entry, wanted)
    for name, entry in entries.items():
        if name not in known and name not in tolerated:
            yield Problem(
                name,
                f"{name} in {entry.shard} is no weight of this model; check that config.json "
                "belongs to it",
                "extra",
            )


def _check_weight(entry: TensorEntry, wanted: Expected) -> Iterator[Problem]:
    where = f"{entry.name} in {entry.shard}"
    if entry.shape != wanted.shape:
        yield Problem(
            entry.name,
            f"{where} has shape {list(entry.shape)}, but config.json implies {list(wanted.shape)}; "
            "check that both come from the same model",
            "shape",
        )
    allowed = ("F32",) if wanted.weight.float32_only else DENSE_DTYPES
    allowed = ("F8_E4M3", *allowed) if wanted.weight.quantized else allowed
    if entry.dtype not in allowed:
        reason = ": routing in less flips experts" if wanted.weight.float32_only else ""
        yield Problem(
            entry.name,
            f"{where} is {entry.dtype}; expected {' or '.join(allowed)}{reason}",
            "dtype",
        )


def _check_scale(
    scale: TensorEntry | None, weight: TensorEntry | None, wanted: Expected
) -> Iterator[Problem]:
    fp8_weight = weight is not None and weight.dtype == "F8_E4M3"
    name = wanted.name
    if scale is None:
        if fp8_weight:
            yield Problem(
                name,
                f"{name} is missing, but its weight is FP8; without it the weight is raw codes",
                "scale",
            )
    elif not fp8_weight:
        found = "missing" if weight is None else weight.dtype
        yield Problem(
            name,
            f"{name} in {scale.shard} scales a weight that is {found}; expected F8_E4M3",
            "scale",
        )
    elif scale.shape != wanted.shape or scale.dtype != "F32":
        yield Problem(
            name,
            f"{name} in {scale.shard} is {scale.dtype} {list(scale.shape)}; expected F32 "
            f"{list(wanted.shape)}, one scale for each block of the weight",
            "scale",
        )
