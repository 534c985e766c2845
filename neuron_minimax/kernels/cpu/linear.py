"""Linear layers: a skinny GEMM for few rows, bound by memory, and a packed GEMM for many.

Shapes: N rows of input, O output and I input features.
"""

from typing import Any

import numpy as np

from neuron_minimax.kernels.cpu.jit import (
    ceil_div,
    compiled,
    inlined,
    on_lines,
    run_in_team,
    take,
    unsigned,
)
from neuron_minimax.kernels.cpu.microkernels import (
    DEPTH,
    DOT_ROWS,
    LONE_STREAMS,
    NARROW_STRIP,
    STREAMS,
    add_dots,
)
from neuron_minimax.kernels.cpu.packing import (
    CHUNK,
    add_strip,
    factor_of_columns,
    halves,
    pack,
    put_sums,
    transpose_codes,
)
from neuron_minimax.kernels.cpu.vectors import LANES, number_of, rebias, spread_inputs

DOT_INPUTS = 4096  # numbers of the input that stay in the first cache,
DOT_COLUMNS = 512  # but at least so many of each row
# Rows of a weight that are read beside each other: the next ones fit into the first cache too
BLOCK_BYTES = 12288
LINEAR_ROWS = 128  # of a weight that a thread takes at a time
MANY_ROWS = 512  # of input that are multiplied together where there are many
ITEMS_PER_THREAD = 4  # so that none waits long for the others
SQUARE = 16  # bytes that are transposed at a time, in both directions


@inlined
def linear_of_few(
    team: int, hidden_NI: Any, weight_OI: Any, scale: Any, block: Any, out_NO: Any
) -> None:
    """out += hidden @ weight.T in float32; FP8 codes, float32, or bfloat16's bits as int16.

    A dense weight takes one scale of 1 for all. `team` is the number of threads.
    """
    taken = np.zeros(1, np.int64)
    run_in_team(_linear_of_few, team, (hidden_NI, weight_OI, (scale, block), taken, out_NO))


