"""Seeded checkpoints with the real layer dimensions, and FP8 codes as a gaussian weight has."""

from pathlib import Path

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.writer import ShardWriter, write_index, write_json
from neuron_minimax.config import ModelConfig

REAL_LAYER = {
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "rotary_dim": 64,
    "num_experts_per_tok": 8,
}
# Another width for layers: a quarter of the hidden size and of the experts', a sixth of the heads.
SMALL = {
    "hidden_size": 768,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
}
SHARD_BYTES = 1_850_000_000


# Two layers have the share of a head that they have in MiniMax-M2, of 200,064 rows and 62 layers:
# a ninth of what a step reads.
VOCABULARY = 6464


def real_layers(layers: int = 2, experts: int = 64, vocabulary: int = VOCABULARY) -> dict:
    """Return config.json of a model with real layer dimensions: 2.0 GB in FP8 by default."""
    return {
        "model_type": "minimax_m2",
        "architectures": ["MiniMaxM2ForCausalLM"],
        **REAL_LAYER,
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "vocab_size": vocabulary,
        "max_position_embeddings": 16384,
        "rope_theta": 5000000,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "float8_e4m3fn",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
        },
    }


def as_qwen3(config_json: dict) -> dict:
    """Return config.json of a Qwen3-MoE with the layers of a MiniMax-M2."""
    same = {name: value for name, value in config_json.items() if name != "rotary_dim"}
    experts = same.pop("num_local_experts")
    return same | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": experts,
        "moe_intermediate_size": config_json["intermediate_size"],
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def write_synthetic(directory: Path, config_json: dict, seed: int = 0) -> Path:
    """Write the checkpoint unless it is there already (config.json is written last)."""
    if (directory / "config.json").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = ModelConfig.from_dict(config_json)
    generator = np.random.default_rng(seed)
    side = max(config.hidden_size, config.query_size)
    pool, _ = fp8.quantize(
        generator.normal(0, 1, (side, side)).astype(np.float32), config.weight_block_size
    )
    shards: list[list[schema.Expected]] = [[]]
    size = 0
    for wanted in schema.expected(config):
        if size + wanted.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(wanted)
        size += wanted.nbytes
    weight_map = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with ShardWriter(directory / name, [wanted.spec for wanted in tensors]) as writer:
            for wanted in tensors:
                weight_map[wanted.name] = name
                writer.write(_elements(wanted, pool, generator))
    write_index(directory, weight_map, 0)
    write_json(directory / "config.json", config_json)
    return directory


def _elements(
    wanted: schema.Expected, pool: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    if wanted.dtype == "F8_E4M3":  # another stretch of the pool for every tensor
        rows, columns = wanted.shape
        return np.resize(np.roll(pool, int(generator.integers(pool.size))), (rows, columns))
    if wanted.is_scale:
        values = generator.uniform(1e-4, 3e-4, wanted.shape)
    elif wanted.weight.module == "e_score_correction_bias":
        # Of the real size, and nearly equal, so that random tokens spread over the experts as a
        # balanced model's do.
        values = 7 + generator.normal(0, 0.02, wanted.shape)
    elif wanted.weight.module_group == "norm":
        values = np.ones(wanted.shape)
    else:
        # Embeddings outweigh what attention averages over the tokens, else all tokens would choose
        # the same experts.
        deviation = 4 if wanted.weight.module == "embed_tokens" else 0.02
        values = generator.normal(0, deviation, wanted.shape)
    values = values.astype(np.float32)
    return values if wanted.dtype == "F32" else (values.view(np.uint32) >> 16).astype(np.uint16)
