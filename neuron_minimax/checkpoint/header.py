"""One safetensors file's header, checked against the file's length without reading its data, and
what it says of a tensor.

The format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}},
then the data (https://github.com/huggingface/safetensors#format).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neuron_minimax.errors import CheckpointError

HEADER_LIMIT = 100_000_000  # the format's own limit
# Safetensors dtype -> numpy dtype of the same bytes; FP8 and BF16 have none of their own.
STORED_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "BF16": "<u2",
        "F16": "<f2",
        "F32": "<f4",
        "F64": "<f8",
        "I8": "i1",
        "U8": "u1",
        "I16": "<i2",
        "I32": "<i4",
        "I64": "<i8",
        "BOOL": "?",
    }.items()
}
TORCH_DTYPES = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BF16": "bfloat16",
    "F16": "float16",
    "F32": "float32",
    "F64": "float64",
    "I8": "int8",
    "U8": "uint8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "BOOL": "bool",
}


# Decimal units, as disks and the model card count.
UNITS = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}


def size_text(nbytes: int, digits: int = 1, unit: str = "") -> str:
    """Bytes in a unit, or else in the largest that gives one or more."""
    unit = unit or next((name for name, size in UNITS.items() if nbytes >= size), "B")
    return f"{nbytes / UNITS[unit]:,.{digits}f} {unit}" if unit in UNITS else f"{nbytes} B"


class TensorSpec(NamedTuple):
    """A tensor's name, its dtype as safetensors spells it, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * STORED_DTYPES[self.dtype].itemsize

    @property
    def form(self) -> str:
        """Dtype and shape as reports and messages show them."""
        return f"{self.dtype} {list(self.shape)}"


class HasSpec:
    """Read access to the fields of the `spec` that a class embeds."""

    spec: TensorSpec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def dtype(self) -> str:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True)
class TensorEntry(HasSpec):
    """A stored tensor's place: its shard's file name, and the absolute byte range in it."""

    spec: TensorSpec
    shard: str
    start: int
    end: int


def read_header(path: Path) -> Iterator[TensorEntry]:
    """The entries of one safetensors file, checked against the file's length.

    Raises CheckpointError naming the file when it is missing, empty, truncated, or its header lies.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, HEADER_LIMIT):
                raise CheckpointError(
                    f"{path} is {size} bytes, too short for its header of {length} bytes; it is "
                    "empty, truncated or no safetensors file: download it again"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing, though the index lists it; download it"
        ) from None
    except ValueError as error:
        raise CheckpointError(
            f"{path} has a header that is not JSON ({error}); download it again"
        ) from None
    header.pop("__metadata__", None)
    base = 8 + length
    position = base
    try:
        ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        for name, fields in ordered:
            entry = _entry(path, name, fields, base)
            yield entry
            if entry.start != position:
                what = (
                    "overlaps the tensor before it"
                    if entry.start < position
                    else "leaves a gap before it"
                )
                raise CheckpointError(
                    f"{path}: {name} {what} (starts at {entry.start}, expected {position})"
                )
            position = entry.end
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{path} has a malformed header entry ({error!r}); download it again"
        ) from None
    if position != size:
        state = "truncated" if size < position else "longer than its tensors"
        raise CheckpointError(
            f"{path} is {state}: its header describes {position} bytes, the file has {size}; "
            "download it again"
        )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} appears twice")
    return unique


def _entry(path: Path, name: str, fields: Mapping[str, Any], base: int) -> TensorEntry:
    dtype = fields["dtype"]
    shape = tuple(fields["shape"])
    (begin, end) = fields["data_offsets"]
    if dtype not in STORED_DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {dtype}; expected one of {', '.join(STORED_DTYPES)}"
        )
    spec = TensorSpec(name, dtype, shape)
    needed = spec.nbytes
    if begin < 0 or min(shape, default=0) < 0 or end - begin != needed:
        raise CheckpointError(
            f"{path}: {name} is {spec.form}, {needed} bytes, but its header gives it "
            f"{end - begin} bytes"
        )
    return TensorEntry(spec, path.name, base + begin, base + end)
