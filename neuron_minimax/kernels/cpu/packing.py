"""Packing for matrix products: panels, and the products of rows by one block of a weight.

A block is up to DEPTH rows, which are inputs, by up to CHUNK columns. Strip by strip it is expanded
to float32, or to pairs of bfloat16 numbers; where it is not whole strips, or lies the other way
round, it is copied first.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from neuron_minimax.kernels.cpu.jit import ceil_div, compiled, unsigned
from neuron_minimax.kernels.cpu.microkernels import (
    DEPTH,
    NARROW,
    NARROW_ROWS,
    NARROW_STRIP,
    add_tile,
)
from neuron_minimax.kernels.cpu.vectors import (
    BYTE,
    BYTES,
    LANES,
    LONG,
    WORD,
    WORDS,
    at,
    bytes_in_order,
    look_up,
    numbers_at,
    rebias,
    rounded_pairs,
    unpack_argument,
    words_of,
)
from neuron_minimax.kernels.reference import decode

# The bfloat16 numbers of FP8 codes without their signs: lower and upper bytes.
_BITS = decode(torch.arange(128, dtype=torch.uint8)).view(torch.int32) >> 16
_LOWER = (_BITS & 0xFF).tolist()
_UPPER = (_BITS >> 8).tolist()


def _pairs_of_codes(builder: Any, data: Any, places: tuple[Any, Any]) -> list[Any]:
    """Pairs of bfloat16 numbers, of NARROW_STRIP codes at each place, exactly."""
    quarters = range(NARROW_STRIP // 8)  # of 16 bytes, as instructions interleave bytes within them
    of_columns = [
        half * LANES + quarter * 4 + n
        for quarter in quarters
        for half in range(2)
        for n in range(4)
    ]
    order = [row * NARROW_STRIP + column for column in of_columns for row in range(2)]
    kind = ir.VectorType(BYTE, NARROW_STRIP)
    first, second = (builder.load(at(builder, data, place, kind), align=1) for place in places)
    codes = bytes_in_order(builder, first, second, order)
    signs = builder.and_(codes, ir.Constant(BYTES, [-128] * BYTES.count))
    lower = look_up(builder, codes, _LOWER)
    upper = builder.or_(look_up(builder, codes, _UPPER), signs)
    words = []
    for half in range(2):
        order = [quarter * 16 + half * 8 + n for quarter in quarters for n in range(8)]
        mixed = [place for byte in order for place in (byte, BYTES.count + byte)]
        words.append(builder.bitcast(bytes_in_order(builder, lower, upper, mixed), WORDS))
    return words


@intrinsic
def round_to_pairs(typing_context: Any, inputs: Any, length: Any, to: Any) -> Any:
    """Round numbers of a row of input to int32 words of two bfloat16 numbers each.

    `length` is a multiple of NARROW_STRIP; `inputs` and `to` are (C-contiguous array, first).
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        unpack = partial(unpack_argument, context, builder, signature, arguments)
        data, first = unpack(0)
        words, to_first = unpack(2)
        with cgutils.for_range(builder, builder.sdiv(arguments[1], LONG(NARROW_STRIP))) as loop:
            place = builder.add(first, builder.mul(loop.index, LONG(NARROW_STRIP)))
            places = [builder.add(place, LONG(register * LANES)) for register in range(NARROW)]
            pairs = rounded_pairs(
                builder, *(numbers_at(builder, data, place, types.float32) for place in places)
            )
            target = builder.add(to_first, builder.mul(loop.index, LONG(LANES)))
            builder.store(pairs, at(builder, words, target, WORDS), align=4)
        return context.get_dummy_value()

    return types.void(inputs, length, to), generate


@intrinsic
def expand_rows(typing_context: Any, weight: Any, depth: Any, panel: Any) -> Any:
    """Expand rows of a weight, NARROW_STRIP numbers of each, to a panel as `add_tile` takes it.

    (weight, first, stride)   stored numbers as in `add_wide_tiles`
    depth                     rows of the panel
    """
    pairs = panel.dtype == types.int32
    stored = weight[0].dtype

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data, first, width = unpack_argument(context, builder, signature, arguments, 0)
        to = context.make_array(signature.args[2])(context, builder, arguments[2]).data
        starts = [LONG(register * LANES) for register in range(NARROW)]

        def numbers(place: Any) -> list[Any]:
            return [
                numbers_at(builder, data, builder.add(place, start), stored) for start in starts
            ]

        def pairs_of_numbers(places: tuple[Any, Any]) -> list[Any]:
            lower, upper = (
                [builder.bitcast(number, WORDS) for number in numbers(place)] for place in places
            )
            lower = [builder.lshr(word, words_of(16)) for word in lower]
            return [builder.or_(*words) for words in zip(lower, upper, strict=True)]

        with cgutils.for_range(builder, arguments[1]) as loop:
            row = builder.mul(loop.index, LONG(2)) if pairs else loop.index
            place = builder.add(first, builder.mul(row, width))
            if pairs:
                places = place, builder.add(place, width)
                made = (
                    _pairs_of_codes(builder, data, places)
                    if stored == types.int8
                    else pairs_of_numbers(places)
                )
            else:
                made = numbers(place)
            for numbers_made, start in zip(made, starts, strict=True):
                target = builder.add(builder.mul(loop.index, LONG(NARROW_STRIP)), start)
                builder.store(numbers_made, at(builder, to, target, numbers_made.type), align=4)
        return context.get_dummy_value()

    return types.void(weight, depth, panel), generate


