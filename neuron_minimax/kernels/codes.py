"""What Numba's loops over weights are made of: numbers out of stored bits, and asking for memory ahead of time.

FP8 codes are int8 views of E4M3, bfloat16 an int16 view, float32 itself.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from neuron_minimax.kernels.fp8 import FLOAT32_BITS, HALF_REBIAS, SIGN_AND_MAGNITUDE
from neuron_minimax.kernels.vectors import FLOATS, LANES, LONG, add, at, fetch, larger, over_lanes, unpack_argument

SHIFT, MASK = np.int32(FLOAT32_BITS), np.int32(SIGN_AND_MAGNITUDE)
REBIAS = np.float32(HALF_REBIAS)
CACHE_LINE = 64  # bytes
# Multiply and add in one rounding; not the rest of fast-math, which would flush the subnormals of FP8 expansion.
FASTMATH = {"contract"}


# Numba takes kept code for current by the file of the function alone, whatever has changed in files that it uses.
STAMP = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


def compiled(function: Callable[..., Any], inline: str = "never") -> Any:
    """Have a function compiled at its first call, and what comes of it kept on disk where there is a place for it."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": FASTMATH, "inline": inline}
    try:
        dispatcher = njit(cache=True, **options)(function)
        dispatcher._cache._cache_file._source_stamp = STAMP
        return dispatcher
    except RuntimeError:  # neither beside the source nor in the user's cache directory may files be made
        return njit(**options)(function)


# Compiled as a part of each compiled function that calls it, not for itself: LLVM takes seconds per call of loops.
inlined = partial(compiled, inline="always")


@njit(inline="always")
def unsigned(number: int) -> Any:
    """As an index it is not asked whether it counts from the end, which keeps loops simple enough for vectors."""
    return np.uint64(number)


@compiled
def on_lines(count: int, like: Any) -> Any:
    """[count] numbers of an array's dtype, unset, from the beginning of a cache line on: no register touches two."""
    whole = np.empty(count + CACHE_LINE // like.itemsize, like.dtype)
    first = -whole.ctypes.data % CACHE_LINE // like.itemsize
    return whole[first : first + count]


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 of these int32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def fetch_ahead(typing_context: Any, codes: Any, offset: Any) -> Any:
    """Ask for the cache line of this element, which may lie outside the codes: vectors.fetch."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        fetch(builder, array.data, arguments[1])
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
    """One of two factors that `number_of` lacks."""
    factor = REBIAS if weight.dtype == types.int8 else np.float32(1)
    return lambda weight: factor


@compiled
def exponential(number: Any) -> Any:
    """e^number in float32 within 1e-7 of it, as Cephes' expf does it, for vectors where the library's takes one number.

    Below -87 and above 88 it stays what it is there.
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


def _reduced(operation: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """The code of an intrinsic that takes (flat float32, first) and a length, a multiple of LANES, to one number."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, first = unpack_argument(context, builder, signature, arguments, 0)
        register = partial(at, builder, data, kind=FLOATS)
        total = cgutils.alloca_once_value(builder, builder.load(register(first), align=4))
        with cgutils.for_range_slice(builder, LONG(LANES), arguments[1], LONG(LANES), LONG) as (place, _):
            one = builder.load(register(builder.add(first, place)), align=4)
            builder.store(operation(builder, builder.load(total), one), total)
        return over_lanes(builder, builder.load(total), operation)

    return generate


@intrinsic
def largest_of(typing_context: Any, numbers: Any, length: Any) -> Any:
    """Of so many numbers, a multiple of LANES, of (flat float32, first)."""
    return types.float32(numbers, length), _reduced(larger)


@intrinsic
def sum_of(typing_context: Any, numbers: Any, length: Any) -> Any:
    """As `largest_of`."""
    return types.float32(numbers, length), _reduced(add)
