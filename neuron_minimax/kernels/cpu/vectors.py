"""LLVM vectors: the machine's width, the operations of micro-kernels, numbers de-interleaved.

A register of stored numbers gives n registers of float32, 4 for FP8 codes, 2 for bfloat16: the k-th
holds every n-th number from the k-th ("spread"). So shifts and masks alone widen them, without an
instruction that moves bytes across lanes.
"""

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from neuron_minimax.kernels.reference import FLOAT32_BITS, HALF_REBIAS, SIGN_AND_MAGNITUDE


def _features() -> dict[str, bool]:
    """The instruction sets of the processor that Numba compiles for."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return {}
    return dict(llvmlite.binding.get_host_cpu_features())


FEATURES = _features()
# float32 numbers of a register
WIDTHS = {"avx512f": 16, "avx2": 8}
LANES = next((lanes for name, lanes in WIDTHS.items() if FEATURES.get(name)), 4)
# Sums that a tile may keep; the other registers hold what is added to them.
SUMS_KEPT = 24 if FEATURES.get("avx512f") or platform.machine() in ("aarch64", "arm64") else 12
# Two bfloat16 products are added by one instruction, and bytes are looked up 64 at a time;
# elsewhere tiles of pairs would be slower than those of float32.
HAS_PAIRS = bool(FEATURES.get("avx512bf16") and FEATURES.get("avx512vbmi"))

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
WORDS = ir.VectorType(WORD, LANES)
SHORTS = ir.VectorType(SHORT, 2 * LANES)
BYTES = ir.VectorType(BYTE, 4 * LANES)


class _BFloat(ir.types._BaseFloatType):
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


def at(builder: Any, address: Any, place: Any, kind: Any) -> Any:
    """The address of this element, for a value of this kind."""
    return builder.bitcast(builder.gep(address, [place]), kind.as_pointer())


def fetch(builder: Any, address: Any, place: Any) -> None:
    """Prefetch the cache line of this element, which may lie outside the array: llvm.prefetch."""
    element = builder.gep(address, [place])
    kind = ir.FunctionType(ir.VoidType(), [element.type, WORD, WORD, WORD])
    function = builder.module.declare_intrinsic("llvm.prefetch", [element.type], kind)
    read = WORD(0)
    first_cache = WORD(3)
    data = WORD(1)
    builder.call(function, [element, read, first_cache, data])


def splat(builder: Any, number: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, WORD(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(WORDS, [0] * LANES))


def words_of(number: int) -> Any:
    return ir.Constant(WORDS, [number] * LANES)


def numbers_at(builder: Any, address: Any, place: Any, stored: Any) -> Any:
    """Numbers of a weight from here: of FP8 codes times 2^-120, exactly; bfloat16; or float32."""
    if stored == types.float32:
        return builder.load(at(builder, address, place, FLOATS), align=4)
    kind = ir.VectorType(BYTE if stored == types.int8 else SHORT, LANES)
    words = builder.sext(builder.load(at(builder, address, place, kind), align=1), WORDS)
    if stored == types.int8:
        words = builder.and_(
            builder.shl(words, words_of(FLOAT32_BITS)), words_of(SIGN_AND_MAGNITUDE)
        )
    else:
        words = builder.shl(words, words_of(16))
    return builder.bitcast(words, FLOATS)


def add_product(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + one * other, in one rounding where the machine has an instruction for that."""
    return builder.fadd(total, builder.fmul(one, other, flags=("contract",)), flags=("contract",))


def add(builder: Any, one: Any, other: Any) -> Any:
    return builder.fadd(one, other)


def larger(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def over_lanes(builder: Any, vector: Any, operation: Callable[[Any, Any, Any], Any] = add) -> Any:
    """Reduce a vector to one lane, by halves."""
    size = LANES // 2
    nothing = ir.Constant(FLOATS, ir.Undefined)
    while size:
        moved = ir.Constant(WORDS, [(lane + size) % LANES for lane in range(LANES)])
        vector = operation(builder, vector, builder.shuffle_vector(vector, nothing, moved))
        size //= 2
    return builder.extract_element(vector, WORD(0))


def add_pairs(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + both products of each word's bfloat16 numbers."""
    kind = ir.FunctionType(FLOATS, [FLOATS, BFLOATS, BFLOATS])
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}"
    )
    return builder.call(
        function, [total, builder.bitcast(one, BFLOATS), builder.bitcast(other, BFLOATS)]
    )


def rounded_pairs(builder: Any, lower: Any, upper: Any) -> Any:
    """Two registers' numbers as bfloat16, one behind the other.

    Rounded to the nearest, ties to even; subnormal ones become zero.
    """
    kind = ir.FunctionType(BFLOATS, [FLOATS, FLOATS])
    function = cgutils.get_or_insert_function(
        builder.module, kind, f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * LANES}"
    )
    return builder.bitcast(builder.call(function, [upper, lower]), WORDS)


