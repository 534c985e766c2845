"""The experts' products, straight from FP8 codes: each chosen expert is read once for up to 96 of
its tokens.

With one or two tokens that takes as long as reading memory, provided that rows, which lie further
apart than a page, are asked for ahead; with a dozen or more as long as the multiplications.

Shapes: R rows and W columns of a weight; P pairs of token and chosen expert, sorted by expert; X
groups of pairs, each of one expert; H hidden, I intermediate.
"""

from typing import Any

import numpy as np

from neuron_minimax.kernels.cpu.jit import (
    CACHE_LINE,
    compiled,
    exponential,
    fetch_ahead,
    inlined,
    on_lines,
    rebias,
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
from neuron_minimax.kernels.cpu.vectors import add_in_order

SHALLOW = (
    16  # rows of a weight that are read at a time for few pairs, LONE_DEPTH for one: whole rows
)
FEW_PAIRS = (
    2 * WIDE_ROWS
)  # up to so many a weight is read as it lies, in float32; more are faster with panels
PAIRS_PER_THREAD = 384  # of one pass, whose sums are kept between the two products,
PAIRS_PER_PASS = 2048  # but at most: 63 MB of the model's
ITEMS_PER_THREAD = 4  # so that none waits long for the others


@compiled
def sort_by_expert(expert_P: Any, experts: int) -> Any:
    """Pairs by expert, in their order otherwise, and where each expert's begin [E+1]; others' pairs
    are left out.
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
        parts = -(-count // GROUP)
        for part in range(parts):
            experts.append(expert)
            places.append(first_E[expert] + count * (part + 1) // parts)
    return np.array(experts, np.int64), np.array(places, np.int64)


@inlined
def add_expert_products(
    team: int,
    hidden_TH: Any,
    expert_TK: Any,
    affinity_TK: Any,
    of_gate_up: Any,
    of_down: Any,
    panels: Any,
    out_TH: Any,
) -> None:
    """out[t] += affinity[t,k] * MLP of the expert[t,k] (hidden[t]). `team` is the number of
    threads.

    Weights come with scales [E,.,.] and the size of blocks. `panels` is of the dtype that groups of
    many pairs are multiplied in: float32, or int32 for pairs of bfloat16 numbers, to which inputs
    are rounded, but weights are not.
    """
    gate_up = of_gate_up[0]
    (down, down_scale, _) = of_down
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
        pieces = min(-(-ITEMS_PER_THREAD * team // (end - group)), down_scale.shape[1])
        work = expert_X[group:end].copy(), place_X[group : end + 1] - first, panels, pieces
        size = pieces * (last - first) * max(gate_up.shape[2], down.shape[2])
        if size > len(scratch):
            scratch = np.empty(size, np.float32)
        activated_QI = np.empty((last - first, down.shape[1]), np.float32)
        taken = np.zeros(2, np.int64), np.zeros(2, np.int64)
        row_Q = pair_Q // chosen
        place_Q = np.arange(last - first)
        run_in_team(_multiply, team, (work, hidden_TH, row_Q, of_gate_up, 2, taken[0], scratch))
        run_in_team(_activate, team, (scratch, pieces, activated_QI))
        run_in_team(_multiply, team, (work, activated_QI, place_Q, of_down, 1, taken[1], scratch))
        run_in_team(_add_up, team, (scratch, pieces, pair_Q, affinity_TK, out_TH))
        group = end


@compiled
def _multiply(
    thread: int,
    threads: int,
    work: Any,
    inputs: Any,
    row_P: Any,
    of_weight: Any,
    parts: int,
    taken: Any,
    out_FPW: Any,
) -> None:
    """One thread's share of out[f,p] = inputs[row_P[p], rows of piece f] @ weight of the pair's
    expert; `out` is flat.

    Groups of many pairs are one piece, the first; the others are zero.

    `parts` weights lie side by side, each with block columns of its own. `taken` counts items of
    work.
    """
    expert_X, place_X, panels, pieces = work
    weight, scale, block = of_weight
    width = weight.shape[2]
    size = -(-scale.shape[1] // pieces)  # of a piece, in blocks
    chunks = -(-width // CHUNK)
    item = take(taken, 0)
    while item < len(expert_X) * chunks:
        group = item // chunks
        left = item % chunks * CHUNK
        count = place_X[group + 1] - place_X[group]
        if count > FEW_PAIRS:
            row_N = row_P[place_X[group] : place_X[group + 1]]
            to = place_X[group] * width
            where = expert_X[group], left, min(left + CHUNK, width), block, parts
            packed = np.empty(count * DEPTH, panels.dtype)
            panel = on_lines(DEPTH * NARROW_STRIP, panels)
            _multiply_many(inputs, row_N, weight, scale, where, packed, panel, out_FPW, to)
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
            where_few = (
                expert_X[group],
                piece * size,
                min((piece + 1) * size, scale.shape[1]),
                block,
                parts,
            )
            out_FPW[to : to + len(row_N) * width] = np.float32(0)
            _add_few(inputs, row_N, weight, scale, where_few, out_FPW, to)
        item = take(taken, 1)


@compiled
def _add_few(
    inputs: Any, row_N: Any, weight: Any, scale: Any, where: Any, out: Any, to: int
) -> None:
    """out += inputs[row_N] @ block rows of a weight, which is read once, row by row: at the speed
    of memory.
    """
    expert, first, last, block, parts = where
    rows, width = weight.shape[1:]
    count = len(row_N)
    flat = weight.reshape(-1)
    whole = width // WIDE_STRIP * WIDE_STRIP
    tiles = -(-count // WIDE_ROWS)
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
        factor_of_columns(
            scale, expert, block_row, block[1], parts, rebias(weight), 0, width, width, factor
        )
        edge_factor[: width - whole] = factor[whole:]
        bottom = min((block_row + 1) * block[0], rows)
        for top in range(block_row * block[0], bottom, shallow):
            depth = min(shallow, bottom - top)
            start = (expert * rows + top) * width
            pack(inputs, row_N, top, depth, rebias(weight), packed)
            for tile in range(tiles):
                n = count * tile // tiles
                height = count * (tile + 1) // tiles - n
                of_inputs = (packed, n * DEPTH)
                of_weight = (weight, start, width)
                of_sums = (sums, n * whole, whole)
                ahead = start if tile else start + depth * width
                add_wide_tiles(height, depth, whole, of_inputs, of_weight, ahead, of_sums)
            if whole < width:
                copy_block(flat, start + whole, width, depth, width - whole, edge)
                for left in range(0, width - whole, NARROW_STRIP):
                    add_strip(
                        count,
                        depth,
                        packed,
                        (edge, left, CHUNK),
                        left,
                        panel,
                        edge_factor,
                        edge_sums,
                    )
        for n in range(count):
            add_in_order((sums, n * whole), weight, whole, (factor, 0), (out, to + n * width))
    put_sums(count, edge_sums, width - whole, out, to + whole, width)


@compiled
def _multiply_many(
    inputs: Any,
    row_N: Any,
    weight: Any,
    scale: Any,
    where: Any,
    packed: Any,
    panel: Any,
    out: Any,
    to: int,
) -> None:
    """out = inputs[row_N] @ a chunk of a weight's columns, in the precision of the panel."""
    expert, left, right, block, parts = where
    rows, width = weight.shape[1:]
    count = len(row_N)
    columns = right - left
    flat = weight.reshape(-1)
    strips = -(-columns // NARROW_STRIP)
    ragged = columns % NARROW_STRIP + rows % 2 + block[0] % 2 > 0
    codes = np.zeros(DEPTH * CHUNK if ragged else 0, weight.dtype)
    factor = np.zeros(CHUNK, np.float32)
    sums = on_lines(strips * NARROW_STRIP * count, factor)
    sums[:] = np.float32(0)
    half = halves(weight, panel)
    for block_row in range(scale.shape[1]):
        factor_of_columns(
            scale, expert, block_row, block[1], parts, half, left, right, width, factor
        )
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
                of_strip = (codes, column, CHUNK) if ragged else (flat, start + column, width)
                add_strip(count, depth, packed, of_strip, column, panel, factor, sums)
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
    """One thread's columns of out[t] += affinity[t,k] * product of the pair t * K + k, whose pieces
    are added up.
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
