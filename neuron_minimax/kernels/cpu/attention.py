"""Attention over a cache: of one token in every slot (decode), and of a prompt's tokens (prefill).

Decode reads each key and value once for all query heads that share it. Prefill is flash attention
with online softmax (Dao et al. 2022, arXiv 2205.14135): both products by micro-kernels over packed
panels, DEPTH positions at a time.

Shapes: S slots, T tokens, K key heads, G query heads of each, N = K * G, D head_dim; R rows, each
one head's query of a token. Keys and values are flat; positions lie D numbers apart, and DEPTH of
them are a block. `stored` is (keys, values, how they lie): numbers in float32 or bfloat16's bits as
int16, and (key heads, how many positions of each are there, how many numbers slots lie apart, and
key heads).
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from neuron_minimax.kernels.cpu.jit import (
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
    DOT_ROWS,
    NARROW_ROWS,
    NARROW_STRIP,
    STREAMS,
    WIDE_ROWS,
    add_dots,
    add_tile,
    add_wide_tiles,
)
from neuron_minimax.kernels.cpu.packing import GROUP, expand_rows, pack, round_to_pairs, rows_of
from neuron_minimax.kernels.cpu.vectors import (
    LANES,
    add_in_order,
    largest_of,
    number_of,
    spread_inputs,
    sum_of,
)

AHEAD = 4096  # bytes; how far ahead keys are prefetched


@inlined
def attend_to_filled(
    team: int, query_SND: Any, stored: Any, positions_S: Any, out_SND: Any
) -> None:
    """out[s] += softmax(query[s] @ keys.T / sqrt(D)) @ values over positions up to positions[s].

    A slot whose position is not there attends to nothing. D is a multiple of WIDE_STRIP. `team` is
    the number of threads.
    """
    taken = np.zeros(1, np.int64)
    run_in_team(_decode, team, (query_SND, stored, positions_S, taken, out_SND))


@compiled
def _decode(
    thread: int,
    threads: int,
    query_SND: Any,
    stored: Any,
    positions_S: Any,
    taken: Any,
    out_SND: Any,
) -> None:
    """One thread's share: online softmax, DEPTH positions at a time."""
    slots, heads, size = query_SND.shape
    keys, values, (key_heads, filled, slots_apart, heads_apart) = stored
    group = heads // key_heads
    scaling = np.float32(1 / np.sqrt(size))
    factor = np.empty(size, np.float32)
    query_GD = np.empty(group * size, np.float32)
    scores = np.empty(group * DEPTH, np.float32)
    largest_G = np.empty(group, np.float32)
    total_G = np.empty(group, np.float32)
    sums_GD = np.empty(group * size, np.float32)
    item = take(taken, 0)
    while item < slots * key_heads:
        slot = item // key_heads
        start = item // key_heads * slots_apart + item % key_heads * heads_apart
        count = positions_S[slot] + 1 if positions_S[slot] < filled else 0
        query = item * group * size
        for g in range(group):
            spread_inputs((query_SND, query + g * size), keys, size, (query_GD, g * size))
        largest_G[:] = np.float32(-np.inf)
        total_G[:] = np.float32(0)
        sums_GD[:] = np.float32(0)
        for first in range(0, count, DEPTH):
            depth = min(DEPTH, count - first)
            place = start + first * size
            keys_view = (keys, place, size)
            _score((query_SND, query), query_GD, keys_view, depth, scaling, scores)
            exponentiate(scores, depth, size, largest_G, total_G, sums_GD)
            tiles = ceil_div(group, WIDE_ROWS)
            for tile in range(tiles):
                g = group * tile // tiles
                height = group * (tile + 1) // tiles - g
                scores_view = (scores, g * DEPTH)
                values_view = (values, place, size)
                sums_view = (sums_GD, g * size, size)
                ahead = place + DEPTH * size
                add_wide_tiles(height, depth, size, scores_view, values_view, ahead, sums_view)
        for g in range(group if count > 0 else 0):
            factor[:] = np.float32(1) / total_G[g]
            add_in_order(
                (sums_GD, g * size), values, size, (factor, 0), (out_SND, query + g * size)
            )
        item = take(taken, 0)