@compiled
def _linear_of_few(
    thread: int,
    threads: int,
    hidden_NI: Any,
    weight_OI: Any,
    scaling: Any,
    taken: Any,
    out_NO: Any,
) -> None:
    """One thread's share. A few rows are read beside each other while the next are prefetched.

    Prefetches are in address order: out of order they cost bandwidth (benchmarks/README.md).
    """
    scale, block = scaling
    rows, features = hidden_NI.shape
    outputs = weight_OI.shape[0]
    items = ceil_div(outputs, block[0]) * ceil_div(block[0], LINEAR_ROWS)
    step = 4 // weight_OI.itemsize * LANES
    half = rebias(weight_OI)
    whole = features // step * step
    columns = max(DOT_INPUTS // rows, DOT_COLUMNS) // step * step
    scaled_NI = np.empty((rows, features), np.float32)
    spread_NI = on_lines(rows * features, hidden_NI).reshape((rows, features))
    tiles = ceil_div(rows, DOT_ROWS)
    place_T = rows * np.arange(tiles + 1) // tiles
    all_fit = STREAMS * features * weight_OI.itemsize <= BLOCK_BYTES
    streams = STREAMS if rows > 1 or all_fit else LONE_STREAMS
    item = take(taken, 0)
    while item < items:
        following = take(taken, 0)
        first, last = _rows_of_item(item, block[0], outputs)
        next_first = _rows_of_item(following, block[0], outputs)[0] if following < items else last
        end = last - (last - first) % streams
        _scale_inputs(hidden_NI, scale, first // block[0], block[1], half, scaled_NI)
        for n in range(rows):
            spread_inputs((scaled_NI, n * features), weight_OI, whole, (spread_NI, n * features))
        for row in range(first, end, streams):
            next_row = row + streams if row + streams < end else next_first
            for left in range(0, whole, columns):
                length = min(columns, whole - left)
                weight_view = (weight_OI, row * features + left, features)
                for tile in range(tiles):
                    n = place_T[tile]
                    count = place_T[tile + 1] - place_T[tile]
                    inputs_view = (spread_NI, n * features + left, features)
                    sums_view = (out_NO, n * outputs + row, outputs)
                    ahead = row * features + left if tile else next_row * features + streams * left
                    add_dots(
                        count, streams, length, inputs_view, weight_view, ahead, half, sums_view
                    )
        for row in range(first if whole < features else end, last):
            _add_products(scaled_NI, weight_OI, row, whole if row < end else 0, half, out_NO)
        item = following


@compiled
def _rows_of_item(item: int, block_rows: int, outputs: int) -> tuple[int, int]:
    """The first row of an item, and where it ends: up to LINEAR_ROWS of one block."""
    per_block = ceil_div(block_rows, LINEAR_ROWS)
    block = item // per_block
    part = item % per_block
    first = min(block * block_rows + part * LINEAR_ROWS, outputs)
    return first, max(first, min(first + LINEAR_ROWS, (block + 1) * block_rows, outputs))


@compiled
def _scale_inputs(
    hidden_NI: Any, scale: Any, block_row: int, step: int, half: float, scaled_NI: Any
) -> None:
    rows, features = hidden_NI.shape
    for n in range(rows):
        for number in range(scale.shape[1]):
            factor = scale[block_row, number] * half
            for column in range(number * step, min((number + 1) * step, features)):
                scaled_NI[unsigned(n), unsigned(column)] = (
                    hidden_NI[unsigned(n), unsigned(column)] * factor
                )


@compiled
def _add_products(
    inputs_NI: Any, weight_OI: Any, row: int, left: int, factor: float, out_NO: Any
) -> None:
    """out += products at the edges of a weight, one number after the other."""
    for n in range(inputs_NI.shape[0]):
        total = np.float32(0)
        for column in range(left, inputs_NI.shape[1]):
            total += inputs_NI[n, column] * number_of(weight_OI[row, column])
        out_NO[n, row] += total * factor


@inlined
def linear_of_many(
    team: int, hidden_NI: Any, codes_OI: Any, scale: Any, block: Any, panels: Any, out_NO: Any
) -> None:
    """out = hidden @ codes.T, in the dtype of `panels` as for experts; `out` is flat."""
    rows = hidden_NI.shape[0]
    outputs = codes_OI.shape[0]
    groups = ceil_div(rows, MANY_ROWS)
    size = ceil_div(outputs * groups, ITEMS_PER_THREAD * team)
    size = min(max(ceil_div(size, NARROW_STRIP) * NARROW_STRIP, NARROW_STRIP), CHUNK)
    turned = np.ascontiguousarray(scale.T).reshape((1, scale.shape[1], scale.shape[0]))
    weight_view = (codes_OI, turned, block)
    taken = np.zeros(1, np.int64)
    run_in_team(
        _linear_of_many, team, ((groups, size, panels), hidden_NI, weight_view, taken, out_NO)
    )


@compiled
def _linear_of_many(
    thread: int,
    threads: int,
    work: Any,
    hidden_NI: Any,
    weight_view: Any,
    taken: Any,
    out_NO: Any,
) -> None:
    """One thread's share: items are groups of rows by chunks of outputs."""
    groups, size, panels = work
    rows = hidden_NI.shape[0]
    outputs = weight_view[0].shape[0]
    item = take(taken, 0)
    while item < groups * ceil_div(outputs, size):
        group = item % groups
        left = item // groups * size
        row_N = np.arange(rows * group // groups, rows * (group + 1) // groups)
        where = (left, min(left + size, outputs))
        packed = np.empty(len(row_N) * DEPTH, panels.dtype)
        panel = on_lines(DEPTH * NARROW_STRIP, panels)
        _multiply_outputs(hidden_NI, row_N, weight_view, where, packed, panel, out_NO)
        item = take(taken, 0)


@compiled
def _multiply_outputs(
    hidden_NI: Any,
    row_N: Any,
    weight_view: Any,
    where: Any,
    packed: Any,
    panel: Any,
    out_NO: Any,
) -> None:
    """out[row_N] = hidden[row_N] @ rows of a weight, transposed block by block, as the panel's."""
    codes_OI, scale, block = weight_view
    first, last = where
    outputs, features = codes_OI.shape
    count = len(row_N)
    columns = last - first
    flat = codes_OI.reshape(-1)
    codes = np.zeros(DEPTH * CHUNK, np.int8)
    factor = np.zeros(CHUNK, np.float32)
    strips = ceil_div(columns, NARROW_STRIP)
    sums = on_lines(strips * NARROW_STRIP * count, factor)
    sums[:] = np.float32(0)
    half = halves(codes_OI, panel)
    for block_column in range(scale.shape[1]):
        scale_view = (scale, 0, block_column)
        factor_of_columns(scale_view, block[0], 1, half, (first, last, outputs), factor)
        right = min((block_column + 1) * block[1], features)
        for left in range(block_column * block[1], right, DEPTH):
            depth = min(DEPTH, right - left)
            pack(hidden_NI, row_N, left, depth, half, packed)
            _transpose_block(flat, first * features + left, features, columns, depth, codes)
            for strip in range(strips):
                column = strip * NARROW_STRIP
                strip_view = (codes, column, CHUNK)
                add_strip(count, depth, packed, strip_view, panel, (factor, column), sums)
    put_sums(count, sums, columns, out_NO, row_N[0] * outputs + first, outputs)


@compiled
def _transpose_block(
    weight: Any, start: int, width: int, rows: int, depth: int, block: Any
) -> None:
    """block[k,j] = the code in row j and column k of a flat weight from here."""
    for j in range(0, rows, SQUARE):
        for k in range(0, depth, SQUARE):
            if j + SQUARE <= rows and k + SQUARE <= depth:
                transpose_codes(
                    (weight, start + j * width + k, width), (block, k * CHUNK + j, CHUNK)
                )
                continue
            for row in range(j, min(j + SQUARE, rows)):
                for column in range(k, min(k + SQUARE, depth)):
                    block[column * CHUNK + row] = weight[start + row * width + column]
