"""Tiles of a product, in registers from the first to the last of their sums: what LLVM does not make out of loops.

A tile is a few rows of input by a strip of columns of a weight whose rows are inputs: each number of the weight is read
once and multiplied with every row. One Zen 4 core does 55 G multiplications per second of 12 rows with a panel of
float32, 105 G with one of bfloat16 pairs, and 22 G straight from FP8 codes with one row, which is faster than its share
of memory is read.
"""

import platform
from collections.abc import Callable
from functools import partial
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from neuron_minimax.kernels.fp8 import FLOAT32_BITS, HALF_REBIAS, SIGN_AND_MAGNITUDE


def _features() -> dict[str, bool]:
    """Of the processor that Numba compiles for."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return {}
    return dict(llvmlite.binding.get_host_cpu_features())


FEATURES = _features()
LANES = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx2") else 4  # float32 numbers of a register
# Sums that a tile may keep; the other registers hold what is added to them.
SUMS_KEPT = 24 if FEATURES.get("avx512f") or platform.machine() in ("aarch64", "arm64") else 12
WIDE, NARROW = 4, 2  # registers across a tile
WIDE_STRIP, NARROW_STRIP = WIDE * LANES, NARROW * LANES  # columns
WIDE_ROWS, NARROW_ROWS = SUMS_KEPT // WIDE, SUMS_KEPT // NARROW  # of a tile at most
STREAMS = 4  # rows of a weight that `add_dots` takes beside each other
DOT_ROWS = SUMS_KEPT // STREAMS  # of input at most
DEPTH = 128  # rows of input side by side are this far apart: no tile goes deeper
# Two bfloat16 products are added by one instruction; elsewhere tiles of pairs would be slower than those of float32.
HAS_PAIRS = bool(FEATURES.get("avx512bf16"))

BYTE, SHORT, WORD, LONG = (ir.IntType(bits) for bits in (8, 16, 32, 64))
FLOAT = ir.FloatType()
FLOATS, WORDS = ir.VectorType(FLOAT, LANES), ir.VectorType(WORD, LANES)


class _BFloat(ir.types._BaseFloatType):
    null = "0.0"
    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"


_BFloat._create_instance()
BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


def _at(builder: Any, address: Any, place: Any, kind: Any) -> Any:
    """The address of this element, for a value of this kind."""
    return builder.bitcast(builder.gep(address, [place]), kind.as_pointer())


def _fetch(builder: Any, address: Any, place: Any) -> None:
    """Ask for the cache line of this element, which may lie outside the array, into the second cache: llvm.prefetch."""
    element = builder.gep(address, [place])
    kind = ir.FunctionType(ir.VoidType(), [element.type, WORD, WORD, WORD])
    function = builder.module.declare_intrinsic("llvm.prefetch", [element.type], kind)
    read, second_cache, data = WORD(0), WORD(2), WORD(1)
    builder.call(function, [element, read, second_cache, data])


def _splat(builder: Any, number: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    one = builder.insert_element(nothing, number, WORD(0))
    return builder.shuffle_vector(one, nothing, ir.Constant(WORDS, [0] * LANES))


def _words(number: int) -> Any:
    return ir.Constant(WORDS, [number] * LANES)


def _numbers(builder: Any, address: Any, place: Any, stored: Any) -> Any:
    """Numbers of a weight from here: of FP8 codes times 2^-120, exactly; bfloat16; or float32."""
    if stored == types.float32:
        return builder.load(_at(builder, address, place, FLOATS), align=4)
    kind = ir.VectorType(BYTE if stored == types.int8 else SHORT, LANES)
    words = builder.sext(builder.load(_at(builder, address, place, kind), align=1), WORDS)
    if stored == types.int8:
        words = builder.and_(builder.shl(words, _words(FLOAT32_BITS)), _words(SIGN_AND_MAGNITUDE))
    else:
        words = builder.shl(words, _words(16))
    return builder.bitcast(words, FLOATS)


def _add(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + one * other, in one rounding where the machine has an instruction for that."""
    return builder.fadd(total, builder.fmul(one, other, flags=("contract",)), flags=("contract",))