@compiled
def _score(
    query_view: Any, query_GD: Any, keys_view: Any, depth: int, scaling: float, scores: Any
) -> None:
    """scores[g] = scaling * products with `depth` keys, -inf behind them; rows DEPTH apart.

    `query_view` is the query (array, first) as it lies, `query_GD` spread as the keys are.
    """
    query_SND, query = query_view
    keys, place, size = keys_view
    group = len(query_GD) // size
    tiles = ceil_div(group, DOT_ROWS)
    whole = depth // STREAMS * STREAMS
    scores[:] = np.float32(-np.inf)
    for g in range(group):
        scores[g * DEPTH : g * DEPTH + depth] = np.float32(0)
    for key in range(0, whole, STREAMS):
        for tile in range(tiles):
            g = group * tile // tiles
            height = group * (tile + 1) // tiles - g
            first = place + key * size
            ahead = first if tile else first + AHEAD // keys.itemsize
            inputs_view = (query_GD, g * size, size)
            rows_view = (keys, first, size)
            sums_view = (scores, g * DEPTH + key, DEPTH)
            add_dots(height, STREAMS, size, inputs_view, rows_view, ahead, scaling, sums_view)
    flat = query_SND.reshape(-1)
    for key in range(whole, depth):
        for g in range(group):
            total = np.float32(0)
            for d in range(size):
                total += flat[unsigned(query + g * size + d)] * number_of(
                    keys[unsigned(place + key * size + d)]
                )
            scores[g * DEPTH + key] = scaling * total


@compiled
def exponentiate(
    scores: Any, depth: int, size: int, largest_G: Any, total_G: Any, sums_GD: Any
) -> None:
    """scores[g] = e^(score - the largest so far), to which earlier sums are brought down.

    Up to the end of a register more scores are read than `depth`: of what is not to be seen, -inf.
    """
    whole = ceil_div(depth, LANES) * LANES
    for g in range(len(largest_G)):
        first = g * DEPTH
        largest = max(largest_G[g], largest_of((scores, first), whole))
        shrink = exponential(largest_G[g] - largest)
        largest_G[g] = largest
        for d in range(g * size, (g + 1) * size):
            sums_GD[unsigned(d)] *= shrink
        for place in range(first, first + whole):
            scores[unsigned(place)] = exponential(scores[unsigned(place)] - largest)
        total_G[g] = total_G[g] * shrink + sum_of((scores, first), whole)


@inlined
def attend_to_prompt(
    team: int, query_RD: Any, stored: Any, positions_ST: Any, panels: Any, out_RD: Any
) -> None:
    """out = softmax(query @ keys.T / sqrt(D)) @ values, each query's over positions up to its own.

    Rows are [S,T,N]; a query whose position is not there attends to nothing. D is a multiple of
    NARROW_STRIP, and DEPTH at most. `panels` is of the dtype that is multiplied: float32, or int32
    for pairs of bfloat16 numbers, to which the values' weights are rounded. `out` is zero before.
    """
    slots = len(positions_ST)
    keys, values, (key_heads, filled, slots_apart, heads_apart) = stored
    size = query_RD.shape[1]
    rows = len(query_RD) // slots
    blocks = ceil_div(filled, DEPTH)
    key_panels = on_lines(blocks * DEPTH * rows_of(size, panels), panels)
    value_panels = on_lines(blocks * rows_of(DEPTH, panels) * size, panels)
    for slot in range(slots):
        visible_T = np.where(positions_ST[slot] < filled, positions_ST[slot] + 1, 0)
        query = query_RD[slot * rows : (slot + 1) * rows]
        out = out_RD[slot * rows : (slot + 1) * rows]
        for head in range(key_heads):
            taken = np.zeros(1, np.int64), np.zeros(1, np.int64)
            place = slot * slots_apart + head * heads_apart, visible_T.max(), size
            arguments = (place, (keys, values), taken[0], key_panels, value_panels)
            run_in_team(_expand, team, arguments)
            head_view = (head, key_heads, visible_T)
            made = (key_panels, value_panels)
            run_in_team(_prefill, team, (head_view, query, made, taken[1], out))


