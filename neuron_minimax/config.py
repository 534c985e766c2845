"""The model's configuration, read from either style of config.json and checked when it is made."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_minimax.errors import ConfigError, shown
from neuron_minimax.families import FAMILIES, Family, Role, family_of, foreign
from neuron_minimax.families.family import LayerKind, Weight
from neuron_minimax.families.fields import (
    ADVICE,
    ConfigFields,
    QuantizationFields,
    RopeFields,
    require_no_contradiction,
    require_no_part,
)
from neuron_minimax.files import parse_json, read_json

REQUIRED_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
EXPERT_COUNTS = ("num_local_experts", "num_experts_per_tok")
# Read where config.json has them; their defaults are those of ModelConfig.
OPTIONAL_FIELDS = (
    "rms_norm_eps",
    "bos_token_id",
    "tie_word_embeddings",
    "shared_intermediate_size",
)
# Far beyond any model, and near enough that what is derived from a config can be counted and shown.
LARGEST = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 20,
    "intermediate_size": 1 << 20,
    "num_hidden_layers": 512,
    "num_attention_heads": 1 << 14,
    "num_key_value_heads": 1 << 14,
    "num_local_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14,
    "max_position_embeddings": 1 << 30,
    "head_dim": 1 << 16,
    "rotary_dim": 1 << 16,
    "shared_intermediate_size": 1 << 20,
    "dense_intermediate_size": 1 << 20,
}
LARGEST_BLOCK = 1 << 20
LARGEST_ROPE_THETA = 1e15
MOST_TENSORS = 500_000  # of a checkpoint; the published ones have 96,103
CONFIG_BYTES = 8 << 20
MODULE_NAME = re.compile(r"[\w.-]*")
MOST_PATTERNS = 32  # entries of modules_to_not_convert that are more than a name
ROPE_TYPES = ("default", "linear", "yarn")
CONVERTED_SECTION = "neuron_minimax"  # what a conversion adds to config.json


def expert_share(experts: int, rank: int, ranks: int) -> range:
    """Numbers of the experts of one of `ranks` expert-parallel ranks, in order: as many on each, or
    from some rank on one fewer, beside which zeros are held that the router does not know.
    """
    fewest, fuller_ranks = divmod(experts, ranks)
    first = rank * fewest + min(rank, fuller_ranks)
    return range(first, first + fewest + (rank < fuller_ranks))


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Dimensions and constants of one model. Sizes are element counts."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rotary_dim: int
    num_local_experts: int  # 0, as the next one, in a family whose layers have a dense MLP
    num_experts_per_tok: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None
    rms_norm_eps: float = 1e-6
    weight_block_size: tuple[int, int] = (128, 128)
    declares_fp8: bool = False
    modules_to_not_convert: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    tie_word_embeddings: bool = False  # the head is the embedding
    norm_topk_prob: bool = True  # the affinities of the chosen experts sum to 1
    shared_intermediate_size: int = 0  # of the expert that every token has, where there is one
    dense_layers: tuple[int, ...] = ()  # layers without experts, of a family with experts
    dense_intermediate_size: int = 0  # of these layers
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        positive = [*_required_sizes(self.family), "head_dim", "rotary_dim"]
        if self.family.architecture.shared_expert:
            positive.append("shared_intermediate_size")
        if self.dense_layers:
            positive.append("dense_intermediate_size")
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            least = 1 if name in positive else 0
            if not least <= value <= largest:
                raise ConfigError(
                    f"config.json: {name} is {shown(value)}; expected {least} to {largest}"
                )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"config.json: num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"config.json: num_experts_per_tok {self.num_experts_per_tok} is more than "
                f"num_local_experts {self.num_local_experts}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"config.json: rotary_dim {self.rotary_dim} must be even and at most head_dim "
                f"{self.head_dim}"
            )
        if not 0 < self.rms_norm_eps < 1 or not 1 < self.rope_theta <= LARGEST_ROPE_THETA:
            raise ConfigError(
                f"config.json: rms_norm_eps {self.rms_norm_eps} or rope_theta {self.rope_theta} is "
                "out of range"
            )
        if not all(1 <= size <= LARGEST_BLOCK for size in self.weight_block_size):
            raise ConfigError(
                f"config.json: weight_block_size {list(self.weight_block_size)} is not two sizes "
                f"of 1 to {LARGEST_BLOCK}"
            )
        if self.tensor_count > MOST_TENSORS:
            raise ConfigError(
                f"config.json: num_hidden_layers {self.num_hidden_layers} and num_local_experts "
                f"{self.num_local_experts} imply {self.tensor_count} tensors; at most "
                f"{MOST_TENSORS} are supported"
            )

    def layers_with(self, weight: Weight) -> Sequence[int | None]:
        """Return the layers that have a weight; [None] when it belongs to no layer."""
        if not weight.per_layer:
            return [None]
        return self.layers_of(weight.layer_kind)

    def layers_of(self, kind: LayerKind) -> Sequence[int]:
        """Return the numbers of the layers of a kind; a family without experts has one kind."""
        layers = range(self.num_hidden_layers)
        if kind is LayerKind.ANY or not self.family.architecture.has_experts:
            return layers
        return [
            layer for layer in layers if (layer in self.dense_layers) == (kind is LayerKind.DENSE)
        ]

    @property
    def tensor_count(self) -> int:
        """The number of tensors that a published checkpoint has at most, scales included."""
        return sum(
            len(self.layers_with(weight))
            * (self.num_local_experts if weight.per_expert else 1)
            * (2 if weight.quantized else 1)
            for weight in self.family.weights
        )

    @property
    def query_size(self) -> int:
        """Width of the query projection, heads * head_dim; also the width of q_norm."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the key and of the value projection; also the width of k_norm."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_dir(cls, directory: str | Path) -> "ModelConfig":
        """Read `config.json` of a checkpoint directory.

        Raises ConfigError when it is missing, is not JSON, or describes another architecture.
        """
        path = Path(directory) / "config.json"
        try:
            raw = read_json(path, dict[str, Any], ConfigError, "download it again", CONFIG_BYTES)
        except FileNotFoundError:
            hint = (
                "is there, but has no config.json" if Path(directory).is_dir() else "does not exist"
            )
            raise ConfigError(
                f"{directory} {hint}; expected a checkpoint directory with a config.json"
            ) from None
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Build from the contents of a config.json: the original style (`rotary_dim`, `rope_theta`
        on top) or the transformers-5 style (`rope_parameters`). Fields about multi-token prediction
        are ignored: those modules are in no published checkpoint.

        Raises ConfigError naming a field of another type, out of range, or of another architecture.
        """
        family = _family_of(raw)
        require_no_part(raw, family)
        read = _with_switched_rope_scaling(raw, family)
        named = {name: _stored_name(name, family, read) for name in ConfigFields.__annotations__}
        taken = {name: read[field] for name, field in named.items() if field in read}
        taken = {**family.defaults, **taken}
        if not family.architecture.has_experts:  # a dense MLP has no experts to count
            taken |= dict.fromkeys(EXPERT_COUNTS, 0)
        missing = next((name for name in REQUIRED_SIZES if name not in taken), None)
        if missing is not None:
            raise ConfigError(f"config.json has no {named[missing]!r}; {ADVICE}")
        text = json.dumps(taken).encode()
        fields = parse_json(text, ConfigFields, "config.json", ConfigError, ADVICE)
        return cls(family=family, **_arguments(fields, read, family), raw=dict(raw))


def _stored_name(name: str, family: Family, raw: Mapping[str, Any]) -> str:
    """Return the name in config.json of a field of ModelConfig."""
    names = family.field_names.get(name, (name,))
    return next((each for each in names if each in raw), names[0])


def _family_of(raw: Mapping[str, Any]) -> Family:
    family = family_of(raw)
    if family is not None:
        return family
    model_type = raw.get("model_type")
    families = FAMILIES.values()
    hint = (
        "MiniMax-M3 is another architecture (vision tower, other activation and norms) that is not "
        "supported"
        if str(model_type).startswith("minimax_m3")
        else f"only {', '.join(each.models for each in families)} are supported"
    )
    expected = " or ".join(dict.fromkeys(repr(each.model_type) for each in families))
    raise ConfigError(
        f"config.json: model_type is {shown(model_type)}; expected {expected}: {hint}"
    )


def _required_sizes(family: Family) -> tuple[str, ...]:
    """Names of the sizes that config.json must have: a dense family has no experts to count."""
    if family.architecture.has_experts:
        return REQUIRED_SIZES
    return tuple(name for name in REQUIRED_SIZES if name not in EXPERT_COUNTS)


def _arguments(fields: ConfigFields, raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return what a ModelConfig is made of, but for its family."""
    if any(kind != 1 for kind in fields.attn_type_list or ()):
        raise ConfigError(
            "config.json: attn_type_list has entries other than 1; only full attention is supported"
        )
    quantization = fields.quantization_config or QuantizationFields()
    foreign.require_own(raw, family)
    if any(kind != "full_attention" for kind in fields.layer_types or ()):
        raise ConfigError(
            "config.json: layer_types has entries other than 'full_attention'; only full attention "
            "is supported"
        )
    optional = {name: getattr(fields, name) for name in OPTIONAL_FIELDS}
    head_dim = fields.head_dim or fields.hidden_size // max(1, fields.num_attention_heads)
    tokens = () if fields.eos_token_id is None else fields.eos_token_id
    return {
        **{name: getattr(fields, name) for name in REQUIRED_SIZES},
        **{name: value for name, value in optional.items() if value is not None},
        **_rope_arguments(fields, raw, head_dim, family),
        **_mlp_arguments(fields, family),
        "head_dim": head_dim,
        "weight_block_size": quantization.weight_block_size or (128, 128),
        "declares_fp8": bool(raw.get("quantization_config")),
        "modules_to_not_convert": _listed(quantization.modules_to_not_convert or ()),
        "eos_token_ids": tokens if isinstance(tokens, tuple) else (tokens,),
    }


