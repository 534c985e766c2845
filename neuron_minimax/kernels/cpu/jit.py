"""Compile loops with Numba, register them as torch operators, and run them on torch's threads.

This is the only module that uses private interfaces of Numba and torch. FP8 codes are int8 views of
E4M3, bfloat16 an int16 view, float32 itself.

A kernel takes (stack, inputs, outputs). The stack holds a word of 64 bits per input: an integer, or
a tensor's handle, which the kernel has to release; then one per output.
https://docs.pytorch.org/docs/stable/notes/libtorch_stable_abi.html

Numba's parallel loops bring a pool of their own, whose idle threads spin on the cores that torch's
need, and the other way round: so loops run on the threads of torch's OpenMP pool.
"""

import ctypes
import hashlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils, sigutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target
from numba.core.runtime import rtsys
from numba.extending import intrinsic

from neuron_minimax.kernels.cpu.vectors import as_float

CACHE_LINE = 64  # bytes
# Multiply and add in one rounding; not the rest of fast-math, which would flush the subnormals of
# FP8 expansion.
FASTMATH = {"contract"}


# Numba takes kept code for current by the file of the function alone, whatever has changed in files
# that it uses.
SOURCES = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[1] / "reference.py"]
STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()


def compiled(function: Callable[..., Any], inline: str = "never") -> Any:
    """Compile a function at its first call, and keep its code on disk where there is a place."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FASTMATH, "inline": inline}
    try:
        dispatcher = njit(cache=True, **options)(function)
        dispatcher._cache._cache_file._source_stamp = STAMP
        return dispatcher
    except RuntimeError:
        # Neither beside the source nor in the user's cache directory may files be made.
        return njit(**options)(function)


# Compiled as a part of each compiled function that calls it, not for itself: LLVM takes seconds per
# call of loops.
inlined = partial(compiled, inline="always")


@njit(inline="always")
def unsigned(number: int) -> Any:
    """An index that cannot count from the end, which keeps loops simple enough for vectors."""
    return np.uint64(number)


@njit(inline="always")
def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient of two sizes, rounded up."""
    return (numerator + denominator - 1) // denominator


@compiled
def on_lines(count: int, like: Any) -> Any:
    """Allocate [count] numbers of an array's dtype from the beginning of a cache line on.

    Then no register touches two lines.
    """
    whole = np.empty(count + CACHE_LINE // like.itemsize, like.dtype)
    first = -whole.ctypes.data % CACHE_LINE // like.itemsize
    return whole[first : first + count]


@compiled
def exponential(number: Any) -> Any:
    """e^number in float32 within 1e-7 of it, for vectors where the library's takes one number.

    Source: Cephes' expf. Below -87 and above 88 the result stays what it is there.
    """
    bounded = min(max(number, np.float32(-87)), np.float32(88))
    twos = np.floor(bounded * np.float32(1.4426950408889634) + np.float32(0.5))
    rest = bounded - twos * np.float32(0.693359375) + twos * np.float32(2.12194440e-4)
    power = np.float32(1.9875691500e-4)
    power = power * rest + np.float32(1.3981999507e-3)
    power = power * rest + np.float32(8.3334519073e-3)
    power = power * rest + np.float32(4.1665795894e-2)
    power = power * rest + np.float32(1.6666665459e-1)
    power = power * rest + np.float32(5.0000001201e-1)
    power = power * rest * rest + rest + np.float32(1)
    return power * as_float((np.int32(twos) + np.int32(127)) << np.int32(23))


NAMESPACE = "neuron_minimax"
SIGNATURE = types.void(types.CPointer(types.int64), types.uint64, types.uint64)
# as torch numbers dtypes and devices
FLOAT32 = 6
CPU = 0
ANY_INDEX = -1

_library = ctypes.CDLL(torch._C.__file__)


class Code(NamedTuple):
    """A compiled kernel: an ELF object, and the symbol in it of the function that torch calls."""

    symbol: str
    binary: bytes


registered: dict[str, Code] = {}  # operator to kernel


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
    "aoti_torch_empty_strided",
    types.int32,
    types.int64,
    types.voidptr,
    types.voidptr,
    *_place,
    types.voidptr,
)
threads = _function("_ZN2at15get_num_threadsEv", types.int32)  # at::get_num_threads()


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@inlined
def words_of(stack: Any, count: int) -> Any:
    """The inputs of a kernel. Until `answer` puts a result, an error ends the process."""
    words = carray(stack, (count,)).copy()
    stack[0] = 0
    return words


