"""Tiny MiniMax-M2 checkpoints in the published format, made on the spot: random weights of trained
size.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.writer import write_checkpoint
from neuron_minimax.config import ModelConfig


def tiny_config(**overrides: Any) -> dict[str, Any]:
    """A config.json of the original style, small; `overrides` replace or add fields."""
    return {
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
    } | overrides


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Float32 -> BF16 bits as uint16, ties to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def tiny_tensors(
    config: ModelConfig, seed: int = 0, dense: bool = False
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(name, dtype, stored array) of every tensor; `dense`: the same weights dequantized to
    float32.
    """
    generator = np.random.default_rng(seed)
    for wanted in schema.expected(config):
        if wanted.is_scale:
            continue
        shape = wanted.shape
        kind = wanted.weight.kind
        if (
            kind == "e_score_correction_bias"
        ):  # of the size and spread that published checkpoints have
            values = 7.0 + generator.normal(0, 0.5, shape)
        elif wanted.weight.module_group == "norm":
            values = 1.0 + 0.1 * generator.normal(size=shape)
        else:
            fan_in = shape[-1]
            values = generator.normal(0, (2.0 if kind == "gate" else 1.0) / np.sqrt(fan_in), shape)
        values = values.astype(np.float32)
        if wanted.weight.quantized:
            codes, scales = fp8.quantize(values, config.weight_block_size)
            if dense:
                yield wanted.name, "F32", fp8.dequantize(codes, scales, config.weight_block_size)
            else:
                yield wanted.name, "F8_E4M3", codes
                yield schema.scale_name(wanted.name), "F32", scales
        elif wanted.dtype == "F32":
            yield wanted.name, "F32", values
        elif dense:
            yield wanted.name, "F32", (bfloat16(values).astype(np.uint32) << 16).view(np.float32)
        else:
            yield wanted.name, "BF16", bfloat16(values)


def write_tiny(
    directory: Path, seed: int = 0, shards: int = 1, dense: bool = False, **overrides: Any
) -> Path:
    """Write a tiny checkpoint; `dense` writes the float32 twin (no quantization_config) for use as
    an oracle.
    """
    raw = tiny_config(**overrides)
    config = ModelConfig.from_dict(raw)
    if dense:
        raw.pop("quantization_config")
    write_checkpoint(directory, raw, tiny_tensors(config, seed, dense), shards)
    return directory