@compiled
def _expand(
    thread: int,
    threads: int,
    place: Any,
    numbers: Any,
    taken: Any,
    key_panels: Any,
    value_panels: Any,
) -> None:
    """One thread's share of a key head's panels: strips of positions for keys, of D for values."""
    start, filled, size = place
    keys, values = numbers
    key_area = rows_of(size, key_panels) * NARROW_STRIP
    value_area = rows_of(DEPTH, value_panels) * NARROW_STRIP
    block_keys = np.zeros(DEPTH * size, keys.dtype)
    block_values = np.zeros(DEPTH * size, values.dtype)
    item = take(taken, 0)
    while item * DEPTH < filled:
        first = start + item * DEPTH * size
        last = start + min((item + 1) * DEPTH, filled) * size
        # A block of their own: what lies behind the last position may be no number, and is
        # multiplied by zero.
        block_keys[: last - first] = keys[first:last]
        block_values[: last - first] = values[first:last]
        for strip in range(DEPTH // NARROW_STRIP):
            to = (item * (DEPTH // NARROW_STRIP) + strip) * key_area
            turn(block_keys[strip * NARROW_STRIP * size :], size, key_panels[to : to + key_area])
        for strip in range(size // NARROW_STRIP):
            to = (item * (size // NARROW_STRIP) + strip) * value_area
            strip_view = (block_values, strip * NARROW_STRIP, size)
            depth = rows_of(DEPTH, value_panels)
            expand_rows(strip_view, depth, value_panels[to : to + value_area])
        item = take(taken, 0)


def turn(keys: Any, size: int, panel: Any) -> None:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(turn)
def _turn_for(keys, size, panel):
    """A panel of NARROW_STRIP keys as columns."""

    def turn_pairs(keys, size, panel):
        words = keys.view(np.int32)
        for k in range(size // 2):
            for j in range(NARROW_STRIP):
                panel[unsigned(k * NARROW_STRIP + j)] = words[unsigned(j * (size // 2) + k)]

    def turn_numbers(keys, size, panel):
        for k in range(size):
            for j in range(NARROW_STRIP):
                panel[unsigned(k * NARROW_STRIP + j)] = number_of(keys[unsigned(j * size + k)])

    return turn_pairs if panel.dtype == types.int32 else turn_numbers


@compiled
def _prefill(
    thread: int, threads: int, head_view: Any, query_RD: Any, panels: Any, taken: Any, out_RD: Any
) -> None:
    """One thread's share of a key head's queries, some tokens' at a time: online softmax."""
    head, key_heads, visible_T = head_view
    key_panels, value_panels = panels
    tokens = len(visible_T)
    size = query_RD.shape[1]
    group = len(query_RD) // tokens // key_heads
    step = max(1, min(GROUP // group, ceil_div(np.count_nonzero(visible_T), threads)))
    packed = np.empty(step * group * DEPTH, key_panels.dtype)
    weights = np.empty(step * group * DEPTH, key_panels.dtype)
    scores = on_lines(step * group * DEPTH, query_RD)
    scaling = np.full(NARROW_STRIP, 1 / np.sqrt(size), np.float32)
    ones = np.ones(NARROW_STRIP, np.float32)
    item = take(taken, 0)
    while item * step < tokens:
        first = item * step
        rows = min(step, tokens - first) * group
        row_N = np.empty(rows, np.int64)
        visible_N = np.empty(rows, np.int64)
        for n in range(rows):
            row_N[n] = ((first + n // group) * key_heads + head) * group + n % group
            visible_N[n] = visible_T[first + n // group]
        pack(query_RD, row_N, 0, size, np.float32(1), packed)
        largest_N = np.full(rows, -np.inf, np.float32)
        total_N = np.zeros(rows, np.float32)
        sums_ND = np.zeros(rows * size, np.float32)
        for block in range(ceil_div(visible_N.max(), DEPTH)):
            scores[:] = np.float32(0)
            depth = rows_of(size, key_panels)
            block_panels = key_panels[block * DEPTH * depth :]
            _add_tiles(rows, DEPTH, depth, packed, block_panels, scaling, scores)
            for n in range(rows):
                seen = min(max(visible_N[n] - block * DEPTH, 0), DEPTH)
                scores[n * DEPTH + seen : (n + 1) * DEPTH] = -np.inf
            exponentiate(scores, DEPTH, size, largest_N, total_N, sums_ND)
            depth = rows_of(DEPTH, value_panels)
            block_panels = value_panels[block * depth * size :]
            inputs = as_inputs(scores, weights)
            _add_tiles(rows, size, depth, inputs, block_panels, ones, sums_ND)
        for n in range(rows):
            for d in range(size if visible_N[n] else 0):
                out_RD[unsigned(row_N[n]), unsigned(d)] = (
                    sums_ND[unsigned(n * size + d)] / total_N[n]
                )
        item = take(taken, 0)


@compiled
def _add_tiles(
    rows: int, columns: int, depth: int, inputs: Any, panels: Any, factor: Any, sums: Any
) -> None:
    """sums [rows, columns] += factor * (inputs @ panels), a strip of columns after the other."""
    tiles = ceil_div(rows, NARROW_ROWS)
    apart = rows_of(DEPTH, panels)
    for strip in range(columns // NARROW_STRIP):
        panel = panels[strip * depth * NARROW_STRIP : (strip + 1) * depth * NARROW_STRIP]
        for tile in range(tiles):
            n = rows * tile // tiles
            height = rows * (tile + 1) // tiles - n
            sums_view = (sums, n * columns + strip * NARROW_STRIP, columns)
            add_tile(height, depth, (inputs, n * apart), panel, (factor, 0), sums_view)


def as_inputs(numbers: Any, words: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(as_inputs)
def _as_inputs_for(numbers, words):
    """Numbers as a tile takes them: themselves, or rounded to pairs of bfloat16."""

    def as_pairs(numbers, words):
        round_to_pairs((numbers, 0), len(numbers), (words, 0))
        return words

    return as_pairs if words.dtype == types.int32 else lambda numbers, words: numbers
