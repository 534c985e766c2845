"""Micro-kernels, whose sums stay in registers: what LLVM does not make out of loops.

A tile is a few rows of input by a strip of columns of a weight whose rows are inputs: each number
of the weight is read once and multiplied with every row. `add_wide_tiles` and `add_dots` take eight
and nine operands: they are generators of LLVM IR, whose arguments are registers.
"""

from collections.abc import Callable
from functools import partial, reduce
from itertools import chain
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from neuron_minimax.kernels.cpu.vectors import (
    FLOAT,
    FLOATS,
    LANES,
    LONG,
    SUMS_KEPT,
    WORD,
    WORDS,
    add,
    add_pairs,
    add_product,
    at,
    fetch,
    over_lanes,
    registers_of,
    splat,
    spread_numbers_at,
    unpack_argument,
)

# registers across a tile
WIDE = 4
NARROW = 2
# columns
WIDE_STRIP = WIDE * LANES
NARROW_STRIP = NARROW * LANES
# of a tile at most
WIDE_ROWS = SUMS_KEPT // WIDE
NARROW_ROWS = SUMS_KEPT // NARROW
STREAMS = 4  # rows of a weight that `add_dots` takes beside each other,
LONE_STREAMS = 2  # or so many, of one row of input
DOT_ROWS = SUMS_KEPT // STREAMS  # of input at most
DEPTH = 128  # rows of input side by side are this far apart: no tile goes deeper
LONE_DEPTH = 4  # a wide tile of this depth, of one row of input, has code without a loop


def _sums(
    builder: Any, rows: int, columns: int, places: list[list[Any]] | None = None
) -> list[list[Any]]:
    """Running sums: variables that LLVM keeps in registers, first what is at `places`, or zero."""
    totals = [[cgutils.alloca_once(builder, FLOATS) for _ in range(columns)] for _ in range(rows)]
    for n, row in enumerate(totals):
        for register, total in enumerate(row):
            value = (
                builder.load(places[n][register], align=4) if places else ir.Constant(FLOATS, None)
            )
            builder.store(value, total)
    return totals


def _places_of_sums(builder: Any, rows: int, registers: int, sums: Any) -> list[list[Any]]:
    """Addresses of a tile's sums, `sums` (address, first, stride)."""
    starts = [builder.add(sums[1], builder.mul(LONG(n), sums[2])) for n in range(rows)]
    return [
        [
            at(builder, sums[0], builder.add(start, LONG(register * LANES)), FLOATS)
            for register in range(registers)
        ]
        for start in starts
    ]


def _for_each_height(
    builder: Any, height: Any, tallest: int, generate: Callable[[int], None]
) -> None:
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


