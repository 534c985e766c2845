"""The mixture of experts: sigmoid routing in float32 with a bias that only chooses, and the
experts' MLP.

Shapes: B batch, T tokens (flattened over the batch), H hidden, I intermediate, E experts, K chosen
per token.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import block_grid
from neuron_minimax.model.layers import Kernels, Weight, require_shape


class Routing(NamedTuple):
    """What one layer's router decided about T tokens; padding has index -1 and affinity as
    computed.
    """

    scores_TE: torch.Tensor  # sigmoids without the bias, float32
    expert_index_TK: torch.Tensor  # int64
    affinity_TK: torch.Tensor  # float32, sums to 1 over K


class Router(nn.Module):
    """Top-K of sigmoid + bias; affinities are the chosen sigmoids, without bias, divided by their
    sum.
    """

    e_score_correction_bias: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.linear_router = Weight(config.num_local_experts, config.hidden_size)
        # A buffer, not a parameter: training moves it by a rule of its own, without a gradient.
        self.e_score_correction_bias = nn.Buffer(
            torch.empty(config.num_local_experts, device="meta")
        )

    def forward(self, hidden_TH: torch.Tensor) -> Routing:
        scores_TE = float32_linear(hidden_TH, self.linear_router.weight).sigmoid()
        choice_TE = scores_TE + self.e_score_correction_bias
        index_TK = choice_TE.topk(self.experts_per_token, dim=-1).indices
        chosen_TK = scores_TE.gather(1, index_TK)
        return Routing(scores_TE, index_TK, chosen_TK / chosen_TK.sum(dim=-1, keepdim=True))

    def assign_bias(self, name: str, bias: torch.Tensor | None) -> None:
        """Use this bias, widened to float32. Raises CheckpointError when it is missing or of
        another shape.
        """
        if bias is None:
            raise CheckpointError(f"{name} is missing; convert the checkpoint again")
        require_shape(name, bias, tuple(self.e_score_correction_bias.shape))
        self.e_score_correction_bias = bias.float()


def float32_linear(hidden_TH: torch.Tensor, weight_EH: torch.Tensor) -> torch.Tensor:
    """`hidden @ weight.T` in float32, inside an autocast region of training too."""
    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return F.linear(hidden_TH.float(), weight_EH.float())
    return F.linear(hidden_TH.float(), weight_EH.float())


class ExpertWeights(nn.Module):
    """All experts' weights, stacked and transposed: [E,H,2I] (gate columns, then up columns) and
    [E,I,H].
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.num_local_experts
        hidden = config.hidden_size
        intermediate = config.intermediate_size
        intermediate_blocks, hidden_blocks = block_grid(
            (intermediate, hidden), config.weight_block_size
        )
        gate_up_blocks = (experts, hidden_blocks, 2 * intermediate_blocks)
        # The blocks of w2 [H,I] count its rows in the block's first size, those of w1 and w3 [I,H]
        # in its second.
        down_rows, down_columns = block_grid((hidden, intermediate), config.weight_block_size)[::-1]
        self.gate_up_proj = Weight(experts, hidden, 2 * intermediate, scale_shape=gate_up_blocks)
        self.down_proj = Weight(
            experts, intermediate, hidden, scale_shape=(experts, down_rows, down_columns)
        )


class ExpertMLPs(nn.Module):
    """NxDI's nesting around the expert weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp_op = ExpertWeights(config)


class SparseMoE(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # The stacked weights are transposed, and so are their blocks.
        self.block = (config.weight_block_size[1], config.weight_block_size[0])
        self.router = Router(config)
        self.expert_mlps = ExpertMLPs(config)

    def forward(
        self, hidden_BTH: torch.Tensor, real_BT: torch.Tensor | None, kernels: Kernels
    ) -> tuple[torch.Tensor, Routing]:
        """[B,T,H] to [B,T,H] and the routing; tokens that are not real (padding) reach no
        expert.
        """
        hidden_TH = hidden_BTH.flatten(0, 1)
        routing = self.router(hidden_TH)
        if real_BT is not None:
            index_TK = torch.where(real_BT.reshape(-1, 1), routing.expert_index_TK, -1)
            routing = routing._replace(expert_index_TK=index_TK)
        gate_up = self.expert_mlps.mlp_op.gate_up_proj
        down = self.expert_mlps.mlp_op.down_proj
        weights = (gate_up.weight, gate_up.scale, down.weight, down.scale)
        out_TH = kernels.expert_mlp(
            hidden_TH, routing.expert_index_TK, routing.affinity_TK, *weights, self.block
        )
        return out_TH.view_as(hidden_BTH), routing
