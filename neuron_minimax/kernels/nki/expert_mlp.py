"""The expert MLP as a Trainium2 kernel: FP8 codes up to the tensor engine, scales on partial sums.

Written for the NKI language of Neuron SDK 2.29 and later (NKI 0.3, `nki`, `nki.isa`,
`nki.language`); importing this module needs the `nki` package. Token generation: 1 to 128 tokens.

Shapes: T tokens, K chosen experts per token, E experts on this rank, H hidden, I intermediate, P
128 partitions, V visits. A visit is one expert whose weights pass through the core once, whatever
the number of tokens that chose it.

How a visit runs. A 128 x 128 block of weights is the stationary operand, the activations [P, T] of
its 128 input features are the moving one, so a product lands in PSUM as [P output features, T] and
needs no transpose before the second projection. One scale belongs to one block, so PSUM never
accumulates over blocks: each row of blocks leaves partial sums in PSUM, which are multiplied by
their scales (one per block column) and added up in SBUF, all in float32. Weights stream through a
ring of buffers, so the DMA of the next rows runs during the current products.

How visits follow each other. The loop over them runs on the device, as often as there are experts
to visit: an expert that nobody chose costs no bytes and no instructions, and no product ever reads
a buffer that was not filled for it. The end of a visit fetches the head of the next one: its
number, its scales and its first rows of weights.
"""

import nki
import nki.isa as nisa
import nki.language as nl
import torch

from neuron_minimax.kernels.reference import BLOCK, ExpertWeights, check_shapes

PARTITIONS = 128  # also the block size: one block is one contraction tile
QUADRANT = 32  # partitions that a shuffle reaches at once
PSUM_BANK = 512  # float32 values per partition and bank; one accumulation tile must fit in one bank
# Rows of blocks per DMA: 1.5 MB at the real size, far above the DMA's fixed cost of about 2 us
ROWS_PER_LOAD = 4
RING = 3  # weight buffers per projection: one in use, two in flight
# From here on the scalar engine applies the scales, a block at a time, and the vector engine adds
SCALAR_ENGINE_TOKENS = 64


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
    cores: int = 1,
) -> torch.Tensor:
    """`kernels.reference.ExpertMLP` on a NeuronCore; `cores` physical cores (the logical core size)
    share the visits.

    Arithmetic order: products of FP8 codes and hidden accumulate in float32 over one block, times
    its scale, summed over blocks in float32; silu(gate) * up in float32, rounded once to the dtype
    of hidden; down product the same way; times affinity and summed over experts in float32, rounded
    once to the dtype of hidden. The codes must be within +-240 (`--fp8-range neuron`). With float32
    hidden (a test mode) the codes are widened to float32 on the chip. Raises ValueError on shapes,
    blocks or weights this kernel does not take.
    """
    check_shapes(hidden_TH, expert_index_TK, weights)
    gate_up, gate_up_scale, down, down_scale, block = weights
    tokens, hidden_size = hidden_TH.shape
    intermediate_size = down.shape[1]
    if tokens > PARTITIONS:
        raise ValueError(
            f"the NKI expert MLP takes 1 to {PARTITIONS} tokens (token generation), not {tokens}"
        )
    if gate_up_scale is None or down_scale is None:
        raise ValueError(
            "the NKI expert MLP takes FP8 weights with block scales; use expert_kernel='torch' for "
            "others"
        )
    if block != BLOCK or hidden_size % PARTITIONS or intermediate_size % PARTITIONS:
        raise ValueError(
            f"the NKI expert MLP needs {BLOCK} blocks and sizes that are multiples of "
            f"{PARTITIONS}, not block {block}, hidden {hidden_size}, intermediate "
            f"{intermediate_size}; use expert_kernel='torch'"
        )
    plan = plan_visits(expert_index_TK, affinity_TK, gate_up.shape[0], cores)
    # The weights go in as they are: a view as bytes has no XLA lowering and would cut them out of a
    # traced graph.
    out_CTH = expert_mlp_kernel[cores](hidden_TH, *plan, gate_up, gate_up_scale, down, down_scale)
    return out_CTH.sum(dim=0).to(hidden_TH.dtype)