@inlined
def flat(handle: int, count: int, dtype: Any) -> Any:
    """The first `count` numbers of a tensor."""
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
    """(handle, numbers) of a new float32 tensor. Raises MemoryError when memory has run out."""
    size = np.array([rows, columns])
    stride = np.array([columns, 1])
    made = np.empty(1, np.int64)
    if _empty(2, size.ctypes, stride.ctypes, FLOAT32, CPU, ANY_INDEX, made.ctypes):
        raise MemoryError
    return made[0], matrix(made[0], np.float32)


@inlined
def answer(stack: Any, words: Any, tensors: int, made: int) -> None:
    """Leave a tensor as the result, and release the first `tensors` inputs, which are tensors."""
    for number in range(tensors):
        _delete(words[number])
    stack[0] = made


def register(operator: str, function: Callable[..., None], code: Code | None = None) -> None:
    """Register a function of (stack, inputs, outputs) as the CPU kernel of an operator.

    It is compiled, and kept on disk, unless there is `code`: what `registered` has for the same
    function in a process with the same Numba on the same kind of processor. The only error that a
    kernel can raise is MemoryError; then Numba says so, and torch ends the process. Raises
    ValueError when `code` is no code.
    """
    kernel = code or _code_of(function)
    address = _load(kernel)
    library = ctypes.c_void_p()
    names = [name.encode() for name in (NAMESPACE, "CPU", __file__)]
    failed = _library.aoti_torch_library_init_impl(
        *names, ctypes.c_uint32(0), ctypes.byref(library)
    )
    if failed or _library.aoti_torch_library_impl(
        library, operator.encode(), ctypes.c_void_p(address)
    ):
        raise RuntimeError(
            f"torch {torch.__version__} did not take a kernel for {NAMESPACE}::{operator}"
        )
    registered[operator] = kernel


def _code_of(function: Callable[..., None]) -> Code:
    """Compile a kernel, or take what Numba has kept of it where there is a place."""
    signature = sigutils.normalize_signature(SIGNATURE)
    kernel: Any = CFunc(function, signature, locals={}, options={"error_model": "numpy"})
    kept = None
    place = None
    try:
        place = FunctionCache(function)
        place._cache_file._source_stamp = STAMP
        key = place._index_key(kernel._sig, cpu_target.target_context.codegen())
        kept = place._cache_file.load(key)
    except RuntimeError:  # as in `compiled`
        pass
    if kept is None:
        with global_compiler_lock:
            result = kernel._compile_uncached()
            kept = result._reduce()
        if place is not None:
            place.save_overload(kernel._sig, result)
    (_, _, (binary, _)), description, *_ = kept
    return Code(description.llvm_cfunc_wrapper_name, binary)


@cache
def _engine() -> Any:
    """Return what links objects into this process, which has the functions that they call."""
    rtsys.initialize(cpu_target.target_context)
    machine = llvmlite.binding.Target.from_default_triple().create_target_machine()
    return llvmlite.binding.create_mcjit_compiler(llvmlite.binding.parse_assembly(""), machine)


