"""The memories of one NeuronCore-v3 as NumPy arrays: tensors, their views, what is written, what is
in use, counts.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from math import prod

import numpy as np
import torch

PARTITIONS = 128
SBUF_BYTES = 24 * 2**20 // PARTITIONS  # per partition
PSUM_BANK_BYTES = 2048  # per partition
PSUM_BANKS = 8


class HardwareError(Exception):
    """The program asks for what the hardware does not do."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise HardwareError(message)


@dataclass(frozen=True)
class Dtype:
    """How values look in memory (`bytes`) and what holds them here (`storage`)."""

    name: str
    bytes: int
    storage: type

    @property
    def is_float(self) -> bool:
        return "float" in self.name


FLOAT32 = Dtype("float32", 4, np.float32)
BFLOAT16 = Dtype("bfloat16", 2, np.float32)  # held as the float32 of equal value
FLOAT8_E4M3 = Dtype("float8_e4m3", 1, np.uint8)  # held as its codes
FLOAT8_E4M3FN = Dtype(
    "float8_e4m3fn", 1, np.uint8
)  # the OCP type: moved, or read through a view of another type
UINT8 = Dtype("uint8", 1, np.uint8)
INT32 = Dtype("int32", 4, np.int32)
UINT32 = Dtype("uint32", 4, np.uint32)


def _e4m3_values() -> np.ndarray:
    """NeuronCore-v3's E4M3: bias 7; exponent 15 is infinity (mantissa 0) or NaN; the largest finite
    value is 240.
    """
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0)
    )
    values = np.where(exponent == 15, np.where(mantissa == 0, np.inf, np.nan), values)
    return np.where(codes & 128, -values, values).astype(np.float32)


E4M3_VALUES = _e4m3_values()
OCP_VALUES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; the result is float32 again."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


@dataclass
class Machine:
    """What is in use per partition, and what was done. `core` and `cores` are the position in a
    launch.
    """

    generation: int = 3  # of the NeuronCore; from 4 on it computes with OCP's FP8
    core: int = 0
    cores: int = 0  # 0: not launched on a grid
    counts: Counter = field(default_factory=Counter)
    in_use: Counter = field(default_factory=Counter)
    shared: list = field(default_factory=list)
    shared_used: int = 0
    busy: int | None = None  # the number of the tensor that the last product was of
    trips: list[int] = field(default_factory=list)  # of the first core's dynamic loops
    loops: int = 0  # dynamic loops of this core so far
    body: list | None = None  # the instructions of this pass through a dynamic loop
    outside: int = 0  # tensors that are older than this pass

    def allocate(self, shape: tuple[int, ...], dtype: Dtype, buffer: str) -> "Tensor":
        shape = tuple(int(size) for size in shape)
        require(all(size > 0 for size in shape), f"a tensor needs positive sizes, not {shape}")
        if buffer == "shared_hbm":
            return self._allocate_shared(shape, dtype)
        storage = Storage(shape, dtype, buffer)
        storage.generation = self.generation
        if buffer in ("sbuf", "psum"):
            require(
                len(shape) >= 2,
                f"{buffer} tensors have a partition and a free dimension, not shape {shape}",
            )
            require(shape[0] <= PARTITIONS, f"{buffer} has {PARTITIONS} partitions, not {shape[0]}")
            self._claim(storage, prod(shape[1:]) * dtype.bytes)
        return Tensor(storage, storage.data, storage.written)

    def _allocate_shared(self, shape: tuple[int, ...], dtype: Dtype) -> "Tensor":
        """The n-th shared tensor of every core of a launch is the same memory."""
        if self.shared_used == len(self.shared):
            self.shared.append(Storage(shape, dtype, "shared_hbm"))
        storage = self.shared[self.shared_used]
        self.shared_used += 1
        require(
            storage.data.shape == shape,
            f"the cores disagree on a shared tensor: {storage.data.shape}, {shape}",
        )
        return Tensor(storage, storage.data, storage.written)

    def _claim(self, storage: "Storage", size: int) -> None:
        if storage.buffer == "psum":
            require(
                size <= PSUM_BANK_BYTES,
                f"a PSUM tile has {PSUM_BANK_BYTES} bytes per partition, not {size}",
            )
        unit, limit, amount = (
            ("bytes", SBUF_BYTES, size) if storage.buffer == "sbuf" else ("banks", PSUM_BANKS, 1)
        )
        self.in_use[storage.buffer] += amount
        used = self.in_use[storage.buffer]
        # A tile is given back when the program holds no reference to it, as the compiler's
        # allocator would at best.
        weakref.finalize(storage, self._release, storage.buffer, amount)
        require(
            used <= limit,
            f"{storage.buffer} has {limit} {unit} per partition, and {used} are in use",
        )
        self.counts[f"peak_{storage.buffer}"] = max(self.counts[f"peak_{storage.buffer}"], used)

    def _release(self, buffer: str, amount: int) -> None:
        self.in_use[buffer] -= amount

    def dynamic_passes(self, values: range) -> Iterator["Register"]:
        """A loop on the device. It has one body, so every pass issues the same instructions on the
        same places.
        """
        require(self.body is None, "a dynamic loop inside another is not interpreted")
        self.loops += 1
        if self.core == 0:
            self.trips.append(len(values))
        # NKI documentation, "Logical NeuronCore configuration": control flow that differs between
        # cores is undefined.
        trips = self.trips[self.loops - 1]
        require(
            trips == len(values),
            f"the cores disagree on the passes of a loop: {trips}, {len(values)}",
        )
        first = None
        for value in values:
            self.body, self.outside = [], next(Storage.numbers)
            yield Register(value)
            first = self.body if first is None else first
            require(
                first == self.body,
                "a dynamic loop has one body, and this pass differs from the first",
            )
        self.body = None

    def record(self, name: str, *operands: "Tensor | float") -> None:
        if self.body is not None:
            places = [
                each.place(self.outside) if isinstance(each, Tensor) else each for each in operands
            ]
            self.body.append((name, *places))