def plan_visits(
    expert_index_TK: torch.Tensor, affinity_TK: torch.Tensor, experts: int, cores: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan which experts to visit, each once, and each token's weight for each visit.

    Shapes are static, numbers int32 and float32 only.

    Returns rounds [1,1] int32, the visits of each core; visits [V,1] int32, where visit v belongs
    to core v % cores; and affinity [V,T] float32. V is the most that T*K choices of E experts can
    need, in whole rounds, and one round more. A round that is not full is filled with the first
    expert again, at affinity 0; the visits after the last round are E: none of them is ever made.
    """
    index_TK = expert_index_TK.to(torch.int32)
    choices = index_TK.reshape(-1)
    if choices.numel() < experts:
        repeated = (choices[:, None] == choices[None, :]).tril(-1).any(dim=1)
        # Compared with tensors: a number beside them would make the tracer compare in int64.
        below = torch.full_like(choices, -1)
        beyond = torch.full_like(choices, experts)
        candidates = choices
        needed = (choices > below) & (choices < beyond) & ~repeated
    else:
        candidates = torch.arange(experts, device=choices.device, dtype=torch.int32)
        needed = (choices[:, None] == candidates[None, :]).any(dim=0)
    most = candidates.numel()
    before = torch.ones(most, most, device=choices.device, dtype=torch.int32).tril(-1)
    place = (before * needed[None, :]).sum(dim=1, dtype=torch.int32)
    count = needed.sum(dtype=torch.int32)
    rounds = (torch.arange(0, most, cores, device=choices.device, dtype=torch.int32) < count).sum(
        dtype=torch.int32
    )

    visit_V = torch.arange(
        ceil_div(most, cores) * cores + cores, device=choices.device, dtype=torch.int32
    )
    placed_VC = (place[None, :] == visit_V[:, None]) & needed[None, :]
    expert_V = (placed_VC * candidates[None, :]).sum(dim=1, dtype=torch.int32)
    unmade_V = torch.full_like(visit_V, experts)
    visits_V = torch.where(
        visit_V < count, expert_V, torch.where(visit_V < rounds * cores, expert_V[:1], unmade_V)
    )
    chosen_VTK = (index_TK[None] == visits_V[:, None, None]) & (visit_V < count)[:, None, None]
    affinity_VT = (chosen_VTK * affinity_TK.to(torch.float32)[None]).sum(dim=-1)
    return rounds.reshape(1, 1), visits_V[:, None], affinity_VT


@nki.jit
def expert_mlp_kernel(  # noqa: PLR0913 (tensors that NKI traces)
    hidden_TH, rounds, visits, affinity_VT, gate_up, gate_up_scale, down, down_scale
):
    """Run the visits on this core: hidden [T,H], the plan of plan_visits, weights of ExpertWeights.

    Returns [cores,T,H] float32: each core's sum over its share of the visits.
    """
    tokens, hidden_size = hidden_TH.shape
    hidden_blocks = hidden_size // PARTITIONS
    intermediate_blocks = down.shape[1] // PARTITIONS
    core = 0
    cores = 1
    if nl.program_ndim() > 0:
        core = nl.program_id(axis=0)
        cores = nl.num_programs(axes=0)

    hidden = load_transposed(hidden_TH)
    gate_up_ring = weight_ring(hidden_blocks, gate_up.shape[2])
    down_ring = weight_ring(intermediate_blocks, hidden_size)
    out = nl.ndarray((PARTITIONS, hidden_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=out, value=0.0)

    visit = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=visit, value=core)
    expert = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    affinity = row_like(affinity_VT)
    gate_up_scales = row_like(gate_up_scale)
    down_scales = row_like(down_scale)
    sources = (visits, affinity_VT, gate_up_scale, down_scale, gate_up)
    head = (expert, affinity, gate_up_scales, down_scales, gate_up_ring[0])
    fetch_head(visit, sources, head)

    for _ in nl.dynamic_range(0, register_of(rounds), 1):
        scales = broadcast(gate_up_scales)
        gate_up_out = block_scaled_product(hidden, gate_up, scales, expert, gate_up_ring, 1)
        product = nl.ndarray(
            (PARTITIONS, intermediate_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf
        )
        nisa.activation(dst=product, op=nl.silu, data=gate_up_out[:, 0:intermediate_blocks, :])
        activated = nl.ndarray(
            (PARTITIONS, intermediate_blocks, tokens), dtype=hidden_TH.dtype, buffer=nl.sbuf
        )
        up = gate_up_out[:, intermediate_blocks : 2 * intermediate_blocks, :]
        nisa.tensor_tensor(dst=activated, data1=product, data2=up, op=nl.multiply)
        down_out = block_scaled_product(
            activated, down, broadcast(down_scales), expert, down_ring, 0
        )
        add_weighted(out, down_out, broadcast(affinity))
        nisa.tensor_scalar(dst=visit, data=visit, op0=nl.add, operand0=cores)
        fetch_head(visit, sources, head)

    result = nl.ndarray((cores, tokens, hidden_size), dtype=nl.float32, buffer=nl.shared_hbm)
    store_transposed(result, core, out)
    return result


def register_of(value):
    """The one value [1,1] int32 in HBM, in a register: a loop's bound."""
    tile = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=value)
    register = nisa.register_alloc()
    nisa.register_load(register, tile)
    return register


