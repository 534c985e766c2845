"""The options that decide the result of a run, and the learning rate of each step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.families.family import LayerKind
from neuron_minimax.inspection.document import Rendered

# Of a config.json that names none. A family that is balanced by its router's bias needs little.
AUX_LOSS_ALPHA = 2.5e-4
# Under these names config.json says how strong the balance loss is. The first is MiniMind 2's, in
# the units of `objective.balance_loss`; that of the second does not divide by the chosen experts.
COEFFICIENT = "router_aux_loss_coef"
ALPHA_FIELDS = ("aux_loss_alpha", COEFFICIENT)
# What a run that goes on from a chosen state may change; everything else makes it another run.
CHANGEABLE = (
    "learning_rate",
    "final_learning_rate_share",
    "weight_decay",
    "betas",
    "clip_norm",
    "aux_loss_alpha",
    "seq_aux",
    "router_bias_rate",
    "micro_batch_tokens",
    "autocast",
    "fp16",
)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Everything that decides the result of a run, except the data and the model's config.

    `batch_size` counts rows of data per step, over all processes; `micro_batch_tokens` only how
    many tokens, padding included, go through the model at once. The gradients of these micro
    batches add up to that of the whole batch. `aux_loss_alpha` and `seq_aux` are those of
    `objective.balance_loss`; None stands for what config.json says. `autocast` computes matrix
    products in BF16, `fp16` in FP16 with a loss that is scaled.
    """

    steps: int = 2000
    batch_size: int = 16
    micro_batch_tokens: int = 1024
    max_tokens: int = 512
    learning_rate: float = 1.5e-3
    final_learning_rate_share: float = 0.02
    warmup_steps: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    aux_loss_alpha: float | None = None
    seq_aux: bool | None = None
    router_bias_rate: float = 1e-3
    router_bias_start: float = 0.0
    initial_deviation: float = 0.04
    autocast: bool = False
    fp16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}; expected at least 1", usage=True
                )
        if self.max_tokens < 2:
            raise TrainingError(
                f"max_tokens is {self.max_tokens}; expected at least 2: nothing predicts the first "
                "token of a sequence",
                usage=True,
            )
        for name in ("learning_rate", "clip_norm", "initial_deviation"):
            if not 0 < getattr(self, name) < math.inf:
                raise TrainingError(
                    f"{name} is {getattr(self, name)}; expected a positive number", usage=True
                )
        if self.aux_loss_alpha is not None and not 0 <= self.aux_loss_alpha < math.inf:
            raise TrainingError(
                f"aux_loss_alpha is {self.aux_loss_alpha}; expected a number from 0 on", usage=True
            )
        if self.autocast and self.fp16:
            raise TrainingError(
                "both BF16 (autocast) and FP16 are asked for; expected one of them", usage=True
            )

    def warmup_warning(self) -> list[str]:
        """Say it in a line when the run ends before it has reached the full learning rate."""
        steps = self.steps
        if steps >= self.warmup_steps:
            return []
        return [
            f"the warm-up takes {counted(self.warmup_steps, 'step')}, the run has {steps}: the "
            f"learning rate reaches {self.learning_rate * steps / self.warmup_steps:.3g}, not "
            f"{self.learning_rate:g}; to reach it: --warmup-steps {steps // 10}"
        ]

    def of_model(self, config: ModelConfig) -> "TrainingOptions":
        """Fill in what config.json decides. Raises TrainingError when it holds no number there."""
        alpha = self.aux_loss_alpha
        seq_aux = self.seq_aux
        field = next((name for name in ALPHA_FIELDS if name in config.raw), None)
        if alpha is None:
            found = AUX_LOSS_ALPHA if field is None else config.raw[field]
            if isinstance(found, bool) or not isinstance(found, int | float):
                raise TrainingError(f"config.json: {field} is {found!r}; expected a number")
            alpha = float(found) * (_per_coefficient(config) if field == COEFFICIENT else 1.0)
        if seq_aux is None:  # a coefficient is of all tokens at once
            seq_aux = field != COEFFICIENT and bool(config.raw.get("seq_aux", True))
        return replace(self, aux_loss_alpha=alpha, seq_aux=seq_aux)


def _per_coefficient(config: ModelConfig) -> float:
    """Return the `aux_loss_alpha` that a `router_aux_loss_coef` of 1 stands for."""
    if not config.family.architecture.has_experts:
        return 1.0  # nothing is balanced
    layers = 1 if config.family.sums_router_aux_loss else len(config.layers_of(LayerKind.SPARSE))
    return config.num_experts_per_tok / max(1, layers)


@dataclass(frozen=True, kw_only=True)
class Change(Rendered):
    """An option that a run was given at another value when it went on after `step`."""

    step: int
    name: str
    before: Any
    after: Any

    def render(self) -> str:
        return f"{self.name} {self.after} from step {self.step + 1} on, {self.before} before"


class Schedule:
    """The learning rate of each step of a run, which may have been lengthened.

    It rises linearly over `warmup_steps`, then falls along a cosine to `final_learning_rate_share`
    at the last step. A lengthened run rises in as many steps from where it was to the cosine of its
    new length.
    """

    def __init__(self, options: TrainingOptions, changes: Sequence[Change] = ()) -> None:
        self.options = options
        lengths = [change for change in changes if change.name == "steps"]
        first = lengths[0].before if lengths else options.steps
        # (the step after which it holds, the number of steps)
        self._stretches = [(0, first), *((change.step, change.after) for change in lengths)]

    def share(self, step: int) -> float:
        """The share of the full learning rate that step `step` (from 0) takes."""
        return self._share(step, len(self._stretches) - 1)

    def _share(self, step: int, stretch: int) -> float:
        start, steps = self._stretches[stretch]
        warmup = self.options.warmup_steps
        if step < start:
            return self._share(step, stretch - 1)
        if stretch == 0 or step - start >= warmup:
            return self._cosine(step, steps)
        before = self._share(start - 1, stretch - 1)
        return before + (self._cosine(step, steps) - before) * (step - start + 1) / warmup

    def _cosine(self, step: int, steps: int) -> float:
        warmup = self.options.warmup_steps
        if step < warmup:
            return (step + 1) / warmup
        done = (step - warmup) / max(1, steps - 1 - warmup)
        low = self.options.final_learning_rate_share
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
