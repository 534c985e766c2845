"""The expert MLP for compiled graphs: one token gathers, a few go block by block, many go expert by expert.

Shapes: T tokens, K chosen experts per token, P = T*K pairs, E experts, H hidden, I intermediate, B tokens per block.
The interface is ExpertMLP of fp8_mlp.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch._higher_order_ops import while_loop

from neuron_minimax.kernels.fp8 import expanded_matmul
from neuron_minimax.kernels.fp8_mlp import BLOCK, check_shapes
from neuron_minimax.kernels.streamed import streamed_columns

Loop = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def streamed_products(
    hidden_KBH: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int],
) -> torch.Tensor:
    """[K,B,H] through the weights of K experts to [K,B,H] float32, codes expanded inside of the products' own loops.

    Neither weights nor products are rounded in between, whatever the dtype of hidden: ExpertMLP's order in float32.
    """
    gate_KBI, up_KBI = streamed_columns(hidden_KBH, gate_up, gate_up_scale, block, parts=2).chunk(2, dim=-1)
    return streamed_columns(F.silu(gate_KBI) * up_KBI, down, down_scale, block)


def single_token_expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int] = BLOCK,
) -> torch.Tensor:
    """One token (T is 1) whose experts are all here: gathered by index inside of the products' loops.

    No index is masked: whatever computes one would be repeated in the innermost loop.
    """
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    index_K = expert_index_TK[0]
    hidden_KBH = hidden_TH.expand(len(index_K), 1, -1)
    first = (gate_up.index_select(0, index_K), _at(gate_up_scale, index_K))
    second = (down.index_select(0, index_K), _at(down_scale, index_K))
    product_KBH = streamed_products(hidden_KBH, *first, *second, block)
    weighted_KH = product_KBH[:, 0] * affinity_TK[0][:, None]
    return weighted_KH.sum(dim=0, keepdim=True).to(hidden_TH.dtype)


def blocked_expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int] = BLOCK,
    *,
    tokens_per_block: int,
    loop: Loop = while_loop,
) -> torch.Tensor:
    """A few tokens: pairs of token and expert are sorted by expert and cut into blocks of one expert each.

    `loop(condition, body, values)` runs over the blocks that exist, so that an expert nobody chose costs nothing.
    """
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    tokens, chosen = expert_index_TK.shape
    experts = gate_up.shape[0]
    index_P = expert_index_TK.reshape(-1)
    index_P = torch.where((index_P >= 0) & (index_P < experts), index_P, experts)
    order_P = index_P.argsort(stable=True)
    count_E = (index_P[:, None] == torch.arange(experts)).sum(dim=0)
    first_pair_E = count_E.cumsum(0) - count_E
    last_block_E = ((count_E + tokens_per_block - 1) // tokens_per_block).cumsum(0)
    affinity_P = affinity_TK.reshape(-1)
    offset_B = torch.arange(tokens_per_block)

    def unfinished(number: torch.Tensor, out_TH: torch.Tensor) -> torch.Tensor:
        return number < last_block_E[-1]

    def one_block(number: torch.Tensor, out_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert = (last_block_E <= number).sum()[None]
        before = torch.where(expert > 0, last_block_E[(expert - 1).clamp(min=0)], 0)
        place_B = (number - before) * tokens_per_block + offset_B
        real_B = place_B < count_E[expert]
        pair_B = order_P[(first_pair_E[expert] + place_B).clamp(max=tokens * chosen - 1)]
        token_B = pair_B // chosen
        hidden_KBH = hidden_TH[token_B][None]
        first = (gate_up.index_select(0, expert), _at(gate_up_scale, expert))
        second = (down.index_select(0, expert), _at(down_scale, expert))
        product_BH = streamed_products(hidden_KBH, *first, *second, block)[0]
        weighted_BH = product_BH * torch.where(real_B, affinity_P[pair_B], 0.0)[:, None]
        return number + 1, out_TH.index_add(0, token_B, weighted_BH)

    start = torch.zeros((), dtype=torch.int64), torch.zeros_like(hidden_TH, dtype=torch.float32)
    return loop(unfinished, one_block, start)[1].to(hidden_TH.dtype)


def expert_by_expert_mlp(
    hidden_TH: torch.Tensor,
    expert_index_TK: torch.Tensor,
    affinity_TK: torch.Tensor,
    gate_up: torch.Tensor,
    gate_up_scale: torch.Tensor | None,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    block: tuple[int, int] = BLOCK,
    *,
    loop: Loop = while_loop,
) -> torch.Tensor:
    """Many tokens: each chosen expert is expanded once, and a library multiplies it with just the tokens that chose it.

    `loop(condition, body, values)` runs over the experts that were chosen.
    """
    check_shapes(hidden_TH, expert_index_TK, gate_up, gate_up_scale, down, down_scale, block)
    tokens, chosen = expert_index_TK.shape
    experts = gate_up.shape[0]
    index_TK = torch.where((expert_index_TK >= 0) & (expert_index_TK < experts), expert_index_TK, experts)
    order_P = index_TK.reshape(-1).argsort(stable=True)
    place_TK = order_P.argsort().view_as(index_TK)
    count_E = (index_TK.reshape(-1, 1) == torch.arange(experts)).sum(dim=0)
    first_pair_E = count_E.cumsum(0) - count_E
    expert_N = (count_E == 0).to(torch.int8).argsort(stable=True)
    chosen_experts = (count_E > 0).sum()

    def unfinished(number: torch.Tensor, out_TH: torch.Tensor) -> torch.Tensor:
        return number < chosen_experts

    def one_expert(number: torch.Tensor, out_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        expert = expert_N.index_select(0, number[None])
        first_pair = first_pair_E.index_select(0, expert)
        rows = int(count_E.index_select(0, expert).item())
        torch._check(rows >= 1)
        torch._check(rows <= tokens * chosen)
        hidden_BH = hidden_TH[order_P[first_pair + torch.arange(rows)] // chosen]
        gate_HI, up_HI = gate_up.index_select(0, expert)[0].chunk(2, dim=1)
        gate_scale, up_scale = (
            (None, None) if gate_up_scale is None else gate_up_scale.index_select(0, expert)[0].chunk(2, dim=1)
        )
        gate_BI = expanded_matmul(hidden_BH, gate_HI, gate_scale, block)
        activated_BI = F.silu(gate_BI) * expanded_matmul(hidden_BH, up_HI, up_scale, block)
        second_scale = None if down_scale is None else down_scale.index_select(0, expert)[0]
        product_BH = expanded_matmul(activated_BI, down.index_select(0, expert)[0], second_scale, block)
        mine_TK = index_TK == expert
        row_T = torch.where(mine_TK, place_TK - first_pair, 0).amax(dim=1)
        share_T1 = torch.where(mine_TK, affinity_TK, 0.0).sum(dim=1, keepdim=True)
        return number + 1, out_TH + product_BH[row_T].float() * share_T1

    begin = torch.zeros((), dtype=torch.int64), torch.zeros_like(hidden_TH, dtype=torch.float32)
    return loop(unfinished, one_expert, begin)[1].to(hidden_TH.dtype)


def _at(scale: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if scale is None else scale.index_select(0, index)
