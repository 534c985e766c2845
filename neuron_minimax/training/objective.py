"""The objective of training: next-token loss and load-balancing loss.

Both are sums, so that batches add up exactly.

Shapes: B sequences, T tokens, E experts, K chosen per token, N learned tokens, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from neuron_minimax.families.family import RouterKind
from neuron_minimax.kernels.reference import attend_documents
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.layers import Kernels
from neuron_minimax.model.moe import Routing
from neuron_minimax.training.data.encoding import Batch

PADDING = -1  # the expert of a token that is none


class Losses(NamedTuple):
    """Sums over a batch: -log p over learned tokens, balance loss, and loads.

    The balance loss is that of all layers with experts (L), each times the number of its
    sequences or, where it is of the batch, of its tokens.
    """

    tokens: torch.Tensor  # float32 scalar
    balance: torch.Tensor  # float32 scalar; 0 without experts
    loads_LE: torch.Tensor  # how many choices fell on each expert of each layer, int64


def losses(model: Decoder, batch: Batch, seq_aux: bool = True) -> Losses:
    """Run a batch. Without learned tokens the token loss is zero, with zero gradients."""
    packed = batch.documents_BT is not None
    hidden_BTH, routings = model.hidden_states(
        batch.ids_BT,
        batch.positions_BT,
        real_BT=batch.real_BT,
        kernels=Kernels(attend=attend_documents) if packed else None,
    )
    learned = batch.learned_BT[:, 1:]
    logits_NV = model.logits(hidden_BTH[:, :-1][learned])
    tokens = F.cross_entropy(logits_NV.float(), batch.ids_BT[:, 1:][learned], reduction="sum")
    if not routings:
        return Losses(tokens, tokens.new_zeros(()), batch.ids_BT.new_zeros(0, 0))
    real_BT, routings = by_document(batch, routings)
    choices = [_choices(routing) for routing in routings]
    balance = torch.stack(
        [
            balance_loss(routing, chosen, real_BT, seq_aux)
            for routing, chosen in zip(routings, choices, strict=True)
        ]
    )
    return Losses(tokens, balance.sum(), torch.stack([chosen_TE.sum(0) for chosen_TE in choices]))


def balance_loss(
    routing: Routing, chosen_TE: torch.Tensor, real_BT: torch.Tensor, seq_aux: bool
) -> torch.Tensor:
    """Return E/K * sum over experts of (share of choices) * (mean score) of one layer.

    With `seq_aux` it is the sum over sequences, each of its own shares and means: the
    sequence-wise loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20), MiniMind's `seq_aux`.
    Sums over sequences do not depend on how sequences are batched. Otherwise shares and means are
    those of the batch that goes through the model at once, and the loss counts once for each of
    its tokens. Scores are normalized per token; an even load gives 1 for each sequence or token.
    Padding counts nowhere.
    """
    if not seq_aux:
        real_BT = real_BT.reshape(1, -1)
    batch, tokens = real_BT.shape
    real_BT1 = real_BT[..., None].float()
    count_B1 = real_BT1.sum(1)
    normalized_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)
    chosen_BTE, normalized_BTE = (
        x.float().view(batch, tokens, -1) for x in (chosen_TE, normalized_TE)
    )
    divisor_B1 = count_B1.clamp(min=1)
    share_BE = chosen_BTE.sum(1) / divisor_B1 / routing.expert_index_TK.shape[-1]
    score_BE = (normalized_BTE * real_BT1).sum(1) / divisor_B1
    loss = chosen_TE.shape[-1] * (share_BE * score_BE).sum()
    return loss if seq_aux else loss * count_B1.sum()


@torch.no_grad()
def update_router_bias(bias_E: torch.Tensor, load_E: torch.Tensor, rate: float) -> None:
    """Move each expert's bias by `rate`: up below the mean load, down above it.

    Auxiliary-loss-free balancing (arXiv 2408.15664): the bias only chooses, so it gets no gradient.
    """
    load_E = load_E.to(torch.float32)
    bias_E += rate * torch.sign(load_E.mean() - load_E)


def router_biases(model: Decoder) -> list[torch.Tensor]:
    """Return the selection bias [E] of each layer's router, in order; none where scores alone
    choose.
    """
    return [
        router.e_score_correction_bias
        for router in model.routers
        if router.kind is RouterKind.SIGMOID_BIAS
    ]


def by_document(batch: Batch, routings: list[Routing]) -> tuple[torch.Tensor, list[Routing]]:
    """Return which tokens are real, and the routings, with a row for each document of a batch.

    A document of a packed sequence is balanced as one that has a sequence to itself.
    """
    if batch.documents_BT is None:
        return batch.real_BT, routings
    rows = len(batch.documents_BT)
    numbers_BT = batch.documents_BT + batch.documents * torch.arange(rows).to(batch.ids_BT)[:, None]
    numbers_N = numbers_BT[batch.real_BT].unique_consecutive(return_inverse=True)[1]
    lengths_D = numbers_N.bincount()
    real_DT = torch.arange(int(lengths_D.max()), device=numbers_N.device) < lengths_D[:, None]
    place_DT = torch.zeros_like(real_DT, dtype=torch.int64)
    place_DT[real_DT] = batch.real_BT.flatten().nonzero().flatten()
    place_T = place_DT.flatten()
    return real_DT, [
        Routing(
            routing.scores_TE[place_T],
            routing.expert_index_TK[place_T].where(real_DT.flatten()[:, None], PADDING),
            routing.affinity_TK[place_T],
        )
        for routing in routings
    ]


def _choices(routing: Routing) -> torch.Tensor:
    """Return [T,E] ones where a token chose an expert; padding (index -1) chose none."""
    experts = routing.scores_TE.shape[-1]
    return F.one_hot(routing.expert_index_TK + 1, experts + 1)[..., 1:].sum(1)
