"""The tensors that a config implies, from its family's table of weights.

Reports, coverage checks, planners and tests are derived from it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod

from neuron_minimax.config import ModelConfig
from neuron_minimax.families.family import Weight
from neuron_minimax.fp8 import block_grid

SCALE_SUFFIX = "_scale_inv"


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One tensor that a checkpoint of a given config holds: its name, row, shape, layer and
    expert.
    """

    name: str
    weight: Weight
    shape: tuple[int, ...]
    dtype: str
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
    config.
    """
    for weight in config.family.weights:
        shape = shape_of(weight, config)
        grid = block_grid(shape, config.weight_block_size) if weight.quantized else ()
        for layer in range(config.num_hidden_layers) if weight.per_layer else (None,):
            for expert in range(config.num_local_experts) if weight.per_expert else (None,):
                name = weight.template.format(l=layer, e=expert)
                place = partial(Expected, weight=weight, layer=layer, expert=expert)
                yield place(name=name, shape=shape, dtype=weight.published_dtype)
                if weight.quantized:
                    yield place(name=scale_name(name), shape=grid, dtype="F32", is_scale=True)


def scale_name(weight_name: str) -> str:
    return weight_name + SCALE_SUFFIX


def is_mtp(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to the multi-token-prediction modules, which this project does not
    run: named so, or a layer beyond the last where config.json declares such modules.
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
