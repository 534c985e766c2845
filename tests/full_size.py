"""Checkpoints of real size, hundreds of gigabytes of tensors, as sparse files that take a few
megabytes of disk.
"""

import json
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.config import ModelConfig
from tests.tiny import tiny_config

PUBLISHED_SIZES = {
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 196608,
}
SHARD_BYTES = 1_850_000_000  # about 125 shards, as published


def published_config(**overrides: int) -> dict[str, Any]:
    """The config.json of the published MiniMax-M2, in the original style."""
    return tiny_config(**PUBLISHED_SIZES | overrides)


def write_sparse(directory: Path, raw: dict[str, Any] | None = None, **overrides: int) -> Path:
    """Write headers, holes in place of the data, and the index; the files' sizes are those of real
    shards. `raw` is the config.json of a model, by default MiniMax-M2; `overrides` give it other
    sizes.
    """
    directory.mkdir(parents=True, exist_ok=True)
    raw = (published_config() if raw is None else raw) | overrides
    shards: list[dict[str, Any]] = [{}]
    position = 0
    for wanted in schema.declared(ModelConfig.from_dict(raw)):
        end = position + wanted.elements * STORED_DTYPES[wanted.dtype].itemsize
        if end > SHARD_BYTES:
            shards.append({})
            end -= position
            position = 0
        offsets = [position, end]
        shards[-1][wanted.name] = {
            "dtype": wanted.dtype,
            "shape": list(wanted.shape),
            "data_offsets": offsets,
        }
        position = end
    weight_map = {}
    for number, header in enumerate(shards, 1):
        name = f"model-{number:05d}-of-00130.safetensors"
        text = json.dumps(header).encode()
        with (directory / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(
                8 + len(text) + max(fields["data_offsets"][1] for fields in header.values())
            )
        weight_map.update(dict.fromkeys(header, name))
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    (directory / "config.json").write_text(json.dumps(raw))
    return directory
