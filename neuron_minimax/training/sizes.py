"""Sizes of models to train from nothing, by family, as the fields of a config.json.

Sources: those of MiniMind are the sizes that github.com/jingyaogong/minimind publishes under these
names, those of Qwen the config.json of the published checkpoints. MiniMind's 26M and 104M have the
norms of queries and keys that its third release has; `minimind2` has them as they were published.
The vocabulary is that of the tokenizer.
"""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.families import Family, family_of

Fields = Mapping[str, Any]

COMMON: Fields = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
TINY: Fields = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def _minimind(*, hidden: int, intermediate: int, layers: int, **more: Any) -> Fields:
    return {
        **COMMON,
        "architectures": ["MiniMindForCausalLM"],
        "model_type": "minimind",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": hidden // 8,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "inference_rope_scaling": False,
        "use_moe": False,
        "dropout": 0.0,
        "flash_attn": True,
        **more,
    }


def _minimind2(**sizes: Any) -> Fields:
    return _minimind(
        **sizes,
        rms_norm_eps=1e-5,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        scoring_func="softmax",
        norm_topk_prob=True,
        aux_loss_alpha=0.01,
        seq_aux=True,
    )


EXPERTS: Fields = {
    "use_moe": True,
    "num_experts": 4,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "router_aux_loss_coef": 5e-4,
}
SMALL: Fields = {"hidden": 512, "intermediate": 1408, "layers": 8}
LARGE: Fields = {"hidden": 768, "intermediate": 2048, "layers": 16}
THIRD: Fields = {"hidden": 768, "intermediate": 2432, "layers": 8, "num_key_value_heads": 4}
MINIMIND2_MOE = _minimind2(hidden=640, intermediate=1728, layers=8, use_moe=True)
MINIMIND_TINY = {**_minimind(hidden=0, intermediate=0, layers=0), **TINY}


def _qwen(model_type: str, architecture: str, **fields: Any) -> Fields:
    return {
        **COMMON,
        "architectures": [architecture],
        "model_type": model_type,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        **fields,
    }


def _qwen3(**fields: Any) -> Fields:
    return _qwen("qwen3", "Qwen3ForCausalLM", attention_bias=False, **fields)


SIZES: Mapping[str, Mapping[str, Fields]] = {
    "minimind": {
        "tiny": MINIMIND_TINY,
        "tiny-moe": {**MINIMIND_TINY, **EXPERTS, "moe_intermediate_size": 192},
        "26M": _minimind(**SMALL),
        "64M": _minimind(**THIRD),
        "104M": _minimind(**LARGE),
        "145M": MINIMIND2_MOE,
        "198M": _minimind(**THIRD, **EXPERTS, moe_intermediate_size=2432),
    },
    "minimind2": {
        "26M": _minimind2(**SMALL),
        "104M": _minimind2(**LARGE),
        "145M": MINIMIND2_MOE,
    },
    "qwen3": {
        "tiny": _qwen3(**TINY),
        "0.6B": _qwen3(
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
        ),
    },
    "qwen3_moe": {
        "tiny": _qwen(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            **TINY,
            attention_bias=False,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            router_aux_loss_coef=0.001,
        ),
    },
    "qwen2": {
        "tiny": _qwen("qwen2", "Qwen2ForCausalLM", **{**TINY, "head_dim": 32}),
        "0.5B": _qwen(
            "qwen2",
            "Qwen2ForCausalLM",
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
        ),
    },
    "minimax_m2": {
        "tiny": {
            **COMMON,
            **TINY,
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "intermediate_size": 128,
            "rotary_dim": 16,
            "rope_theta": 5000000,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32768,
            "scoring_func": "sigmoid",
            "use_qk_norm": True,
            "use_routing_bias": True,
            "tie_word_embeddings": False,
        },
    },
}


def family_of_size(family: str, size: str) -> Family:
    """Return the family that a size is of. Raises TrainingError when there is no such size."""
    if family not in SIZES:
        raise TrainingError(
            f"there are no sizes of {family!r}; expected {', '.join(SIZES)}", usage=True
        )
    sizes = SIZES[family]
    if size not in sizes:
        raise TrainingError(
            f"{family} has no size {size!r}; expected {', '.join(sizes)}, or a --config of your "
            "own",
            usage=True,
        )
    found = family_of(sizes[size])
    assert found is not None
    return found


def config_of_size(family: str, size: str, tokenizer: PreTrainedTokenizerBase) -> ModelConfig:
    """Return the config of a size of a family with the vocabulary of a tokenizer.

    Raises TrainingError when there is no such family or size.
    """
    family_of_size(family, size)
    return ModelConfig.from_dict(
        {
            **SIZES[family][size],
            "vocab_size": len(tokenizer),
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
    )
