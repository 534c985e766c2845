"""One safetensors file's header, checked against the file's length without reading its data, and
what it says of a tensor.

The format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}},
then the data (https://github.com/huggingface/safetensors#format).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import ConfigDict, Field

from neuron_minimax.config import MOST_TENSORS
from neuron_minimax.errors import CheckpointError, shown
from neuron_minimax.files import open_regular, parse_json

HEADER_LIMIT = 100_000_000  # the format's own limit
SIZE_LIMIT = 2**64  # of a size or a product of sizes, in the format's own reader
MINUS_ZERO = re.compile(rb"-0\s*[],]")  # a number to the format's own reader, and no size
ARRAY_LIMIT = 2**60  # elements of numpy's arrays: of 8 bytes each, 2**63 bytes
NAME_LIMIT = 500  # characters of a tensor's or a file's name
MOST_DIMENSIONS = 32  # of what numpy can hold
METADATA = "__metadata__"
ADVICE = "download it again"
# Safetensors dtype -> numpy dtype of the same bytes; FP8 and BF16 have none of their own.
STORED_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
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
# Bits of an element of the format's other dtypes. Such a tensor has its place, and is not read.
UNREAD_DTYPES = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "U32": 32,
    "U64": 64,
    "C64": 64,
}
TORCH_DTYPES = {
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
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


# Decimal units, as disks and the model card count, and binary ones, as a device's memory is.
UNITS: Mapping[str, float] = {"TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3}
BINARY_UNITS: Mapping[str, float] = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}


def size_text(nbytes: int, digits: int = 1, units: Mapping[str, float] = UNITS) -> str:
    """Bytes in the largest of `units` that gives one or more."""
    unit = next((name for name, size in units.items() if nbytes >= size), "B")
    return f"{nbytes / units[unit]:,.{digits}f} {unit}" if unit in units else f"{nbytes} B"


class TensorSpec(NamedTuple):
    """A tensor's name, its dtype as safetensors spells it, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        elements = prod(self.shape)
        if self.dtype in UNREAD_DTYPES:
            return elements * UNREAD_DTYPES[self.dtype] // 8
        return elements * STORED_DTYPES[self.dtype].itemsize

    @property
    def form(self) -> str:
        """Dtype and shape as reports and messages show them."""
        return f"{self.dtype} {list(self.shape)}"


_Size = Annotated[int, Field(ge=0, lt=SIZE_LIMIT)]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stored:
    """A tensor as a header describes it; the range of its bytes starts behind the header."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    dtype: str
    shape: Annotated[tuple[_Size, ...], Field(max_length=MOST_DIMENSIONS)]
    data_offsets: tuple[_Size, _Size]


_Header = dict[str, _Stored | dict[str, str] | None]


def is_plain_text(name: str) -> bool:
    """Return whether a name can stand in reports and messages as it is: some characters, all
    printable.
    """
    return 0 < len(name) <= NAME_LIMIT and name.isprintable()


def read_header(path: Path) -> list[TensorEntry]:
    """The entries of one safetensors file in the order of their data, checked against the file's
    length.

    What the safetensors library refuses is refused. Of what it takes are refused: a tensor's entry
    with another field or written as a list, more than MOST_DIMENSIONS, sizes beyond ARRAY_LIMIT,
    names that are no plain text (`is_plain_text`), keys that stand twice, and more than
    MOST_TENSORS. A tensor of UNREAD_DTYPES is listed; no array can be had of it.
    Raises CheckpointError naming the file when it is missing, empty, truncated, or its header lies.
    """
    return parse_header(path, *_header_text(path))


def parse_header(path: Path, size: int, text: bytes) -> list[TensorEntry]:
    """The entries of a file of so many bytes whose header, behind its length, is this text."""
    header = parse_json(text, _Header, f"the header of {path}", CheckpointError, ADVICE)
    if MINUS_ZERO.search(text):
        raise CheckpointError(f"{path}: a size or an offset in its header is -0; {ADVICE}")
    declared = _tensors_of(header, path)
    base = 8 + len(text)
    position = base
    entries = []
    for name, fields in sorted(declared.items(), key=lambda item: item[1].data_offsets):
        entry = _entry(path, name, fields, base)
        if entry.start != position:
            what = (
                "overlaps the tensor before it"
                if entry.start < position
                else "leaves a gap before it"
            )
            raise CheckpointError(
                f"{path}: {name} {what} (starts at {entry.start}, expected {position}); {ADVICE}"
            )
        position = entry.end
        entries.append(entry)
    if position != size:
        state = "truncated" if size < position else "longer than its tensors"
        raise CheckpointError(
            f"{path} is {state}: its header describes {position} bytes, the file has {size}; "
            f"{ADVICE}"
        )
    return entries


def _header_text(path: Path) -> tuple[int, bytes]:
    """Return the file's size and its header."""
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = header_length(path, size, file.read(8))
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is missing, though the index lists it; download it"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    return size, text


