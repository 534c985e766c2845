"""What is done about a step that would spoil the weights: a loss or gradient that is not finite, or
a loss that leaps.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from neuron_minimax.errors import TrainingError

WINDOW = 50  # steps that a loss is held against
LEAST = 20  # of them, or nothing is known yet
LEAST_LEAP = 1.0  # nats; small losses double from one batch to the next
MOST_IN_A_ROW = 10  # of bad steps that are skipped


class OnBadStep(StrEnum):
    """The end of the run, or the next step with the weights as they are."""

    STOP = "stop"
    SKIP = "skip"

    @classmethod
    def of(cls, name: str) -> "OnBadStep":
        """Return the choice of that name. Raises TrainingError when it is unknown."""
        try:
            return cls(name)
        except ValueError:
            raise TrainingError(
                f"on_bad_step is {name!r}; expected {', '.join(cls)}", usage=True
            ) from None


@dataclass(frozen=True, kw_only=True)
class Guard:
    """A rule for bad steps. A loss is a spike when it is more than `spike_factor` times the median
    of the last steps, and a nat above it; 0 takes every finite loss.
    """

    on_bad_step: OnBadStep = OnBadStep.STOP
    spike_factor: float = 3.0

    def __post_init__(self) -> None:
        if self.spike_factor and not 1 < self.spike_factor < math.inf:
            raise TrainingError(
                f"spike_factor is {self.spike_factor}; expected more than 1, or 0 for none",
                usage=True,
            )

    def problem(
        self, loss: float, norm: float, history: Sequence[float], skipped: Collection[int]
    ) -> str | None:
        """Return what is wrong with a step after `history`, of which `skipped` (from 1) left no
        trace in the weights; None when it is good.
        """
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss:g} and the gradient's norm {norm:g}"
        first = max(0, len(history) - WINDOW)
        recent = [
            past
            for step, past in enumerate(history[first:], start=first + 1)
            if step not in skipped
        ]
        if not self.spike_factor or len(recent) < LEAST:
            return None
        median = statistics.median(recent)
        if loss <= max(self.spike_factor * median, median + LEAST_LEAP):
            return None
        return (
            f"the loss is {loss:.4g}, more than {self.spike_factor:g} times the median "
            f"{median:.4g} of the last {len(recent)} steps (--spike-factor 0 takes it)"
        )


def bad_in_a_row(step: int, skipped: Collection[int], overflows: Collection[int]) -> int:
    """Return how many bad steps are among those that were skipped, one after the other, up to
    `step`. `overflows`, which found FP16's scale, are skipped but not bad.
    """
    found = 0
    while step in skipped:
        found += step not in overflows
        step -= 1
    return found
