"""The experts' loops over FP8 codes, compiled by Numba: each chosen expert is read once, at the speed of memory.

An expert's weight lies row by input row, so sums over a column jump from page to page, where no processor fetches ahead
by itself, nor can a compiler of graphs be asked to. Here rows are read in their order and the next ones are asked for
meanwhile: 30 GB/s of codes where the same sums by Inductor get 12 to 17 (2 cores that read 31 GB/s).

Shapes: R rows and W columns of a weight; P pairs of token and chosen expert, sorted by expert; X groups of
pairs, each of one expert; H hidden, I intermediate.
"""

from typing import Any

import numpy as np

from neuron_minimax.kernels.codes import (
    CACHE_LINE,
    COLUMNS,
    REBIAS,
    compiled,
    fetch_ahead,
    number_of,
    scale_of_columns,
    unsigned,
)
from neuron_minimax.kernels.team import run_in_team

ROWS = 8  # of a weight that are added to the running sums at a time


@compiled()
def sort_by_expert(expert_P: Any, experts: int) -> Any:
    """Pairs by expert, in their order otherwise, and where each expert's begin [E+1]; others' pairs are left out."""
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


@compiled()
def groups_below(first_E: Any, limit: int, size: int) -> Any:
    """(expert, first place, place after the last) [X,3]: groups of at most `size` pairs, of experts with < `limit`."""
    groups = []
    for expert in range(len(first_E) - 1):
        begin, end = first_E[expert], first_E[expert + 1]
        if end - begin < limit:
            for first in range(begin, end, size):
                groups.append((expert, first, min(first + size, end)))
    groups_X3 = np.empty((len(groups), 3), np.int64)
    for number, group in enumerate(groups):
        groups_X3[number, 0], groups_X3[number, 1], groups_X3[number, 2] = group
    return groups_X3


