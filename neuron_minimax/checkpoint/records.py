"""Records of written tensors, as a manifest or a journal holds them, and their comparison with what
is on disk.
"""

import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import ConfigDict, Field

from neuron_minimax.checkpoint.header import STORED_DTYPES, HasSpec, TensorSpec
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.streaming import WORKERS, PageDropper
from neuron_minimax.files import FileName
from neuron_minimax.progress import Advance, nothing

CHECK_PIECE = 8 << 20
CRC_POLYNOMIAL = 0xEDB88320  # of crc32, lowest bit first


@dataclass(frozen=True)
class TensorRecord(HasSpec):
    """A written tensor: its shard, the crc32 of its bytes, and how many codes were rounded."""

    spec: TensorSpec
    shard: str
    crc32: str
    rounded_codes: int = 0


Count = Annotated[int, Field(ge=0, lt=2**63)]


@dataclass(frozen=True, kw_only=True)
class TensorFields:
    """A record as a manifest or a journal holds it, under the tensor's name."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    shard: FileName
    dtype: Literal[tuple(STORED_DTYPES)]  # type: ignore[valid-type]
    shape: tuple[Count, ...]
    crc32: Annotated[str, Field(pattern="^[0-9a-f]{8}$")]
    rounded_codes: Count


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


def read_records(parsed: Mapping[str, TensorFields]) -> dict[str, TensorRecord]:
    """The inverse of records_as_json, of fields that were parsed."""
    return {
        name: TensorRecord(
            spec=TensorSpec(name, fields.dtype, fields.shape),
            shard=fields.shard,
            crc32=fields.crc32,
            rounded_codes=fields.rounded_codes,
        )
        for name, fields in parsed.items()
    }


def _crc32_of(stored: TensorDirectory, name: str) -> str:
    """Return crc32 of a stored tensor's bytes, as manifests spell it."""
    entry = stored.entry(name)
    if not entry.shape:
        return f"{zlib.crc32(stored.rows(name).tobytes()):08x}"
    rows = max(1, CHECK_PIECE * entry.shape[0] // max(1, entry.nbytes))
    value = 0
    for strip in stored.strips(name, rows):
        value = zlib.crc32(strip.reshape(-1).view(np.uint8).data, value)
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
    advance: Advance = nothing,
) -> list[str]:
    """Names whose stored bytes, dtype or shape are not what the records say; all are re-read."""
    dropper = PageDropper((stored,), stored.nbytes)

    def is_damaged(name: str) -> bool:
        entry = stored.entries.get(name)
        if entry is None or entry.spec != records[name].spec:
            return True
        damaged = _crc32_of(stored, name) != records[name].crc32
        advance(entry.nbytes)
        dropper.advance(entry.nbytes)
        return damaged

    with ThreadPoolExecutor(WORKERS) as pool:
        found = zip(records, pool.map(is_damaged, records), strict=True)
        return [name for name, damaged in found if damaged]
