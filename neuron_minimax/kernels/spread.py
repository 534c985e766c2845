"""Numbers as they come easiest out of registers of stored ones: spread, not in their order.

A register of stored numbers gives n of numbers, 4 for FP8 codes, 2 for bfloat16: the k-th holds every n-th number from
the k-th. None needs an instruction that widens bytes, and some shifts do for two of them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from neuron_minimax.kernels.fp8 import FLOAT32_BITS, SIGN_AND_MAGNITUDE
from neuron_minimax.kernels.vectors import (
    FLOATS,
    LANES,
    LONG,
    SHORTS,
    WORDS,
    add_product,
    at,
    numbers_at,
    unpack_argument,
    words_of,
)


def registers_of(stored: Any) -> int:
    """Registers of numbers that one of stored numbers gives."""
    return 32 // stored.bitwidth


def spread_numbers_at(builder: Any, address: Any, place: Any, stored: Any) -> list[Any]:
    """`numbers_at` out of one register of stored numbers from here, spread."""
    if stored == types.float32:
        return [numbers_at(builder, address, place, stored)]
    words = builder.load(at(builder, address, place, WORDS), align=1)
    if stored == types.int16:
        found = [builder.shl(words, words_of(16)), builder.and_(words, words_of(-(2**16)))]
    else:
        odd = builder.bitcast(words, SHORTS)
        even = builder.shl(odd, _shorts_of(8))
        # In the upper half of a word, a code's sign and magnitude are in place then, and copies of the sign between.
        shifted = [builder.ashr(each, _shorts_of(24 - FLOAT32_BITS)) for each in (even, odd)]
        upper = [builder.bitcast(each, WORDS) for each in shifted]
        lower = [builder.shl(each, words_of(16)) for each in upper]
        found = [builder.and_(each, words_of(SIGN_AND_MAGNITUDE)) for each in lower + upper]
    return [builder.bitcast(each, FLOATS) for each in found]


def _shorts_of(number: int) -> Any:
    return ir.Constant(SHORTS, [number] * 2 * LANES)


def _pick(builder: Any, one: Any, other: Any, places: Any) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(WORDS, list(places)))


def _spread(builder: Any, registers: list[Any]) -> list[Any]:
    """Registers in order to spread ones: those with even places and those with odd ones, each spread."""
    if len(registers) == 1:
        return registers
    pairs = list(zip(registers[::2], registers[1::2], strict=True))
    halves = [
        _spread(builder, [_pick(builder, *pair, range(first, 2 * LANES, 2)) for pair in pairs]) for first in range(2)
    ]
    return [register for both in zip(*halves, strict=True) for register in both]


def _gather(builder: Any, registers: list[Any]) -> list[Any]:
    """The other way round."""
    if len(registers) == 1:
        return registers
    halves = [_gather(builder, registers[first::2]) for first in range(2)]
    alternating = [place for lane in range(LANES) for place in (lane, LANES + lane)]
    return [
        _pick(builder, even, odd, alternating[first : first + LANES])
        for even, odd in zip(*halves, strict=True)
        for first in (0, LANES)
    ]


def _addresses(builder: Any, array: tuple[Any, Any], left: Any, count: int) -> list[Any]:
    """Of so many registers of an array (address, first), from its place `left` on."""
    start = builder.add(array[1], left)
    return [at(builder, array[0], builder.add(start, LONG(n * LANES)), FLOATS) for n in range(count)]


def _for_each_group(builder: Any, length: Any, count: int, generate: Callable[[Any], None]) -> None:
    with cgutils.for_range_slice(builder, LONG(0), length, LONG(count * LANES), LONG) as (left, _):
        generate(left)


@intrinsic
def spread_inputs(typing_context: Any, inputs: Any, weight: Any, length: Any, to: Any) -> Any:
    """Numbers of a row of input, as many as are in whole registers of this weight's stored ones, to spread ones.

    `inputs` and `to` are (C-contiguous float32, first).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        count = registers_of(signature.args[1].dtype)

        def move(left: Any) -> None:
            places, targets = (_addresses(builder, unpack(number), left, count) for number in (0, 3))
            numbers = _spread(builder, [builder.load(each, align=4) for each in places])
            for number, target in zip(numbers, targets, strict=True):
                builder.store(number, target, align=4)

        _for_each_group(builder, arguments[2], count, move)
        return context.get_dummy_value()

    return types.void(inputs, weight, length, to), generate


@intrinsic
def add_in_order(typing_context: Any, sums: Any, weight: Any, length: Any, factor: Any, to: Any) -> Any:
    """to += factor * sums that are spread as this weight's numbers are; they are zero afterwards.

    `sums`, `factor` and `to` are (flat float32, first).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        count = registers_of(signature.args[1].dtype)

        def move(left: Any) -> None:
            places = _addresses(builder, unpack(0), left, count)
            numbers = _gather(builder, [builder.load(each, align=4) for each in places])
            for place in places:
                builder.store(ir.Constant(FLOATS, None), place, align=4)
            factors, targets = (_addresses(builder, unpack(number), left, count) for number in (3, 4))
            for number, factor, target in zip(numbers, factors, targets, strict=True):
                factor, old = (builder.load(each, align=4) for each in (factor, target))
                builder.store(add_product(builder, old, number, factor), target, align=4)

        _for_each_group(builder, arguments[2], count, move)
        return context.get_dummy_value()

    return types.void(sums, weight, length, factor, to), generate
