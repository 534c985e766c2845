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

Expanded scales, one for 128 hidden features and one channel, let a rank hold any number of
channels. They belong to a partition row: those of gate and up lie along the output features, are
transposed once per visit, and multiply the partial sums as above. Those of down lie along its input
features and multiply what goes in, silu(gate) * up, once for each column of blocks and before it is
rounded; PSUM then accumulates over the rows of a load, and nothing is scaled behind the product.

How visits follow each other. The loop over them runs on the device, as often as there are experts
to visit: an expert that nobody chose costs no bytes and no instructions, and no product ever reads
a buffer that was not filled for it. The end of a visit fetches the head of the next one: its
number, its scales and its first rows of weights.
"""

import nki
import nki.isa as nisa
import nki.language as nl
import torch

from neuron_minimax.kernels.nki.loads import (
    PARTITIONS,
    broadcast,
    by_output,
    ceil_div,
    channels_like,
    hidden_rows_like,
    load_channels,
    load_codes,
    load_hidden_rows,
    load_row,
    load_transposed,
    output_tiles,
    register_of,
    row_like,
    store_transposed,
    weight_ring,
)
from neuron_minimax.kernels.nki.memory import ExpertSizes, overflow
from neuron_minimax.kernels.nki.products import (
    activate,
    add_weighted,
    block_scaled_product,
    channel_scaled_product,
)
from neuron_minimax.kernels.nki.visits import plan_visits
from neuron_minimax.kernels.reference import BLOCK, ExpertWeights, check_shapes


def expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    weights: ExpertWeights,
    cores: int = 1,
    ocp_codes: bool = False,
) -> torch.Tensor:
    """`kernels.reference.ExpertMLP` on a NeuronCore; `cores` physical cores (the logical core size)
    share the visits.

    Arithmetic order: products of FP8 codes and hidden accumulate in float32 over one block, times
    its scale, summed over blocks in float32; silu(gate) * up in float32, rounded once to the dtype
    of hidden; down product the same way; times affinity and summed over experts in float32, rounded
    once to the dtype of hidden. With expanded scales (gate_up [E,H/128,2I], down [E,I,H/128])
    silu(gate) * up is multiplied by the scale of its channel before it is rounded, and I need not
    be a multiple of 128. The codes must be within +-240 (`--fp8-range neuron`), but with
    `ocp_codes` (`--fp8-range ocp`), which NeuronCore-v4 (trn3) and later ones alone read. With
    float32 hidden (a test mode) the codes are widened to float32 on the chip. Raises ValueError on
    shapes, blocks or weights this kernel does not take, or does not have the memory for.
    """
    expanded = has_expanded_scales(weights)
    unscaled = weights._replace(gate_up_scale=None, down_scale=None)
    check_shapes(hidden_TH, expert_index_TK, unscaled if expanded else weights)
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
    ragged = intermediate_size % PARTITIONS and not expanded
    if block != BLOCK or hidden_size % PARTITIONS or ragged:
        raise ValueError(
            f"the NKI expert MLP needs {BLOCK} blocks and sizes that are multiples of "
            f"{PARTITIONS} (with expanded scales the hidden one only), not block {block}, hidden "
            f"{hidden_size}, intermediate {intermediate_size}; use expert_kernel='torch'"
        )
    sizes = ExpertSizes(
        hidden=hidden_size,
        channels=intermediate_size,
        expanded=expanded,
        itemsize=hidden_TH.itemsize,
    )
    if said := overflow(sizes, tokens):
        raise ValueError(f"the NKI expert MLP has too little memory: {said}")
    plan = plan_visits(expert_index_TK, affinity_TK, gate_up.shape[0], cores)
    # The weights go in as they are: a view as bytes has no XLA lowering and would cut them out of a
    # traced graph.
    native = (True,) if ocp_codes else ()  # no operand of a graph otherwise
    out_CTH = expert_mlp_kernel[cores](
        hidden_TH, *plan, gate_up, gate_up_scale, down, down_scale, *native
    )
    return out_CTH.sum(dim=0).to(hidden_TH.dtype)


def has_expanded_scales(weights: ExpertWeights) -> bool:
    """Return whether a scale is of one channel, by the shapes of both layers."""
    gate_up_scale = weights.gate_up_scale
    down_scale = weights.down_scale
    if gate_up_scale is None or down_scale is None:
        return False
    experts, channels, hidden_size = weights.down.shape
    blocks = ceil_div(hidden_size, PARTITIONS)
    return list(gate_up_scale.shape) == [experts, blocks, 2 * channels] and list(
        down_scale.shape
    ) == [experts, channels, blocks]


@nki.jit
def expert_mlp_kernel(  # noqa: PLR0913 (tensors that NKI traces)
    hidden_TH,
    rounds,
    visits,
    affinity_VT,
    gate_up,
    gate_up_scale,
    down,
    down_scale,
    ocp_codes=False,
):
    """Run the visits on this core: hidden [T,H], the plan of plan_visits, weights of ExpertWeights.

    Returns [cores,T,H] float32: each core's sum over its share of the visits.
    """
    tokens, hidden_size = hidden_TH.shape
    hidden_blocks = hidden_size // PARTITIONS
    channels = down.shape[1]
    expanded = down_scale.shape[1] == channels
    core = 0
    cores = 1
    if nl.program_ndim() > 0:
        core = nl.program_id(axis=0)
        cores = nl.num_programs(axes=0)

    hidden = load_transposed(hidden_TH)
    codes = nl.float8_e4m3fn if ocp_codes else nl.float8_e4m3
    gate_up_ring = weight_ring(hidden_blocks, gate_up.shape[2], codes)
    down_ring = weight_ring(ceil_div(channels, PARTITIONS), hidden_size, codes)
    out = nl.ndarray((PARTITIONS, hidden_blocks, tokens), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=out, value=0.0)

    visit = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=visit, value=core)
    expert = nl.ndarray((1, 1), dtype=nl.int32, buffer=nl.sbuf)
    affinity = row_like(affinity_VT)
    gate_up_scales = hidden_rows_like(gate_up_scale) if expanded else row_like(gate_up_scale)
    down_scales = channels_like(down_scale) if expanded else row_like(down_scale)
    sources = (visits, affinity_VT, gate_up_scale, down_scale, gate_up)
    head = (expert, affinity, gate_up_scales, down_scales, gate_up_ring[0])
    fetch_head(visit, sources, head, expanded)

    rings = (gate_up_ring, down_ring)
    for _ in nl.dynamic_range(0, register_of(rounds), 1):
        # Nested, so that a result is held no longer than it is needed.
        add_weighted(
            out,
            expert_output(hidden, (gate_up, down), head, rings, expanded),
            broadcast(affinity),
        )
        nisa.tensor_scalar(dst=visit, data=visit, op0=nl.add, operand0=cores)
        fetch_head(visit, sources, head, expanded)

    result = nl.ndarray((cores, tokens, hidden_size), dtype=nl.float32, buffer=nl.shared_hbm)
    store_transposed(result, core, out)
    return result


def expert_output(hidden, weights, head, rings, expanded):
    """One expert's output for all tokens, [P, H/128, T] float32, of hidden [P, H/128, T]."""
    gate_up, down = weights
    expert, _, gate_up_scales, down_scales, _ = head
    activated = activate(
        gate_and_up(hidden, gate_up, gate_up_scales, expert, rings[0], expanded),
        down.shape[1],
        nl.float32 if expanded else hidden.dtype,
    )
    if expanded:
        return channel_scaled_product(activated, down, down_scales, expert, rings[1], hidden.dtype)
    tiles = output_tiles(down.shape[2], 1)
    scales = broadcast(down_scales)
    return block_scaled_product(activated, down, scales, expert, (rings[1], 0), tiles)


