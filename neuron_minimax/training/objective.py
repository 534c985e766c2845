"""The objective of training: next-token loss and load-balancing loss.

Both are sums, so that batches add up exactly.

Shapes: B sequences, T tokens, E experts, K chosen per token, N learned tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.moe import Router, Routing
from neuron_minimax.training.encoding import Batch


class Losses(NamedTuple):
    """Sums over a batch: -log p over learned tokens, balance loss over sequences, and loads."""

    tokens: torch.Tensor  # float32 scalar
    balance: torch.Tensor  # float32 scalar
    loads_LE: torch.Tensor  # how many choices fell on each expert of each layer, int64


def losses(model: Decoder, batch: Batch) -> Losses:
    """Run a batch. Without learned tokens the token loss is zero, with zero gradients."""
    positions_BT = torch.arange(batch.ids_BT.shape[1], device=batch.ids_BT.device).expand_as(
        batch.ids_BT
    )
    hidden_BTH, routings = model.hidden_states(batch.ids_BT, positions_BT, real_BT=batch.real_BT)
    learned = batch.learned_BT[:, 1:]
    logits_NV = model.logits(hidden_BTH[:, :-1][learned])
    tokens = F.cross_entropy(logits_NV.float(), batch.ids_BT[:, 1:][learned], reduction="sum")
    choices = [_choices(routing) for routing in routings]
    balance = torch.stack(
        [
            sequence_balance_loss(routing, chosen, batch.real_BT)
            for routing, chosen in zip(routings, choices, strict=True)
        ]
    )
    return Losses(tokens, balance.mean(), torch.stack([chosen_TE.sum(0) for chosen_TE in choices]))


def sequence_balance_loss(
    routing: Routing, chosen_TE: torch.Tensor, real_BT: torch.Tensor
) -> torch.Tensor:
    """Return the sum over sequences of E/K * sum over experts of (share of choices) * (mean score).

    Scores are normalized per token; a sequence of even load adds 1, one without real tokens 0. It
    is the sequence-wise balance loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20): a sum
    over sequences, unlike a loss over a batch, does not depend on how sequences are batched.
    """
    batch, tokens = real_BT.shape
    real_BT1 = real_BT[..., None].float()
    count_B1 = real_BT1.sum(1).clamp(min=1)
    normalized_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)
    chosen_BTE, normalized_BTE = (
        x.float().view(batch, tokens, -1) for x in (chosen_TE, normalized_TE)
    )
    share_BE = chosen_BTE.sum(1) / count_B1 / routing.expert_index_TK.shape[-1]
    score_BE = (normalized_BTE * real_BT1).sum(1) / count_B1
    return chosen_TE.shape[-1] * (share_BE * score_BE).sum()


@torch.no_grad()
def update_router_bias(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> None:
    """Move each expert's bias by `rate`: up below the mean load, down above it.

    Auxiliary-loss-free balancing (arXiv 2408.15664): the bias only chooses, so it gets no gradient.
    """
    load_E = load_E.to(torch.float32)
    bias_E += rate * torch.sign(load_E.mean() - load_E)


def router_biases(model: Decoder) -> list[torch.Tensor]:
    """Return the selection bias [E] of each layer's router, in order."""
    return [
        module.e_score_correction_bias for module in model.modules() if isinstance(module, Router)
    ]


def _choices(routing: Routing) -> torch.Tensor:
    """Return [T,E] ones where a token chose an expert; padding (index -1) chose none."""
    experts = routing.scores_TE.shape[-1]
    return F.one_hot(routing.expert_index_TK + 1, experts + 1)[..., 1:].sum(1)