@intrinsic
def transpose_codes(typing_context: Any, weight: Any, to: Any) -> Any:
    """16 x 16 bytes of one array, transposed, into another. Each is (array, first, stride)."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def place(array: Any, row: int) -> Any:
            data, first, stride = array
            return at(builder, data, builder.add(first, builder.mul(LONG(row), stride)), kind)

        kind = ir.VectorType(BYTE, 16)
        size = 16
        source, target = (
            unpack_argument(context, builder, signature, arguments, number) for number in range(2)
        )
        rows = [builder.load(place(source, row), align=1) for row in range(size)]
        # Each row alternates with the one half of them further, four times over.
        halves = [
            ir.Constant(
                ir.VectorType(WORD, size), [half * 8 + n // 2 + n % 2 * size for n in range(size)]
            )
            for half in range(2)
        ]
        for _ in range(4):
            rows = [
                builder.shuffle_vector(rows[n], rows[n + size // 2], half)
                for n in range(size // 2)
                for half in halves
            ]
        for number, row in enumerate(rows):
            builder.store(row, place(target, number), align=1)
        return context.get_dummy_value()

    return types.void(weight, to), generate


CHUNK = 768  # columns; what belongs to them stays in the second cache
GROUP = 8 * NARROW_ROWS  # rows of input that are multiplied together


def pack(inputs: Any, row_N: Any, left: int, depth: int, factor: Any, packed: Any) -> None:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(pack, jit_options={"fastmath": {"contract"}})
def _pack_for(inputs, row_N, left, depth, factor, packed):
    """packed[n] = inputs[row_N[n], left : left + depth] * factor, each row DEPTH numbers from the
    last.

    Or as words, rounded to bfloat16 instead, of two numbers each, the first in the lower half;
    after an odd one, zero.
    """

    def pack_floats(inputs, row_N, left, depth, factor, packed):
        for n in range(len(row_N)):
            row = unsigned(row_N[n])
            for k in range(depth):
                packed[unsigned(n * DEPTH + k)] = inputs[row, unsigned(left + k)] * factor

    def pack_pairs(inputs, row_N, left, depth, factor, packed):
        whole = depth // NARROW_STRIP * NARROW_STRIP
        edge = np.zeros(NARROW_STRIP if whole < depth else 0, np.float32)
        for n in range(len(row_N)):
            first = row_N[n] * inputs.shape[1] + left
            to = n * (DEPTH // 2)
            round_to_pairs((inputs, first), whole, (packed, to))
            if whole < depth:
                edge[: depth - whole] = inputs[row_N[n], left + whole : left + depth]
                round_to_pairs((edge, 0), NARROW_STRIP, (packed, to + whole // 2))

    return pack_pairs if packed.dtype == types.int32 else pack_floats


def halves(weight: Any, panel: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(halves)
def _halves_for(weight, panel):
    """The part that inputs, and scales, have of the factor that a panel's numbers lack.

    A panel of pairs lacks nothing.
    """
    if panel.dtype == types.int32:
        return lambda weight, panel: np.float32(1)
    return lambda weight, panel: rebias(weight)


def rows_of(depth: int, panel: Any) -> int:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(rows_of)
def _rows_of_for(depth, panel):
    """Rows of a panel for so many of a weight."""
    if panel.dtype == types.int32:
        return lambda depth, panel: (depth + 1) // 2
    return lambda depth, panel: depth


@compiled
def factor_of_columns(
    scale_view: Any, step: int, parts: int, half: float, columns: Any, factor: Any
) -> None:
    """factor[j] = scale of column left + j, times `half` of what codes lack.

    `scale_view` is (scales, expert, block row), `columns` (left, right, columns of the weight). The
    last block of each of the `parts` weights side by side may be partial.
    """
    scale, expert, block_row = scale_view
    left, right, width = columns
    part_width = width // parts
    blocks = scale.shape[2] // parts
    column = left
    while column < right:
        part = column // part_width
        number = (column - part * part_width) // step
        end = min(part * part_width + min((number + 1) * step, part_width), right)
        value = np.float32(half) * scale[expert, block_row, part * blocks + number]
        for j in range(column - left, end - left):
            factor[unsigned(j)] = value
        column = end


@compiled
def copy_block(weight: Any, start: int, width: int, depth: int, columns: int, block: Any) -> None:
    """Copy rows of a flat weight to rows CHUNK apart, where a strip may be read beyond its end."""
    for k in range(depth):
        for j in range(columns):
            block[unsigned(k * CHUNK + j)] = weight[unsigned(start + k * width + j)]


@compiled
def add_strip(
    count: int,
    depth: int,
    packed: Any,
    strip_view: Any,
    panel: Any,
    factor_view: Any,
    sums: Any,
) -> None:
    """sums += factor * (packed @ a strip of a block), `strip_view` (array, first, stride).

    `factor_view` is (factors, left): the strip's sums begin behind those of `left` columns, and lie
    together, those of each row NARROW_STRIP from the last.
    """
    left = factor_view[1]
    expand_rows(strip_view, rows_of(depth, panel), panel)
    tiles = ceil_div(count, NARROW_ROWS)
    for tile in range(tiles):
        first = count * tile // tiles
        height = count * (tile + 1) // tiles - first
        inputs_view = (packed, first * rows_of(DEPTH, panel))
        sums_view = (sums, left * count + first * NARROW_STRIP, NARROW_STRIP)
        add_tile(height, rows_of(depth, panel), inputs_view, panel, factor_view, sums_view)


@compiled
def put_sums(count: int, sums: Any, columns: int, out: Any, to: int, width: int) -> None:
    """Put the strips' sums where they belong."""
    for n in range(count):
        for left in range(0, columns, NARROW_STRIP):
            for j in range(min(NARROW_STRIP, columns - left)):
                out[unsigned(to + n * width + left + j)] = sums[
                    unsigned(left * count + n * NARROW_STRIP + j)
                ]
