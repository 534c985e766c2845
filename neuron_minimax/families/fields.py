"""The fields of config.json: what is read of it, which values leave out a part that no family has,
and which fields change nothing here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import ConfigDict, Field

from neuron_minimax.errors import ConfigError, shown
from neuron_minimax.families.family import Family

_Token = Annotated[int, Field(ge=-(2**31), lt=2**31)]
_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Positive = Annotated[float, Field(gt=0)]
_Amount = Annotated[float, Field(ge=0)]
_Entry = Annotated[str, Field(max_length=200)]
_TYPED = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class RopeFields:
    """What is read of `rope_parameters`, or of `rope_scaling`."""

    __pydantic_config__ = _TYPED

    rope_type: str | None = None
    type: str | None = None
    rope_theta: _Positive | None = None
    partial_rotary_factor: _Positive | None = None
    factor: _Positive | None = None
    original_max_position_embeddings: _Positive | None = None
    beta_fast: _Positive | None = None
    beta_slow: _Positive | None = None
    attention_factor: _Positive | None = None
    mscale: _Amount | None = None
    mscale_all_dim: _Amount | None = None
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class QuantizationFields:
    """What is read of `quantization_config`."""

    __pydantic_config__ = _TYPED

    quant_method: str = "fp8"
    quant_algo: str | None = None  # ModelOpt's, which may have no quant_method
    weight_block_size: tuple[_Count, _Count] | None = None
    modules_to_not_convert: Annotated[tuple[_Entry, ...], Field(max_length=1000)] | None = None


@dataclass(frozen=True, kw_only=True)
class ConfigFields:
    """What is read of a config.json, under the names of ModelConfig."""

    __pydantic_config__ = _TYPED

    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    num_local_experts: _Count
    num_experts_per_tok: _Count
    max_position_embeddings: _Count
    head_dim: _Count | None = None
    rotary_dim: _Count | None = None
    shared_intermediate_size: _Count | None = None
    dense_intermediate_size: _Count | None = None
    decoder_sparse_step: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    mlp_only_layers: tuple[_Count, ...] | None = None
    layer_types: tuple[_Entry, ...] | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: _Positive | None = None
    partial_rotary_factor: _Positive | None = None
    rope_parameters: RopeFields | None = None
    rope_scaling: RopeFields | None = None
    quantization_config: QuantizationFields | None = None
    attn_type_list: tuple[_Count, ...] | None = None
    eos_token_id: _Token | tuple[_Token, ...] | None = None
    bos_token_id: _Count | None = None
    tie_word_embeddings: bool | None = None
    norm_topk_prob: bool | None = None


ADVICE = "take the config.json of the checkpoint"
# Parts that no family has, with the values that leave them out, the usual one first. A family's
# `fixed_fields` go before these.
SWITCHES: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0),
    "clip_qkv": (None, 0),
    "embedding_multiplier": (1, None),
    "final_logit_softcapping": (None, 0),
    "first_k_dense_replace": (0, None),
    "kv_lora_rank": (None, 0),
    "layernorm_full_attention_alpha": (1, None),
    "layernorm_full_attention_beta": (1, None),
    "layernorm_mlp_alpha": (1, None),
    "layernorm_mlp_beta": (1, None),
    "logit_scale": (1, None),
    "logits_scaling": (1, None),
    "mlp_bias": (False, None),
    "n_group": (1, 0, None),
    "n_shared_experts": (0, None),
    "num_expert_group": (1, 0, None),
    "num_shared_experts": (0, None),
    "postnorm": (False, None),
    "q_lora_rank": (None, 0),
    "qkv_bias": (False, None),
    "residual_multiplier": (1, None),
    "rope_interleave": (False, None),
    "rope_interleaved": (False, None),
    "routed_scaling_factor": (1, None),
    "shared_expert_intermediate_size": (0, None),
    "topk_group": (1, 0, None),
    "use_alibi": (False, None),
    "use_bias": (False, None),
    "use_dynamic_ntk": (False, None),
    "use_logn_attn": (False, None),
    "use_parallel_residual": (False, None),
}
# What acts in training alone, where another value than the first is noted.
TRAINING_FIELDS: Mapping[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "attn_dropout": (0, None),
    "dropout": (0, None),
    "embd_pdrop": (0, None),
    "hidden_dropout": (0, None),
    "resid_pdrop": (0, None),
    "router_jitter_noise": (0, None),
}
# What changes no result here: notes about files and versions, what training or transformers' own
# code asks for, settings of generation that generation_config.json has, multi-token prediction.
NAMES = """_attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
_sliding_window_pattern add_cross_attention architectures attn_implementation auto_map
aux_loss_alpha bad_words_ids chunk_size_feed_forward cross_attention_hidden_size
decoder_start_token_id dtype experts_implementation finetuning_task flash_attn
gradient_checkpointing id2label initializer_range is_decoder is_encoder_decoder label2id
layernorm_linear_attention_alpha layernorm_linear_attention_beta max_model_len max_window_layers
mlp_intermediate_size model_max_length mtp_transformer_layers neuron_minimax num_mtp_modules
num_nextn_predict_layers output_attentions output_hidden_states output_router_logits pad_token_id
prefix pretraining_tp problem_type pruned_heads return_dict return_dict_in_generate
router_aux_loss_coef sep_token_id seq_aux shared_moe_mode sliding_window task_specific_params
tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers.js_config
transformers_version unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn use_mtp"""
UNUSED_FIELDS = frozenset(NAMES.split())
# Of `quantization_config` and of RoPE's section, beside what is read.
UNUSED_IN = {
    "quantization_config": frozenset(
        ("activation_scheme", "fmt", "scale_fmt", "dequantize", "ignored_layers")
    ),
    "rope_parameters": frozenset(("finetuned",)),
}
# What a newer config.json has in its RoPE section, and an older one beside it.
BESIDE_ROPE = ("rope_theta", "partial_rotary_factor")
SECTIONS = {
    "quantization_config": QuantizationFields,
    "rope_parameters": RopeFields,
    "rope_scaling": RopeFields,
}


class FieldFinding(NamedTuple):
    """A field that changes nothing here though somebody may expect it to, and why."""

    name: str
    message: str
    is_note: bool = False


def unused_fields(raw: Mapping[str, Any], family: Family) -> Iterator[FieldFinding]:
    """Yield the fields of a config.json that are neither read nor known to change nothing."""
    used = {"model_type", *SWITCHES, *family.fixed_fields, *family.selected_by}
    used |= {each for name in ConfigFields.__annotations__ for each in _stored(name, family)}
    used |= {"inference_rope_scaling"} if family.switched_rope_scaling else set()
    for name, value in raw.items():
        if name in TRAINING_FIELDS and value not in TRAINING_FIELDS[name]:
            yield FieldFinding(
                name, f"config.json: {name} is {shown(value)}: of training, not used here", True
            )
        elif name not in {*used, *UNUSED_FIELDS, *TRAINING_FIELDS, *family.unused_fields}:
            yield FieldFinding(
                name,
                f"config.json: {name} is {shown(value)}, which {family.title} does not have: it is "
                "not used; take it out where it means nothing, and another model where it does",
                value in (None, False),
            )
    for section, fields in SECTIONS.items():
        inside = raw.get(section)
        if not isinstance(inside, Mapping):
            continue
        known = {*fields.__annotations__, *UNUSED_IN.get(section, UNUSED_IN["rope_parameters"])}
        for name, value in inside.items():
            if name not in known:
                yield FieldFinding(
                    f"{section}.{name}",
                    f"config.json: {name} of {section} is {shown(value)}, which is not known and "
                    "not used",
                )


def _stored(name: str, family: Family) -> tuple[str, ...]:
    return family.field_names.get(name, (name,))


def require_no_part(raw: Mapping[str, Any], family: Family) -> None:
    """Raise ConfigError naming a field that says of a part what no model of the family has."""
    switches = {
        name: allowed for name, allowed in SWITCHES.items() if name not in family.unused_fields
    }
    for name, allowed in {**switches, **family.fixed_fields}.items():
        if name in raw and raw[name] not in allowed:
            raise ConfigError(
                f"config.json: {name} is {shown(raw[name])}; {family.title} has "
                f"{allowed[0]!r}: another architecture, which is not supported"
            )


def require_no_contradiction(
    fields: ConfigFields,
    raw: Mapping[str, Any],
    rope: RopeFields,
    rope_type: str,
    head_dim: int,
) -> None:
    """Raise ConfigError naming two fields that say different things, or one without the other that
    it needs.
    """
    if fields.rope_parameters and fields.rope_scaling:
        _require_one_rope(fields.rope_parameters, fields.rope_scaling)
    factor = rope.partial_rotary_factor or fields.partial_rotary_factor
    if fields.rotary_dim and factor and abs(fields.rotary_dim - head_dim * factor) >= 1:
        raise ConfigError(
            f"config.json: rotary_dim {fields.rotary_dim} contradicts partial_rotary_factor "
            f"{factor:g} (of head_dim {head_dim}); {ADVICE}"
        )
    inner = "that of its RoPE section"
    pairs = [
        ("partial_rotary_factor", fields.partial_rotary_factor, inner, rope.partial_rotary_factor),
        ("rope_theta", fields.rope_theta, inner, rope.rope_theta),
        ("rope_type", rope.rope_type, "type", rope.type),
        ("num_experts", raw.get("num_experts"), "num_local_experts", raw.get("num_local_experts")),
    ]
    for name, value, other, found in pairs:
        if value is not None and found is not None and value != found:
            raise ConfigError(
                f"config.json: {name} is {shown(value)}, but {other} is {shown(found)}; {ADVICE}"
            )
    needed = {"yarn": "original_max_position_embeddings", "linear": "factor"}.get(rope_type)
    if needed is not None and getattr(rope, needed) is None:
        raise ConfigError(f"config.json: rope_type {rope_type!r} lacks {needed!r}; {ADVICE}")


def _require_one_rope(parameters: RopeFields, scaling: RopeFields) -> None:
    """Raise ConfigError naming what the two RoPE sections of one config.json say differently."""
    first, second = (
        {**vars(section), "rope_type": section.rope_type or section.type or "default", "type": None}
        for section in (parameters, scaling)
    )
    for name, value in first.items():
        found = second[name]
        beside = name in BESIDE_ROPE and None in (value, found)
        if value != found and not beside:
            raise ConfigError(
                f"config.json: {name} of rope_parameters is {shown(value)}, but of rope_scaling "
                f"{shown(found)}; expected one section, or two that say the same: {ADVICE}"
            )
