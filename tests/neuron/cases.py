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
