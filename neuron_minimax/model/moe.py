"""A layer's MLP: dense, or a mixture of experts with the router that a family has.

Shapes: B batch, T tokens (flattened over the batch), H hidden, I intermediate, E experts, K chosen
per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neuron_minimax.config import ModelConfig
from neuron_minimax.families.family import Role, RouterKind
from neuron_minimax.fp8 import block_grid
from neuron_minimax.kernels.reference import ExpertWeights
from neuron_minimax.model.layers import Linear, Step, StoredWeight, take
from neuron_minimax.model.parallel import Shard


class Routing(NamedTuple):
    """One layer's routing of T tokens; padding has index -1 and its affinity as computed.

    scores_TE         float32: sigmoids without the bias, or the softmax
    expert_index_TK   int64
    affinity_TK       float32; sums to 1 over K where the config says so
    """

    scores_TE: torch.Tensor
    expert_index_TK: torch.Tensor
    affinity_TK: torch.Tensor


class Router(nn.Module):
    """Top-K of the scores, in float32; affinities are the scores of the chosen experts.

    With sigmoid scores a bias is added to choose, and only to choose.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.family.architecture.router
        self.experts_per_token = config.num_experts_per_tok
        self.normalised = config.norm_topk_prob
        float32_only = config.family.weight_of(Role.ROUTER).float32_only
        self.linear_router = StoredWeight(
            config.num_local_experts, config.hidden_size, float32_only=float32_only
        )
        if self.kind is RouterKind.SIGMOID_BIAS:
            # A buffer, not a parameter: training moves it by a rule of its own, without a gradient.
            bias_E = torch.empty(config.num_local_experts, device="meta")
            self.e_score_correction_bias = nn.Buffer(bias_E)

    @property
    def bias(self) -> torch.Tensor:
        """[E], zeros where scores alone choose."""
        if self.kind is RouterKind.SIGMOID_BIAS:
            return self.e_score_correction_bias
        return torch.zeros(len(self.linear_router.weight))

    def forward(self, hidden_TH: torch.Tensor) -> Routing:
        logits_TE = float32_linear(hidden_TH, self.linear_router.weight)
        if self.kind is RouterKind.SIGMOID_BIAS:
            scores_TE = logits_TE.sigmoid()
            choice_TE = scores_TE + self.e_score_correction_bias
        else:
            scores_TE = logits_TE.softmax(dim=-1)
            choice_TE = scores_TE
        index_TK = choice_TE.topk(self.experts_per_token, dim=-1).indices
        affinity_TK = scores_TE.gather(1, index_TK)
        if self.normalised:
            affinity_TK = affinity_TK / affinity_TK.sum(dim=-1, keepdim=True)
        return Routing(scores_TE, index_TK, affinity_TK)

    def assign(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Take the bias out of `state`.

        Raises CheckpointError when it is missing, of another shape, or not in float32.
        """
        if self.kind is RouterKind.SIGMOID_BIAS:
            ((buffer, empty),) = self.named_buffers(name, recurse=False)
            self.e_score_correction_bias = take(state, buffer, tuple(empty.shape), (torch.float32,))


def float32_linear(hidden_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """`hidden @ weight.T` in float32, inside an autocast region of training too."""
    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(hidden_TH.float(), weight_EH.float())
    return F.linear(hidden_TH.float(), weight_EH.float())


class StackedExperts(nn.Module):
    """A rank's experts, stacked and transposed: [E,H,2I] (gate columns, then up columns) and
    [E,I,H].
    """

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        experts = shard.held_experts
        hidden = shard.config.hidden_size
        intermediate = shard.config.intermediate_size // shard.moe_tp_degree
        self.block = shard.expert_block
        hidden_blocks, intermediate_blocks = block_grid((hidden, intermediate), self.block)
        gate_up_blocks = (experts, hidden_blocks, 2 * intermediate_blocks)
        down_blocks = (experts, *block_grid((intermediate, hidden), self.block))
        self.gate_up_proj = StoredWeight(
            experts, hidden, 2 * intermediate, scale_shape=gate_up_blocks
        )
        self.down_proj = StoredWeight(experts, intermediate, hidden, scale_shape=down_blocks)

    def weights(self) -> ExpertWeights:
        return ExpertWeights(
            gate_up=self.gate_up_proj.weight,
            gate_up_scale=self.gate_up_proj.scale,
            down=self.down_proj.weight,
            down_scale=self.down_proj.scale,
            block=self.block,
        )


class ExpertMLPs(nn.Module):
    """NxDI's nesting around the expert weights."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        self.mlp_op = StackedExperts(shard)


class DenseMLP(nn.Module):
    """SwiGLU: down(silu(gate) * up), of a rank's channels."""

    def __init__(self, shard: Shard, intermediate_size: int) -> None:
        super().__init__()
        hidden = shard.config.hidden_size
        channels = intermediate_size // shard.tp_degree
        self.gate_proj = Linear(hidden, channels, shard.block(rows=channels))
        self.up_proj = Linear(hidden, channels, shard.block(rows=channels))
        self.down_proj = Linear(channels, hidden, shard.block(columns=channels))

    def forward(self, hidden_BTH: torch.Tensor, step: Step) -> torch.Tensor:
        """[B,T,H] to this rank's part of [B,T,H]."""
        gate_BTI = F.silu(self.gate_proj(hidden_BTH, step.kernels))
        up_BTI = self.up_proj(hidden_BTH, step.kernels)
        return self.down_proj(gate_BTI * up_BTI, step.kernels)


class SparseMoE(nn.Module):
    """A router, a rank's experts, and the expert that every token has where a family has one."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        config = shard.config
        self.shard = shard
        self.router = Router(config)
        self.expert_mlps = ExpertMLPs(shard)
        self.shared_experts: DenseMLP | None = None
        if config.family.architecture.shared_expert:
            self.shared_experts = DenseMLP(shard, config.shared_intermediate_size)

    def forward(self, hidden_BTH: torch.Tensor, step: Step) -> tuple[torch.Tensor, Routing]:
        """[B,T,H] to this rank's part of [B,T,H], and the routing, by the numbers that experts have
        over all ranks; tokens that are padding reach no expert.
        """
        hidden_TH = hidden_BTH.flatten(0, 1)
        routing = self.router(hidden_TH)
        if step.real_BT is not None:
            index_TK = torch.where(step.real_BT.reshape(-1, 1), routing.expert_index_TK, -1)
            routing = routing._replace(expert_index_TK=index_TK)
        out_TH = step.kernels.expert_mlp(
            hidden_TH,
            self._here(routing.expert_index_TK, step.rank),
            routing.affinity_TK,
            self.expert_mlps.mlp_op.weights(),
        )
        out_BTH = out_TH.view_as(hidden_BTH)
        if self.shared_experts is not None:
            out_BTH = out_BTH + self.shared_experts(hidden_BTH, step)
        return out_BTH, routing

    def _here(self, index_TK: torch.Tensor, rank: torch.Tensor | None) -> torch.Tensor:
        """Numbers of the chosen experts among this rank's; -1 for those of other ranks."""
        if self.shard.moe_ep_degree == 1:
            return index_TK
        first: int | torch.Tensor = self.shard.experts.start
        behind: int | torch.Tensor = self.shard.experts.stop
        if rank is not None:
            first = self.shard.first_expert(rank)
            behind = self.shard.first_expert(rank + self.shard.moe_tp_degree)
        here_TK = (index_TK >= first) & (index_TK < behind)
        return torch.where(here_TK, index_TK - first, -1)
