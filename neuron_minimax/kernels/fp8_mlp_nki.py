"""The expert MLP as a Trainium2 kernel: FP8 codes up to the tensor engine, block scales on the float32 partial sums.

Written for the NKI language of Neuron SDK 2.29 and later (NKI 0.3, `nki`, `nki.isa`, `nki.language`); importing this
module needs the `nki` package. Token generation: 1 to 128 tokens.

Shapes: T tokens, K chosen experts per token, E experts on this rank, H hidden, I intermediate, P 128 partitions,
V visits. A visit is one expert whose weights pass through the core once, whatever the number of tokens that chose it.

How a visit runs. A 128 x 128 block of weights is the stationary operand, the activations [P, T] of its 128 input
features are the moving one, so a product lands in PSUM as [P output features, T] and needs no transpose before the
second projection. One scale belongs to one block, so PSUM never accumulates over blocks: each row of blocks leaves
partial sums in PSUM, which are multiplied by their scales (one per block column) and added up in SBUF, all in float32.
Weights stream through a ring of buffers, so the DMA of the next rows runs during the current products.
"""

import nki
import nki.isa as nisa
import nki.language as nl
import torch

from neuron_minimax.kernels.fp8_mlp import BLOCK, check_shapes

PARTITIONS = 128  # also the block size: one block is one contraction tile
PSUM_BANK = 512  # float32 values per partition and bank; one accumulation tile must fit in one bank
ROWS_PER_LOAD = 4  # rows of blocks per DMA: 1.5 MB at the real size, far above the DMA's fixed cost of about 2 us
RING = 3  # weight buffers per projection: one in use, two in flight
SCALAR_ENGINE_TOKENS = (
    64  # from here on the scalar engine applies the scales, a block at a time, and the vector engine adds
)


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int] = BLOCK,
    cores: int = 1,
) -> torch.Tensor:
    """`kernels.fp8_mlp.ExpertMLP` on a NeuronCore; `cores` physical cores (the logical core size) share the visits.

    Arithmetic order: products of FP8 codes and hidden accumulate in float32 over one block, times its scale, summed
    over blocks in float32; silu(gate) * up in float32, rounded once to the dtype of hidden; down product the same way;
    times affinity and summed over experts in float32, rounded once to the dtype of hidden. The codes must be within
    +-240 (`--fp8-range neuron`). With float32 hidden (a test mode) the codes are widened to float32 on the chip.
    Raises ValueError on shapes, blocks or weights this kernel does not take.
    """
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    tokens, hidden_size = hidden_TH.shape
    intermediate_size = down.shape[1]
    if tokens > PARTITIONS:
        raise ValueError(f"the NKI expert MLP takes 1 to {PARTITIONS} tokens (token generation), not {tokens}")
    if gate_up_scale is None or down_scale is None:
        raise ValueError("the NKI expert MLP takes FP8 weights with block scales; use expert_kernel='torch' for others")
    if block != BLOCK or hidden_size % PARTITIONS or intermediate_size % PARTITIONS:
        raise ValueError(
            f"the NKI expert MLP needs {BLOCK} blocks and sizes that are multiples of {PARTITIONS}, not block {block}, "
            f"hidden {hidden_size}, intermediate {intermediate_size}; use expert_kernel='torch'"
        )
    visits, affinity_VT = plan_visits(expert_index_TK, affinity_TK, gate_up.shape[0])
    # As bytes, so that no framework operation sees an FP8 type; the kernel reads them as E4M3.
    codes = (gate_up.view(torch.uint8), down.view(torch.uint8))
    out_CTH = expert_mlp_kernel[cores](hidden_TH, visits, affinity_VT, codes[0], gate_up_scale, codes[1], down_scale)
    return out_CTH.sum(dim=0).to(hidden_TH.dtype)


