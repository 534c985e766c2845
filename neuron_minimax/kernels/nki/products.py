"""The products of the expert kernel, with the scales where their layout lets them be applied.

Shapes: T tokens, E experts, H hidden, I intermediate, P 128 partitions; R rows and C columns of a
weight.
"""

import nki.isa as nisa
import nki.language as nl

from neuron_minimax.kernels.nki.loads import ceil_div, load_codes, row_size, spans
from neuron_minimax.kernels.nki.memory import (
    INSTRUCTION_CYCLES,
    PARTITIONS,
    PSUM_BANK,
    ROWS_PER_LOAD,
)

# From here on the scalar engine applies the scales, a block at a time, and the vector engine adds
SCALAR_ENGINE_TOKENS = 24


def block_scaled_product(moving, weight, scales, expert, buffers, tiles):
    """`moving` [P, R/128, T] times one expert's codes [E,R,C] and scales [P, R/128 * tiles]: [P,
    tiles, T] float32, the columns of each of `tiles` on partitions.

    `buffers` are the ring of codes, and how many of its loads are made already.
    """
    ring, loaded = buffers
    row_blocks = moving.shape[1]
    tokens = moving.shape[2]
    out = nl.ndarray((PARTITIONS, len(tiles), tokens), dtype=nl.float32, buffer=nl.sbuf)
    for load in range(ceil_div(row_blocks, ROWS_PER_LOAD)):
        first = load * ROWS_PER_LOAD
        codes = ring[load % len(ring)]
        if load >= loaded:
            load_codes(codes, weight, expert, first, nisa.oob_mode.error)
        blocks = []
        for row in range(min(ROWS_PER_LOAD, row_blocks - first)):
            stationary = codes[:, row, :]
            if moving.dtype == nl.float32:
                stationary = widened(stationary)
            blocks.append(stationary)
        for place, count, columns in groups_of(tiles, PSUM_BANK // tokens):
            at_once = rows_at_once(count, tokens)
            for row in range(0, len(blocks), at_once):
                height = min(at_once, len(blocks) - row)
                shape = (columns, height, count, tokens)
                partial = nl.ndarray(shape, dtype=nl.float32, buffer=nl.psum)
                for step in range(height * count):
                    below = step // count
                    start = tiles[place + step % count][0]
                    nisa.nc_matmul(
                        dst=partial[:, below, step % count, :],
                        stationary=blocks[row + below][:, start : start + columns],
                        moving=moving[:, first + row + below, :],
                        accumulate=False,
                    )
                add_scaled(
                    out[0:columns, place : place + count, :],
                    partial,
                    scales,
                    ((first + row) * len(tiles) + place, len(tiles)),
                    first + row == 0,
                )
    return out


def rows_at_once(count, tokens):
    """Rows of blocks whose partial sums of `count` tiles are scaled together, as many as lie in one
    bank: one where those of a row alone are work enough for an instruction.
    """
    elements = count * tokens
    if elements >= INSTRUCTION_CYCLES:
        return 1
    return PSUM_BANK // elements


def groups_of(tiles, most):
    """Neighbours of `tiles` that are equally wide, at most so many at once: (first, number,
    columns).
    """
    found = []  # type: ignore[var-annotated]  # NKI traces no annotations
    for place in range(len(tiles)):
        columns = tiles[place][1]
        if len(found) > 0 and found[-1][2] == columns and found[-1][1] < most:
            found[-1] = (found[-1][0], found[-1][1] + 1, columns)
        else:
            found.append((place, 1, columns))
    return found


def widened(blocks):
    """One row of blocks [P, columns] as float32: the tensor engine takes float32 only on both
    sides.
    """
    wide = nl.ndarray(blocks.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=wide, src=blocks)
    return wide


def add_scaled(out, partial, scale_tile, place, is_first):
    """out [columns, tiles, T] (+)= the sum over rows of partial [columns, rows, tiles, T] * scales,
    in float32; `place` is the first scale, and how far the next row's is from it.
    """
    summed = out
    if not is_first:
        summed = nl.ndarray(out.shape, dtype=nl.float32, buffer=nl.sbuf)
    if partial.shape[1] == 1:
        scale_row(summed, partial[:, 0, :, :], scale_tile, place[0])
    else:
        scale_rows(summed, partial, scale_tile, place)
    if not is_first:
        nisa.tensor_tensor(dst=out, data1=out, data2=summed, op=nl.add)


def scale_row(scaled, partial, scale_tile, first_block):
    """scaled = partial [columns, tiles, T] * a scale for each tile."""
    columns, width, tokens = partial.shape
    size = row_size(scale_tile)
    if tokens < SCALAR_ENGINE_TOKENS:
        # Repeated over tokens by a stride of 0.
        pattern = [[size, columns], [1, width], [0, tokens]]
        scales = scale_tile.ap(pattern=pattern, offset=first_block)
        nisa.tensor_tensor(dst=scaled, data1=partial, data2=scales, op=nl.multiply)
        return
    for step in range(width):
        scale = scale_tile.ap(pattern=[[size, columns], [1, 1]], offset=first_block + step)
        nisa.activation(dst=scaled[:, step, :], op=nl.copy, data=partial[:, step, :], scale=scale)


def scale_rows(summed, partial, scale_tile, place):
    """summed [columns, tiles, T] = the sum over rows of partial * scales."""
    columns, height, width, tokens = partial.shape
    first_block, row_step = place
    pattern = [[row_size(scale_tile), columns], [row_step, height], [1, width], [0, tokens]]
    scales = scale_tile.ap(pattern=pattern, offset=first_block)
    scaled = nl.ndarray(partial.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=scaled, data1=partial, data2=scales, op=nl.multiply)
    elements = width * tokens
    pattern = [[height * elements, columns], [1, elements], [elements, height]]
    nisa.tensor_reduce(dst=summed, op=nl.add, data=scaled.ap(pattern=pattern), axis=2)


def activate(gate_up_out, channels, dtype):
    """silu(gate) * up [P, tiles, T] of both [P, 2 * tiles, T]; of a last tile that is not full, its
    channels.
    """
    tiles = gate_up_out.shape[1] // 2
    tokens = gate_up_out.shape[2]
    activated = nl.ndarray((PARTITIONS, tiles, tokens), dtype=dtype, buffer=nl.sbuf)
    for first, count, rows in spans(channels):
        product = nl.ndarray((rows, count, tokens), dtype=nl.float32, buffer=nl.sbuf)
        place = 2 * first
        gate = gate_up_out[0:rows, place : place + count, :]
        nisa.activation(dst=product, op=nl.silu, data=gate)
        up = gate_up_out[0:rows, place + count : place + 2 * count, :]
        nisa.tensor_tensor(
            dst=activated[0:rows, first : first + count, :], data1=product, data2=up, op=nl.multiply
        )
    return activated


def channel_scaled_product(activated, weight, scales, expert, ring, dtype):
    """`activated` [P, I/128, T] float32 times scales [P, I/128, H/128] and one expert's codes
    [E,I,H]: [P, H/128, T] float32. Channels times scales are rounded to `dtype`.

    A scale belongs to a row of the contraction, so it is applied to what goes in, and PSUM sums
    over all rows of a load.
    """
    channels = weight.shape[1]
    tokens = activated.shape[2]
    columns = weight.shape[2] // PARTITIONS
    group = min(columns, PSUM_BANK // tokens)
    out = nl.ndarray((PARTITIONS, columns, tokens), dtype=nl.float32, buffer=nl.sbuf)
    for load in range(ceil_div(channels, ROWS_PER_LOAD * PARTITIONS)):
        first = load * ROWS_PER_LOAD
        codes = ring[load % len(ring)]
        load_codes(codes, weight, expert, first, nisa.oob_mode.error)
        stationary = []  # type: ignore[var-annotated]  # NKI traces no annotations
        moving = []  # type: ignore[var-annotated]
        left = channels - first * PARTITIONS
        for start, count, rows in spans(min(ROWS_PER_LOAD * PARTITIONS, left)):
            span = (first + start, count, rows)
            add_operands((stationary, moving), codes, start, (activated, scales, span), dtype)
        for column in range(0, columns, group):
            width = min(group, columns - column)
            partial = nl.ndarray((PARTITIONS, width, tokens), dtype=nl.float32, buffer=nl.psum)
            for step in range(width):
                place = (column + step) * PARTITIONS
                for row in range(len(moving)):
                    nisa.nc_matmul(
                        dst=partial[:, step, :],
                        stationary=stationary[row][:, place : place + PARTITIONS],
                        moving=moving[row][:, column + step, :],
                        accumulate=row > 0,
                    )
            summed = out[:, column : column + width, :]
            if load == 0:
                nisa.tensor_copy(dst=summed, src=partial)
            else:
                nisa.tensor_tensor(dst=summed, data1=summed, data2=partial, op=nl.add)
    return out


def add_operands(operands, codes, start, scaled_by, dtype):
    """Add the stationary and the moving operands of a span of channels: its codes from `start` on,
    and its channels times their scales.
    """
    stationary, moving = operands
    activated, scales, span = scaled_by
    scaled = times_scales(activated, scales, span, dtype)
    for row in range(span[1]):
        blocks = codes[0 : span[2], start + row, :]
        if dtype == nl.float32:
            blocks = widened(blocks)
        stationary.append(blocks)
        moving.append(scaled[:, row, :, :])


def times_scales(activated, scales, span, dtype):
    """Some tiles of channels times their scales for each column of blocks: [rows, tiles, H/128, T]
    in `dtype`.
    """
    first, count, rows = span
    tokens = activated.shape[2]
    columns = scales.shape[2]
    scaled = nl.ndarray((rows, count, columns, tokens), dtype=dtype, buffer=nl.sbuf)
    by_column = activated.ap(
        pattern=[[row_size(activated), rows], [tokens, count], [0, columns], [1, tokens]],
        offset=first * tokens,
    )
    by_token = scales.ap(
        pattern=[[row_size(scales), rows], [columns, count], [1, columns], [0, tokens]],
        offset=first * columns,
    )
    nisa.tensor_tensor(dst=scaled, data1=by_column, data2=by_token, op=nl.multiply)
    return scaled


def add_weighted(out, down_out, affinity):
    """out += down_out * affinity [P, T] of each token for this visit's expert."""
    hidden_blocks = out.shape[1]
    tokens = out.shape[2]
    by_token = affinity.ap(
        pattern=[[tokens, PARTITIONS], [0, hidden_blocks], [1, tokens]], offset=0
    )
    weighted = nl.ndarray((PARTITIONS, hidden_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weighted, data1=down_out, data2=by_token, op=nl.multiply)
    nisa.tensor_tensor(dst=out, data1=out, data2=weighted, op=nl.add)
