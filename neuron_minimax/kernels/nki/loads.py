"""What the expert kernel moves between HBM and SBUF, and how it lies there.

Shapes: T tokens, E experts, H hidden, I intermediate, P 128 partitions; R rows and C columns of a
weight. Features lie along partitions, 128 to a tile; the last tile may not be full.
"""

import nki.isa as nisa
import nki.language as nl

from neuron_minimax.kernels.nki.memory import PARTITIONS, RING, ROWS_PER_LOAD

QUADRANT = 32  # partitions that a shuffle reaches at once


def register_of(value):
    """The one value [1,1] int32 in HBM, in a register: a loop's bound."""
    tile = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=value)
    register = nisa.register_alloc()
    nisa.register_load(register, tile)
    return register


def row_like(source):
    """An empty row [1, n] for one index of `source` [N, ...] with n elements each."""
    return nl.ndarray((1, row_size(source)), dtype=source.dtype, buffer=nl.sbuf)


def row_size(source):
    size = 1
    for dimension in source.shape[1:]:
        size = size * dimension
    return size


def load_row(row, source, index, oob_mode):
    """row [1, n] = source[index] in HBM, flattened; `index` is one value in SBUF."""
    size = row_size(source)
    pattern = [[size, 1], [1, size]]
    nisa.dma_copy(
        dst=row,
        src=source.ap(pattern=pattern, offset=0, scalar_offset=index, indirect_dim=0),
        oob_mode=oob_mode,
    )


def broadcast(row):
    """The row [1, n] in every partition [P, n]; copied bit by bit, a quadrant at a time."""
    size = row.shape[1]
    tile = nl.ndarray((PARTITIONS, size), dtype=row.dtype, buffer=nl.sbuf)
    for start in range(0, PARTITIONS, QUADRANT):
        nisa.nc_stream_shuffle(
            dst=tile[start : start + QUADRANT, :], src=row, shuffle_mask=[0] * QUADRANT
        )
    return tile