def look_up(builder: Any, places: Any, table: list[int]) -> Any:
    """The bytes of a table of 128 at these places, whose highest bits are ignored."""
    size = 4 * LANES
    halves = [ir.Constant(BYTES, table[start : start + size]) for start in (0, size)]
    kind = ir.FunctionType(BYTES, [BYTES, BYTES, BYTES])
    function = cgutils.get_or_insert_function(
        builder.module, kind, "llvm.x86.avx512.vpermi2var.qi.512"
    )
    return builder.call(function, [halves[0], places, halves[1]])


def bytes_in_order(builder: Any, one: Any, other: Any, order: list[int]) -> Any:
    """Bytes of two vectors; those of the other are counted on."""
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(WORD, len(order)), order))


def unpack_argument(context: Any, builder: Any, signature: Any, arguments: Any, number: int) -> Any:
    """The address of an array's elements, and the numbers beside it, of a tuple argument."""
    array, *places = cgutils.unpack_tuple(builder, arguments[number])
    return context.make_array(signature.args[number][0])(context, builder, array).data, *places


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
        # In the upper half of a word, a code's sign and magnitude are in place then, and copies of
        # the sign between.
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
    """Registers in order to spread ones: even places, then odd ones, each spread in turn."""
    if len(registers) == 1:
        return registers
    pairs = list(zip(registers[::2], registers[1::2], strict=True))
    halves = [
        _spread(builder, [_pick(builder, *pair, range(first, 2 * LANES, 2)) for pair in pairs])
        for first in range(2)
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
    """The addresses of `count` registers of an array (address, first), from its place `left` on."""
    start = builder.add(array[1], left)
    return [
        at(builder, array[0], builder.add(start, LONG(n * LANES)), FLOATS) for n in range(count)
    ]


def _for_each_group(builder: Any, length: Any, count: int, generate: Callable[[Any], None]) -> None:
    with cgutils.for_range_slice(builder, LONG(0), length, LONG(count * LANES), LONG) as (left, _):
        generate(left)


@intrinsic
def spread_inputs(typing_context: Any, inputs: Any, weight: Any, length: Any, to: Any) -> Any:
    """De-interleave a row of input as this weight's registers of stored numbers hold theirs.

    `length` is a whole number of such registers; `inputs` and `to` are (C-contiguous, first).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        count = registers_of(signature.args[1].dtype)

        def move(left: Any) -> None:
            places, targets = (
                _addresses(builder, unpack(number), left, count) for number in (0, 3)
            )
            numbers = _spread(builder, [builder.load(each, align=4) for each in places])
            for number, target in zip(numbers, targets, strict=True):
                builder.store(number, target, align=4)

        _for_each_group(builder, arguments[2], count, move)
        return context.get_dummy_value()

    return types.void(inputs, weight, length, to), generate


@intrinsic
def add_in_order(
    typing_context: Any, sums: Any, weight: Any, length: Any, factor: Any, to: Any
) -> Any:
    """to += factor * sums, which are spread as this weight's numbers are, and zero afterwards.

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
            factors, targets = (
                _addresses(builder, unpack(number), left, count) for number in (3, 4)
            )
            for number, place, target in zip(numbers, factors, targets, strict=True):
                scale, old = (builder.load(each, align=4) for each in (place, target))
                builder.store(add_product(builder, old, number, scale), target, align=4)

        _for_each_group(builder, arguments[2], count, move)
        return context.get_dummy_value()

    return types.void(sums, weight, length, factor, to), generate


@intrinsic
def as_float(typing_context: Any, bits: Any) -> Any:
    """The float32 of these int32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def fetch_ahead(typing_context: Any, codes: Any, offset: Any) -> Any:
    """Prefetch the cache line of this element, which may lie outside the codes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        fetch(builder, array.data, arguments[1])
        return context.get_dummy_value()

    return types.void(codes, types.intp), generate


SHIFT = np.int32(FLOAT32_BITS)
MASK = np.int32(SIGN_AND_MAGNITUDE)
REBIAS = np.float32(HALF_REBIAS)


def number_of(code: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(number_of, inline="always")
def _number_for(code):
    """The number of an FP8 code times 2^-120, exactly; of bfloat16's bits; or a number as it is."""
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


def _reduced(operation: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    """The code of an intrinsic over (flat float32, first) and a length, a multiple of LANES."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, first = unpack_argument(context, builder, signature, arguments, 0)
        register = partial(at, builder, data, kind=FLOATS)
        total = cgutils.alloca_once_value(builder, builder.load(register(first), align=4))
        with cgutils.for_range_slice(builder, LONG(LANES), arguments[1], LONG(LANES), LONG) as (
            place,
            _,
        ):
            one = builder.load(register(builder.add(first, place)), align=4)
            builder.store(operation(builder, builder.load(total), one), total)
        return over_lanes(builder, builder.load(total), operation)

    return generate


@intrinsic
def largest_of(typing_context: Any, numbers: Any, length: Any) -> Any:
    """The largest of `length` numbers, a multiple of LANES, of (flat float32, first)."""
    return types.float32(numbers, length), _reduced(larger)


@intrinsic
def sum_of(typing_context: Any, numbers: Any, length: Any) -> Any:
    """The sum of `length` numbers, a multiple of LANES, of (flat float32, first)."""
    return types.float32(numbers, length), _reduced(add)
