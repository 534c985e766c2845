"""NxDI mixture of experts for MiniMax-M2: a float32 sigmoid router whose bias only chooses, over NxD's expert layers.

Shapes: T tokens, H hidden, E experts, K chosen per token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from neuron_minimax.backends.neuron import nxdi


class Router(nxdi.RouterTopK):
    """Top-K of sigmoid + bias in float32; the affinities are the unbiased sigmoids over the sum of the chosen ones.

    Gate and bias stay float32 under any cast of the model: a bias of 4.7 to 9.5 has BF16 steps of 0.03 to 0.06.
    The bias is a parameter, because XLA folds constants.
    """

    def __init__(self, *, experts: int, experts_per_token: int, hidden_size: int) -> None:
        super().__init__(
            num_experts=experts,
            top_k=experts_per_token,
            hidden_size=hidden_size,
            dtype=torch.float32,
            act_fn="sigmoid",
            sequence_dimension=1,
        )
        self.e_score_correction_bias = nn.Parameter(torch.zeros(experts, dtype=torch.float32), requires_grad=False)

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Router logits [T,E] float32, affinities [T,E] in the dtype of the hidden states, and chosen experts [T,K].

        NxD's experts would normalise affinities after a cast to BF16; here the division comes first, in float32.
        """
        logits_TE = self.get_router_logits(hidden_states)
        scores_TE = torch.sigmoid(logits_TE)
        index_TK = torch.topk(scores_TE + self.e_score_correction_bias, self.top_k, dim=1).indices
        affinities_TE = scores_TE / scores_TE.gather(1, index_TK).sum(dim=1, keepdim=True)
        return logits_TE, affinities_TE.to(hidden_states.dtype), index_TK.detach().to(torch.long)

    def _apply(self, fn: Callable, recurse: bool = True) -> "Router":
        """Moves between devices reach the router, casts do not."""

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            applied = fn(tensor)
            return applied if applied.dtype == tensor.dtype else tensor.to(applied.device)

        return super()._apply(keep_dtype, recurse)


def build_moe(config: Any) -> nn.Module:
    """NxDI's MoE block with this project's router; its experts are NxD's, block-scaled once NxDI quantizes them."""
    block = nxdi.initialize_moe_module(config=config)
    model = config.model_config
    block.router = Router(
        experts=model.num_local_experts, experts_per_token=model.num_experts_per_tok, hidden_size=model.hidden_size
    )
    return block.eval()