def load_transposed(hidden_TH):
    """[T,H] in HBM to [P, H/128, T] in SBUF: features on partitions, where a contraction wants
    them.
    """
    tokens, hidden_size = hidden_TH.shape
    rows = nl.ndarray((tokens, hidden_size), dtype=hidden_TH.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=rows, src=hidden_TH)
    columns = nl.ndarray(
        (PARTITIONS, hidden_size // PARTITIONS, tokens), dtype=hidden_TH.dtype, buffer=nl.sbuf
    )
    for block in range(hidden_size // PARTITIONS):
        turned = nl.ndarray((PARTITIONS, tokens), dtype=hidden_TH.dtype, buffer=nl.psum)
        nisa.nc_transpose(
            dst=turned,
            data=rows[:, block * PARTITIONS : (block + 1) * PARTITIONS],
            engine=nisa.engine.tensor,
        )
        nisa.tensor_copy(dst=columns[:, block, :], src=turned)
    return columns


def store_transposed(result, core, columns):
    """[P, H/128, T] in SBUF to this core's [T,H] in HBM."""
    hidden_blocks = columns.shape[1]
    tokens = columns.shape[2]
    rows = nl.ndarray((tokens, hidden_blocks * PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    for block in range(hidden_blocks):
        turned = nl.ndarray((tokens, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=columns[:, block, :], engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=rows[:, block * PARTITIONS : (block + 1) * PARTITIONS], src=turned)
    nisa.dma_copy(dst=result[core], src=rows)


def weight_ring(row_blocks, columns, dtype):
    """Buffers [P, rows of blocks, columns] of codes, empty."""
    rows = min(ROWS_PER_LOAD, row_blocks)
    ring = []
    for _ in range(RING):  # a plain loop: NKI traces it
        codes = nl.ndarray((PARTITIONS, rows, columns), dtype=dtype, buffer=nl.sbuf)
        ring.append(codes)
    return ring


def load_codes(tile, weight, expert, first, oob_mode):
    """Rows of blocks from `first` on, as many as the tile holds or are left, of one expert [E,R,C]
    in HBM; of a last one that is not full, its rows.
    """
    columns = weight.shape[2]
    left = weight.shape[1] - first * PARTITIONS
    for start, count, rows in spans(min(ROWS_PER_LOAD * PARTITIONS, left)):
        nisa.dma_copy(
            dst=tile[0:rows, start : start + count, :],
            src=weight.ap(
                pattern=[[columns, rows], [PARTITIONS * columns, count], [1, columns]],
                offset=(first + start) * PARTITIONS * columns,
                scalar_offset=expert,
                indirect_dim=0,
                dtype=tile.dtype,
            ),
            oob_mode=oob_mode,
        )


def hidden_rows_like(scale):
    """An empty tile [H/128, 2I] for one expert's expanded scales of gate and up."""
    return nl.ndarray((scale.shape[1], scale.shape[2]), dtype=scale.dtype, buffer=nl.sbuf)


def load_hidden_rows(tile, scale, expert):
    """tile [H/128, 2I] = scale[expert] in HBM; nothing where there is no such expert."""
    rows = scale.shape[1]
    columns = scale.shape[2]
    pattern = [[columns, rows], [1, columns]]
    nisa.dma_copy(
        dst=tile,
        src=scale.ap(pattern=pattern, offset=0, scalar_offset=expert, indirect_dim=0),
        oob_mode=nisa.oob_mode.skip,
    )


def channels_like(scale):
    """An empty tile [P, I/128, H/128] for one expert's expanded scales of down."""
    shape = (PARTITIONS, ceil_div(scale.shape[1], PARTITIONS), scale.shape[2])
    return nl.ndarray(shape, dtype=scale.dtype, buffer=nl.sbuf)


def load_channels(tile, scale, expert):
    """tile [P, I/128, H/128] = scale[expert] in HBM, channels on partitions; nothing where there is
    no such expert.
    """
    blocks = scale.shape[2]
    for first, count, rows in spans(scale.shape[1]):
        pattern = [[blocks, rows], [PARTITIONS * blocks, count], [1, blocks]]
        offset = first * PARTITIONS * blocks
        nisa.dma_copy(
            dst=tile[0:rows, first : first + count, :],
            src=scale.ap(pattern=pattern, offset=offset, scalar_offset=expert, indirect_dim=0),
            oob_mode=nisa.oob_mode.skip,
        )


def by_output(rows, channels):
    """Expanded scales [H/128, 2I] with the output features of gate and up on partitions: [P, H/128,
    tiles], in the order in which block scales lie.
    """
    tiles = output_tiles(channels, 2)
    blocks = rows.shape[0]
    scales = nl.ndarray((PARTITIONS, blocks, len(tiles)), dtype=rows.dtype, buffer=nl.sbuf)
    for place in range(len(tiles)):
        first, columns = tiles[place]
        turned = nl.ndarray((columns, blocks), dtype=rows.dtype, buffer=nl.psum)
        nisa.nc_transpose(
            dst=turned, data=rows[:, first : first + columns], engine=nisa.engine.tensor
        )
        nisa.tensor_copy(dst=scales[0:columns, :, place], src=turned)
    return scales


def spans(size):
    """Tiles of partitions that `size` features take, as (first, number, partitions of each): the
    full ones, then one that is not.
    """
    full = size // PARTITIONS
    found = []
    if full > 0:
        found.append((0, full, PARTITIONS))
    if size % PARTITIONS > 0:
        found.append((full, 1, size % PARTITIONS))
    return found


def output_tiles(size, parts):
    """(first column, columns) of each tile of a product's output, `parts` of a size side by side:
    the full tiles of each part, then those that are not.
    """
    found = []
    for first, count, columns in spans(size):
        for part in range(parts):
            start = part * size + first * PARTITIONS
            found.extend([(start + tile * PARTITIONS, columns) for tile in range(count)])
    return found


def ceil_div(numerator, denominator):
    return (numerator + denominator - 1) // denominator
