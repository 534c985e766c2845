"""Compiled functions as kernels of torch's operators, called without Python: torch's stable C interface.

Python would take 50 us more per call here: between loops, which have swept the caches, its code comes from memory.
A kernel takes (stack, inputs, outputs). The stack holds a word of 64 bits per input: an integer, or a tensor's handle,
which the kernel has to release; then one per output. https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html
"""

import ctypes
import pickle
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.core import serialize, sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.extending import intrinsic

from neuron_minimax.kernels.codes import STAMP, inlined

NAMESPACE = "neuron_minimax"
SIGNATURE = types.void(types.CPointer(types.int64), types.uint64, types.uint64)
FLOAT32, CPU, ANY_INDEX = 6, 0, -1  # as torch numbers dtypes and devices

_library = ctypes.CDLL(torch._C.__file__)
registered: dict[str, Any] = {}  # operator to kernel, which must stay


def _function(name: str, result: Any, *arguments: Any) -> Any:
    """One of torch's C functions for compiled code, which keeps its name, not its address."""
    llvmlite.binding.add_symbol(name, ctypes.cast(getattr(_library, name), ctypes.c_void_p).value)
    return types.ExternalFunction(name, result(*arguments))


_get_data = _function("aoti_torch_get_data_ptr", types.int32, types.intp, types.voidptr)
_get_sizes = _function("aoti_torch_get_sizes", types.int32, types.intp, types.voidptr)
_get_strides = _function("aoti_torch_get_strides", types.int32, types.intp, types.voidptr)
_delete = _function("aoti_torch_delete_tensor_object", types.int32, types.intp)
_place = (types.int32,) * 3
_empty = _function(
    "aoti_torch_empty_strided", types.int32, types.int64, types.voidptr, types.voidptr, *_place, types.voidptr
)
threads = _function("_ZN2at15get_num_threadsEv", types.int32)  # at::get_num_threads()


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@inlined
def words_of(stack: Any, count: int) -> Any:
    """The inputs. There is no result until `answer` puts one: a kernel that raises ends the process."""
    words = carray(stack, (count,)).copy()
    stack[0] = 0
    return words


@inlined
def flat(handle: int, count: int, dtype: Any) -> Any:
    """So many numbers of a tensor from its first one on."""
    found = np.empty(1, np.int64)
    _get_data(handle, found.ctypes)
    return carray(_pointer(found[0]), (count,), dtype)


@inlined
def sizes(handle: int, dimensions: int) -> Any:
    found = np.empty(1, np.int64)
    _get_sizes(handle, found.ctypes)
    return carray(_pointer(found[0]), (dimensions,), np.int64)


@inlined
def strides(handle: int, dimensions: int) -> Any:
    found = np.empty(1, np.int64)
    _get_strides(handle, found.ctypes)
    return carray(_pointer(found[0]), (dimensions,), np.int64)


@inlined
def matrix(handle: int, dtype: Any) -> Any:
    """A contiguous tensor of two dimensions."""
    size = sizes(handle, 2)
    return flat(handle, size[0] * size[1], dtype).reshape((size[0], size[1]))


@inlined
def cube(handle: int, dtype: Any) -> Any:
    """A contiguous tensor of three dimensions."""
    size = sizes(handle, 3)
    return flat(handle, size[0] * size[1] * size[2], dtype).reshape((size[0], size[1], size[2]))


@inlined
def new_matrix(rows: int, columns: int) -> Any:
    """(handle, numbers) of a new float32 tensor. Raises MemoryError when there is no room for it."""
    size, stride, made = np.array([rows, columns]), np.array([columns, 1]), np.empty(1, np.int64)
    if _empty(2, size.ctypes, stride.ctypes, FLOAT32, CPU, ANY_INDEX, made.ctypes):
        raise MemoryError
    return made[0], matrix(made[0], np.float32)


@inlined
def answer(stack: Any, words: Any, tensors: int, made: int) -> None:
    """Leave a tensor as the result; the first inputs, which are so many tensors, are released."""
    for number in range(tensors):
        _delete(words[number])
    stack[0] = made


class _Code:
    """A kernel's compiled code, for Numba in place of its cache on disk: what is given, or else what is kept there."""

    def __init__(self, function: Callable[..., None], code: bytes | None) -> None:
        self.code, self.cache = code, None
        try:
            self.cache = FunctionCache(function)
            self.cache._cache_file._source_stamp = STAMP
        except RuntimeError:  # as in `compiled`
            pass

    def load_overload(self, signature: Any, context: Any) -> Any:
        if self.code is None and self.cache is not None:
            kept = self.cache._cache_file.load(self.cache._index_key(signature, context.codegen()))
            self.code = None if kept is None else serialize.dumps(kept)
        if self.code is None:
            return None
        rtsys.initialize(context)  # Numba's memory; the rest of a context is there to compile, and takes 0.2 s
        return CompileResult._rebuild(context, *pickle.loads(self.code))

    def save_overload(self, signature: Any, result: Any) -> None:
        self.code = serialize.dumps(result._reduce())
        if self.cache is not None:
            self.cache.save_overload(signature, result)


def register(operator: str, function: Callable[..., None], code: bytes | None = None) -> None:
    """Have a function of (stack, inputs, outputs) as the CPU kernel of an operator.

    It is compiled, and kept on disk, unless there is `code`: what `code_of` the same function gave with the same Numba
    on the same kind of processor. Where one raises, which only memory that has run out can make it do, Numba says so,
    and torch ends the process.
    """
    kernel: Any = CFunc(function, sigutils.normalize_signature(SIGNATURE), locals={}, options={"error_model": "numpy"})
    kernel._cache = _Code(function, code)
    kernel.compile()
    library = ctypes.c_void_p()
    names = [name.encode() for name in (NAMESPACE, "CPU", __file__)]
    failed = _library.aoti_torch_library_init_impl(*names, ctypes.c_uint32(0), ctypes.byref(library))
    if failed or _library.aoti_torch_library_impl(library, operator.encode(), ctypes.c_void_p(kernel.address)):
        raise RuntimeError(f"torch {torch.__version__} did not take a kernel for {NAMESPACE}::{operator}")
    registered[operator] = kernel


def code_of(operator: str) -> bytes:
    """The compiled code of a registered kernel, for `register` in another process."""
    return registered[operator]._cache.code