def gate_and_up(hidden, gate_up, gate_up_scales, expert, ring, expanded):
    """Gate and up [P, tiles, T] float32 of hidden; the first load of codes is made already."""
    channels = gate_up.shape[2] // 2
    scales = by_output(gate_up_scales, channels) if expanded else broadcast(gate_up_scales)
    tiles = output_tiles(channels, 2)
    return block_scaled_product(hidden, gate_up, scales, expert, (ring, 1), tiles)


def fetch_head(visit, sources, head, expanded):
    """Fetch a visit's expert, affinities, scales and first rows of codes.

    The visit after the last one has no expert, and its loads are skipped: the loop has ended, so
    nothing reads them.
    """
    visits, affinity_VT, gate_up_scale, down_scale, gate_up = sources
    expert, affinity, gate_up_scales, down_scales, codes = head
    load_row(expert, visits, visit, nisa.oob_mode.error)
    load_row(affinity, affinity_VT, visit, nisa.oob_mode.error)
    if expanded:
        load_hidden_rows(gate_up_scales, gate_up_scale, expert)
        load_channels(down_scales, down_scale, expert)
    else:
        load_row(gate_up_scales, gate_up_scale, expert, nisa.oob_mode.skip)
        load_row(down_scales, down_scale, expert, nisa.oob_mode.skip)
    load_codes(codes, gate_up, expert, 0, nisa.oob_mode.skip)
