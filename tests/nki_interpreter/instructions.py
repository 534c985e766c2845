"""The instructions of `nki.isa` that kernels here may use, with the operand rules of NeuronCore-v3.

Counted per instruction: calls; for on-chip engines also elements per partition (`<name>_elements`),
which with the documented minimum of 64 cycles per instruction gives `<name>_cycles`; for DMA the
bytes to and from HBM, and how many loads went into the buffer that the last matmul read
(`dma_into_busy`), so that they could not overlap with it.

A load that is skipped leaves its destination unwritten, whatever was there before: which memory a
tile names is the compiler's business, so a kernel may not count on what an earlier load left in it.
"""

from enum import Enum
from math import prod

import numpy as np

from tests.nki_interpreter import machine as memory
from tests.nki_interpreter.machine import Machine, Register, Tensor, require

QUADRANT = 32
STATIONARY_COLUMNS = 128
MOVING_COLUMNS = 512
MINIMUM_CYCLES = 64
MATMUL_DTYPES = (memory.FLOAT8_E4M3, memory.FLOAT8_E4M3FN, memory.BFLOAT16, memory.FLOAT32)


class OobMode(Enum):
    error = 0
    skip = 1


class Engine(Enum):
    unknown = 0
    tensor = 1
    vector = 5


class Instructions:
    """The functions of `nki.isa`, bound to one machine."""

    names = (
        *(
            "dma_copy",
            "nc_matmul",
            "nc_transpose",
            "tensor_copy",
            "tensor_tensor",
            "tensor_scalar",
            "tensor_reduce",
        ),
        *("activation", "memset", "nc_stream_shuffle", "register_alloc", "register_load"),
    )

    def __init__(self, machine: Machine):
        self.machine = machine

    def exported(self) -> dict:
        return {name: getattr(self, name) for name in self.names} | {
            "oob_mode": OobMode,
            "engine": Engine,
        }

    def dma_copy(self, dst: Tensor, src: Tensor, oob_mode=OobMode.error, name=None) -> None:
        """dst = src between HBM and SBUF; nothing moves when a dynamic index is out of range and
        may be skipped.
        """
        require(dst.buffer != "psum" and src.buffer != "psum", "DMA reaches HBM and SBUF, not PSUM")
        require(dst.shape == src.shape, f"DMA between shapes {src.shape} and {dst.shape}")
        require(
            dst.dtype == src.dtype,
            f"DMA here moves bytes: {src.dtype.name} is not {dst.dtype.name}",
        )
        self.machine.record("dma_copy", dst, src)
        source, target = src.resolved(), dst.resolved()
        if source is None or target is None:
            require(oob_mode is OobMode.skip, "DMA index out of range")
            self.machine.counts["dma_skipped"] += 1
            if target is not None:
                target.lose()
            return
        require(bool(source.written.all()), f"DMA of unwritten {source.buffer} memory")
        target.data[...] = source.data
        target.written[...] = True
        size = prod(dst.shape) * dst.dtype.bytes
        self.machine.counts["dma_copy"] += 1
        self.machine.counts["dma_into_busy"] += target.storage.number == self.machine.busy
        self.machine.counts["hbm_read_bytes"] += 0 if source.on_chip else size
        self.machine.counts["hbm_written_bytes"] += 0 if target.on_chip else size

    def nc_matmul(
        self, dst: Tensor, stationary: Tensor, moving: Tensor, accumulate=None, name=None
    ) -> None:
        """dst = stationary.T @ moving, contracted over partitions, in float32."""
        require(dst.buffer == "psum", f"nc_matmul writes to PSUM, not {dst.buffer}")
        for operand in (stationary, moving):
            require(operand.buffer == "sbuf", f"nc_matmul reads SBUF, not {operand.buffer}")
            require(
                operand.dtype in MATMUL_DTYPES,
                f"the tensor engine does not take {operand.dtype.name}",
            )
            require(
                operand.start_partition == 0 and len(operand.shape) == 2,
                "matmul operands are [partitions, columns]",
            )
        wide = [operand.dtype is memory.FLOAT32 for operand in (stationary, moving)]
        require(wide[0] == wide[1], "if one matmul operand is float32, both are")
        require(dst.dtype is memory.FLOAT32, "NeuronCore-v3 accumulates into float32 only")
        require(
            stationary.shape[0] == moving.shape[0],
            "matmul operands have different partition counts",
        )
        require(
            stationary.shape[1] <= STATIONARY_COLUMNS,
            f"stationary has {stationary.shape[1]} > 128 columns",
        )
        require(
            moving.shape[1] <= MOVING_COLUMNS,
            f"moving has {moving.shape[1]} > {MOVING_COLUMNS} columns",
        )
        require(
            dst.shape == (stationary.shape[1], moving.shape[1]),
            f"matmul result does not fit shape {dst.shape}",
        )
        result = stationary.read().T @ moving.read()
        if accumulate or (accumulate is None and dst.written.all()):
            result = dst.read() + result
        dst.write(result)
        self.machine.busy = stationary.storage.number
        passes = 4 if wide[0] else 1
        self.machine.record("nc_matmul", dst, stationary, moving)
        self._count("nc_matmul", moving.shape[1], passes)

    def nc_transpose(self, dst: Tensor, data: Tensor, engine=Engine.unknown, name=None) -> None:
        """dst = data.T on the tensor engine, bit-exact on NeuronCore-v3."""
        require(engine is Engine.tensor, "only tensor engine transposes are interpreted")
        require(
            data.buffer == "sbuf" and dst.buffer == "psum",
            "the tensor engine transposes from SBUF to PSUM",
        )
        require(
            max(data.shape) <= STATIONARY_COLUMNS and len(data.shape) == 2,
            f"transpose of shape {data.shape}",
        )
        require(dst.dtype == data.dtype, "a transpose keeps the dtype")
        require(
            dst.shape == data.shape[::-1], f"transpose of {data.shape} does not fit {dst.shape}"
        )
        dst.write(data.read().T)
        self.machine.record("nc_transpose", dst, data)
        self._count("nc_transpose", data.shape[0], 1)

    def nc_stream_shuffle(self, dst: Tensor, src: Tensor, shuffle_mask, name=None) -> None:
        """Partition i of dst = partition shuffle_mask[i] of src, in each quadrant of 32 partitions
        by itself.
        """
        self._check_on_chip("nc_stream_shuffle", dst, src)
        require(dst.dtype == src.dtype, "a shuffle keeps the dtype")
        require(dst.shape[1:] == src.shape[1:], f"shuffle of shape {src.shape} into {dst.shape}")
        require(
            len(shuffle_mask) == QUADRANT,
            f"a shuffle mask has {QUADRANT} entries, not {len(shuffle_mask)}",
        )
        active = (max(dst.shape[0], src.shape[0]) + QUADRANT - 1) // QUADRANT * QUADRANT
        allowed = {32: (0, 32, 64, 96), 64: (0, 64)}.get(active, (0,))
        starts = (dst.start_partition, src.start_partition)
        require(
            all(start in allowed for start in starts),
            f"{active} shuffled partitions start at {allowed}",
        )
        partitions = np.arange(dst.shape[0])
        sources = partitions - partitions % QUADRANT + np.array(shuffle_mask)[partitions % QUADRANT]
        require(
            max(sources) < src.shape[0],
            f"the shuffle reads partition {max(sources)} of {src.shape[0]}",
        )
        dst.write(src.read()[sources])
        self.machine.record("nc_stream_shuffle", dst, src, *shuffle_mask)
        self._count("nc_stream_shuffle", prod(dst.shape[1:]), 1)

    def register_alloc(self, x: int | None = None) -> Register:
        return Register(x)

    def register_load(self, dst: Register, src: Tensor) -> None:
        require(prod(src.shape) == 1 and not src.dtype.is_float, "a register takes one integer")
        self.machine.record("register_load", src)
        dst.value = int(src.read().reshape(-1)[0])

    def tensor_copy(self, dst: Tensor, src: Tensor, engine=Engine.unknown, name=None) -> None:
        self._elementwise("tensor_copy", dst, (src,), lambda value: value)

    def tensor_tensor(
        self, dst: Tensor, data1: Tensor, data2: Tensor, op, engine=Engine.unknown, name=None
    ) -> None:
        require(
            not data1.buffer == data2.buffer == "psum",
            "tensor_tensor reads at most one operand from PSUM",
        )
        self._elementwise("tensor_tensor", dst, (data1, data2), op)

    def tensor_scalar(
        self,
        dst,
        data,
        op0,
        operand0,
        reverse0=False,
        op1=None,
        operand1=None,
        reverse1=False,
        engine=None,
        name=None,
    ) -> None:
        """(data op0 operand0) op1 operand1; an operand is a number or one value per partition."""

        def run(value: np.ndarray) -> np.ndarray:
            for op, operand, reverse in ((op0, operand0, reverse0), (op1, operand1, reverse1)):
                if op is not None:
                    other = _per_partition(operand, data)
                    value = op(other, value) if reverse else op(value, other)
            return value

        self._elementwise("tensor_scalar", dst, (data,), run)

    def activation(self, dst, op, data, bias=None, scale=1.0, name=None) -> None:
        """op(data * scale + bias) in float32."""
        added = 0.0 if bias is None else bias
        factors = (_per_partition(scale, data), _per_partition(added, data))
        self._elementwise(
            "activation", dst, (data,), lambda value: op(value * factors[0] + factors[1])
        )

    def tensor_reduce(self, dst, op, data, axis, negate=False, keepdims=False, name=None) -> None:
        """Reduce the last free axes."""
        axes = (axis,) if isinstance(axis, int) else tuple(axis)
        expected = tuple(range(len(data.shape) - len(axes), len(data.shape)))
        require(
            axes == expected and axes[0] > 0,
            f"tensor_reduce reduces the last free axes, not {axes}",
        )
        self._check_on_chip("tensor_reduce", dst, data)
        result = op.reduce(data.read().astype(np.float32), axis=axes)
        require(
            result.size == prod(dst.shape), f"reduction to {result.shape} does not fit {dst.shape}"
        )
        dst.write(-result if negate else result)
        self.machine.record("tensor_reduce", dst, data)
        self._count("tensor_reduce", prod(data.shape[1:]), 1)

    def memset(self, dst: Tensor, value, engine=None, name=None) -> None:
        require(dst.on_chip, "memset reaches SBUF and PSUM only")
        require(
            isinstance(value, float) == dst.dtype.is_float,
            f"memset of {dst.dtype.name} with {value!r}",
        )
        require(
            dst.dtype is not memory.FLOAT8_E4M3 or value == 0,
            "FP8 memset is interpreted for zero only",
        )
        dst.data[...] = value
        dst.written[...] = True
        self.machine.record("memset", dst, value)
        self._count("memset", prod(dst.shape[1:]), 1)

    def _elementwise(self, name: str, dst: Tensor, operands: tuple[Tensor, ...], function) -> None:
        self._check_on_chip(name, dst, *operands)
        for operand in operands:
            same = (operand.shape[0], prod(operand.shape[1:])) == (
                dst.shape[0],
                prod(dst.shape[1:]),
            )
            require(same, f"{name} of shapes {operand.shape} and {dst.shape}")
        values = [operand.read().reshape(dst.shape) for operand in operands]
        if any(operand.dtype != dst.dtype for operand in operands) or name != "tensor_copy":
            values = [value.astype(np.float32) for value in values]
        dst.write(function(*values))
        self.machine.record(name, dst, *operands)
        self._count(name, prod(dst.shape[1:]), 1)

    def _check_on_chip(self, name: str, *tensors: Tensor) -> None:
        for tensor in tensors:
            require(tensor.on_chip, f"{name} reaches SBUF and PSUM, not {tensor.buffer}")
            require(tensor.dynamic is None, f"{name} takes no dynamic access here")
            require(tensor.start_partition % 32 == 0, "engines start at partition 0, 32, 64 or 96")

    def _count(self, name: str, elements: int, passes: int) -> None:
        self.machine.counts[name] += 1
        self.machine.counts[f"{name}_elements"] += elements
        self.machine.counts[f"{name}_cycles"] += passes * max(MINIMUM_CYCLES, elements)


def _per_partition(operand, data: Tensor):
    """A number, or a [partitions, 1] tile shaped to broadcast along the free dimensions of
    `data`.
    """
    if not isinstance(operand, Tensor):
        return np.float32(operand)
    require(operand.on_chip, "an operand per partition is in SBUF or PSUM")
    require(
        operand.shape == (data.shape[0], 1),
        f"an operand per partition has shape {(data.shape[0], 1)}",
    )
    return operand.read().astype(np.float32).reshape([-1] + [1] * (len(data.shape) - 1))
