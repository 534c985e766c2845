"""Stand-ins for what kernels use of `nki.language` and for `nki.jit`."""

import numpy as np
import torch

from tests.nki_interpreter import machine as memory
from tests.nki_interpreter.machine import Machine, Storage, Tensor

TORCH_DTYPES = {
    torch.float32: memory.FLOAT32,
    torch.bfloat16: memory.BFLOAT16,
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
        dtypes = {dtype.name: dtype for dtype in vars(memory).values() if isinstance(dtype, memory.Dtype)}
        buffers = {name: name for name in ("sbuf", "psum", "shared_hbm")}
        operations = {"multiply": np.multiply, "add": np.add, "subtract": np.subtract, "maximum": np.maximum}
        activations = {"silu": silu, "copy": lambda values: values}
        launch = {"program_ndim": self.program_ndim, "program_id": self.program_id, "num_programs": self.num_programs}
        return {"ndarray": self.ndarray, **dtypes, **buffers, **operations, **activations, **launch}

    def ndarray(self, shape, dtype, buffer="sbuf", name="", address=None) -> Tensor:
        return self.machine.allocate(shape, dtype, buffer)

    def program_ndim(self) -> int:
        return int(self.machine.cores > 0)

    def program_id(self, axis: int) -> int:
        return self.machine.core

    def num_programs(self, axes: int) -> int:
        return self.machine.cores

    def jit(self, function) -> "Kernel":
        return Kernel(function, self.machine)


class Kernel:
    """A kernel that takes and returns torch tensors; `kernel[n]` runs it on n cores, one after the other."""

    def __init__(self, function, machine: Machine, cores: int = 0):
        self.function, self.machine, self.cores = function, machine, cores

    def __getitem__(self, cores: int) -> "Kernel":
        return Kernel(self.function, self.machine, cores)

    def __call__(self, *arguments: torch.Tensor) -> torch.Tensor:
        self.machine.shared.clear()
        inputs = [_from_torch(argument) for argument in arguments]
        for core in range(max(self.cores, 1)):
            self.machine.core, self.machine.cores, self.machine.shared_used = core, self.cores, 0
            result = self.function(*inputs)
        memory.require(result.buffer == "shared_hbm", "a kernel returns tensors in shared_hbm")
        return torch.from_numpy(result.read().copy())


def _from_torch(tensor: torch.Tensor) -> Tensor:
    dtype = TORCH_DTYPES[tensor.dtype]
    values = tensor.float() if dtype is memory.BFLOAT16 else tensor
    storage = Storage(tuple(tensor.shape), dtype, "hbm", np.ascontiguousarray(values.numpy()))
    return Tensor(storage, storage.data, storage.written)