def _lane_sum(builder: Any, vector: Any) -> Any:
    """Halves of a vector are added until one lane is left."""
    size, nothing = LANES // 2, ir.Constant(FLOATS, ir.Undefined)
    while size:
        moved = ir.Constant(WORDS, [(lane + size) % LANES for lane in range(LANES)])
        vector = builder.fadd(vector, builder.shuffle_vector(vector, nothing, moved))
        size //= 2
    return builder.extract_element(vector, WORD(0))


def _add_pairs(builder: Any, total: Any, one: Any, other: Any) -> Any:
    """total + both products of each word's bfloat16 numbers."""
    kind = ir.FunctionType(FLOATS, [FLOATS, BFLOATS, BFLOATS])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}")
    return builder.call(function, [total, builder.bitcast(one, BFLOATS), builder.bitcast(other, BFLOATS)])


def _unpack(context: Any, builder: Any, signature: Any, arguments: Any, number: int) -> Any:
    """(where an array's elements begin, the other numbers) of an argument (array, other numbers)."""
    array, *places = cgutils.unpack_tuple(builder, arguments[number])
    return context.make_array(signature.args[number][0])(context, builder, array).data, *places


def _zeros(builder: Any, rows: int, columns: int) -> list[list[Any]]:
    """Running sums: variables that LLVM keeps in registers."""
    zero = ir.Constant(FLOATS, None)
    totals = [[cgutils.alloca_once(builder, FLOATS) for _ in range(columns)] for _ in range(rows)]
    for row in totals:
        for total in row:
            builder.store(zero, total)
    return totals


def _for_each_height(builder: Any, height: Any, tallest: int, generate: Callable[[int], None]) -> None:
    """Code of its own for each number of rows."""
    end = builder.append_basic_block("end")
    switch = builder.switch(height, end)
    for rows in range(1, tallest + 1):
        block = builder.append_basic_block(f"rows.{rows}")
        switch.add_case(LONG(rows), block)
        builder.position_at_end(block)
        generate(rows)
        builder.branch(end)
    builder.position_at_end(end)


