"""Plan the visits of the expert kernel, in torch operations that a tracer lowers.

Shapes: T tokens, K chosen experts per token, V visits, C candidates.
"""

import torch

from neuron_minimax.fp8 import ceil_div


def plan_visits(
    expert_index_TK: torch.Tensor, affinity_TK: torch.Tensor, experts: int, cores: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Plan which experts to visit, each once, and each token's weight for each visit.

    Shapes are static, numbers int32 and float32 only.

    Returns rounds [1,1] int32, the visits of each core; visits [V,1] int32, where visit v belongs
    to core v % cores; and affinity [V,T] float32. V is the most that T*K choices of E experts can
    need, in whole rounds, and one round more. A round that is not full is filled with the first
    expert again, at affinity 0; the visits after the last round are E: none of them is ever made.
    """
    index_TK = expert_index_TK.to(torch.int32)
    choices = index_TK.reshape(-1)
    if choices.numel() < experts:
        repeated = (choices[:, None] == choices[None, :]).tril(-1).any(dim=1)
        # Compared with tensors: a number beside them would make the tracer compare in int64.
        below = torch.full_like(choices, -1)
        beyond = torch.full_like(choices, experts)
        candidates = choices
        needed = (choices > below) & (choices < beyond) & ~repeated
    else:
        candidates = torch.arange(experts, device=choices.device, dtype=torch.int32)
        needed = (choices[:, None] == candidates[None, :]).any(dim=0)
    most = candidates.numel()
    before = torch.ones(most, most, device=choices.device, dtype=torch.int32).tril(-1)
    place = (before * needed[None, :]).sum(dim=1, dtype=torch.int32)
    count = needed.sum(dtype=torch.int32)
    rounds = (torch.arange(0, most, cores, device=choices.device, dtype=torch.int32) < count).sum(
        dtype=torch.int32
    )

    visit_V = torch.arange(
        ceil_div(most, cores) * cores + cores, device=choices.device, dtype=torch.int32
    )
    placed_VC = (place[None, :] == visit_V[:, None]) & needed[None, :]
    expert_V = (placed_VC * candidates[None, :]).sum(dim=1, dtype=torch.int32)
    unmade_V = torch.full_like(visit_V, experts)
    visits_V = torch.where(
        visit_V < count, expert_V, torch.where(visit_V < rounds * cores, expert_V[:1], unmade_V)
    )
    chosen_VTK = (index_TK[None] == visits_V[:, None, None]) & (visit_V < count)[:, None, None]
    affinity_VT = (chosen_VTK * affinity_TK.to(torch.float32)[None]).sum(dim=-1)
    return rounds.reshape(1, 1), visits_V[:, None], affinity_VT
