"""What Numba's loops over weights are made of: numbers out of stored bits, and asking for memory ahead of time.

FP8 codes are int8 views of E4M3, bfloat16 an int16 view, float32 itself.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

from neuron_minimax.kernels.fp8 import FLOAT32_BITS, HALF_REBIAS, SIGN_AND_MAGNITUDE

SHIFT, MASK = np.int32(FLOAT32_BITS), np.int32(SIGN_AND_MAGNITUDE)
REBIAS = np.float32(HALF_REBIAS)
CACHE_LINE = 64  # bytes
COLUMNS = 512  # of a few rows that are asked for ahead at a time; what belongs to them stays in the first cache
# Multiply and add in one rounding; not the rest of fast-math, which would flush the subnormals of FP8 expansion.
ELEMENTWISE = {"contract"}
# Sums along a row in any order too, else they could not be computed side by side.
SUMS = {"contract", "reassoc"}


# Numba takes kept code for current by the file of the function alone, whatever has changed in files that it uses.
STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def compiled(fastmath: set[str] = ELEMENTWISE) -> Callable[[Callable[..., Any]], Any]:
    """Have a function compiled at its first call, and what comes of it kept on disk where there is a place for it."""

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            dispatcher = njit(cache=True, nogil=True, error_model="numpy", fastmath=fastmath)(function)
            dispatcher._cache._cache_file._source_stamp = STAMP
            return dispatcher
        except RuntimeError:  # neither beside the source nor in the user's cache directory may files be made
            return njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)

    return decorate


@njit(inline="always")
def unsigned(number: int) -> Any:
    """As an index it is not asked whether it counts from the end, which keeps loops simple enough for vectors."""
    return np.uint64(number)


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 of these int32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def as_bits(typing_context: Any, number: Any) -> Any:
    """The int32 bits of this float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def fetch_ahead(typing_context: Any, codes: Any, offset: Any) -> Any:
    """Ask for the cache line at this byte, which may lie outside the codes, into the second cache: llvm.prefetch."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.gep(array.data, [arguments[1]])
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
        read, second_cache, data = number(0), number(2), number(1)
        builder.call(function, [address, read, second_cache, data])
        return context.get_dummy_value()

    return types.void(codes, types.intp), generate


def number_of(code: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(number_of, inline="always")
def _number_for(code):
    """The number of an FP8 code times 2^-120, exactly; of bfloat16's bits; or what is a number already."""
    if code == types.int8:
        return lambda code: as_float((np.int32(code) << SHIFT) & MASK)
    if code == types.int16:
        return lambda code: as_float(np.int32(code) << np.int32(16))
    return lambda code: code


def rebias(weight: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(rebias)
def _rebias_for(weight):
    """What values lack beside the half that scales bring: scale_of_columns is for FP8."""
    factor = REBIAS if weight.dtype == types.int8 else 1 / REBIAS
    return lambda weight: factor


@compiled()
def scale_of_columns(scale_B: Any, width: int, step: int, parts: int) -> Any:
    """One block row's scales, times HALF_REBIAS, for each column; the last block of each part may be partial."""
    factor_W = np.empty(width, np.float32)
    blocks, part_width = len(scale_B) // parts, width // parts
    for part in range(parts):
        for number in range(blocks):
            left = part * part_width + number * step
            factor_W[left : min(left + step, (part + 1) * part_width)] = REBIAS * scale_B[part * blocks + number]
    return factor_W
