"""What a manifest says of each written tensor, and whether the bytes on disk still agree."""

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.page_cache import Trail
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.workers import WORKERS
from neuron_minimax.errors import NeuronMiniMaxError

CHECK_PIECE = 8 << 20
CRC_POLYNOMIAL = 0xEDB88320  # of crc32, lowest bit first


@dataclass(frozen=True)
class TensorRecord:
    """What the manifest says of a written tensor: crc32 of its bytes, and codes rounded on the
    way.
    """

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
    return {
        name: TensorRecord(**{**fields, "shape": tuple(fields["shape"])})
        for name, fields in raw.items()
    }


def crc32_of(array: np.ndarray) -> str:
    """crc32 of an array's bytes, as manifests spell it."""
    data = array.reshape(-1).view(np.uint8)
    value = 0
    for start in range(0, data.size, CHECK_PIECE):
        value = zlib.crc32(data[start : start + CHECK_PIECE].data, value)
    return f"{value:08x}"


def joined_crc32(first: int, second: int, nbytes: int) -> int:
    """crc32 of two stretches of bytes from the crc32 of each, the second being `nbytes` long.

    Appending n bytes multiplies the polynomial of the first by x^(8n), modulo that of crc32.
    """
    return _multiply(_shift(nbytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """Product of polynomials over GF(2) modulo that of crc32; the highest bit is the coefficient of
    x^0.
    """
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (CRC_POLYNOMIAL if b & 1 else 0)
    return product


@cache
def _shift(nbytes: int) -> int:
    """x^(8 * nbytes), by squaring."""
    # x^0, x^8
    power = 1 << 31
    square = 1 << 23
    while nbytes:
        power = _multiply(power, square) if nbytes & 1 else power
        square = _multiply(square, square)
        nbytes = nbytes >> 1
    return power


def damaged_tensors(
    directory: Path,
    records: Mapping[str, TensorRecord],
    shard: str | None = None,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Names whose stored bytes, dtype or shape are not what the records say; all are re-read, or
    those of one shard.
    """
    wanted = {name: record for name, record in records.items() if shard in (None, record.shard)}
    try:
        stored = TensorDirectory(
            directory, shards=sorted({record.shard for record in wanted.values()})
        )
    except NeuronMiniMaxError:
        return list(wanted)

    trail = Trail((stored,), stored.nbytes)

    def is_damaged(name: str) -> bool:
        record = wanted[name]
        entry = stored.entries.get(name)
        if entry is None or (entry.dtype, entry.shape) != (record.dtype, record.shape):
            return True
        damaged = crc32_of(stored.array(name)) != record.crc32
        progress(entry.nbytes)
        trail.advance(entry.nbytes)
        return damaged

    with ThreadPoolExecutor(WORKERS) as pool:
        return [
            name
            for name, damaged in zip(wanted, pool.map(is_damaged, wanted), strict=True)
            if damaged
        ]
