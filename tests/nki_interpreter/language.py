"""Stand-ins for what kernels use of `nki.language` and for `nki.jit`."""

from collections.abc import Iterator

import numpy as np
import torch

from tests.nki_interpreter import machine as memory
from tests.nki_interpreter.machine import Machine, Register, Storage, Tensor

TORCH_DTYPES = {
    torch.float32: memory.FLOAT32,
    torch.bfloat16: memory.BFLOAT16,
    torch.float8_e4m3fn: memory.FLOAT8_E4M3FN,
    torch.uint8: memory.UINT8,
    torch.int32: memory.INT32,
}


def silu(values: np.ndarray) -> np.ndarray:
    return torch.nn.functional.silu(torch.from_numpy(np.ascontiguousarray(values))).numpy()


class Language:
    """The names of `nki.language`, bound to one machine."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def exported(self) -> dict:
        dtypes = {
            dtype.name: dtype for dtype in vars(memory).values() if isinstance(dtype, memory.Dtype)
        }
        buffers = {name: name for name in ("sbuf", "psum", "shared_hbm")}
        operations = {
            "multiply": np.multiply,
            "add": np.add,
            "subtract": np.subtract,
            "maximum": np.maximum,
        }
        activations = {"silu": silu, "copy": lambda values: values}
        launch = {
            "program_ndim": self.program_ndim,
            "program_id": self.program_id,
            "num_programs": self.num_programs,
        }
        functions = {"ndarray": self.ndarray, "dynamic_range": self.dynamic_range}
        return {**functions, **dtypes, **buffers, **operations, **activations, **launch}

    def ndarray(self, shape, dtype, buffer="sbuf", name="", address=None) -> Tensor:
        return self.machine.allocate(shape, dtype, buffer)

    def dynamic_range(self, start, stop=None, step: int = 1) -> Iterator[Register]:
        """Passes of a loop on the device; a bound is a number or a register, the step a number."""
        bounds = (0, start) if stop is None else (start, stop)
        first, last = (bound.value if isinstance(bound, Register) else bound for bound in bounds)
        memory.require(
            first is not None and last is not None,
            "a loop's bound is a register nothing was loaded into",
        )
        return self.machine.dynamic_passes(range(first, last, step))

    def program_ndim(self) -> int:
        return int(self.machine.cores > 0)

    def program_id(self, axis: int) -> int:
        return self.machine.core

    def num_programs(self, axes: int) -> int:
        return self.machine.cores

    def jit(self, function) -> "Kernel":
        return Kernel(function, self.machine)


class Kernel:
    """A kernel that takes and returns torch tensors; `kernel[n]` runs it on n cores, one after the
    other.
    """

    def __init__(self, function, machine: Machine, cores: int = 0):
        self.function, self.machine, self.cores = function, machine, cores

    def __getitem__(self, cores: int) -> "Kernel":
        return Kernel(self.function, self.machine, cores)

    def __call__(self, *arguments: torch.Tensor | bool) -> torch.Tensor:
        self.machine.shared.clear()
        self.machine.trips.clear()
        inputs = [
            _from_torch(argument) if isinstance(argument, torch.Tensor) else argument
            for argument in arguments
        ]
        for core in range(max(self.cores, 1)):
            self.machine.core, self.machine.cores, self.machine.shared_used = core, self.cores, 0
            self.machine.loops = 0
            result = self.function(*inputs)
        memory.require(result.buffer == "shared_hbm", "a kernel returns tensors in shared_hbm")
        return torch.from_numpy(result.read().copy())


def _from_torch(tensor: torch.Tensor) -> Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    values = tensor.float() if dtype is memory.BFLOAT16 else tensor
    values = values.view(torch.uint8) if dtype is memory.FLOAT8_E4M3FN else values
    storage = Storage(tuple(tensor.shape), dtype, "hbm", np.ascontiguousarray(values.numpy()))
    return Tensor(storage, storage.data, storage.written)
