"""The one table of MiniMax-M2's weights; reports, coverage checks, planners and tests are derived from it.

Dimension symbols: V vocabulary, H hidden, I intermediate, Q query width, K key/value width, E experts.
Source of the table: the headers of the published checkpoints.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod

from neuron_minimax.config import ModelConfig

SCALE_SUFFIX = "_scale_inv"
# Declared by config.json (`num_mtp_modules`), in no published checkpoint; tolerated and reported where present.
MTP_MARKERS = ("mtp", "nextn")


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One row: a name template over layer `{l}` and expert `{e}`, its dimensions, and how it is published."""

    template: str
    dimensions: tuple[str, ...]
    published_dtype: str
    kind: str
    module_group: str

    @property
    def quantized(self) -> bool:
        """Whether the published checkpoint stores it as FP8 codes with block scales."""
        return self.published_dtype == "F8_E4M3"

    @property
    def float32_only(self) -> bool:
        """Routing needs float32: bias values are 4.7 to 9.5, where BF16 steps are 0.03 to 0.06 and flip experts."""
        return self.published_dtype == "F32"

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.template

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.template


@dataclass(frozen=True, kw_only=True)
class Expected:
    """One tensor that a checkpoint of a given config holds: its name, row, shape, layer and expert."""

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


def _row(template: str, dimensions: str, dtype: str, kind: str, group: str) -> Weight:
    return Weight(template=template, dimensions=tuple(dimensions), published_dtype=dtype, kind=kind, module_group=group)


LAYER = "model.layers.{l}."
ATTENTION = LAYER + "self_attn."
MOE = LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{e}."

WEIGHTS: tuple[Weight, ...] = (
    _row("model.embed_tokens.weight", "VH", "BF16", "embed_tokens", "embedding"),
    _row(LAYER + "input_layernorm.weight", "H", "BF16", "input_layernorm", "norm"),
    _row(ATTENTION + "q_proj.weight", "QH", "F8_E4M3", "q_proj", "attention"),
    _row(ATTENTION + "k_proj.weight", "KH", "F8_E4M3", "k_proj", "attention"),
    _row(ATTENTION + "v_proj.weight", "KH", "F8_E4M3", "v_proj", "attention"),
    _row(ATTENTION + "o_proj.weight", "HQ", "F8_E4M3", "o_proj", "attention"),
    _row(ATTENTION + "q_norm.weight", "Q", "BF16", "q_norm", "norm"),
    _row(ATTENTION + "k_norm.weight", "K", "BF16", "k_norm", "norm"),
    _row(LAYER + "post_attention_layernorm.weight", "H", "BF16", "post_attention_layernorm", "norm"),
    _row(MOE + "gate.weight", "EH", "F32", "gate", "router"),
    _row(MOE + "e_score_correction_bias", "E", "F32", "e_score_correction_bias", "router"),
    _row(EXPERT + "w1.weight", "IH", "F8_E4M3", "w1", "experts"),
    _row(EXPERT + "w2.weight", "HI", "F8_E4M3", "w2", "experts"),
    _row(EXPERT + "w3.weight", "IH", "F8_E4M3", "w3", "experts"),
    _row("model.norm.weight", "H", "BF16", "norm", "norm"),
    _row("lm_head.weight", "VH", "BF16", "lm_head", "head"),
)


def dimension_sizes(config: ModelConfig) -> dict[str, int]:
    """The size behind each dimension symbol."""
    return {
        "V": config.vocab_size,
        "H": config.hidden_size,
        "I": config.intermediate_size,
        "Q": config.query_size,
        "K": config.key_value_size,
        "E": config.num_local_experts,
    }


def shape_of(weight: Weight, config: ModelConfig) -> tuple[int, ...]:
    sizes = dimension_sizes(config)
    return tuple(sizes[symbol] for symbol in weight.dimensions)


def block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Shape of the scales of a [rows, columns] weight: one per block, partial last blocks included."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


def expected(config: ModelConfig) -> Iterator[Expected]:
    """Every tensor of the published format, scales included, in layer order: 96,103 for the real config."""
    for weight in WEIGHTS:
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
    """Whether a tensor belongs to the multi-token-prediction modules, which this project does not run: named so, or a
    layer beyond the last where config.json declares such modules."""
    parts = name.split(".")
    if any(part.startswith(MTP_MARKERS) for part in parts):
        return True
    in_layer = parts[:2] == ["model", "layers"] and len(parts) > 2 and parts[2].isdigit()
    return in_layer and int(parts[2]) >= config.num_hidden_layers and bool(config.raw.get("num_mtp_modules"))


def count_parameters(config: ModelConfig) -> int:
    return sum(weight.elements for weight in expected(config) if not weight.is_scale)