def _add_products(
    builder: Any,
    totals: list[list[Any]],
    depth: Any,
    inputs: Any,
    numbers_of: Callable[[Any], list[Any]],
    pairs: bool,
) -> None:
    """totals += rows of input, `inputs` (address, first), times rows of a weight, over a depth."""
    kind, kinds, add = (WORD, WORDS, add_pairs) if pairs else (FLOAT, FLOATS, add_product)
    with cgutils.for_range(builder, depth) as loop:
        numbers = numbers_of(loop.index)
        for n, row in enumerate(totals):
            place = builder.add(
                builder.add(inputs[1], loop.index), LONG(n * (DEPTH // 2 if pairs else DEPTH))
            )
            value = splat(builder, builder.load(at(builder, inputs[0], place, kind)), kinds)
            for total, number in zip(row, numbers, strict=True):
                builder.store(add(builder, builder.load(total), value, number), total)


@intrinsic
def add_wide_tiles(  # noqa: PLR0913 (an intrinsic takes no tuple of views)
    typing_context: Any,
    height: Any,
    depth: Any,
    columns: Any,
    inputs: Any,
    weight: Any,
    ahead: Any,
    sums: Any,
) -> Any:
    """sums += inputs @ weight, straight from stored numbers, in tiles WIDE_STRIP wide.

    height                    rows of input, up to WIDE_ROWS
    depth                     rows of the weight, up to DEPTH
    columns                   a multiple of WIDE_STRIP
    (inputs, first)           flat float32: rows that are DEPTH apart
    (weight, first, stride)   C-contiguous int8 codes, int16 bits of bfloat16, or float32; how far
                              its rows are apart
    ahead                     where what is needed next begins: as much as is read is prefetched
                              meanwhile, in its order
    (sums, first, stride)     flat float32, spread as vectors.py does it

    `first` is the element at which the first tile begins.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        data, first, width = unpack(4)
        sums_data, sums_first, stride = unpack(6)
        stored = signature.args[4][0].dtype
        loads = range(0, WIDE_STRIP, registers_of(stored) * LANES)

        def strips(rows: int, depth: Any) -> None:
            with cgutils.for_range_slice(
                builder, LONG(0), arguments[2], LONG(WIDE_STRIP), LONG
            ) as (left, _):
                ahead = builder.add(arguments[5], builder.mul(left, depth))

                def numbers(row: Any) -> list[Any]:
                    next_place = builder.add(ahead, builder.mul(row, LONG(WIDE_STRIP)))
                    place = builder.add(first, builder.add(builder.mul(row, width), left))
                    found = []
                    for load in loads:
                        fetch(builder, data, builder.add(next_place, LONG(load)))
                        found += spread_numbers_at(
                            builder, data, builder.add(place, LONG(load)), stored
                        )
                    return found

                places = _places_of_sums(
                    builder, rows, WIDE, (sums_data, builder.add(sums_first, left), stride)
                )
                totals = _sums(builder, rows, WIDE, places)
                _add_products(builder, totals, depth, unpack(3), numbers, pairs=False)
                for total, place in zip(chain(*totals), chain(*places), strict=True):
                    builder.store(builder.load(total), place, align=4)

        def tiles(rows: int) -> None:
            if rows > 1:
                strips(rows, arguments[1])
                return
            usual = builder.icmp_signed("==", arguments[1], LONG(LONE_DEPTH))
            with builder.if_else(usual) as (then, otherwise):
                with then:
                    strips(rows, LONG(LONE_DEPTH))
                with otherwise:
                    strips(rows, arguments[1])

        _for_each_height(builder, arguments[0], WIDE_ROWS, tiles)
        return context.get_dummy_value()

    return types.void(height, depth, columns, inputs, weight, ahead, sums), generate


@intrinsic
def add_tile(
    typing_context: Any, height: Any, depth: Any, inputs: Any, panel: Any, factor: Any, sums: Any
) -> Any:
    """sums += factor * (inputs @ panel) for one tile.

    height                  rows of input, up to NARROW_ROWS
    depth                   rows of the panel, up to DEPTH; of pairs, up to half of it
    (inputs, first)         flat: float32 rows that are DEPTH apart; for a panel of pairs, as many
                            bfloat16 numbers, two to an int32 word
    panel                   flat: NARROW_STRIP float32 numbers to a row; or int32 words of two rows
                            of bfloat16 numbers, the first in the lower half
    (factor, first)         flat float32, for each column
    (sums, first, stride)   C-contiguous float32
    """
    pairs = panel.dtype == types.int32

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        data = context.make_array(signature.args[3])(context, builder, arguments[3]).data

        def numbers(row: Any) -> list[Any]:
            place = builder.mul(row, LONG(NARROW_STRIP))
            places = [builder.add(place, LONG(register * LANES)) for register in range(NARROW)]
            return [
                builder.load(at(builder, data, place, WORDS if pairs else FLOATS), align=4)
                for place in places
            ]

        def tile(rows: int) -> None:
            totals = _sums(builder, rows, NARROW)
            _add_products(builder, totals, arguments[1], unpack(2), numbers, pairs)
            data_of_factors, first = unpack(4)
            columns = [builder.add(first, LONG(register * LANES)) for register in range(NARROW)]
            factors = [
                builder.load(at(builder, data_of_factors, column, FLOATS), align=4)
                for column in columns
            ]
            for row, places in zip(
                totals, _places_of_sums(builder, rows, NARROW, unpack(5)), strict=True
            ):
                for total, place, scale in zip(row, places, factors, strict=True):
                    old = builder.load(place, align=4)
                    builder.store(
                        add_product(builder, old, builder.load(total), scale), place, align=4
                    )

        _for_each_height(builder, arguments[0], NARROW_ROWS, tile)
        return context.get_dummy_value()

    return types.void(height, depth, inputs, panel, factor, sums), generate


@intrinsic
def add_dots(  # noqa: PLR0913 (an intrinsic takes no tuple of views)
    typing_context: Any,
    height: Any,
    streams: Any,
    length: Any,
    inputs: Any,
    weight: Any,
    ahead: Any,
    factor: Any,
    sums: Any,
) -> Any:
    """sums += factor * (inputs @ weight.T) for so many rows of a weight, which are outputs.

    height                    rows of input, up to DOT_ROWS
    streams                   rows of the weight: STREAMS, or for one row of input also LONE_STREAMS
    length                    of a row, a multiple of the numbers that a register holds as stored
    (inputs, first, stride)   C-contiguous float32, spread as vectors.py does it
    (weight, first, stride)   C-contiguous int8 codes, int16 bits of bfloat16, or float32
    ahead                     where what is needed next begins: as much as is read is prefetched
                              meanwhile, in its order
    factor                    float32
    (sums, first, stride)     C-contiguous float32
    """
    stored = weight[0].dtype
    registers = registers_of(stored)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        input_data, input_first, input_width = unpack(3)
        weight_data, weight_first, width = unpack(4)
        sums_data, sums_first, sums_width = unpack(7)

        def dots(rows: int, streams: int) -> None:
            parts = (
                STREAMS // streams
            )  # sums of a row, so that one can be added to while another one is
            totals = _sums(builder, rows, streams * parts)
            step = registers * LANES
            with cgutils.for_range_slice(builder, LONG(0), arguments[2], LONG(step), LONG) as (
                column,
                _,
            ):
                start = builder.add(weight_first, column)
                places = [
                    builder.add(start, builder.mul(LONG(stream), width))
                    for stream in range(streams)
                ]
                next_place = builder.add(arguments[5], builder.mul(column, LONG(streams)))
                for stream in range(streams):
                    fetch(builder, weight_data, builder.add(next_place, LONG(stream * step)))
                numbers = [
                    spread_numbers_at(builder, weight_data, place, stored) for place in places
                ]
                for register in range(registers):
                    for n, of_row in enumerate(totals):
                        place = builder.add(
                            builder.add(input_first, column), builder.mul(LONG(n), input_width)
                        )
                        place = builder.add(place, LONG(register * LANES))
                        value = builder.load(at(builder, input_data, place, FLOATS), align=4)
                        for total, of_stream in zip(
                            of_row[register % parts :: parts], numbers, strict=True
                        ):
                            sum_ = add_product(
                                builder, builder.load(total), value, of_stream[register]
                            )
                            builder.store(sum_, total)
            for n, of_row in enumerate(totals):
                for stream in range(streams):
                    place = builder.add(
                        builder.add(sums_first, LONG(stream)), builder.mul(LONG(n), sums_width)
                    )
                    address = builder.gep(sums_data, [place])
                    of_stream = [
                        builder.load(total)
                        for total in of_row[stream * parts : (stream + 1) * parts]
                    ]
                    whole = over_lanes(builder, reduce(partial(add, builder), of_stream))
                    builder.store(
                        add_product(builder, builder.load(address), whole, arguments[6]), address
                    )

        def tile(rows: int) -> None:
            if rows > 1:
                dots(rows, STREAMS)
                return
            with builder.if_else(builder.icmp_signed("==", arguments[1], LONG(STREAMS))) as (
                then,
                otherwise,
            ):
                with then:
                    dots(rows, STREAMS)
                with otherwise:
                    dots(rows, LONE_STREAMS)

        _for_each_height(builder, arguments[0], DOT_ROWS, tile)
        return context.get_dummy_value()

    return types.void(
        height, streams, length, inputs, weight, types.intp, types.float32, sums
    ), generate