def header_length(path: Path, size: int, beginning: bytes) -> int:
    """Return the length of the header that a file of so many bytes declares in its first eight.

    Raises CheckpointError when no header has it, or the file is too short for it.
    """
    length = int.from_bytes(beginning, "little")
    if length > HEADER_LIMIT and size >= 8:
        raise CheckpointError(
            f"{path} declares a header of {length} bytes; at most {HEADER_LIMIT} are allowed: it "
            f"is no safetensors file or was damaged: {ADVICE}"
        )
    if length > size - 8:
        raise CheckpointError(
            f"{path} is {size} bytes, too short for its header of {length} bytes; it is "
            f"empty, truncated or no safetensors file: {ADVICE}"
        )
    return length


def _tensors_of(header: _Header, path: Path) -> dict[str, _Stored]:
    """Return what a header describes, without its metadata."""
    metadata = header.pop(METADATA, None)
    if isinstance(metadata, _Stored):
        raise CheckpointError(f"{path}: {METADATA} is a tensor; expected texts by name; {ADVICE}")
    if len(header) > MOST_TENSORS:
        raise CheckpointError(
            f"{path} has {len(header)} tensors; at most {MOST_TENSORS} are read: it is of no "
            "supported model"
        )
    tensors = {}
    for name, fields in header.items():
        if not isinstance(fields, _Stored):
            raise CheckpointError(
                f"{path}: {shown(name)} has no dtype, shape and data_offsets; {ADVICE}"
            )
        if not is_plain_text(name):
            raise CheckpointError(
                f"{path} has a tensor whose name is no plain text ({shown(name)}); expected up to "
                f"{NAME_LIMIT} printable characters"
            )
        tensors[name] = fields
    return tensors


def _entry(path: Path, name: str, fields: _Stored, base: int) -> TensorEntry:
    if fields.dtype not in STORED_DTYPES and fields.dtype not in UNREAD_DTYPES:
        raise CheckpointError(
            f"{path}: {name} has dtype {shown(fields.dtype)}; expected one of "
            f"{', '.join(STORED_DTYPES)}"
        )
    spec = TensorSpec(name, fields.dtype, fields.shape)
    if fields.dtype in UNREAD_DTYPES and prod(fields.shape) * UNREAD_DTYPES[fields.dtype] % 8:
        raise CheckpointError(f"{path}: {name} is {spec.form}, no whole bytes; {ADVICE}")
    (begin, end) = fields.data_offsets
    needed = spec.nbytes
    if not needed and _overflows(fields.shape):
        raise CheckpointError(f"{path}: {name} is {spec.form}, as no array can be; {ADVICE}")
    if end - begin != needed:
        raise CheckpointError(
            f"{path}: {name} is {spec.form}, {needed} bytes, but its header gives it "
            f"{end - begin} bytes; {ADVICE}"
        )
    return TensorEntry(spec, path.name, base + begin, base + end)


def _overflows(shape: tuple[int, ...]) -> bool:
    """Return whether a product on the way to 0 is beyond what the format's own reader holds, or
    that of the other sizes beyond what numpy does.
    """
    largest = max(accumulate(shape, mul), default=0)
    return largest >= SIZE_LIMIT or prod(size for size in shape if size) >= ARRAY_LIMIT
