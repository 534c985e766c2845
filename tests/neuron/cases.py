"""The tiny models and prompts that NxDI runs and transformers answers; read by both sides, which
have no common transformers version: the reference file is made with 5.x, NxDI needs 4.57.
"""

from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parent.parent / "data" / "neuron_reference.safetensors"
# Sizes are whole blocks; 256 intermediate channels are two blocks, one per rank at moe_tp 2.
MODELS: dict[str, dict[str, Any]] = {
    "grouped": {"intermediate_size": 256},
    "padded": {"intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 2},
    "converted": {"intermediate_size": 256, "num_attention_heads": 6, "num_key_value_heads": 3},
    # Channels that ranks share in parts of blocks: one block that is not full, one block, a block
    # and a half.
    "48 channels": {"intermediate_size": 48},
    "96 channels": {"intermediate_size": 96},
    "128 channels": {"intermediate_size": 128},
    "192 channels": {"intermediate_size": 192},
    # On four ranks two hold two experts, and two one and zeros.
    "6 experts": {"intermediate_size": 256, "num_local_experts": 6},
}
# Models of the other families: a family of tests/tiny.py, and the changed fields. With FP8
# their sizes are whole blocks; in BF16 they are odd.
FP8 = {"hidden_size": 256, "head_dim": 128}
BF16: dict[str, Any] = {"quantization_config": None}
SHARED_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
FAMILY_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe fp8": ("qwen3_moe", FP8 | {"moe_intermediate_size": 256, "num_experts": 8}),
    "qwen3_moe bf16": ("qwen3_moe", BF16 | SHARED_HEADS),
    # A dense layer among sparse ones, and affinities that are not divided by their sum.
    "qwen3_moe mixed": (
        "qwen3_moe",
        FP8
        | {"moe_intermediate_size": 256, "num_experts": 8, "intermediate_size": 512}
        | {"mlp_only_layers": [0], "norm_topk_prob": False},
    ),
    "qwen3_moe 7 experts": (
        "qwen3_moe",
        FP8 | {"moe_intermediate_size": 256, "num_experts": 7, "norm_topk_prob": False},
    ),
    "qwen3 fp8": ("qwen3", FP8 | {"intermediate_size": 512}),
    "qwen3 bf16": ("qwen3", BF16 | SHARED_HEADS | {"tie_word_embeddings": False}),
    "qwen2 bf16": ("qwen2", BF16 | SHARED_HEADS | {"tie_word_embeddings": True}),
}
SEED = 5
STEPS = 12
SEQ_LEN = 64
LENGTHS = (7, 12, 20, 31)


def prompts(vocab_size: int) -> list[list[int]]:
    """Four prompts of unequal lengths."""
    return [
        [(7 + 31 * slot + 17 * place) % vocab_size for place in range(length)]
        for slot, length in enumerate(LENGTHS)
    ]
