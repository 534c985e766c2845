"""The index of a checkpoint's shards: which file has each tensor."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from neuron_minimax.checkpoint.header import ADVICE, is_plain_text
from neuron_minimax.config import MOST_TENSORS
from neuron_minimax.errors import CheckpointError, shown
from neuron_minimax.files import is_plain_name, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MOST_SHARDS = 10_000  # the published checkpoints have some 130


@dataclass(frozen=True, kw_only=True)
class _Index:
    """What is read of an index: the shard of each tensor."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    weight_map: dict[str, str]


def read_weight_map(directory: Path) -> dict[str, str]:
    """Return the shard of each tensor; nothing of a directory without an index.

    Raises CheckpointError without a directory, and on an index that cannot be used.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is not a directory; expected a checkpoint directory")
    path = directory / INDEX_NAME
    try:
        weight_map = read_json(path, _Index, CheckpointError, ADVICE).weight_map
    except FileNotFoundError:
        return {}
    if not 0 < len(weight_map) <= MOST_TENSORS:
        raise CheckpointError(
            f"{path} cannot be used (weight_map has {len(weight_map)} tensors, expected 1 to "
            f"{MOST_TENSORS}); {ADVICE}"
        )
    for name in weight_map:
        if not is_plain_text(name):
            raise CheckpointError(
                f"{path} lists {shown(name)}, which is no name of a tensor; {ADVICE}"
            )
    shards = set(weight_map.values())
    if len(shards) > MOST_SHARDS:
        raise CheckpointError(
            f"{path} names {len(shards)} shards; at most {MOST_SHARDS} are read: {ADVICE}"
        )
    for shard in shards:
        if not is_plain_name(shard) or not is_plain_text(shard):
            raise CheckpointError(
                f"{path} names the shard {shown(shard)}; expected a file name in the same directory"
            )
    return weight_map