def _mlp_arguments(fields: ConfigFields, family: Family) -> dict[str, Any]:
    """Return which layers are dense, and how affinities are normed, of a family with experts."""
    architecture = family.architecture
    if not architecture.has_experts:
        return {}
    normed = True if fields.norm_topk_prob is None else fields.norm_topk_prob
    several = architecture.norms_one_expert or fields.num_experts_per_tok > 1
    given: dict[str, Any] = {"norm_topk_prob": normed and several}
    if not family.has(Role.MLP_GATE):
        return given
    step = fields.decoder_sparse_step or 1
    dense = fields.mlp_only_layers or ()
    layers = range(min(fields.num_hidden_layers, LARGEST["num_hidden_layers"]))
    return given | {
        "dense_layers": tuple(each for each in layers if each in dense or (each + 1) % step),
        "dense_intermediate_size": fields.dense_intermediate_size or 0,
    }


def _listed(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Return the entries of modules_to_not_convert, which are printable, and most of them names."""
    odd = next((entry for entry in entries if not entry.isprintable()), None)
    if odd is not None:
        raise ConfigError(
            f"config.json: modules_to_not_convert has {shown(odd)}; expected names of modules"
        )
    patterns = [entry for entry in entries if not MODULE_NAME.fullmatch(entry)]
    if len(patterns) > MOST_PATTERNS:
        raise ConfigError(
            f"config.json: modules_to_not_convert has {len(patterns)} patterns, such as "
            f"{patterns[0]}; at most {MOST_PATTERNS} are judged: list names"
        )
    return entries


def _with_switched_rope_scaling(raw: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """Return config.json with the RoPE that is used, of a family whose code has one scaling, which
    `inference_rope_scaling` switches on; it begins beyond the positions of the training.

    Raises ConfigError when config.json spells out another scaling than that.
    """
    own = family.switched_rope_scaling
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not own or not isinstance(rope, dict):
        return raw
    theta = {name: value for name, value in rope.items() if name == "rope_theta"}
    positions = raw.get("max_position_embeddings")
    longer = isinstance(positions, int) and positions > own["original_max_position_embeddings"]
    if not raw.get("inference_rope_scaling") or not longer:
        return {**raw, "rope_parameters": theta, "rope_scaling": None}
    for name, value in own.items():
        if rope.get(name, value) != value:
            raise ConfigError(
                f"config.json: {name} of rope_scaling is {shown(rope[name])}; {family.title}'s "
                f"code takes {value!r} where inference_rope_scaling is on"
            )
    return {**raw, "rope_parameters": {**theta, **own}, "rope_scaling": None}


def _rope_arguments(
    fields: ConfigFields, raw: Mapping[str, Any], head_dim: int, family: Family
) -> dict[str, Any]:
    """Rotary settings; transformers 5 keeps them in `rope_parameters`, the original style on the
    top level.
    """
    rope = fields.rope_parameters or fields.rope_scaling or RopeFields()
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope_type = rope.rope_type or rope.type or "default"
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"config.json: rope_type is {shown(rope_type)}; supported are {', '.join(ROPE_TYPES)}"
        )
    require_no_contradiction(fields, raw, rope, rope_type, head_dim)
    factor = rope.partial_rotary_factor or fields.partial_rotary_factor or 1.0
    left_out = ("type", "partial_rotary_factor")
    scaling = {
        name: value for name, value in given.items() if name not in left_out and value is not None
    }
    return {
        "rotary_dim": fields.rotary_dim or int(head_dim * min(factor, 2.0)),
        "rope_theta": rope.rope_theta or fields.rope_theta or family.rope_theta,
        "rope_scaling": None if rope_type == "default" else scaling | {"rope_type": rope_type},
    }
