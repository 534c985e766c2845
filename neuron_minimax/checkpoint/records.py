"""Records of written tensors, as a manifest or a journal holds them, and their comparison with what
is on disk.
"""

import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.header import HasSpec, TensorSpec
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.streaming import WORKERS, PageDropper

CHECK_PIECE = 8 << 20
CRC_POLYNOMIAL = 0xEDB88320  # of crc32, lowest bit first


@dataclass(frozen=True)
class TensorRecord(HasSpec):
    """A written tensor: its shard, the crc32 of its bytes, and how many codes were rounded."""

    spec: TensorSpec
    shard: str
    crc32: str
    rounded_codes: int = 0


def records_as_json(records: Mapping[str, TensorRecord]) -> dict[str, dict[str, Any]]:
    """Records as a manifest or a journal holds them."""
    return {
        name: {
            "shard": record.shard,
            "dtype": record.dtype,
            "shape": list(record.shape),
            "crc32": record.crc32,
            "rounded_codes": record.rounded_codes,
        }
        for name, record in records.items()
    }


def read_records(raw: Mapping[str, Mapping[str, Any]]) -> dict[str, TensorRecord]:
    """The inverse of records_as_json."""
    return {
        name: TensorRecord(
            spec=TensorSpec(name, fields["dtype"], tuple(fields["shape"])),
            shard=fields["shard"],
            crc32=fields["crc32"],
            rounded_codes=fields.get("rounded_codes", 0),
        )
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
    stored: TensorDirectory,
    records: Mapping[str, TensorRecord],
    progress: Callable[[int], None] = lambda nbytes: None,
) -> list[str]:
    """Names whose stored bytes, dtype or shape are not what the records say; all are re-read."""
    dropper = PageDropper((stored,), stored.nbytes)

    def is_damaged(name: str) -> bool:
        entry = stored.entries.get(name)
        if entry is None or entry.spec != records[name].spec:
            return True
        damaged = crc32_of(stored.array(name)) != records[name].crc32
        progress(entry.nbytes)
        dropper.advance(entry.nbytes)
        return damaged

    with ThreadPoolExecutor(WORKERS) as pool:
        found = zip(records, pool.map(is_damaged, records), strict=True)
        return [name for name, damaged in found if damaged]