def fetch_head(visit, sources, head):
    """Fetch a visit's expert, affinities, scales and first rows of codes.

    The visit after the last one has no expert, and its loads are skipped: the loop has ended, so
    nothing reads them.
    """
    visits, affinity_VT, gate_up_scale, down_scale, gate_up = sources
    expert, affinity, gate_up_scales, down_scales, codes = head
    load_row(expert, visits, visit, nisa.oob_mode.error)
    load_row(affinity, affinity_VT, visit, nisa.oob_mode.error)
    load_row(gate_up_scales, gate_up_scale, expert, nisa.oob_mode.skip)
    load_row(down_scales, down_scale, expert, nisa.oob_mode.skip)
    load_codes(codes, gate_up, expert, 0, nisa.oob_mode.skip)


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


def weight_ring(row_blocks, columns):
    """Buffers [P, rows of blocks, columns] of codes, empty."""
    rows = min(ROWS_PER_LOAD, row_blocks)
    ring = []
    for _ in range(RING):  # a plain loop: NKI traces it
        codes = nl.ndarray((PARTITIONS, rows, columns), dtype=nl.float8_e4m3, buffer=nl.sbuf)
        ring.append(codes)
    return ring


def block_scaled_product(moving, weight, scales, expert, ring, loaded):
    """`moving` [P, R/128, T] times one expert's codes [E,R,C] and scales [P, R/128 * C/128]: [P,
    C/128, T] float32.

    The first `loaded` loads of the codes are in the ring already.
    """
    row_blocks = moving.shape[1]
    tokens = moving.shape[2]
    column_blocks = weight.shape[2] // PARTITIONS
    group = min(column_blocks, PSUM_BANK // tokens)
    out = nl.ndarray((PARTITIONS, column_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    for load in range(ceil_div(row_blocks, ROWS_PER_LOAD)):
        first = load * ROWS_PER_LOAD
        codes = ring[load % len(ring)]
        if load >= loaded:
            load_codes(codes, weight, expert, first, nisa.oob_mode.error)
        for row in range(min(ROWS_PER_LOAD, row_blocks - first)):
            blocks = codes[:, row, :]
            if moving.dtype == nl.float32:
                blocks = widened(blocks)
            for column in range(0, column_blocks, group):
                width = min(group, column_blocks - column)
                partial = nl.ndarray((PARTITIONS, width, tokens), dtype=nl.float32, buffer=nl.psum)
                for step in range(width):
                    start = (column + step) * PARTITIONS
                    nisa.nc_matmul(
                        dst=partial[:, step, :],
                        stationary=blocks[:, start : start + PARTITIONS],
                        moving=moving[:, first + row, :],
                        accumulate=False,
                    )
                first_block = (first + row) * column_blocks + column
                add_scaled(
                    out[:, column : column + width, :],
                    partial,
                    scales,
                    first_block,
                    first + row == 0,
                )
    return out


def load_codes(tile, weight, expert, first, oob_mode):
    """Rows of blocks from `first` on, as many as the tile holds or are left, of one expert [E,R,C]
    in HBM.
    """
    columns = weight.shape[2]
    rows = min(ROWS_PER_LOAD, weight.shape[1] // PARTITIONS - first)
    nisa.dma_copy(
        dst=tile[:, 0:rows, :],
        src=weight.ap(
            pattern=[[columns, PARTITIONS], [PARTITIONS * columns, rows], [1, columns]],
            offset=first * PARTITIONS * columns,
            scalar_offset=expert,
            indirect_dim=0,
            dtype=nl.float8_e4m3,
        ),
        oob_mode=oob_mode,
    )


def widened(blocks):
    """One row of blocks [P, columns] as float32: the tensor engine takes float32 only on both
    sides.
    """
    wide = nl.ndarray(blocks.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=wide, src=blocks)
    return wide


def add_scaled(out, partial, scale_tile, first_block, is_first):
    """out (+)= partial [P, blocks, T] * the scales from `first_block` on, in float32."""
    width = partial.shape[1]
    tokens = partial.shape[2]
    scaled = out
    if not is_first:
        scaled = nl.ndarray(partial.shape, dtype=nl.float32, buffer=nl.sbuf)
    if tokens < SCALAR_ENGINE_TOKENS:
        # One scale per block column, repeated over tokens by a stride of 0.
        pattern = [[scale_tile.shape[1], PARTITIONS], [1, width], [0, tokens]]
        scales = scale_tile.ap(pattern=pattern, offset=first_block)
        nisa.tensor_tensor(dst=scaled, data1=partial, data2=scales, op=nl.multiply)
    else:
        for step in range(width):
            scale = scale_tile[:, first_block + step : first_block + step + 1]
            nisa.activation(
                dst=scaled[:, step, :], op=nl.copy, data=partial[:, step, :], scale=scale
            )
    if not is_first:
        nisa.tensor_tensor(dst=out, data1=out, data2=scaled, op=nl.add)


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


def ceil_div(numerator, denominator):
    return (numerator + denominator - 1) // denominator
