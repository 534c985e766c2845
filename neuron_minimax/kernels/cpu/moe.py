"""Fused mixture of experts: sort by expert, grouped GEMM straight from FP8, SwiGLU, combine.

Each chosen expert is read once for up to GROUP of its tokens. With one or two tokens that is bound
by memory, provided that rows, which lie further apart than a page, are prefetched; with a dozen or
more by arithmetic.

Shapes: R rows and W columns of a weight; P pairs of token and chosen expert, sorted by expert; X
groups of pairs, each of one expert; H hidden, I intermediate.
"""

from typing import Any

import numpy as np

from neuron_minimax.kernels.cpu.jit import (
    CACHE_LINE,
    ceil_div,
    compiled,
    exponential,
    inlined,
    on_lines,
    run_in_team,
    take,
    unsigned,
)
from neuron_minimax.kernels.cpu.microkernels import (
    DEPTH,
    LONE_DEPTH,
    NARROW_STRIP,
    WIDE_ROWS,
    WIDE_STRIP,
    add_wide_tiles,
)
from neuron_minimax.kernels.cpu.packing import (
    CHUNK,
    GROUP,
    add_strip,
    copy_block,
    factor_of_columns,
    halves,
    pack,
    put_sums,
)
from neuron_minimax.kernels.cpu.vectors import add_in_order, fetch_ahead, rebias

# Rows of a weight that are read at a time for few pairs, LONE_DEPTH for one: whole rows
SHALLOW = 16
# Up to so many a weight is read as it lies, in float32; more are faster with panels
FEW_PAIRS = 2 * WIDE_ROWS
PAIRS_PER_THREAD = 384  # of one pass, whose sums are kept between the two products,
PAIRS_PER_PASS = 2048  # but at most: 63 MB of the model's
ITEMS_PER_THREAD = 4  # so that none waits long for the others


@compiled
def sort_by_expert(expert_P: Any, experts: int) -> Any:
    """Pairs by expert, in their order otherwise, and where each expert's begin [E+1].

    The pairs of other ranks' experts are left out.
    """
    first_E = np.zeros(experts + 1, np.int64)
    for expert in expert_P:
        if 0 <= expert < experts:
            first_E[expert + 1] += 1
    first_E = first_E.cumsum()
    next_E = first_E.copy()
    pair_P = np.empty(first_E[experts], np.int64)
    for pair, expert in enumerate(expert_P):
        if 0 <= expert < experts:
            pair_P[next_E[expert]] = pair
            next_E[expert] += 1
    return pair_P, first_E


