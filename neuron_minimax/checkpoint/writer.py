"""Streaming safetensors files: tensors are written piece by piece, and a name appears only when its file is whole."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.checkpoint.reader import INDEX_NAME, SINGLE_NAME

PARTIAL_SUFFIX = ".partial"
# What travels with the weights, as it is, when the source has it; code files are never copied.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


class ShardWriter:
    """One safetensors file, declared first and then filled in order.

    `tensors` maps each name to (dtype as safetensors spells it, shape). `write` appends the next bytes. Leaving the
    `with` block syncs the file and gives it its final name; an exception leaves only the partial file.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL_SUFFIX)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, (dtype, shape) in tensors.items():
            end = position + prod(shape) * STORED_DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data starts aligned
        self._remaining = position
        self._file = self.partial.open("wb", buffering=0)
        self._write_all(memoryview(len(text).to_bytes(8, "little") + text))

    def write(self, data: np.ndarray) -> None:
        """Append the elements of a contiguous array."""
        self._remaining -= data.nbytes
        assert self._remaining >= 0, f"more bytes than {self.path.name} declares"
        self._write_all(data.reshape(-1).view(np.uint8).data)

    def sync(self) -> None:
        """Push what is written so far to the disk, so that the last sync is short. Any thread may call it."""
        os.fdatasync(self._file.fileno())

    def _write_all(self, data: memoryview) -> None:
        while data:
            data = data[self._file.write(data) :]

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._file.close()
            return
        assert self._remaining == 0, f"{self.path.name} lacks {self._remaining} of its declared bytes"
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self.partial, self.path)
        sync_directory(self.path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when it is whole and synced."""
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_directory(path.parent)


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config, as far as they exist."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """The index that names each tensor's shard, in Hugging Face's format."""
    write_json(directory / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)})


def write_checkpoint(
    directory: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, str, np.ndarray]], shards: int = 1
) -> None:
    """A whole checkpoint directory from (name, safetensors dtype, array of stored elements) that fit in memory.

    FP8 arrays are uint8 codes, BF16 arrays uint16. Tensors are spread evenly over the shards, in order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = rows[number * len(rows) // shards : (number + 1) * len(rows) // shards]
        name = SINGLE_NAME if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        with ShardWriter(directory / name, {key: (dtype, array.shape) for key, dtype, array in part}) as writer:
            for key, _, array in part:
                weight_map[key] = name
                writer.write(np.ascontiguousarray(array))
    if shards > 1:
        write_index(directory, weight_map, sum(array.nbytes for _, _, array in rows))
    write_json(directory / "config.json", dict(config))