def _products(
    builder: Any,
    rows: int,
    registers: int,
    depth: Any,
    inputs: Any,
    numbers_of: Callable[[Any], list[Any]],
    pairs: bool,
) -> list[list[Any]]:
    """Sums over a tile's depth of rows of input, `inputs` (address, first), times the numbers of a row of weight."""
    totals = _zeros(builder, rows, registers)
    kind, kinds, add = (WORD, WORDS, _add_pairs) if pairs else (FLOAT, FLOATS, _add)
    with cgutils.for_range(builder, depth) as loop:
        numbers = numbers_of(loop.index)
        for n in range(rows):
            place = builder.add(builder.add(inputs[1], loop.index), LONG(n * (DEPTH // 2 if pairs else DEPTH)))
            value = _splat(builder, builder.load(_at(builder, inputs[0], place, kind)), kinds)
            for total, number in zip(totals[n], numbers, strict=True):
                builder.store(add(builder, builder.load(total), value, number), total)
    return totals


def _add_to_sums(builder: Any, totals: list[list[Any]], factor: Any, sums: Any, left: Any) -> None:
    """sums += factor * totals; `factor` is (address, first), `sums` (address, first, stride)."""
    for register in range(len(totals[0])):
        column = builder.add(left, LONG(register * LANES))
        place = builder.add(factor[1], column)
        factors = builder.load(_at(builder, factor[0], place, FLOATS), align=4)
        for n, of_row in enumerate(totals):
            place = builder.add(builder.add(sums[1], column), builder.mul(LONG(n), sums[2]))
            address = _at(builder, sums[0], place, FLOATS)
            old, total = builder.load(address, align=4), builder.load(of_row[register])
            builder.store(_add(builder, old, total, factors), address, align=4)


@intrinsic
def expand_rows(typing_context: Any, weight: Any, depth: Any, panel: Any) -> Any:
    """Rows of a weight, NARROW_STRIP numbers of each, as a panel for `add_tile`, which says what panels are.

    (weight, first, stride)   stored numbers as in `add_wide_tiles`
    depth                     rows of the panel
    """
    pairs = panel.dtype == types.int32
    stored = weight[0].dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, first, width = _unpack(context, builder, signature, arguments, 0)
        to = context.make_array(signature.args[2])(context, builder, arguments[2]).data

        def pairs_from(place: Any) -> Any:
            """FP8 codes become bfloat16 exactly. Multiplied here: the instruction takes subnormals for zeros."""
            words = []
            for start in (place, builder.add(place, width)):
                numbers = _numbers(builder, data, start, stored)
                if stored == types.int8:
                    numbers = builder.fmul(numbers, ir.Constant(FLOATS, [HALF_REBIAS**2] * LANES))
                words.append(builder.bitcast(numbers, WORDS))
            return builder.or_(builder.lshr(words[0], _words(16)), builder.and_(words[1], _words(-(2**16))))

        with cgutils.for_range(builder, arguments[1]) as loop:
            above = builder.mul(builder.mul(loop.index, LONG(2 if pairs else 1)), width)
            for register in range(NARROW):
                place = builder.add(builder.add(first, above), LONG(register * LANES))
                target = builder.add(builder.mul(loop.index, LONG(NARROW_STRIP)), LONG(register * LANES))
                numbers = pairs_from(place) if pairs else _numbers(builder, data, place, stored)
                builder.store(numbers, _at(builder, to, target, numbers.type), align=4)
        return context.get_dummy_value()

    return types.void(weight, depth, panel), generate


@intrinsic
def add_wide_tiles(
    typing_context: Any,
    height: Any,
    depth: Any,
    columns: Any,
    inputs: Any,
    weight: Any,
    ahead: Any,
    factor: Any,
    sums: Any,
) -> Any:
    """sums += factor * (inputs @ weight), straight from stored numbers: tiles WIDE_STRIP wide, one beside the other.

    height                    rows of input, up to WIDE_ROWS
    depth                     rows of the weight, up to DEPTH
    columns                   a multiple of WIDE_STRIP
    (inputs, first)           flat float32: rows that are DEPTH apart
    (weight, first, stride)   C-contiguous int8 codes, int16 bits of bfloat16, or float32; how far its rows are apart
    ahead                     what will be needed next like `first`: a block from there on is asked for meanwhile
    (factor, first)           flat float32, for each column
    (sums, first, stride)     C-contiguous float32

    `first` is the element at which the first tile begins.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(_unpack, context, builder, signature, arguments)
        data, first, width = unpack(4)

        def tiles(rows: int) -> None:
            with cgutils.for_range_slice(builder, LONG(0), arguments[2], LONG(WIDE_STRIP), LONG) as (left, _):

                def numbers(row: Any) -> list[Any]:
                    place = builder.add(builder.mul(row, width), left)
                    _fetch(builder, data, builder.add(arguments[5], place))
                    place = builder.add(first, place)
                    places = [builder.add(place, LONG(register * LANES)) for register in range(WIDE)]
                    return [_numbers(builder, data, place, signature.args[4][0].dtype) for place in places]

                totals = _products(builder, rows, WIDE, arguments[1], unpack(3), numbers, pairs=False)
                _add_to_sums(builder, totals, unpack(6), unpack(7), left)

        _for_each_height(builder, arguments[0], WIDE_ROWS, tiles)
        return context.get_dummy_value()

    return types.void(height, depth, columns, inputs, weight, ahead, factor, sums), generate


@intrinsic
def add_tile(typing_context: Any, height: Any, depth: Any, inputs: Any, panel: Any, factor: Any, sums: Any) -> Any:
    """sums += factor * (inputs @ panel) for one tile.

    height                  rows of input, up to NARROW_ROWS
    depth                   rows of the panel, up to DEPTH; of pairs, up to half of it
    (inputs, first)         flat: float32 rows that are DEPTH apart; for a panel of pairs, as many bfloat16 numbers, two
                            to an int32 word
    panel                   flat: NARROW_STRIP float32 numbers to a row; or int32 words of two rows of bfloat16 numbers,
                            the first in the lower half
    (factor, first)         flat float32, for each column
    (sums, first, stride)   C-contiguous float32
    """
    pairs = panel.dtype == types.int32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(_unpack, context, builder, signature, arguments)
        data = context.make_array(signature.args[3])(context, builder, arguments[3]).data

        def numbers(row: Any) -> list[Any]:
            place = builder.mul(row, LONG(NARROW_STRIP))
            places = [builder.add(place, LONG(register * LANES)) for register in range(NARROW)]
            return [builder.load(_at(builder, data, place, WORDS if pairs else FLOATS), align=4) for place in places]

        def tile(rows: int) -> None:
            totals = _products(builder, rows, NARROW, arguments[1], unpack(2), numbers, pairs)
            _add_to_sums(builder, totals, unpack(4), unpack(5), LONG(0))

        _for_each_height(builder, arguments[0], NARROW_ROWS, tile)
        return context.get_dummy_value()

    return types.void(height, depth, inputs, panel, factor, sums), generate


@intrinsic
def add_dots(typing_context: Any, height: Any, length: Any, inputs: Any, weight: Any, factor: Any, sums: Any) -> Any:
    """sums += factor * (inputs @ weight.T) for a weight whose rows are outputs, STREAMS of them.

    height                    rows of input, up to DOT_ROWS
    length                    of a row, a multiple of LANES
    (inputs, first, stride)   C-contiguous float32
    (weight, first, stride)   C-contiguous int8 codes, int16 bits of bfloat16, or float32
    factor                    float32
    (sums, first, stride, apart)   C-contiguous float32; how far its rows, and its columns, are apart
    """
    stored = weight[0].dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(_unpack, context, builder, signature, arguments)
        input_data, input_first, input_width = unpack(2)
        weight_data, weight_first, width = unpack(3)
        sums_data, sums_first, sums_width, apart = unpack(5)

        def dots(rows: int) -> None:
            totals = _zeros(builder, rows, STREAMS)
            with cgutils.for_range_slice(builder, LONG(0), arguments[1], LONG(LANES), LONG) as (column, _):
                values = []
                for n in range(rows):
                    place = builder.add(builder.add(input_first, column), builder.mul(LONG(n), input_width))
                    values.append(builder.load(_at(builder, input_data, place, FLOATS), align=4))
                for stream in range(STREAMS):
                    place = builder.add(builder.add(weight_first, column), builder.mul(LONG(stream), width))
                    numbers = _numbers(builder, weight_data, place, stored)
                    for value, of_row in zip(values, totals, strict=True):
                        total = of_row[stream]
                        builder.store(_add(builder, builder.load(total), value, numbers), total)
            for n, of_row in enumerate(totals):
                for stream, total in enumerate(of_row):
                    column = builder.mul(LONG(stream), apart)
                    place = builder.add(builder.add(sums_first, column), builder.mul(LONG(n), sums_width))
                    address = builder.gep(sums_data, [place])
                    lane_sum = _lane_sum(builder, builder.load(total))
                    builder.store(_add(builder, builder.load(address), lane_sum, arguments[4]), address)

        _for_each_height(builder, arguments[0], DOT_ROWS, dots)
        return context.get_dummy_value()

    return types.void(height, length, inputs, weight, types.float32, sums), generate


@intrinsic
def transpose_codes(typing_context: Any, weight: Any, to: Any) -> Any:
    """16 x 16 bytes of one array, transposed, into another. Each is (array, first, stride)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(array: Any, row: int) -> Any:
            data, first, stride = array
            return _at(builder, data, builder.add(first, builder.mul(LONG(row), stride)), kind)

        kind, size = ir.VectorType(BYTE, 16), 16
        source, target = (_unpack(context, builder, signature, arguments, number) for number in range(2))
        rows = [builder.load(place(source, row), align=1) for row in range(size)]
        # Each row alternates with the one half of them further, four times over.
        halves = [
            ir.Constant(ir.VectorType(WORD, size), [half * 8 + n // 2 + n % 2 * size for n in range(size)])
            for half in range(2)
        ]
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[n], rows[n + size // 2], half) for n in range(size // 2) for half in halves
            ]
        for number, row in enumerate(rows):
            builder.store(row, place(target, number), align=1)
        return context.get_dummy_value()

    return types.void(weight, to), generate
