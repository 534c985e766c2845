"""The router's verdict: which experts the coded probe shows, against what the CPU chooses from the
same hidden states.

Shapes: N rows, H hidden, E experts, K chosen per token.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from neuron_minimax.device_check.schedule import Phase, Row
from neuron_minimax.device_check.verdicts import (
    ProbeMeasurement,
    Status,
    Verdict,
    tool_failure,
    unusable_logits,
)
from neuron_minimax.errors import counted

CHECK = "router"
# An expert that wrote less than this part of what the largest wrote was not chosen: its channel is
# zero.
SHOWN = 1e-6
# A known fault is named as the cause when it explains so many of the wrong tokens.
EXPLAINED = 0.9
# Standard deviations of a router logit under rounding of its inputs; and roundings of an affinity
# on its way to a logit: itself, the expert's output, the sum, the norm, the head.
DEVIATIONS = 3
ROUNDINGS = 8
LEAST_AFFINITY = 1e-4  # relative; float32 sums in another order give less


@dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """The experts chosen from scores: `chosen_NE` bool, and by how much rounding may move each
    expert's `choice_NE`.
    """

    choice_NE: torch.Tensor
    margin_NE: torch.Tensor
    experts_per_token: int

    @cached_property
    def chosen_NE(self) -> torch.Tensor:
        index_NK = self.choice_NE.topk(self.experts_per_token, dim=1).indices
        return torch.zeros_like(self.choice_NE, dtype=torch.bool).scatter(1, index_NK, True)

    def allows(self, chosen_NE: torch.Tensor) -> torch.Tensor:
        """[N]: whether rounding alone can lead to these experts; near-ties may fall either way."""
        least_N = torch.where(chosen_NE, self.choice_NE + self.margin_NE, torch.inf).amin(dim=1)
        most_N = torch.where(chosen_NE, -torch.inf, self.choice_NE - self.margin_NE).amax(dim=1)
        return least_N >= most_N

    @property
    def near_tie_N(self) -> torch.Tensor:
        """[N]: whether the last chosen and the first left out may change places."""
        sure_N = torch.where(self.chosen_NE, self.choice_NE - self.margin_NE, torch.inf).amin(dim=1)
        other_N = torch.where(self.chosen_NE, -torch.inf, self.choice_NE + self.margin_NE).amax(
            dim=1
        )
        return sure_N <= other_N


@dataclass(frozen=True, kw_only=True)
class RouterCase:
    """The layer's gate [E,H] and bias [E] in float32, and what the router was given, [N,H] in
    the compute dtype.
    """

    bias_name: str  # of the bias, as the checkpoint calls it
    gate_EH: torch.Tensor
    bias_E: torch.Tensor
    inputs_NH: torch.Tensor
    experts_per_token: int

    def choice(
        self, *, gate_EH: torch.Tensor | None = None, bias_E: torch.Tensor | None = None
    ) -> ExpertChoice:
        """The choice with this gate and bias in place of the layer's own.

        The hidden state is rounded twice, after the norm and after its weight; the margin is what
        that may do.
        """
        gate_EH = self.gate_EH if gate_EH is None else gate_EH
        bias_E = self.bias_E if bias_E is None else bias_E
        wide_NH = self.inputs_NH.float()
        scores_NE = (wide_NH @ gate_EH.T).sigmoid()
        rounding = torch.finfo(self.inputs_NH.dtype).eps / 2
        deviation_NE = (wide_NH.square() @ gate_EH.square().T).sqrt() * rounding
        margin_NE = DEVIATIONS * deviation_NE * scores_NE * (1 - scores_NE)
        # Sums in float32 in any order, and the rounding of score + bias.
        margin_NE = margin_NE + 4 * torch.finfo(torch.float32).eps * (1 + bias_E.abs())
        return ExpertChoice(
            choice_NE=scores_NE + bias_E,
            margin_NE=margin_NE,
            experts_per_token=self.experts_per_token,
        )

    @property
    def affinity_NE(self) -> torch.Tensor:
        """The chosen sigmoids without the bias over their sum, zero elsewhere."""
        scores_NE = (self.inputs_NH.float() @ self.gate_EH.T).sigmoid() * self.choice().chosen_NE
        return scores_NE / scores_NE.sum(dim=1, keepdim=True)

    def known_faults(self) -> dict[str, ExpertChoice]:
        """The choice of each known fault, by what completes "the choices are those ..."."""
        short_gate_EH = self.gate_EH.bfloat16().float()
        short_bias_E = self.bias_E.bfloat16().float()
        summed_NE = (
            self.inputs_NH.float() @ short_gate_EH.T
        ).sigmoid().bfloat16() + self.bias_E.bfloat16()
        in_bf16 = ExpertChoice(
            choice_NE=summed_NE.float(),
            margin_NE=torch.zeros_like(summed_NE, dtype=torch.float32),
            experts_per_token=self.experts_per_token,
        )
        return {
            f"without {self.bias_name}: it is missing on the device": self.choice(
                bias_E=torch.zeros_like(self.bias_E)
            ),
            f"with {self.bias_name} rounded to BF16": self.choice(bias_E=short_bias_E),
            "with the gate rounded to BF16": self.choice(gate_EH=short_gate_EH),
            f"with the gate and {self.bias_name} rounded to BF16": self.choice(
                gate_EH=short_gate_EH, bias_E=short_bias_E
            ),
            "with scores and bias added in BF16": in_bf16,
        }


def judge_router(
    case: RouterCase,
    rows: Sequence[Row],
    read_NE: tuple[torch.Tensor, torch.Tensor],
    vocabulary_NV: torch.Tensor,
) -> Verdict:
    """Compare what the device's logits show with the CPU's choice.

    `read_NE` are the experts' logits of the CPU and of the device, `vocabulary_NV` all logits of
    the device.
    """
    expected_NE, found_NE = read_NE
    blind = _why_blind(case, expected_NE)
    if blind is not None:
        return blind
    unusable = unusable_logits(CHECK, found_NE, expected_NE)
    if unusable is not None:
        return unusable
    others = vocabulary_NV[:, found_NE.shape[1] :]
    if others.numel() and bool((others.abs() > SHOWN * found_NE.abs().amax()).any()):
        return Verdict(
            check=CHECK,
            status=Status.FAIL,
            finding="logits that belong to no expert are not zero",
            meaning="the head's rows are out of place, or the vocabulary is padded in its middle",
            next_step="check the head's shards: vocabulary and tp degree",
        )
    shown_NE = found_NE > SHOWN * found_NE.amax(dim=1, keepdim=True).clamp_min(1e-30)
    allowed = case.choice()
    wrong_N = ~allowed.allows(shown_NE) | (shown_NE.sum(dim=1) != case.experts_per_token)
    if wrong_N.any():
        return _wrong_experts(case, rows, shown_NE, wrong_N)
    return _affinities(case, found_NE, shown_NE)


def _why_blind(case: RouterCase, expected_NE: torch.Tensor) -> Verdict | None:
    """A failure of the tool when the probe does not show what it is made to show on the CPU."""
    own = case.choice()
    shown_NE = expected_NE > SHOWN * expected_NE.amax(dim=1, keepdim=True).clamp_min(1e-30)
    if not own.allows(shown_NE).all() or bool(
        (shown_NE.sum(dim=1) != case.experts_per_token).any()
    ):
        return tool_failure(
            CHECK,
            "the coded experts are not visible in the CPU's own logits",
            "choose another layer with --layer; report the layer's norm before the experts",
        )
    everywhere = case.gate_EH.shape[0] == case.experts_per_token
    if everywhere or len({tuple(row) for row in own.chosen_NE.tolist()}) < 2:
        return tool_failure(
            CHECK,
            "every token has the same experts, so nothing can be seen",
            "choose another layer with --layer",
        )
    without = case.choice(bias_E=torch.zeros_like(case.bias_E))
    spread = float(case.bias_E.max() - case.bias_E.min())
    if spread > 0 and bool(own.allows(without.chosen_NE).all()):
        return tool_failure(
            CHECK,
            f"{case.bias_name} (spread {spread:.3g}) changes no token's experts, so a lost "
            "one is not seen",
            "choose another layer with --layer",
        )
    return None


def _wrong_experts(
    case: RouterCase, rows: Sequence[Row], shown_NE: torch.Tensor, wrong_N: torch.Tensor
) -> Verdict:
    own_NE = case.choice().chosen_NE
    count = int(wrong_N.sum())
    total = len(wrong_N)
    example = int(wrong_N.nonzero()[0])
    counts = shown_NE.sum(dim=1)
    finding = (
        f"the device chose experts {_numbers(shown_NE[example] & ~own_NE[example])} where the CPU "
        f"chose {_numbers(own_NE[example] & ~shown_NE[example])} in the first of {count} wrong "
        f"tokens (of {total}; {_phases(rows, wrong_N)}); most often differing: "
        f"{_most_often(shown_NE, own_NE, wrong_N)}"
    )
    measured = ProbeMeasurement(
        what="tokens with other experts than rounding allows",
        difference=float(count),
        tolerance=0.0,
        source="near-ties by rounding of the hidden state are not counted",
    )
    odd = sorted(set(counts[wrong_N].tolist()) - {case.experts_per_token})
    if odd:
        return Verdict(
            check=CHECK,
            status=Status.FAIL,
            measured=measured,
            finding=f"{finding}; tokens show {odd} experts instead of {case.experts_per_token}",
            meaning="outputs of experts are lost, doubled or of another sign: their shards, or "
            "the sum over ranks",
            next_step="repeat with --moe-ep-degree 1 and with --moe-tp-degree 1 to see which of "
            "the two it is",
        )
    cause = _cause(case, shown_NE, wrong_N)
    if cause is None:
        meaning = (
            "no known fault explains it: experts may be out of place (their order over the ranks)"
        )
        step = "compare the order of experts per rank; repeat with --moe-ep-degree 1"
    else:
        meaning = f"the choices are those {cause}"
        step = (
            "look for the parameter in the compiled graph's inputs and its dtype after NxDI's "
            "layout transformation; believe no later check before this one passes"
        )
    return Verdict(
        check=CHECK,
        status=Status.FAIL,
        finding=finding,
        measured=measured,
        meaning=meaning,
        next_step=step,
    )


def _cause(case: RouterCase, shown_NE: torch.Tensor, wrong_N: torch.Tensor) -> str | None:
    """The known fault that explains the wrong tokens and contradicts no other; the first that
    explains most.
    """
    explained = {
        cause: float(choice.allows(shown_NE).float().mean())
        * float(choice.allows(shown_NE)[wrong_N].float().mean())
        for cause, choice in case.known_faults().items()
    }
    best = max(explained, key=lambda cause: explained[cause])
    return best if explained[best] >= EXPLAINED else None


def _affinities(case: RouterCase, found_NE: torch.Tensor, shown_NE: torch.Tensor) -> Verdict:
    """The right experts are chosen: are they weighed as the CPU weighs them?"""
    same_N = (shown_NE == case.choice().chosen_NE).all(dim=1)
    expected_NE = case.affinity_NE
    weighed_NE = found_NE * shown_NE / (found_NE * shown_NE).sum(dim=1, keepdim=True)
    relative_NE = (weighed_NE - expected_NE).abs() / expected_NE.clamp_min(1e-30)
    error_N = torch.where(shown_NE, relative_NE, 0.0).amax(dim=1)
    tolerance = max(ROUNDINGS * torch.finfo(case.inputs_NH.dtype).eps, LEAST_AFFINITY)
    largest = float(error_N[same_N].max()) if same_N.any() else float("inf")
    ties = int((~same_N).sum())
    tail = f"; {ties} near-ties fell the other way" if ties else ""
    measured = ProbeMeasurement(
        what="largest relative difference of an affinity",
        difference=largest,
        tolerance=tolerance,
        source=f"{ROUNDINGS} steps of BF16"
        if tolerance > LEAST_AFFINITY
        else "the least for float32",
    )
    if largest <= tolerance:
        seen = int(shown_NE.any(dim=0).sum())
        experts = shown_NE.shape[1]
        chosen = f"{seen} of {experts} experts were chosen"
        same = counted(len(same_N), "token")
        finding = f"{same} with the CPU's experts and affinities ({chosen}){tail}"
        return Verdict(check=CHECK, status=Status.PASS, finding=finding, measured=measured)
    biased_NE = case.choice().choice_NE * shown_NE
    biased_NE = biased_NE / biased_NE.sum(dim=1, keepdim=True)
    is_biased = bool(((weighed_NE - biased_NE).abs() <= tolerance * biased_NE.abs())[same_N].all())
    return Verdict(
        check=CHECK,
        status=Status.FAIL,
        measured=measured,
        finding=f"the experts are the CPU's, their affinities are not{tail}",
        meaning=f"the affinities are those with {case.bias_name} in them; it may only choose"
        if is_biased
        else "affinities are normalised differently, or an expert's output is",
        next_step="look at normalize_top_k_affinities and at the router's activation in the "
        "NeuronConfig",
    )


def _numbers(chosen_E: torch.Tensor) -> list[int]:
    return chosen_E.nonzero().flatten().tolist()


def _phases(rows: Sequence[Row], wrong_N: torch.Tensor) -> str:
    """The numbers of wrong tokens in each phase, as text."""
    parts = []
    for phase in Phase:
        here_N = torch.tensor([row.phase is phase for row in rows])
        if here_N.any():
            parts.append(f"{phase} {int((wrong_N & here_N).sum())} of {int(here_N.sum())}")
    return ", ".join(parts)


def _most_often(shown_NE: torch.Tensor, own_NE: torch.Tensor, wrong_N: torch.Tensor) -> str:
    """The experts that are chosen or left out wrongly in most tokens."""
    counts = Counter(
        {
            expert: int(n)
            for expert, n in enumerate((shown_NE ^ own_NE)[wrong_N].sum(dim=0).tolist())
            if n
        }
    )
    return ", ".join(
        f"{expert} ({counted(count, 'token')})" for expert, count in counts.most_common(4)
    )