@compiled()
def add_expert_products(
    team: int,
    hidden_TH: Any,
    pair_P: Any,
    groups_X3: Any,
    affinity_TK: Any,
    gate_up: Any,
    gate_up_scale: Any,
    down: Any,
    down_scale: Any,
    block: Any,
    pieces: int,
    out_TH: Any,
) -> None:
    """out[t] += affinity[t,k] * MLP of the pair's expert (hidden[t]), for the pairs t * K + k of the groups.

    `team` is the number of threads; the rows of each weight are cut into `pieces` that run side by side.
    """
    groups, chosen = len(groups_X3), affinity_TK.shape[1]
    place_X = np.zeros(groups + 1, np.int64)  # where a group's pairs begin among those of all groups
    place_X[1:] = (groups_X3[:, 2] - groups_X3[:, 1]).cumsum()
    pairs = place_X[groups]
    pair_Q = np.empty(pairs, np.int64)  # the groups' own
    for group in range(groups):
        pair_Q[place_X[group] : place_X[group + 1]] = pair_P[groups_X3[group, 1] : groups_X3[group, 2]]
    work = groups_X3[:, 0].copy(), place_X, block, pieces
    gate_up_FPW = np.zeros((pieces, pairs, gate_up.shape[2]), np.float32)
    activated_PI = np.empty((pairs, down.shape[1]), np.float32)
    product_FPH = np.zeros((pieces, pairs, gate_up.shape[1]), np.float32)
    run_in_team(
        _add_products, team, (work, hidden_TH * REBIAS, pair_Q // chosen, gate_up, gate_up_scale, 2, gate_up_FPW)
    )
    run_in_team(_activate, team, (gate_up_FPW, activated_PI))
    run_in_team(_add_products, team, (work, activated_PI, np.arange(pairs), down, down_scale, 1, product_FPH))
    for place, pair in enumerate(pair_Q):
        share = affinity_TK[pair // chosen, pair % chosen]
        out_TH[pair // chosen] += share * product_FPH[:, place].sum(axis=0)


@compiled()
def _add_products(
    thread: int, threads: int, work: Any, inputs: Any, row_P: Any, weight: Any, scale: Any, parts: int, sums_FPW: Any
) -> None:
    """One thread's share of sums[f,p] += inputs[row_P[p], rows of piece f] @ weight of the pair's expert."""
    expert_X, place_X, block, pieces = work
    rows = weight.shape[1]
    size = -(-rows // (pieces * block[0])) * block[0]  # of a piece: whole blocks
    for item in range(thread, len(expert_X) * pieces, threads):
        group, piece = item // pieces, item % pieces
        places = slice(place_X[group], place_X[group + 1])
        codes, scales = weight[expert_X[group]], scale[expert_X[group]]
        first, last = piece * size, min(piece * size + size, rows)
        _add_product(inputs, row_P[places], codes, scales, block, parts, first, last, sums_FPW[piece, places])


@compiled()
def _activate(thread: int, threads: int, gate_up_FPW: Any, activated_PI: Any) -> None:
    """One thread's share of silu(gate) * up, times HALF_REBIAS."""
    intermediate = activated_PI.shape[1]
    for place in range(thread, len(activated_PI), threads):
        sums_W = gate_up_FPW[:, place].sum(axis=0)
        gate = sums_W[:intermediate]
        activated_PI[place] = gate / (1 + np.exp(-gate)) * sums_W[intermediate:] * REBIAS


@compiled()
def _add_rows(inputs: Any, n: int, codes: Any, row: int, columns: Any, sums: Any, to: int) -> None:
    """sums[to] += inputs[n] @ codes over ROWS rows, a number known when this is compiled, so that no loop is left."""
    n_, row_, to_ = unsigned(n), unsigned(row), unsigned(to)
    for j in range(columns[0], columns[1]):
        total = np.float32(0)
        for q in range(ROWS):
            q_ = row_ + unsigned(q)
            total += inputs[n_, q_] * number_of(codes[q_, j])
        sums[to_, j] += total


@compiled()
def _add_rows_for_two(inputs: Any, n: int, m: int, codes: Any, row: int, columns: Any, sums: Any, to: int) -> None:
    """The same for sums[to] and sums[to + 1], which share the expansion of codes: 1.45 times the sums per second."""
    n_, m_, row_, to_n, to_m = unsigned(n), unsigned(m), unsigned(row), unsigned(to), unsigned(to + 1)
    for j in range(columns[0], columns[1]):
        total, other = np.float32(0), np.float32(0)
        for q in range(ROWS):
            q_ = row_ + unsigned(q)
            value = number_of(codes[q_, j])
            total += inputs[n_, q_] * value
            other += inputs[m_, q_] * value
        sums[to_n, j] += total
        sums[to_m, j] += other


@compiled()
def _add_product(
    inputs: Any, row_N: Any, codes_RW: Any, scale: Any, block: Any, parts: int, first: int, last: int, sums_NW: Any
) -> None:
    """sums_NW += inputs[row_N, first:last] @ weight[first:last]; of 2^-120 that codes lack, inputs bring one half.

    `first` begins a block. `parts` weights lie side by side, each with block columns of its own.
    """
    width = codes_RW.shape[1]
    count = len(row_N)
    block_NW = np.empty((count, width), np.float32)
    for top in range(first, last, block[0]):
        bottom = min(top + block[0], last)
        block_NW[:] = 0
        whole = top + (bottom - top) // ROWS * ROWS
        for row in range(top, whole, ROWS):
            for left in range(0, width, COLUMNS):
                columns = unsigned(left), unsigned(min(left + COLUMNS, width))
                for ahead in range(row + ROWS, row + 2 * ROWS):
                    for column in range(left, min(left + COLUMNS, width), CACHE_LINE):
                        fetch_ahead(codes_RW, ahead * width + column)
                for n in range(0, count - 1, 2):
                    _add_rows_for_two(inputs, row_N[n], row_N[n + 1], codes_RW, row, columns, block_NW, n)
                if count % 2:
                    _add_rows(inputs, row_N[count - 1], codes_RW, row, columns, block_NW, count - 1)
        for row in range(whole, bottom):
            for n in range(count):
                for j in range(width):
                    block_NW[n, j] += inputs[row_N[n], row] * number_of(codes_RW[row, j])
        factor_W = scale_of_columns(scale[top // block[0]], width, block[1], parts)
        for n in range(count):
            _add_scaled(block_NW[n], factor_W, sums_NW[n])


@compiled()
def _add_scaled(products_W: Any, factor_W: Any, sums_W: Any) -> None:
    for j in range(len(sums_W)):
        sums_W[j] += products_W[j] * factor_W[j]