def plan_visits(
    expert_index_TK: torch.Tensor, affinity_TK: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which experts to visit, each at most once, and each token's weight for each visit; static shapes, any tracer.

    Returns visits [1,V] int32 with V = min(T*K, E), and affinity [V,T] float32. A visit that is not needed (its expert
    came earlier, was not chosen, or lives on another rank) has index E, which the kernel's DMAs skip, and affinity 0.
    """
    choices = expert_index_TK.reshape(-1)
    if choices.numel() < experts:
        repeated = (choices[:, None] == choices[None, :]).tril(-1).any(dim=1)
        candidates, needed = choices, (choices >= 0) & (choices < experts) & ~repeated
    else:
        candidates = torch.arange(experts, device=choices.device, dtype=choices.dtype)
        needed = (choices[:, None] == candidates[None, :]).any(dim=0)
    chosen_VTK = (expert_index_TK[None] == candidates[:, None, None]) & needed[:, None, None]
    affinity_VT = torch.where(chosen_VTK, affinity_TK.float()[None], 0.0).sum(dim=-1)
    return torch.where(needed, candidates, experts).to(torch.int32)[None], affinity_VT


@nki.jit
def expert_mlp_kernel(hidden_TH, visits, affinity_VT, gate_up, gate_up_scale, down, down_scale):
    """hidden [T,H]; visits [1,V] int32, E to skip; affinity [V,T]; codes [E,H,2I], [E,I,H]; scales as in ExpertMLP.

    Returns [cores,T,H] float32: each core's sum over its share of the visits.
    """
    tokens, hidden_size = hidden_TH.shape
    visit_count = visits.shape[1]
    hidden_blocks = hidden_size // PARTITIONS
    intermediate_blocks = down.shape[1] // PARTITIONS
    core, cores = 0, 1
    if nl.program_ndim() > 0:
        core, cores = nl.program_id(axis=0), nl.num_programs(axes=0)

    visits_sb = nl.ndarray((1, visit_count), dtype=visits.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=visits_sb, src=visits)
    hidden = load_transposed(hidden_TH)
    gate_up_ring = weight_ring(hidden_blocks, gate_up.shape[2])
    down_ring = weight_ring(intermediate_blocks, hidden_size)
    gate_up_scales = scale_ring(gate_up_scale)
    down_scales = scale_ring(down_scale)
    out = nl.ndarray((PARTITIONS, hidden_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=out, value=0.0)

    for visit in range(core, visit_count, cores):
        turn = visit // cores
        expert = visits_sb.ap(pattern=[[visit_count, 1], [1, 1]], offset=visit)
        gate_up_out = block_scaled_product(hidden, gate_up, gate_up_scale, expert, gate_up_ring, gate_up_scales, turn)
        product = nl.ndarray((PARTITIONS, intermediate_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=product, op=nl.silu, data=gate_up_out[:, 0:intermediate_blocks, :])
        activated = nl.ndarray((PARTITIONS, intermediate_blocks, tokens), dtype=hidden_TH.dtype, buffer=nl.sbuf)
        up = gate_up_out[:, intermediate_blocks : 2 * intermediate_blocks, :]
        nisa.tensor_tensor(dst=activated, data1=product, data2=up, op=nl.multiply)
        down_out = block_scaled_product(activated, down, down_scale, expert, down_ring, down_scales, turn)
        add_weighted(out, down_out, affinity_VT, visit)

    result = nl.ndarray((cores, tokens, hidden_size), dtype=nl.float32, buffer=nl.shared_hbm)
    store_transposed(result, core, out)
    return result


def load_transposed(hidden_TH):
    """[T,H] in HBM to [P, H/128, T] in SBUF: features on partitions, where a contraction wants them."""
    tokens, hidden_size = hidden_TH.shape
    rows = nl.ndarray((tokens, hidden_size), dtype=hidden_TH.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=rows, src=hidden_TH)
    columns = nl.ndarray((PARTITIONS, hidden_size // PARTITIONS, tokens), dtype=hidden_TH.dtype, buffer=nl.sbuf)
    for block in range(hidden_size // PARTITIONS):
        turned = nl.ndarray((PARTITIONS, tokens), dtype=hidden_TH.dtype, buffer=nl.psum)
        nisa.nc_transpose(
            dst=turned, data=rows[:, block * PARTITIONS : (block + 1) * PARTITIONS], engine=nisa.engine.tensor
        )
        nisa.tensor_copy(dst=columns[:, block, :], src=turned)
    return columns


def store_transposed(result, core, columns):
    """[P, H/128, T] in SBUF to this core's [T,H] in HBM."""
    hidden_blocks, tokens = columns.shape[1], columns.shape[2]
    rows = nl.ndarray((tokens, hidden_blocks * PARTITIONS), dtype=nl.float32, buffer=nl.sbuf)
    for block in range(hidden_blocks):
        turned = nl.ndarray((tokens, PARTITIONS), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=turned, data=columns[:, block, :], engine=nisa.engine.tensor)
        nisa.tensor_copy(dst=rows[:, block * PARTITIONS : (block + 1) * PARTITIONS], src=turned)
    nisa.dma_copy(dst=result[core], src=rows)


def weight_ring(row_blocks, columns):
    """Buffers [P, rows of blocks, columns] of codes. Zeroed: a skipped load must leave finite values behind."""
    rows = min(ROWS_PER_LOAD, row_blocks)
    words = rows * columns // 4
    ring = []
    for _ in range(RING):
        tile = nl.ndarray((PARTITIONS, rows, columns), dtype=nl.float8_e4m3, buffer=nl.sbuf)
        # Four codes at a time: a memset writes one element per cycle.
        nisa.memset(dst=tile.ap(pattern=[[words, PARTITIONS], [1, words]], offset=0, dtype=nl.float32), value=0.0)
        ring.append(tile)
    return ring


def scale_ring(scale):
    """Two buffers [P, blocks]: one expert's scales, the same in every partition. Zeroed like the weights."""
    ring = []
    for _ in range(2):
        tile = nl.ndarray((PARTITIONS, scale.shape[1] * scale.shape[2]), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=tile, value=0.0)
        ring.append(tile)
    return ring


def block_scaled_product(moving, weight, scale, expert, ring, scales, turn):
    """`moving` [P, R/128, T] times one expert's codes [E,R,C] and scales [E,R/128,C/128]: [P, C/128, T] float32."""
    row_blocks, tokens = moving.shape[1], moving.shape[2]
    column_blocks = weight.shape[2] // PARTITIONS
    group = min(column_blocks, PSUM_BANK // tokens)
    loads = (row_blocks + ROWS_PER_LOAD - 1) // ROWS_PER_LOAD
    scale_tile = load_scales(scales[turn % len(scales)], scale, expert)
    out = nl.ndarray((PARTITIONS, column_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    for load in range(loads):
        first = load * ROWS_PER_LOAD
        rows = min(ROWS_PER_LOAD, row_blocks - first)
        codes = load_codes(ring[(turn * loads + load) % len(ring)], weight, expert, first, rows)
        for row in range(rows):
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
                add_scaled(out[:, column : column + width, :], partial, scale_tile, first_block, first + row == 0)
    return out


def load_scales(tile, scale, expert):
    """One expert's scales from HBM into every partition of `tile`; skipped when the visit is."""
    size = scale.shape[1] * scale.shape[2]
    nisa.dma_copy(
        dst=tile,
        src=scale.ap(pattern=[[0, PARTITIONS], [1, size]], offset=0, scalar_offset=expert, indirect_dim=0),
        oob_mode=nisa.oob_mode.skip,
    )
    return tile


def load_codes(tile, weight, expert, first, rows):
    """Rows `first` to `first + rows` of one expert's blocks from HBM; nothing moves when `expert` is out of range."""
    columns = weight.shape[2]
    nisa.dma_copy(
        dst=tile[:, 0:rows, :],
        src=weight.ap(
            pattern=[[columns, PARTITIONS], [PARTITIONS * columns, rows], [1, columns]],
            offset=first * PARTITIONS * columns,
            scalar_offset=expert,
            indirect_dim=0,
            dtype=nl.float8_e4m3,
        ),
        oob_mode=nisa.oob_mode.skip,
    )
    return tile


def widened(blocks):
    """One row of blocks [P, columns] as float32: the tensor engine takes float32 only on both sides."""
    wide = nl.ndarray(blocks.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_copy(dst=wide, src=blocks)
    return wide


def add_scaled(out, partial, scale_tile, first_block, is_first):
    """out (+)= partial [P, blocks, T] * the scales from `first_block` on, in float32."""
    width, tokens = partial.shape[1], partial.shape[2]
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
            nisa.activation(dst=scaled[:, step, :], op=nl.copy, data=partial[:, step, :], scale=scale)
    if not is_first:
        nisa.tensor_tensor(dst=out, data1=out, data2=scaled, op=nl.add)


def add_weighted(out, down_out, affinity_VT, visit):
    """out += down_out * affinity of each token for this visit's expert."""
    hidden_blocks, tokens = out.shape[1], out.shape[2]
    affinity = nl.ndarray((PARTITIONS, tokens), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=affinity, src=affinity_VT.ap(pattern=[[0, PARTITIONS], [1, tokens]], offset=visit * tokens))
    by_token = affinity.ap(pattern=[[tokens, PARTITIONS], [0, hidden_blocks], [1, tokens]], offset=0)
    weighted = nl.ndarray((PARTITIONS, hidden_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=weighted, data1=down_out, data2=by_token, op=nl.multiply)
    nisa.tensor_tensor(dst=out, data1=out, data2=weighted, op=nl.add)
