"""Attention of one token in every slot, compiled by Numba: each key and value is read once for all
heads that share it.

Shapes: S slots, K key heads, G query heads of each, N = K * G, D head_dim. Keys and values are
flat; positions lie D numbers apart.
"""

from typing import Any

import numpy as np

from neuron_minimax.kernels.cpu.jit import (
    compiled,
    exponential,
    inlined,
    largest_of,
    number_of,
    run_in_team,
    sum_of,
    take,
    unsigned,
)
from neuron_minimax.kernels.cpu.microkernels import (
    DEPTH,
    DOT_ROWS,
    STREAMS,
    WIDE_ROWS,
    add_dots,
    add_wide_tiles,
)
from neuron_minimax.kernels.cpu.vectors import LANES, add_in_order, spread_inputs

AHEAD = 4096  # bytes; how far ahead keys are asked for


@inlined
def attend_to_filled(
    team: int, query_SND: Any, keys: Any, values: Any, cache: Any, positions_S: Any, out_SND: Any
) -> None:
    """out[s] += softmax(query[s] @ keys.T / sqrt(D)) @ values over positions up to positions[s] of
    every slot.

    `cache` is (key heads, how many positions of each are there, how many numbers slots lie apart,
    and key heads); a slot whose position is not there attends to nothing. Keys and values are
    float32, or bfloat16's bits as int16. D is a multiple of WIDE_STRIP. `team` is the number of
    threads.
    """
    taken = np.zeros(1, np.int64)
    run_in_team(_attend, team, (query_SND, keys, values, cache, positions_S, taken, out_SND))


@compiled
def _attend(
    thread: int,
    threads: int,
    query_SND: Any,
    keys: Any,
    values: Any,
    cache: Any,
    positions_S: Any,
    taken: Any,
    out_SND: Any,
) -> None:
    """One thread's share: DEPTH positions after the other, whose exponentials are relative to the
    largest score so far.

    When a larger one comes, what was summed up before is brought down to it.
    """
    slots, heads, size = query_SND.shape
    key_heads, filled, slots_apart, heads_apart = cache
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
            _score(query_SND, query, query_GD, keys, place, size, depth, scaling, scores)
            exponentiate(scores, depth, size, largest_G, total_G, sums_GD)
            tiles = -(-group // WIDE_ROWS)
            for tile in range(tiles):
                g = group * tile // tiles
                height = group * (tile + 1) // tiles - g
                of_values = (values, place, size)
                of_sums = (sums_GD, g * size, size)
                ahead = place + DEPTH * size
                add_wide_tiles(height, depth, size, (scores, g * DEPTH), of_values, ahead, of_sums)
        for g in range(group if count > 0 else 0):
            factor[:] = np.float32(1) / total_G[g]
            add_in_order(
                (sums_GD, g * size), values, size, (factor, 0), (out_SND, query + g * size)
            )
        item = take(taken, 0)


@compiled
def _score(
    query_SND: Any,
    query: int,
    query_GD: Any,
    keys: Any,
    place: int,
    size: int,
    depth: int,
    scaling: float,
    scores: Any,
) -> None:
    """scores[g] = scaling * products with `depth` keys, -inf behind them; each head's are DEPTH
    from the last.
    """
    group = len(query_GD) // size
    tiles = -(-group // DOT_ROWS)
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
            of_keys = (keys, first, size)
            of_scores = (scores, g * DEPTH + key, DEPTH)
            add_dots(
                height,
                STREAMS,
                size,
                (query_GD, g * size, size),
                of_keys,
                ahead,
                scaling,
                of_scores,
            )
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
    """scores[g] = e^(score - the largest so far), to which what was summed up before is brought
    down.

    Up to the end of a register more scores are read than `depth`: of what is not to be seen, -inf.
    """
    whole = -(-depth // LANES) * LANES
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
