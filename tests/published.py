"""The config.json facts of published checkpoints, and the numbers of parameters that their cards
state.

Copied from the config.json files of huggingface.co/Qwen, and, for MiniMind, from the defaults of
its MiniMindConfig (github.com/jingyaogong/minimind, of the release in question) with the sizes of
the table in its README.
"""

from dataclasses import dataclass
from typing import Any

FP8_BLOCKS = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "norm_topk_prob": True,
    "num_experts_per_tok": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
# Of the instruction-tuned models; the base models have more positions.
QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
TIED = {"tie_word_embeddings": True}
SMALLER_VOCABULARY = {"vocab_size": 151936}
MINIMIND: dict[str, Any] = {
    "model_type": "minimind",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dropout": 0.0,
    "flash_attn": True,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_attention_heads": 8,
    "rope_theta": 1000000.0,
    "use_moe": False,
    "vocab_size": 6400,
}
MINIMIND3 = MINIMIND | {
    "head_dim": 96,
    "hidden_size": 768,
    "intermediate_size": 2432,
    "moe_intermediate_size": 2432,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "router_aux_loss_coef": 5e-4,
    "tie_word_embeddings": True,
}
MINIMIND2 = MINIMIND | {
    "aux_loss_alpha": 0.1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "scoring_func": "softmax",
    "seq_aux": True,
}


@dataclass(frozen=True)
class Published:
    """A checkpoint: its config.json in BF16 (or float32), and its card's parameters in billions."""

    raw: dict[str, Any]
    billions: float


def _dense(base: dict[str, Any], sizes: tuple[int, ...], **others: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    fields = dict(zip((*names, "num_key_value_heads"), sizes, strict=True))
    return base | fields | {"max_window_layers": sizes[0]} | others


def _sparse(sizes: tuple[int, ...], experts: int, channels: int, **others: Any) -> dict[str, Any]:
    counts = {"num_experts": experts, "moe_intermediate_size": channels}
    return _dense(QWEN3_MOE, sizes) | counts | others


# Coder-480B has no `attention_bias` and no `bos_token_id`, and fields that other models have not.
CODER = _sparse(
    (62, 6144, 8192, 96, 8),
    160,
    2560,
    max_position_embeddings=262144,
    qkv_bias=False,
    rope_theta=10000000,
    router_aux_loss_coef=0.0,
    shared_expert_intermediate_size=0,
    use_qk_norm=True,
)
CODER = {name: CODER[name] for name in CODER if name not in ("attention_bias", "bos_token_id")}

PUBLISHED: dict[str, Published] = {
    "Qwen3-0.6B": Published(_dense(QWEN3, (28, 1024, 3072, 16, 8), **TIED), 0.6),
    "Qwen3-1.7B": Published(_dense(QWEN3, (28, 2048, 6144, 16, 8), **TIED), 1.7),
    "Qwen3-4B": Published(_dense(QWEN3, (36, 2560, 9728, 32, 8), **TIED), 4.0),
    "Qwen3-8B": Published(_dense(QWEN3, (36, 4096, 12288, 32, 8)), 8.2),
    "Qwen3-14B": Published(_dense(QWEN3, (40, 5120, 17408, 40, 8)), 14.8),
    "Qwen3-32B": Published(_dense(QWEN3, (64, 5120, 25600, 64, 8)), 32.8),
    "Qwen3-30B-A3B": Published(_sparse((48, 2048, 6144, 32, 4), 128, 768), 30.5),
    "Qwen3-235B-A22B": Published(_sparse((94, 4096, 12288, 64, 4), 128, 1536), 235),
    "Qwen3-Coder-480B-A35B": Published(CODER, 480),
    "Qwen2.5-0.5B": Published(
        _dense(QWEN2, (24, 896, 4864, 14, 2), **TIED, **SMALLER_VOCABULARY), 0.49
    ),
    "Qwen2.5-1.5B": Published(
        _dense(QWEN2, (28, 1536, 8960, 12, 2), **TIED, **SMALLER_VOCABULARY), 1.54
    ),
    "Qwen2.5-3B": Published(
        _dense(QWEN2, (36, 2048, 11008, 16, 2), **TIED, **SMALLER_VOCABULARY), 3.09
    ),
    "Qwen2.5-7B": Published(_dense(QWEN2, (28, 3584, 18944, 28, 4)), 7.61),
    "Qwen2.5-14B": Published(_dense(QWEN2, (48, 5120, 13824, 40, 8)), 14.7),
    "Qwen2.5-32B": Published(_dense(QWEN2, (64, 5120, 27648, 40, 8)), 32.5),
    "Qwen2.5-72B": Published(_dense(QWEN2, (80, 8192, 29568, 64, 8)), 72.7),
    "MiniMind2-small": Published(
        MINIMIND2 | {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}, 0.026
    ),
    "MiniMind2": Published(
        MINIMIND2 | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 16}, 0.104
    ),
    "MiniMind2-MoE": Published(
        MINIMIND2
        | {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 8, "use_moe": True},
        0.145,
    ),
    "MiniMind-3": Published(MINIMIND3, 0.064),
    "MiniMind-3-MoE": Published(MINIMIND3 | {"use_moe": True}, 0.198),
}


def published(name: str) -> dict[str, Any]:
    """The config.json of a published checkpoint; a name that ends in -FP8 is that of the FP8 one.

    Qwen3-30B-A3B-FP8 and 235B-A22B-FP8 list what they do not convert, layer by layer, norms
    included; Qwen3-32B-FP8 has no list. The other FP8 ones are taken to be as those of their kind.
    """
    model = name.removesuffix("-FP8")
    raw = PUBLISHED[model].raw
    if model == name:
        return dict(raw)
    quantization: dict[str, Any] = dict(FP8_BLOCKS)
    if "num_experts" in raw:
        parts = ("input_layernorm", "mlp.gate", "post_attention_layernorm")
        layers = range(raw["num_hidden_layers"])
        listed = [f"model.layers.{layer}.{part}" for layer in layers for part in parts]
        quantization["modules_to_not_convert"] = ["lm_head", *listed]
    return {**raw, "quantization_config": quantization}
