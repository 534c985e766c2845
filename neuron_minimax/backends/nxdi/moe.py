"""NxDI mixture of experts: this project's float32 router, of the kind that a family has, over NxD's
expert layers.

Shapes: T tokens, H hidden, E experts, K chosen per token.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from neuron_minimax.backends.nxdi import imports
from neuron_minimax.backends.nxdi.padding import Padding
from neuron_minimax.config import ModelConfig
from neuron_minimax.families.family import Role, RouterKind
from neuron_minimax.kernels.reference import ExpertMLP, ExpertWeights
from neuron_minimax.planner.memory import NEURON_E4M3_MAX, largest_code

# NxD's name for what a kind makes scores of logits with.
ACTIVATIONS = {RouterKind.SIGMOID_BIAS: "sigmoid", RouterKind.SOFTMAX: "softmax"}


class NeuronRouter(imports.RouterTopK):
    """Top-K of the scores in float32; the affinities are the scores, divided by the sum of the
    chosen ones where the config says so. With sigmoid scores a bias is added to choose, and only
    to choose.

    Gate and bias stay float32 under any cast of the model: a bias of 4.7 to 9.5 has BF16 steps of
    0.03 to 0.06. The bias is a parameter, because XLA folds constants.

    Where ranks hold experts of zeros, it knows the others alone, and names them by their places.
    """

    def __init__(self, model: ModelConfig, padding: Padding) -> None:
        self.kind = model.family.architecture.router
        self.padding = padding
        super().__init__(
            num_experts=model.num_local_experts,
            top_k=model.num_experts_per_tok,
            hidden_size=model.hidden_size,
            dtype=torch.float32,
            act_fn=ACTIVATIONS[self.kind],
            sequence_dimension=1,
        )
        self.normalised = model.norm_topk_prob
        if self.kind is RouterKind.SIGMOID_BIAS:
            # Values that differ, because a compiler may prove that adding equal ones changes no
            # choice, and drop the bias.
            self.e_score_correction_bias = nn.Parameter(
                torch.arange(model.num_local_experts, dtype=torch.float32), requires_grad=False
            )

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits [T,E] float32, affinities [T,E] in the dtype of the hidden states, E with
        experts of zeros, and chosen experts [T,K].

        NxD's experts would normalise affinities after a cast to BF16; here the division comes
        first, in float32.
        """
        logits_TE = self.get_router_logits(hidden_states)
        if self.kind is RouterKind.SIGMOID_BIAS:
            scores_TE = torch.sigmoid(logits_TE)
            choice_TE = scores_TE + self.e_score_correction_bias
        else:
            scores_TE = torch.softmax(logits_TE, dim=1)
            choice_TE = scores_TE
        index_TK = torch.topk(choice_TE, self.top_k, dim=1).indices
        affinities_TE = scores_TE
        if self.normalised:
            affinities_TE = scores_TE / scores_TE.gather(1, index_TK).sum(dim=1, keepdim=True)
        affinities_TE = self.padding.pad(affinities_TE.to(hidden_states.dtype), 1)
        return logits_TE, affinities_TE, self.padding.places(index_TK.detach().to(torch.long))

    def _apply(self, fn: Callable, recurse: bool = True) -> "NeuronRouter":
        """Moves between devices reach the router, casts do not."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)


class KernelExperts(imports.ExpertMLPsV2):
    """NxD's experts, whose token generation is one call of an expert kernel over the rank's own FP8
    weights.

    NxD dequantizes block-scaled weights to BF16 in front of its products, and refuses a few tokens
    with expert parallelism; the kernel reads FP8 and skips the experts of other ranks. Context
    encoding is NxD's.
    """

    def __init__(self, experts: imports.ExpertMLPsV2, expert_mlp: ExpertMLP) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(
            experts.__dict__
        )  # the same submodules and settings, under the same names
        self.expert_mlp = expert_mlp

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_affinities: torch.Tensor,
        expert_index: torch.Tensor,
        seq_len: int,
        *others: Any,
        **named: Any,
    ) -> torch.Tensor:
        """[T,H] to this rank's share of [T,H], which NxD's block sums over the ranks; affinities
        [T,E], index [T,K].
        """
        if seq_len != 1:
            return super().forward(
                hidden_states, expert_affinities, expert_index, seq_len, *others, **named
            )
        layers = self.get_mlp_op()
        return self.expert_mlp(
            hidden_states,
            self.local_index(expert_index),
            expert_affinities.gather(1, expert_index).float(),
            ExpertWeights(
                layers.gate_up_proj.weight,
                layers.gate_up_proj.scale,
                layers.down_proj.weight,
                layers.down_proj.scale,
            ),
        )

    def local_index(self, expert_index_TK: torch.Tensor) -> torch.Tensor:
        """Numbers [T,K] of the chosen experts on this rank; -1 for those of other ranks."""
        if self.moe_expert_model_parallel_group.size() == 1:
            return expert_index_TK
        local_E = self.get_spmd_rank().get_local_expert_indices().reshape(-1)
        here_TKE = expert_index_TK[..., None] == local_E
        places_E = torch.arange(1, local_E.numel() + 1, device=local_E.device, dtype=torch.int32)
        return (here_TKE * places_E).sum(dim=-1, dtype=torch.int32) - 1


def expert_kernel(name: str, cores: int, ocp_codes: bool = False) -> ExpertMLP | None:
    """The kernel for token generation, on `cores` physical cores per rank; None for "torch", NxD's
    own operations.
    """
    if name == "torch":
        return None
    from neuron_minimax.kernels.nki import expert_mlp

    return partial(expert_mlp.expert_mlp, cores=cores, ocp_codes=ocp_codes)


def build_moe(config: Any, layer: int) -> nn.Module:
    """NxDI's MoE block with this project's router; its experts are NxD's, block-scaled once NxDI
    quantizes them, or by a configuration of their own where their scales are expanded.

    With `config.expert_kernel` "nki" their token generation is this project's kernel.
    """
    block = imports.initialize_moe_module(config=with_nxdis_names(config))
    block.router = NeuronRouter(config.model_config, config.padding)
    if config.expands_scales(layer):
        expand(block.expert_mlps.get_mlp_op(), config.model_config)
    kernel = expert_kernel(
        config.expert_kernel,
        config.neuron_config.logical_nc_config,
        ocp_codes=largest_code(config.model_config) > NEURON_E4M3_MAX,
    )
    if kernel is not None:
        block.expert_mlps = KernelExperts(block.expert_mlps, kernel)
    return block.eval()


def expand(experts: nn.Module, model: ModelConfig) -> None:
    """Quantize NxD's expert layers so that a scale covers a block of the hidden size and one
    channel: those of gate_up [E,H,2I] are [E,H/128,2I], those of down [E,I,H] are [E,I,H/128].

    NxDI has one block axis for all layers that it quantizes, and these need two; it leaves alone
    what is quantized already.
    """
    rows, columns = model.weight_block_size  # of the published [I,H] and [H,I]
    for role, quantized, hidden_axis, size in (
        (Role.EXPERT_GATE, imports.QuantizedExpertFusedColumnParallel, 1, columns),
        (Role.EXPERT_DOWN, imports.QuantizedExpertFusedRowParallel, 2, rows),
    ):
        name = model.family.module_name(role)
        options = {
            **imports.get_default_blockwise_custom_qconfig_dict(),
            "quantized_dtype": imports.QuantizedDtype.F8E4M3,
            "block_axis": [hidden_axis],
            "block_size": [size],
        }
        setattr(experts, name, quantized.from_float(getattr(experts, name), options))


def with_nxdis_names(config: Any) -> Any:
    """A copy of the config, its neuron_config shared, with the names under which NxDI looks the
    sizes of experts up: a family may have others, or give these to its dense layers.
    """
    model = config.model_config
    named = copy.copy(config)
    named.num_local_experts = config.padding.held
    named.num_experts_per_tok = model.num_experts_per_tok
    named.intermediate_size = model.intermediate_size
    named.n_shared_experts = 0
    return named
