"""One decoder layer computed rank by rank from a converted state: each rank its own shards, then
sums over ranks.

Shapes: T tokens, H hidden. The heads follow `planner/sharding.py` and the experts `expert_shard`,
which `tests/data/nxd_slices.json` ties to NxD; the arithmetic of a rank is the eager model's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from neuron_minimax.backends.nxdi.heads import rearrange
from neuron_minimax.config import ModelConfig
from neuron_minimax.kernels.reference import ExpertWeights, attend, expert_mlp, linear
from neuron_minimax.model.rope import rope_table, rotate
from neuron_minimax.planner.sharding import head_layout

State = Mapping[str, torch.Tensor]
QKV = "self_attn.qkv_proj."


@dataclass(frozen=True)
class Degrees:
    tp: int
    moe_tp: int
    moe_ep: int


@dataclass(frozen=True, kw_only=True)
class ExpertShard:
    """One rank's experts of every layer, and their intermediate channels."""

    experts: range
    intermediate: range


def expert_shard(
    config: ModelConfig, *, moe_tp_degree: int, moe_ep_degree: int, rank: int
) -> ExpertShard:
    """Which experts and channels `rank` holds: consecutive ranks share an expert group
    (neuronx-distributed 0.18.0, parallel_layers/parallel_state.py).
    """
    experts = config.num_local_experts // moe_ep_degree
    channels = config.intermediate_size // moe_tp_degree
    assert experts * moe_ep_degree == config.num_local_experts
    assert channels * moe_tp_degree == config.intermediate_size
    group, member = divmod(rank, moe_tp_degree)
    return ExpertShard(
        experts=range(group * experts, (group + 1) * experts),
        intermediate=range(member * channels, (member + 1) * channels),
    )


def share(tensor: torch.Tensor, dimension: int, ranks: int, rank: int) -> torch.Tensor:
    """The rank's equal part along a dimension."""
    size = tensor.shape[dimension] // ranks
    assert size * ranks == tensor.shape[dimension]
    return tensor.narrow(dimension, rank * size, size)


def placed_attention(state: State, config: ModelConfig, tp: int) -> dict[str, torch.Tensor]:
    """Full attention tensors with padded and repeated heads, as the preshard hooks leave them."""
    layout = head_layout(config.num_attention_heads, config.num_key_value_heads, tp)
    placed = {name: tensor for name, tensor in state.items() if name.startswith("self_attn.")}
    queries = config.num_attention_heads
    keys = config.num_key_value_heads
    for module, dimension, heads, slots in (
        (QKV + "q_proj", 0, queries, layout.query_slots),
        (QKV + "k_proj", 0, keys, layout.key_value_slots),
        (QKV + "v_proj", 0, keys, layout.key_value_slots),
        ("self_attn.o_proj.o_proj", 1, queries, layout.query_slots),
        ("self_attn.q_norm", 0, queries, layout.query_slots),
        ("self_attn.k_norm", 0, keys, layout.key_value_slots),
    ):
        rearrange(placed, module, dimension, heads, slots)
    return placed


def attention(state: State, config: ModelConfig, hidden_TH: torch.Tensor, tp: int) -> torch.Tensor:
    """[T,H] to [T,H]: projections per rank, sums of squares over ranks, heads per rank, partial
    outputs over ranks.
    """
    layout = head_layout(config.num_attention_heads, config.num_key_value_heads, tp)
    placed = placed_attention(state, config, tp)
    block = config.weight_block_size
    positions = torch.arange(hidden_TH.shape[0])[None]
    rope = rope_table(config, positions, torch.float32)

    def project(name: str, rank: int) -> torch.Tensor:
        weight, scale = (placed.get(f"{QKV}{name}_proj.{part}") for part in ("weight", "scale"))
        assert weight is not None
        return linear(
            hidden_TH,
            share(weight, 0, tp, rank),
            None if scale is None else share(scale, 0, tp, rank),
            block,
        )

    local = {name: [project(name, rank) for rank in range(tp)] for name in "qkv"}
    for name, width, copies in (
        ("q", config.query_size, 1),
        ("k", config.key_value_size, layout.key_value_copies),
    ):
        squares_T1 = sum(part.pow(2).sum(-1, keepdim=True) for part in local[name]) / (
            width * copies
        )
        scale_T1 = torch.rsqrt(squares_T1 + config.rms_norm_eps)
        norm = placed[f"self_attn.{name}_norm.weight"].float()
        local[name] = [
            share(norm, 0, tp, rank) * (part * scale_T1) for rank, part in enumerate(local[name])
        ]

    total = torch.zeros_like(hidden_TH)
    weight, scale = (placed.get(f"self_attn.o_proj.o_proj.{part}") for part in ("weight", "scale"))
    assert weight is not None
    for rank in range(tp):
        query, key, value = (
            local[name][rank].unflatten(-1, (-1, config.head_dim))[None] for name in "qkv"
        )
        query = rotate(query, rope)
        key = rotate(key, rope)
        attended = attend(query, key.transpose(1, 2), value.transpose(1, 2), positions)[0]
        part_scale = None if scale is None else share(scale, 1, tp, rank)
        total += linear(attended, share(weight, 1, tp, rank), part_scale, block)
    return total


def experts(
    state: State, config: ModelConfig, hidden_TH: torch.Tensor, degrees: Degrees
) -> torch.Tensor:
    """[T,H] to [T,H]: the router on every rank, each rank's experts and channels, partial outputs
    over ranks.
    """
    router = "block_sparse_moe.router."
    scores = (hidden_TH @ state[router + "linear_router.weight"].T).sigmoid()
    index_TK = (
        (scores + state[router + "e_score_correction_bias"])
        .topk(config.num_experts_per_tok, -1)
        .indices
    )
    affinity_TK = scores.gather(1, index_TK)
    affinity_TK = affinity_TK / affinity_TK.sum(-1, keepdim=True)
    total = torch.zeros_like(hidden_TH)
    for rank in range(degrees.tp):
        held = expert_shard(
            config, moe_tp_degree=degrees.moe_tp, moe_ep_degree=degrees.moe_ep, rank=rank
        )
        here = (index_TK >= held.experts.start) & (index_TK < held.experts.stop)
        local = torch.where(here, index_TK - held.experts.start, -1)
        weights = expert_weights(state, config, held.experts, held.intermediate)
        total += expert_mlp(hidden_TH, local, affinity_TK, weights)
    return total


def expert_weights(
    state: State, config: ModelConfig, chosen: range, channels: range
) -> ExpertWeights:
    """The weights of some experts and intermediate channels; gate and up
    are cut separately.
    """
    rows = config.weight_block_size[0]
    cut: list[torch.Tensor | None] = []
    for name, dimension in (("gate_up_proj", 2), ("down_proj", 1)):
        for part, step in (("weight", 1), ("scale", rows)):
            tensor = state.get(f"block_sparse_moe.expert_mlps.mlp_op.{name}.{part}")
            if tensor is None:
                cut.append(None)
                continue
            halves = tensor[chosen.start : chosen.stop].chunk(
                2 if name == "gate_up_proj" else 1, dimension
            )
            kept = [
                half.narrow(dimension, channels.start // step, len(channels) // step)
                for half in halves
            ]
            bits = [
                piece.view(torch.uint8) if piece.dtype == torch.float8_e4m3fn else piece
                for piece in kept
            ]
            cut.append(torch.cat(bits, dimension))
    return ExpertWeights(*cut, block=config.weight_block_size)
