"""A linear layer's loops, compiled by Numba: products of few rows at the speed of memory, and expansion for a library.

Shapes: N rows of input, O output and I input features; R rows and W columns of a stored weight.
"""

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from neuron_minimax.kernels.codes import (
    CACHE_LINE,
    COLUMNS,
    ELEMENTWISE,
    REBIAS,
    SUMS,
    as_bits,
    compiled,
    fetch_ahead,
    number_of,
    rebias,
    scale_of_columns,
    unsigned,
)
from neuron_minimax.kernels.team import run_in_team

LINEAR_ROWS = 128  # of a weight that a thread takes at a time
ROWS_AHEAD = 8  # are asked for while one is expanded


@compiled()
def linear(team: int, hidden_NI: Any, weight_OI: Any, scale: Any, block: Any, out_NO: Any) -> None:
    """out += hidden @ weight.T in float32, for FP8 codes, or for a dense weight: float32, or bfloat16's bits as int16.

    A dense weight takes one scale of 1 for all. `team` is the number of threads.
    """
    run_in_team(_linear, team, (hidden_NI, weight_OI, scale, block, out_NO))


@compiled()
def _linear(thread: int, threads: int, hidden_NI: Any, weight_OI: Any, scale: Any, block: Any, out_NO: Any) -> None:
    """One thread's share. Four rows that are far apart are read at a time: four long streams."""
    rows, features = hidden_NI.shape
    outputs = weight_OI.shape[0]
    height = min(block[0], LINEAR_ROWS)
    per_block = -(-block[0] // height)
    line = CACHE_LINE // weight_OI.itemsize
    for item in range(thread, -(-outputs // block[0]) * per_block, threads):
        first = item // per_block * block[0] + item % per_block * height
        last = min(first + height, item // per_block * block[0] + block[0], outputs)
        apart = max(last - first, 0) // 4
        scaled_NI = hidden_NI * (scale_of_columns(scale[first // block[0]], features, block[1], 1) * rebias(weight_OI))
        for row in range(first, first + apart):
            for left in range(0, features, COLUMNS):
                columns = unsigned(left), unsigned(min(left + COLUMNS, features))
                for stream in range(4):
                    for column in range(left, min(left + COLUMNS, features), line):
                        fetch_ahead(weight_OI, (row + 1 + stream * apart) * features + column)
                for n in range(0, rows - 3, 4):
                    for stream in range(0, 4, 2):
                        _add_products_of_four(scaled_NI, n, weight_OI, row + stream * apart, apart, columns, out_NO)
                for n in range(rows // 4 * 4, rows):
                    _add_products(scaled_NI, n, weight_OI, row, apart, columns, out_NO)
        for row in range(first + 4 * apart, last):
            for n in range(rows):
                for column in range(features):
                    out_NO[n, row] += scaled_NI[n, column] * number_of(weight_OI[row, column])


@compiled(SUMS)
def _add_products(inputs: Any, n: int, weight: Any, row: int, apart: int, columns: Any, out: Any) -> None:
    """out += one row of input with four rows of a weight, over these columns."""
    n_, one, two = unsigned(n), unsigned(row), unsigned(row + apart)
    three, four = unsigned(row + 2 * apart), unsigned(row + 3 * apart)
    sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
    for i in range(columns[0], columns[1]):
        sum_0 += inputs[n_, i] * number_of(weight[one, i])
        sum_1 += inputs[n_, i] * number_of(weight[two, i])
        sum_2 += inputs[n_, i] * number_of(weight[three, i])
        sum_3 += inputs[n_, i] * number_of(weight[four, i])
    out[n, row] += sum_0
    out[n, row + apart] += sum_1
    out[n, row + 2 * apart] += sum_2
    out[n, row + 3 * apart] += sum_3


@compiled(SUMS)
def _add_products_of_four(inputs: Any, n: int, weight: Any, row: int, apart: int, columns: Any, out: Any) -> None:
    """out += four rows of input with two rows of a weight, over these columns."""
    n_0, n_1, n_2, n_3 = unsigned(n), unsigned(n + 1), unsigned(n + 2), unsigned(n + 3)
    one, two = unsigned(row), unsigned(row + apart)
    sum_0 = sum_1 = sum_2 = sum_3 = np.float32(0)
    other_0 = other_1 = other_2 = other_3 = np.float32(0)
    for i in range(columns[0], columns[1]):
        value, other = number_of(weight[one, i]), number_of(weight[two, i])
        sum_0 += inputs[n_0, i] * value
        sum_1 += inputs[n_1, i] * value
        sum_2 += inputs[n_2, i] * value
        sum_3 += inputs[n_3, i] * value
        other_0 += inputs[n_0, i] * other
        other_1 += inputs[n_1, i] * other
        other_2 += inputs[n_2, i] * other
        other_3 += inputs[n_3, i] * other
    out[n, row] += sum_0
    out[n + 1, row] += sum_1
    out[n + 2, row] += sum_2
    out[n + 3, row] += sum_3
    out[n, row + apart] += other_0
    out[n + 1, row + apart] += other_1
    out[n + 2, row + apart] += other_2
    out[n + 3, row + apart] += other_3


@compiled()
def expand(team: int, codes_RW: Any, scale: Any, block: Any, parts: int, out_RW: Any) -> None:
    """out [R,W] = codes times block scales; the first row begins a block. `team` is the number of threads.

    `out` is float32, or int16 for the bits of bfloat16, to which is rounded to nearest, ties to even.
    """
    run_in_team(_expand, team, (codes_RW, scale, block, parts, out_RW))


@compiled()
def _expand(thread: int, threads: int, codes_RW: Any, scale: Any, block: Any, parts: int, out_RW: Any) -> None:
    rows, width = codes_RW.shape
    for row_block in range(thread, scale.shape[0], threads):
        factor_W = scale_of_columns(scale[row_block], width, block[1], parts)
        for row in range(row_block * block[0], min((row_block + 1) * block[0], rows)):
            for column in range(0, width, CACHE_LINE):
                fetch_ahead(codes_RW, (row + ROWS_AHEAD) * width + column)
            _expand_row(codes_RW[row], factor_W, out_RW[row])


def _expand_row(codes_W: Any, factor_W: Any, out_W: Any) -> None:
    raise NotImplementedError("runs inside of compiled loops only")


@overload(_expand_row, jit_options={"fastmath": ELEMENTWISE})
def _expand_row_to(codes_W: Any, factor_W: Any, out_W: Any) -> Any:
    def to_float32(codes_W: Any, factor_W: Any, out_W: Any) -> None:
        for j in range(len(out_W)):
            out_W[j] = number_of(codes_W[j]) * REBIAS * factor_W[j]

    def to_bfloat16(codes_W: Any, factor_W: Any, out_W: Any) -> None:
        for j in range(len(out_W)):
            bits = as_bits(number_of(codes_W[j]) * REBIAS * factor_W[j])
            odd = (bits >> np.int32(16)) & np.int32(1)
            out_W[j] = np.int16((bits + np.int32(0x7FFF) + odd) >> np.int32(16))

    return to_float32 if out_W.dtype == types.float32 else to_bfloat16