def _load(code: Code) -> int:
    """Return the address of a kernel, whose code stays in memory from here on."""
    if not code.binary.startswith(b"\x7fELF"):  # LLVM would end the process
        raise ValueError(f"the code of {code.symbol} is no ELF object")
    engine = _engine()
    engine.add_object_file(llvmlite.binding.ObjectFileRef.from_data(code.binary))
    engine.finalize_object()
    address = engine.get_function_address(code.symbol)
    if not address:
        raise ValueError(f"the code has no function {code.symbol}")
    return int(address)


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_PARALLEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
_NUMBER = ctypes.CFUNCTYPE(ctypes.c_int)
# Where there is no GNU OpenMP the caller works alone.
_ALONE = {
    "GOMP_parallel": _PARALLEL(lambda body, data, threads, flags: _BODY(body)(data)),
    "omp_get_thread_num": _NUMBER(lambda: 0),
    "omp_get_num_threads": _NUMBER(lambda: 1),
}


def _resolve() -> None:
    """Tell LLVM where the functions of the OpenMP library are that torch has loaded."""
    try:
        library = ctypes.CDLL("libgomp.so.1")
        functions: dict[str, Any] = {name: getattr(library, name) for name in _ALONE}
    except (OSError, AttributeError):
        functions = _ALONE
    for name, function in functions.items():
        llvmlite.binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)


_resolve()


@intrinsic
def run_in_team(typing_context: Any, function: Any, size: Any, arguments: Any) -> Any:
    """Call `function(thread, threads, *arguments)` on every thread of a team, and wait.

    The function is a compiled one. Raises RuntimeError when it raised on any thread; the only error
    that a loop can raise is MemoryError. The protocol is GCC's for `#pragma omp parallel`.
    """
    signature = types.void(function, types.intp, arguments)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kinds = (types.intp, types.intp, *signature.args[2].types)
        function.get_call_type(typing_context, kinds, {})
        made = function.dispatcher.overloads[kinds]
        context.add_linking_libs([made.library])
        address = ir.IntType(8).as_pointer()
        number = ir.IntType(32)

        failed = cgutils.alloca_once_value(builder, number(0))
        record = cgutils.alloca_once_value(
            builder, cgutils.pack_struct(builder, [values[2], failed])
        )
        name = f"{builder.function.name}.team.{len(builder.module.functions)}"
        body = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [address]), name)
        body.linkage = "internal"
        inside = ir.IRBuilder(body.append_basic_block())
        packed, failed_inside = cgutils.unpack_tuple(
            inside, inside.load(inside.bitcast(body.args[0], record.type))
        )
        count = ir.FunctionType(number, [])
        place = [
            inside.sext(
                inside.call(cgutils.get_or_insert_function(builder.module, count, name), []),
                ir.IntType(64),
            )
            for name in ("omp_get_thread_num", "omp_get_num_threads")
        ]
        callee = context.declare_function(builder.module, made.fndesc)
        passed = [*place, *cgutils.unpack_tuple(inside, packed)]
        status, _ = context.call_conv.call_function(
            inside, callee, made.signature.return_type, kinds, passed
        )
        with inside.if_then(status.is_error):
            inside.store(number(1), failed_inside)
        inside.ret_void()

        kind = ir.FunctionType(ir.VoidType(), [body.type, address, number, number])
        parallel = cgutils.get_or_insert_function(builder.module, kind, "GOMP_parallel")
        data = builder.bitcast(record, address)
        builder.call(parallel, [body, data, builder.trunc(values[1], number), number(0)])
        with builder.if_then(builder.icmp_signed("!=", builder.load(failed), number(0))):
            context.call_conv.return_user_exc(
                builder, RuntimeError, ("a loop over weights failed: out of memory?",)
            )
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def take(typing_context: Any, counters: Any, number: Any) -> Any:
    """Take the next item of work: fetch and add one to an int64 counter, atomically."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.atomic_rmw(
            "add", builder.gep(data, [arguments[1]]), ir.IntType(64)(1), "monotonic"
        )

    return types.int64(counters, types.intp), generate