@dataclass
class Register:
    """One value on the device; the program cannot compute with it."""

    value: int | None


class Storage:
    """Memory of one tensor: values, and which of them were written."""

    numbers = count()
    generation = 3

    def __init__(
        self, shape: tuple[int, ...], dtype: Dtype, buffer: str, data: np.ndarray | None = None
    ):
        self.number = next(self.numbers)
        self.dtype, self.buffer = dtype, buffer
        self.data = np.zeros(shape, dtype.storage) if data is None else data
        self.written = np.full(self.data.shape, data is not None)


class Tensor:
    """A view of a storage. Only whole tensors have `ap`; a dynamic view is placed when a DMA
    resolves it.
    """

    def __init__(
        self,
        storage: Storage,
        data: np.ndarray,
        written: np.ndarray,
        start: int = 0,
        dtype=None,
        dynamic=None,
    ):
        self.storage, self.data, self.written = storage, data, written
        self.start_partition, self.dtype, self.dynamic = start, dtype or storage.dtype, dynamic

    @property
    def shape(self) -> tuple[int, ...]:
        return (
            self.data.shape
            if self.dynamic is None
            else tuple(num for _, num in self.dynamic.pattern)
        )

    @property
    def buffer(self) -> str:
        return self.storage.buffer

    @property
    def on_chip(self) -> bool:
        return self.buffer in ("sbuf", "psum")

    def __getitem__(self, keys) -> "Tensor":
        keys = keys if isinstance(keys, tuple) else (keys,)
        require(self.dynamic is None, "a dynamic access pattern cannot be indexed further")
        start = self.start_partition
        if self.on_chip:
            require(isinstance(keys[0], slice), "the partition dimension is indexed by a slice")
            first, _, step = keys[0].indices(self.data.shape[0])
            require(step == 1, "partitions are accessed without stride")
            start += first
        for key, size in zip(keys, self.data.shape, strict=False):
            last = (key.stop if isinstance(key, slice) else key + 1) or size
            require(0 <= last <= size, f"index {key} is outside a dimension of {size}")
        return Tensor(self.storage, self.data[keys], self.written[keys], start, self.dtype)

    def ap(
        self, pattern, offset=0, scalar_offset=None, vector_offset=None, indirect_dim=0, dtype=None
    ) -> "Tensor":
        """An access pattern [[step, num], ...] in elements over the flattened tensor, outermost
        first.
        """
        require(vector_offset is None, "vector_offset is not interpreted")
        require(self.data is self.storage.data, "an access pattern starts from a whole tensor")
        dtype = dtype or self.dtype
        ratio = dtype.bytes // self.dtype.bytes
        require(ratio >= 1, "reinterpreting as a smaller type is not interpreted")
        if self.on_chip:
            free = prod(self.data.shape[1:]) // ratio
            step, num = pattern[0]
            require(
                step == free or num == 1, f"the partition step is the free size {free}, not {step}"
            )
        access = DynamicAccess(pattern, offset, scalar_offset, indirect_dim, dtype)
        view = Tensor(self.storage, self.data, self.written, 0, dtype, access)
        return view if scalar_offset is not None else view.resolved()

    def resolved(self) -> "Tensor | None":
        """The view a dynamic access names now, or None when it lies outside the tensor."""
        if self.dynamic is None:
            return self
        access, offset = self.dynamic, self.dynamic.offset
        if access.scalar_offset is not None:
            index = access.scalar_offset
            require(
                index.buffer == "sbuf" and prod(index.shape) == 1,
                "scalar_offset is one value in SBUF",
            )
            require(
                index.dtype in (INT32, UINT32),
                f"scalar_offset is an integer, not {index.dtype.name}",
            )
            shape = self.storage.data.shape
            value = int(index.read().reshape(-1)[0])
            if not 0 <= value < shape[access.indirect_dim]:
                return None
            offset += value * prod(shape[access.indirect_dim + 1 :])
        ratio = access.dtype.bytes // self.storage.dtype.bytes
        last = offset + sum(step * (num - 1) for step, num in access.pattern)
        require(
            offset >= 0 and last < self.storage.data.size // ratio,
            "an access pattern leaves its tensor",
        )
        start = offset * ratio // prod(self.storage.data.shape[1:]) if self.on_chip else 0
        flat = self.storage.data.reshape(-1).view(access.dtype.storage)
        written = self.storage.written.reshape(-1, ratio)
        return Tensor(
            self.storage,
            _strided(flat, access.pattern, offset),
            _strided(written, access.pattern, offset),
            start,
            access.dtype,
        )

    def place(self, outside: int) -> tuple:
        """Which elements of which tensor; a tensor of this pass through a loop is known by its
        order in it.
        """
        start = (
            self.data.__array_interface__["data"][0]
            - self.storage.data.__array_interface__["data"][0]
        )
        number = self.storage.number
        tensor = ("outside", number) if number < outside else ("inside", number - outside)
        dynamic = None
        if self.dynamic is not None:
            access = self.dynamic
            index = access.scalar_offset and access.scalar_offset.place(outside)
            dynamic = (str(access.pattern), access.offset, index, access.indirect_dim)
        return (*tensor, start, self.data.shape, self.data.strides, self.dtype.name, dynamic)

    def lose(self) -> None:
        """What was here is gone: reading it is an error until it is written again."""
        self.written[...] = False

    def read(self) -> np.ndarray:
        """The values; FP8 as float32. Reading what nobody wrote is an error."""
        require(
            self.dtype is not FLOAT8_E4M3FN or self.storage.generation > 3,
            "NeuronCore-v3 computes with float8_e4m3, not with float8_e4m3fn",
        )
        require(
            bool(self.written.all()), f"use of unwritten {self.buffer} memory (shape {self.shape})"
        )
        if self.dtype is FLOAT8_E4M3FN:
            return OCP_VALUES[self.data]
        return E4M3_VALUES[self.data] if self.dtype is FLOAT8_E4M3 else self.data

    def write(self, values: np.ndarray) -> None:
        fp8 = (FLOAT8_E4M3, FLOAT8_E4M3FN)
        require(
            self.dtype not in fp8, "no instruction here computes FP8 values; they are only moved"
        )
        if self.dtype is BFLOAT16:
            values = round_to_bfloat16(np.asarray(values, np.float32))
        self.data[...] = np.asarray(values).reshape(self.data.shape)
        self.written[...] = True


@dataclass(frozen=True)
class DynamicAccess:
    pattern: list
    offset: int
    scalar_offset: Tensor | None
    indirect_dim: int
    dtype: Dtype


def _strided(array: np.ndarray, pattern, offset: int) -> np.ndarray:
    """The pattern over the first dimension of `array`; further dimensions are kept."""
    strides = [step * array.strides[0] for step, _ in pattern]
    shape = [num for _, num in pattern]
    return np.lib.stride_tricks.as_strided(
        array[offset:], shape + list(array.shape[1:]), strides + list(array.strides[1:])
    )
