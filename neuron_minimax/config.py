"""The model's configuration, read from either style of config.json and checked when it is made."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neuron_minimax.errors import ConfigError
from neuron_minimax.families import FAMILIES, Family
from neuron_minimax.families.family import RouterKind

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
SWITCHES = ("tie_word_embeddings", "norm_topk_prob")
# Read where config.json has them; their defaults are those of ModelConfig.
OPTIONAL_FIELDS = (*SWITCHES, "shared_intermediate_size")
ROPE_TYPES = ("default", "linear", "yarn")
CONVERTED_SECTION = "neuron_minimax"  # what a conversion adds to config.json


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
    raw: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        positive = [*_required_sizes(self.family), "head_dim", "rotary_dim"]
        if self.family.architecture.shared_expert:
            positive.append("shared_intermediate_size")
        for name in (*REQUIRED_SIZES, "head_dim", "rotary_dim", "shared_intermediate_size"):
            value = getattr(self, name)
            least = 1 if name in positive else 0
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"config.json: {name} is {value!r}; expected a positive integer")
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"config.json: {name} is {getattr(self, name)!r}; expected true or false"
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
        if not 0 < self.rms_norm_eps < 1 or not self.rope_theta > 0:
            raise ConfigError(
                f"config.json: rms_norm_eps {self.rms_norm_eps} or rope_theta {self.rope_theta} is "
                "out of range"
            )
        if min(self.weight_block_size) < 1:
            raise ConfigError(
                f"config.json: weight_block_size {list(self.weight_block_size)} is not two "
                "positive sizes"
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
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            hint = (
                "is there, but has no config.json" if Path(directory).is_dir() else "does not exist"
            )
            raise ConfigError(
                f"{directory} {hint}; expected a checkpoint directory with a config.json"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{path} cannot be read as JSON ({error}); download it again"
            ) from None
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Build from the contents of a config.json: the original style (`rotary_dim`, `rope_theta`
        on top) or the transformers-5 style (`rope_parameters`). Fields about multi-token prediction
        are ignored: those modules are in no published checkpoint.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json holds a {type(raw).__name__}; expected an object")
        family = _family_of(raw)
        for name, allowed in family.fixed_fields.items():
            if name in raw and raw[name] not in allowed:
                raise ConfigError(
                    f"config.json: {name} is {raw[name]!r}; {family.title} has {allowed[0]!r}: "
                    "another architecture, which is not supported"
                )
        if any(kind != 1 for kind in raw.get("attn_type_list") or ()):
            raise ConfigError(
                "config.json: attn_type_list has entries other than 1; only full attention is "
                "supported"
            )
        try:
            return cls(family=family, **_fields(raw, family), raw=dict(raw))
        except KeyError as missing:
            raise ConfigError(
                f"config.json has no {missing.args[0]!r}; take the config.json of the checkpoint"
            ) from None
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config.json has a field of the wrong type: {error}") from None


def _family_of(raw: Mapping[str, Any]) -> Family:
    model_type = raw.get("model_type")
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    hint = (
        "MiniMax-M3 is another architecture (vision tower, other activation and norms) that is not "
        "supported"
        if str(model_type).startswith("minimax_m3")
        else f"only {', '.join(family.models for family in FAMILIES.values())} are supported"
    )
    expected = " or ".join(repr(name) for name in FAMILIES)
    raise ConfigError(f"config.json: model_type is {model_type!r}; expected {expected}: {hint}")


def _required_sizes(family: Family) -> tuple[str, ...]:
    """Names of the sizes that config.json must have: a dense family has no experts to count."""
    if family.architecture.router is not RouterKind.NONE:
        return REQUIRED_SIZES
    return tuple(name for name in REQUIRED_SIZES if name not in EXPERT_COUNTS)


def _fields(raw: Mapping[str, Any], family: Family) -> dict[str, Any]:
    names = family.field_names
    fields = dict.fromkeys(EXPERT_COUNTS, 0)
    fields |= {name: raw[names.get(name, name)] for name in _required_sizes(family)}
    optional = {name: raw.get(names.get(name, name)) for name in OPTIONAL_FIELDS}
    fields |= {name: value for name, value in optional.items() if value is not None}
    head_dim = raw.get("head_dim") or raw["hidden_size"] // raw["num_attention_heads"]
    quantization = raw.get("quantization_config") or {}
    if quantization.get("quant_method", "fp8") != "fp8":
        raise ConfigError(
            f"config.json: quant_method is {quantization['quant_method']!r}; only the published "
            "FP8 format is supported"
        )
    block = quantization.get("weight_block_size") or (128, 128)
    if len(block) != 2:
        raise ConfigError(
            f"config.json: weight_block_size is {block!r}; expected two sizes such as [128, 128]"
        )
    listed = quantization.get("modules_to_not_convert") or ()
    if isinstance(listed, str) or not all(isinstance(name, str) for name in listed):
        raise ConfigError(
            f"config.json: modules_to_not_convert is {listed!r}; expected a list of module names"
        )
    return {
        **fields,
        **_rope_fields(raw, head_dim, family),
        "head_dim": head_dim,
        "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),
        "weight_block_size": (int(block[0]), int(block[1])),
        "declares_fp8": bool(quantization),
        "modules_to_not_convert": tuple(listed),
        "eos_token_ids": _token_ids(raw.get("eos_token_id")),
        "bos_token_id": raw.get("bos_token_id"),
    }


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def _rope_fields(raw: Mapping[str, Any], head_dim: int, family: Family) -> dict[str, Any]:
    """Rotary settings; transformers 5 keeps them in `rope_parameters`, the original style on the
    top level.
    """
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope_type = parameters.get("rope_type", parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"config.json: rope_type is {rope_type!r}; supported are {', '.join(ROPE_TYPES)}"
        )
    factor = parameters.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    rotary_dim = raw.get("rotary_dim") or int(head_dim * factor)
    scaling = None
    if rope_type != "default":
        scaling = {
            key: value
            for key, value in parameters.items()
            if key not in ("type", "partial_rotary_factor")
        }
        scaling["rope_type"] = rope_type
    return {
        "rotary_dim": rotary_dim,
        "rope_theta": float(parameters.get("rope_theta", raw.get("rope_theta", family.rope_theta))),
        "rope_scaling": scaling,
    }
