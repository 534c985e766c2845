"""Attention of a prompt's tokens, compiled by Numba: both products by tiles, a block of scores at a
time.

Shapes: S slots, T tokens, N query heads, D head_dim; R rows, each one head's query of a token. Keys
and values are flat; positions lie D numbers apart, and DEPTH of them are a block.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from neuron_minimax.kernels.cpu.decode_attention import exponentiate
from neuron_minimax.kernels.cpu.jit import (
    compiled,
    inlined,
    number_of,
    on_lines,
    run_in_team,
    take,
    unsigned,
)
from neuron_minimax.kernels.cpu.microkernels import DEPTH, NARROW_ROWS, NARROW_STRIP, add_tile
from neuron_minimax.kernels.cpu.packing import GROUP, expand_rows, pack, round_to_pairs, rows_of


@inlined
def attend_to_prompt(
    team: int,
    query_RD: Any,
    keys: Any,
    values: Any,
    cache: Any,
    positions_ST: Any,
    panels: Any,
    out_RD: Any,
) -> None:
    """out = softmax(query @ keys.T / sqrt(D)) @ values, each query's over positions up to its own;
    rows are [S,T,N].

    `cache`, keys and values are as for `attend_to_filled`, and a query whose position is not there
    attends to nothing. D is a multiple of NARROW_STRIP, and DEPTH at most. `panels` is of the dtype
    that is multiplied: float32, or int32 for pairs of bfloat16 numbers, to which the values'
    weights are rounded. `out` is zero before.
    """
    slots = len(positions_ST)
    key_heads, filled, slots_apart, heads_apart = cache
    size = query_RD.shape[1]
    rows = len(query_RD) // slots
    blocks = -(-filled // DEPTH)
    of_keys = on_lines(blocks * DEPTH * rows_of(size, panels), panels)
    of_values = on_lines(blocks * rows_of(DEPTH, panels) * size, panels)
    for slot in range(slots):
        visible_T = np.where(positions_ST[slot] < filled, positions_ST[slot] + 1, 0)
        query = query_RD[slot * rows : (slot + 1) * rows]
        out = out_RD[slot * rows : (slot + 1) * rows]
        for head in range(key_heads):
            taken = np.zeros(1, np.int64), np.zeros(1, np.int64)
            place = slot * slots_apart + head * heads_apart, visible_T.max(), size
            run_in_team(_expand, team, (place, keys, values, taken[0], of_keys, of_values))
            run_in_team(
                _attend,
                team,
                ((head, key_heads), query, of_keys, of_values, visible_T, taken[1], out),
            )


@compiled
def _expand(
    thread: int,
    threads: int,
    place: Any,
    keys: Any,
    values: Any,
    taken: Any,
    of_keys: Any,
    of_values: Any,
) -> None:
    """One thread's share of a key head's panels: a strip of keys is one of positions, a strip of
    values one of D.
    """
    start, filled, size = place
    key_area = rows_of(size, of_keys) * NARROW_STRIP
    value_area = rows_of(DEPTH, of_values) * NARROW_STRIP
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
            turn(block_keys[strip * NARROW_STRIP * size :], size, of_keys[to : to + key_area])
        for strip in range(size // NARROW_STRIP):
            to = (item * (size // NARROW_STRIP) + strip) * value_area
            of_strip = block_values, strip * NARROW_STRIP, size
            expand_rows(of_strip, rows_of(DEPTH, of_values), of_values[to : to + value_area])
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
def _attend(
    thread: int,
    threads: int,
    of_head: Any,
    query_RD: Any,
    of_keys: Any,
    of_values: Any,
    visible_T: Any,
    taken: Any,
    out_RD: Any,
) -> None:
    """One thread's share of a key head's queries: some tokens' at a time, block by block as in
    `attention_loops`.
    """
    head, key_heads = of_head
    tokens = len(visible_T)
    size = query_RD.shape[1]
    group = len(query_RD) // tokens // key_heads
    step = max(1, min(GROUP // group, -(-np.count_nonzero(visible_T) // threads)))
    packed = np.empty(step * group * DEPTH, of_keys.dtype)
    weights = np.empty(step * group * DEPTH, of_keys.dtype)
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
        for block in range(-(-visible_N.max() // DEPTH)):
            scores[:] = np.float32(0)
            of_block = of_keys[block * DEPTH * rows_of(size, of_keys) :]
            _add_tiles(rows, DEPTH, rows_of(size, of_keys), packed, of_block, scaling, scores)
            for n in range(rows):
                scores[
                    n * DEPTH + min(max(visible_N[n] - block * DEPTH, 0), DEPTH) : (n + 1) * DEPTH
                ] = -np.inf
            exponentiate(scores, DEPTH, size, largest_N, total_N, sums_ND)
            of_block = of_values[block * rows_of(DEPTH, of_keys) * size :]
            inputs = as_inputs(scores, weights)
            _add_tiles(rows, size, rows_of(DEPTH, of_keys), inputs, of_block, ones, sums_ND)
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
    tiles = -(-rows // NARROW_ROWS)
    apart = rows_of(DEPTH, panels)
    for strip in range(columns // NARROW_STRIP):
        panel = panels[strip * depth * NARROW_STRIP : (strip + 1) * depth * NARROW_STRIP]
        for tile in range(tiles):
            n = rows * tile // tiles
            height = rows * (tile + 1) // tiles - n
            of_sums = (sums, n * columns + strip * NARROW_STRIP, columns)
            add_tile(height, depth, (inputs, n * apart), panel, (factor, 0), of_sums)


def as_inputs(numbers: Any, words: Any) -> Any:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(as_inputs)
def _as_inputs_for(numbers, words):
    """Numbers as a tile takes them: themselves, or rounded to pairs of bfloat16."""

    def as_pairs(numbers, words):
        round_to_pairs((numbers, 0), len(numbers), (words, 0))
        return words

    return as_pairs if words.dtype == types.int32 else lambda numbers, words: numbers
