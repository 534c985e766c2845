"""What the expert kernel takes of a core's SBUF, in bytes of a partition; needs no nki.

Each tile counts from when it is filled to its last use. Shapes are those of expert_mlp.py.
"""

from dataclasses import dataclass

from neuron_minimax.errors import counted
from neuron_minimax.fp8 import ceil_div

PARTITIONS = 128  # also the block size: one block is one contraction tile
# Source: NKI documentation, "Trainium2 Architecture Guide": 24 MiB in 128 partitions.
SBUF_BYTES = 24 * 2**20 // PARTITIONS
PSUM_BANK = 512  # float32 values per partition and bank; one accumulation tile must fit in one bank
# Rows of blocks per DMA: 1.5 MB at the real size, far above the DMA's fixed cost of about 2 us
ROWS_PER_LOAD = 4
RING = 3  # weight buffers per projection: one in use, two in flight
FLOAT32_BYTES = 4
INSTRUCTION_CYCLES = 64  # the least that the vector engine takes for one, at an element a cycle


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """Sizes of a rank's share of an expert, and the bytes of a hidden value."""

    hidden: int
    channels: int
    expanded: bool
    itemsize: int = 2


def sbuf_bytes(sizes: ExpertSizes, tokens: int) -> int:
    """Bytes of a partition that the kernel needs at most at once."""
    blocks = ceil_div(sizes.hidden, PARTITIONS)
    tiles = ceil_div(sizes.channels, PARTITIONS)
    token_bytes = FLOAT32_BYTES * tokens
    codes = RING * min(ROWS_PER_LOAD, blocks) * 2 * sizes.channels
    codes += RING * min(ROWS_PER_LOAD, tiles) * sizes.hidden
    by_output = FLOAT32_BYTES * blocks * 2 * tiles  # scales of gate and up, in every partition
    rows = FLOAT32_BYTES * 2 * sizes.channels if sizes.expanded else by_output
    scales = rows + FLOAT32_BYTES * tiles * blocks
    kept = sizes.itemsize * blocks * tokens + blocks * token_bytes  # hidden and the sum
    kept += codes + scales + token_bytes + 2 * FLOAT32_BYTES  # affinities, visit and expert
    gate_up = by_output + 2 * tiles * token_bytes + _passing(2 * tiles, tokens)
    activated = tiles * (token_bytes if sizes.expanded else sizes.itemsize * tokens)
    activation = 3 * tiles * token_bytes + activated
    down = activated + blocks * token_bytes
    if sizes.expanded:
        down += sizes.itemsize * min(ROWS_PER_LOAD, tiles) * blocks * tokens
    else:
        down += FLOAT32_BYTES * tiles * blocks + _passing(blocks, tokens)
    weighted = 2 * blocks * token_bytes + token_bytes
    result = FLOAT32_BYTES * sizes.hidden
    if sizes.itemsize == FLOAT32_BYTES:  # codes are widened
        gate_up += FLOAT32_BYTES * min(ROWS_PER_LOAD, blocks) * 2 * sizes.channels
        down += FLOAT32_BYTES * min(ROWS_PER_LOAD, tiles) * sizes.hidden
    return kept + max(gate_up, activation, down, weighted, result)


def _passing(tiles: int, tokens: int) -> int:
    """Bytes of scaled partial sums on their way to the sum: a row of blocks, of a bank at most; or,
    of small rows, those of a load beside their sum.
    """
    elements = min(tiles, PSUM_BANK // tokens) * tokens
    small = min(elements, INSTRUCTION_CYCLES - 1)
    return FLOAT32_BYTES * max(elements, (ROWS_PER_LOAD + 1) * small)


def overflow(sizes: ExpertSizes, tokens: int) -> str:
    """What so many tokens need, and the most that fit; nothing where they do."""
    needed = sbuf_bytes(sizes, tokens)
    if needed <= SBUF_BYTES:
        return ""
    fitting = [number for number in range(1, tokens) if sbuf_bytes(sizes, number) <= SBUF_BYTES]
    most = (
        f"at most {counted(max(fitting), 'token')} fit" if fitting else "no number of tokens fits"
    )
    return (
        f"{counted(tokens, 'token')} of {sizes.hidden} features and {sizes.channels} channels need "
        f"{needed:,} bytes of each partition of SBUF, which has {SBUF_BYTES:,}: {most}"
    )
