"""What a manifest says of each written tensor, and whether the bytes on disk still agree."""

import os
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.errors import NeuronMiniMaxError

CHECK_PIECE = 8 << 20
# Threads that compute; one thread digests and writes, and eight keep it busy. Pieces in flight stay under 250 MB.
WORKERS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class TensorRecord:
    """What the manifest says of a written tensor: crc32 of its bytes, and codes rounded on the way."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    crc32: str
    rounded_codes: int = 0


def records_as_json(records: Mapping[str, TensorRecord]) -> dict[str, dict[str, Any]]:
    """Records as a manifest or a journal holds them."""
    return {name: asdict(record) for name, record in records.items()}


def read_records(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorRecord]:
    """The inverse of records_as_json."""
    return {name: TensorRecord(**{**fields, "shape": tuple(fields["shape"])}) for name, fields in raw.items()}


def crc32_of(array: np.ndarray) -> str:
    """crc32 of an array's bytes, as manifests spell it."""
    data, value = array.reshape(-1).view(np.uint8), 0
    for start in range(0, data.size, CHECK_PIECE):
        value = zlib.crc32(data[start : start + CHECK_PIECE].data, value)
    return f"{value:08x}"


def damaged_tensors(
    directory: Path,
    records: Mapping[str, TensorRecord],
    shard: str | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Names whose stored bytes, dtype or shape are not what the records say; all are re-read, or those of one shard."""
    wanted = {name: record for name, record in records.items() if shard in (None, record.shard)}
    try:
        stored = TensorDirectory(directory, shards=sorted({record.shard for record in wanted.values()}))
    except NeuronMiniMaxError:
        return list(wanted)

    def is_damaged(name: str) -> bool:
        record, entry = wanted[name], stored.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (record.dtype, record.shape):
            return True
        damaged = crc32_of(stored.array(name)) != record.crc32
        progress(entry.nbytes)
        return damaged

    with ThreadPoolExecutor(WORKERS) as pool:
        return [name for name, damaged in zip(wanted, pool.map(is_damaged, wanted), strict=True) if damaged]