@compiled
def groups_of(first_E: Any) -> Any:
    """Experts [X] of groups of at most GROUP pairs, and where each group's pairs begin [X+1]."""
    experts = [0][:0]
    places = [0]
    for expert in range(len(first_E) - 1):
        count = first_E[expert + 1] - first_E[expert]
        parts = ceil_div(count, GROUP)
        for part in range(parts):
            experts.append(expert)
            places.append(first_E[expert] + count * (part + 1) // parts)
    return np.array(experts, np.int64), np.array(places, np.int64)


@inlined
def add_expert_products(
    team: int,
    hidden_TH: Any,
    choice: Any,
    gate_up_view: Any,
    down_view: Any,
    panels: Any,
    out_TH: Any,
) -> None:
    """out[t] += affinity[t,k] * MLP of the expert[t,k] (hidden[t]) on `team` threads.

    `choice` is (expert_TK, affinity_TK). A weight comes as (weight, scales [E,.,.], block, how many
    weights lie side by side in its columns). `panels` is of the dtype that groups of
    many pairs are multiplied in: float32, or int32 for pairs of bfloat16 numbers, to which inputs
    are rounded, but weights are not.
    """
    expert_TK, affinity_TK = choice
    gate_up = gate_up_view[0]
    down = down_view[0]
    down_scale = down_view[1]
    chosen = expert_TK.shape[1]
    pair_P, first_E = sort_by_expert(expert_TK.ravel(), len(gate_up))
    expert_X, place_X = groups_of(first_E)
    limit = min(PAIRS_PER_THREAD * team, PAIRS_PER_PASS)
    scratch = np.empty(0, np.float32)
    group = 0
    while group < len(expert_X):
        end = group + 1
        while end < len(expert_X) and place_X[end + 1] - place_X[group] <= limit:
            end += 1
        first = place_X[group]
        last = place_X[end]
        pair_Q = pair_P[first:last].copy()
        pieces = min(ceil_div(ITEMS_PER_THREAD * team, end - group), down_scale.shape[1])
        work = (expert_X[group:end].copy(), place_X[group : end + 1] - first, panels, pieces)
        size = pieces * (last - first) * max(gate_up.shape[2], down.shape[2])
        if size > len(scratch):
            scratch = np.empty(size, np.float32)
        activated_QI = np.empty((last - first, down.shape[1]), np.float32)
        taken = (np.zeros(2, np.int64), np.zeros(2, np.int64))
        inputs_view = (hidden_TH, pair_Q // chosen)
        run_in_team(_multiply, team, (work, inputs_view, gate_up_view, taken[0], scratch))
        run_in_team(_activate, team, (scratch, pieces, activated_QI))
        activated_view = (activated_QI, np.arange(last - first))
        run_in_team(_multiply, team, (work, activated_view, down_view, taken[1], scratch))
        run_in_team(_add_up, team, (scratch, pieces, pair_Q, affinity_TK, out_TH))
        group = end


@compiled
def _multiply(
    thread: int,
    threads: int,
    work: Any,
    inputs_view: Any,
    weight_view: Any,
    taken: Any,
    out_FPW: Any,
) -> None:
    """One thread's share of out[f,p] = inputs[row_P[p], rows of piece f] @ weight of p's expert.

    `out` is flat. Groups of many pairs are one piece, the first; the others are zero. `taken`
    counts items of work.
    """
    expert_X, place_X, panels, pieces = work
    inputs, row_P = inputs_view
    width = weight_view[0].shape[2]
    block_rows = weight_view[1].shape[1]
    size = ceil_div(block_rows, pieces)  # of a piece, in blocks
    chunks = ceil_div(width, CHUNK)
    item = take(taken, 0)
    while item < len(expert_X) * chunks:
        group = item // chunks
        left = item % chunks * CHUNK
        count = place_X[group + 1] - place_X[group]
        if count > FEW_PAIRS:
            row_N = row_P[place_X[group] : place_X[group + 1]]
            to = place_X[group] * width
            where = (expert_X[group], left, min(left + CHUNK, width))
            packed = np.empty(count * DEPTH, panels.dtype)
            panel = on_lines(DEPTH * NARROW_STRIP, panels)
            _multiply_many((inputs, row_N), weight_view, where, packed, panel, (out_FPW, to))
            for place in range(place_X[group], place_X[group + 1] if pieces > 1 else 0):
                for piece in range(1, pieces):
                    row = (piece * place_X[-1] + place) * width
                    out_FPW[row + left : row + min(left + CHUNK, width)] = np.float32(0)
        item = take(taken, 0)
    item = take(taken, 1)
    while item < len(expert_X) * pieces:
        group = item // pieces
        piece = item % pieces
        row_N = row_P[place_X[group] : place_X[group + 1]]
        to = (piece * place_X[-1] + place_X[group]) * width
        if len(row_N) <= FEW_PAIRS:
            rows_of_piece = (expert_X[group], piece * size, min((piece + 1) * size, block_rows))
            out_FPW[to : to + len(row_N) * width] = np.float32(0)
            _add_few((inputs, row_N), weight_view, rows_of_piece, (out_FPW, to))
        item = take(taken, 1)


@compiled
def _add_few(inputs_view: Any, weight_view: Any, where: Any, out_view: Any) -> None:
    """out += inputs[row_N] @ block rows of a weight, which is read once, row by row.

    `where` is (expert, first, last block row).
    """
    inputs, row_N = inputs_view
    weight, scale, block, parts = weight_view
    expert, first, last = where
    out, to = out_view
    rows, width = weight.shape[1:]
    count = len(row_N)
    flat = weight.reshape(-1)
    whole = width // WIDE_STRIP * WIDE_STRIP
    tiles = ceil_div(count, WIDE_ROWS)
    packed = np.empty(count * DEPTH, np.float32)
    factor = np.empty(width, np.float32)
    shallow = LONE_DEPTH if count == 1 else SHALLOW
    panel = np.empty(SHALLOW * NARROW_STRIP, np.float32)
    edge = np.zeros(SHALLOW * CHUNK, weight.dtype)
    edge_sums = np.zeros(WIDE_STRIP * count, np.float32)
    edge_factor = np.zeros(WIDE_STRIP, np.float32)
    sums = on_lines(count * whole, factor)
    sums[:] = np.float32(0)
    for block_row in range(first, last):
        scale_view = (scale, expert, block_row)
        factor_of_columns(scale_view, block[1], parts, rebias(weight), (0, width, width), factor)
        edge_factor[: width - whole] = factor[whole:]
        bottom = min((block_row + 1) * block[0], rows)
        for top in range(block_row * block[0], bottom, shallow):
            depth = min(shallow, bottom - top)
            start = (expert * rows + top) * width
            pack(inputs, row_N, top, depth, rebias(weight), packed)
            for tile in range(tiles):
                n = count * tile // tiles
                height = count * (tile + 1) // tiles - n
                packed_view = (packed, n * DEPTH)
                rows_view = (weight, start, width)
                sums_view = (sums, n * whole, whole)
                ahead = start if tile else start + depth * width
                add_wide_tiles(height, depth, whole, packed_view, rows_view, ahead, sums_view)
            if whole < width:
                copy_block(flat, start + whole, width, depth, width - whole, edge)
                for left in range(0, width - whole, NARROW_STRIP):
                    strip_view = (edge, left, CHUNK)
                    factor_view = (edge_factor, left)
                    add_strip(count, depth, packed, strip_view, panel, factor_view, edge_sums)
        for n in range(count):
            add_in_order((sums, n * whole), weight, whole, (factor, 0), (out, to + n * width))
    put_sums(count, edge_sums, width - whole, out, to + whole, width)


@compiled
def _multiply_many(
    inputs_view: Any, weight_view: Any, where: Any, packed: Any, panel: Any, out_view: Any
) -> None:
    """out = inputs[row_N] @ a chunk of a weight's columns, in the precision of the panel.

    `where` is (expert, first, last column).
    """
    inputs, row_N = inputs_view
    weight, scale, block, parts = weight_view
    expert, left, right = where
    out, to = out_view
    rows, width = weight.shape[1:]
    count = len(row_N)
    columns = right - left
    flat = weight.reshape(-1)
    strips = ceil_div(columns, NARROW_STRIP)
    # Strips that are not whole, or pairs of rows that a block divides, are copied first.
    ragged = columns % NARROW_STRIP != 0 or rows % 2 != 0 or block[0] % 2 != 0
    codes = np.zeros(DEPTH * CHUNK if ragged else 0, weight.dtype)
    factor = np.zeros(CHUNK, np.float32)
    sums = on_lines(strips * NARROW_STRIP * count, factor)
    sums[:] = np.float32(0)
    half = halves(weight, panel)
    for block_row in range(scale.shape[1]):
        scale_view = (scale, expert, block_row)
        factor_of_columns(scale_view, block[1], parts, half, (left, right, width), factor)
        bottom = min((block_row + 1) * block[0], rows)
        for top in range(block_row * block[0], bottom, DEPTH):
            depth = min(DEPTH, bottom - top)
            start = (expert * rows + top) * width + left
            pack(inputs, row_N, top, depth, half, packed)
            if ragged:
                copy_block(flat, start, width, depth, columns, codes)
            for strip in range(strips):
                column = strip * NARROW_STRIP
                for ahead in range(depth * strip // strips, depth * (strip + 1) // strips):
                    for line in range(0, columns, CACHE_LINE // weight.itemsize):
                        fetch_ahead(weight, start + (depth + ahead) * width + line)
                strip_view = (codes, column, CHUNK) if ragged else (flat, start + column, width)
                add_strip(count, depth, packed, strip_view, panel, (factor, column), sums)
    put_sums(count, sums, columns, out, to + left, width)


@compiled
def _activate(thread: int, threads: int, gate_up_FPW: Any, pieces: int, activated_PI: Any) -> None:
    """One thread's share of silu(gate) * up, whose pieces are added up."""
    pairs, intermediate = activated_PI.shape
    for place in range(thread, pairs, threads):
        first = 2 * place * intermediate
        for piece in range(1, pieces):
            other = first + 2 * piece * pairs * intermediate
            for j in range(2 * intermediate):
                gate_up_FPW[unsigned(first + j)] += gate_up_FPW[unsigned(other + j)]
        for j in range(intermediate):
            gate = gate_up_FPW[unsigned(first + j)]
            up = gate_up_FPW[unsigned(first + intermediate + j)]
            activated_PI[unsigned(place), unsigned(j)] = (
                gate / (np.float32(1) + exponential(-gate)) * up
            )


@compiled
def _add_up(
    thread: int,
    threads: int,
    product_FPH: Any,
    pieces: int,
    pair_P: Any,
    affinity_TK: Any,
    out_TH: Any,
) -> None:
    """One thread's columns of out[t] += affinity[t,k] * product of the pair t * K + k.

    A product's pieces are added up.
    """
    pairs = len(pair_P)
    chosen = affinity_TK.shape[1]
    width = out_TH.shape[1]
    left = width * thread // threads
    right = width * (thread + 1) // threads
    for place in range(pairs):
        token = pair_P[place] // chosen
        share = affinity_TK[token, pair_P[place] % chosen]
        for piece in range(pieces):
            first = (piece * pairs + place) * width
            for column in range(left, right):
                out_TH[unsigned(token), unsigned(column)] += (
                    share * product_FPH[unsigned(first + column)]
                )
