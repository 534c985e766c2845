"""Tiny checkpoints of every family in the published formats, made on the spot: random weights of
trained size.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.writer import write_checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.families import Role
from neuron_minimax.fp8 import bfloat16

MINIMAX_M2: dict[str, Any] = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "vocab_size": 160,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "rotary_dim": 64,
    "rope_theta": 5000000,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "scoring_func": "sigmoid",
    "use_qk_norm": True,
    "use_routing_bias": True,
    "use_mtp": True,
    "num_mtp_modules": 3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "float8_e4m3fn",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
}


QWEN = {
    "vocab_size": 160,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": None,
}
BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
MINIMIND = {
    "model_type": "minimind",
    "vocab_size": 160,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "dropout": 0.0,
    "flash_attn": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_moe": False,
    "inference_rope_scaling": False,
}
# What config.json of a family's checkpoints says, small, and of odd sizes where that is allowed.
CONFIGS: dict[str, dict[str, Any]] = {
    "minimax_m2": MINIMAX_M2,
    "qwen3": QWEN
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "head_dim": 32,
        "intermediate_size": 200,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "max_window_layers": 2,
        "quantization_config": BLOCKS | {"modules_to_not_convert": ["lm_head"]},
    },
    "qwen3_moe": QWEN
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "intermediate_size": 200,
        "moe_intermediate_size": 72,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "quantization_config": BLOCKS | {"modules_to_not_convert": ["lm_head", "gate"]},
    },
    "qwen2": QWEN
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "intermediate_size": 200,
        "tie_word_embeddings": False,
        "sliding_window": 131072,
        "max_window_layers": 2,
    },
    "minimind": MINIMIND | {"head_dim": 24, "rms_norm_eps": 1e-6},
    "minimind_moe": MINIMIND
    | {
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "use_moe": True,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 80,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 5e-4,
    },
    "minimind2": MINIMIND | {"n_routed_experts": 4, "n_shared_experts": 1},
    "minimind2_moe": MINIMIND
    | {
        "use_moe": True,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.01,
        "seq_aux": True,
        "norm_topk_prob": True,
    },
}


def tiny_config(family: str = "minimax_m2", **overrides: Any) -> dict[str, Any]:
    """A small config.json of a family; `overrides` replace or add fields."""
    return copy.deepcopy(CONFIGS[family]) | overrides


def tiny_tensors(
    config: ModelConfig, seed: int = 0, dense: bool = False
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, dtype, stored array) of every tensor; `dense`: the same weights dequantized to
    float32. What can be FP8 is, where config.json declares it.
    """
    generator = np.random.default_rng(seed)
    for wanted in schema.expected(config):
        if wanted.is_scale:
            continue
        values = _values(wanted, generator)
        if wanted.weight.quantized and config.declares_fp8:
            codes, scales = fp8.quantize(values, config.weight_block_size)
            if config.family.scale_dtypes[0] == "BF16":
                scales = bfloat16.round_to_bfloat16(scales)
            factors = bfloat16.to_float32(scales)
            if dense:
                yield wanted.name, "F32", fp8.dequantize(codes, factors, config.weight_block_size)
            else:
                yield wanted.name, "F8_E4M3", codes
                yield schema.scale_name(wanted.name), config.family.scale_dtypes[0], scales
        elif wanted.dtype == "F32":
            yield wanted.name, "F32", values
        elif dense:
            rounded = bfloat16.round_to_bfloat16(values)
            yield wanted.name, "F32", bfloat16.to_float32(rounded)
        else:
            yield wanted.name, "BF16", bfloat16.round_to_bfloat16(values)


def _values(wanted: schema.Expected, generator: np.random.Generator) -> np.ndarray:
    shape = wanted.shape
    role = wanted.weight.role
    if role is Role.ROUTER_BIAS:  # of the size and spread that published checkpoints have
        values = 7.0 + generator.normal(0, 0.5, shape)
    elif wanted.weight.module_group == "norm":
        values = 1.0 + 0.1 * generator.normal(size=shape)
    elif len(shape) == 1:
        values = 0.2 * generator.normal(size=shape)
    else:
        spread = 2.0 if role is Role.ROUTER else 1.0
        values = generator.normal(0, spread / np.sqrt(shape[-1]), shape)
    return values.astype(np.float32)


def write_tiny(
    directory: Path,
    seed: int = 0,
    shards: int = 1,
    dense: bool = False,
    family: str = "minimax_m2",
    **overrides: Any,
) -> Path:
    """Write a tiny checkpoint; `dense` writes the float32 twin (no quantization_config) for use as
    an oracle. An override of None for `quantization_config` stores BF16.
    """
    raw = tiny_config(family, **overrides)
    if raw.get("quantization_config", 0) is None:
        raw.pop("quantization_config")
    config = ModelConfig.from_dict(raw)
    if dense:
        raw.pop("quantization_config", None)
    write_checkpoint(directory, raw, tiny_tensors(config, seed, dense), shards)
    return directory
