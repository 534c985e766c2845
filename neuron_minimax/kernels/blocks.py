"""What the loops of experts and of linear layers share: rows of input by a block of a weight, tile by tile.

A block is up to DEPTH rows, which are inputs, by up to CHUNK columns. Strip by strip it is expanded to float32, or to
pairs of bfloat16 numbers; where it is not whole strips, or lies the other way round, it is copied first.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from neuron_minimax.kernels.codes import compiled, rebias, unsigned
from neuron_minimax.kernels.panels import expand_rows, round_to_pairs
from neuron_minimax.kernels.tiles import DEPTH, NARROW_ROWS, NARROW_STRIP, add_tile

CHUNK = 768  # columns; what belongs to them stays in the second cache
GROUP = 8 * NARROW_ROWS  # rows of input that are multiplied together


def pack(inputs: Any, row_N: Any, left: int, depth: int, factor: Any, packed: Any) -> None:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(pack, jit_options={"fastmath": {"contract"}})
def _pack_for(inputs, row_N, left, depth, factor, packed):
    """packed[n] = inputs[row_N[n], left : left + depth] * factor, each row DEPTH numbers from the last.

    Or as words, rounded to bfloat16 instead, of two numbers each, the first in the lower half; after an odd one, zero.
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
            first, to = row_N[n] * inputs.shape[1] + left, n * (DEPTH // 2)
            round_to_pairs((inputs, first), whole, (packed, to))
            if whole < depth:
                edge[: depth - whole] = inputs[row_N[n], left + whole : left + depth]
                round_to_pairs((edge, 0), NARROW_STRIP, (packed, to + whole // 2))

    return pack_pairs if packed.dtype == types.int32 else pack_floats


def halves(weight: Any, panel: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(halves)
def _halves_for(weight, panel):
    """What inputs, and scales, bring of the factor that numbers lack in a panel: all is there in one of pairs."""
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
    scale: Any,
    expert: int,
    block_row: int,
    step: int,
    parts: int,
    half: float,
    left: int,
    right: int,
    width: int,
    factor: Any,
) -> None:
    """factor[j] = scale of column left + j, times `half` of what codes lack; a part's last block may be partial."""
    part_width, blocks = width // parts, scale.shape[2] // parts
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
    """Rows of a flat weight to rows that are CHUNK apart, where a strip may be read beyond its end."""
    for k in range(depth):
        for j in range(columns):
            block[unsigned(k * CHUNK + j)] = weight[unsigned(start + k * width + j)]


@compiled
def add_strip(count: int, depth: int, packed: Any, weight: Any, left: int, panel: Any, factor: Any, sums: Any) -> None:
    """sums += factor * (packed @ a strip of a block), whose place is `weight` (array, first, stride).

    The strip's sums begin behind those of `left` columns, and lie together, those of each row NARROW_STRIP from the
    last.
    """
    expand_rows(weight, rows_of(depth, panel), panel)
    tiles = -(-count // NARROW_ROWS)
    for tile in range(tiles):
        first = count * tile // tiles
        height = count * (tile + 1) // tiles - first
        of_sums = sums, left * count + first * NARROW_STRIP, NARROW_STRIP
        add_tile(height, rows_of(depth, panel), (packed, first * rows_of(DEPTH, panel)), panel, (factor, left), of_sums)


@compiled
def put_sums(count: int, sums: Any, columns: int, out: Any, to: int, width: int) -> None:
    """Put the strips' sums where they belong."""
    for n in range(count):
        for left in range(0, columns, NARROW_STRIP):
            for j in range(min(NARROW_STRIP, columns - left)):
                out[unsigned(to + n * width + left + j)] = sums[unsigned(left * count + n * NARROW_STRIP + j)]
