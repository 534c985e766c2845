"""What the engine is asked to compute, and what it gives back."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.generation.events import Event
from neuron_minimax.generation.sampling import SamplingOptions
from neuron_minimax.serving.constraints import Constraint
from neuron_minimax.serving.pipeline import Pipeline


class QueueFullError(NeuronMiniMaxError):
    """Too many requests are waiting."""


class DrainingError(NeuronMiniMaxError):
    """The engine finishes what it has and takes nothing new."""


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probability of a token, and of the most probable ones at its place."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True, kw_only=True)
class Output:
    """What one token, or the end, of a request brought. `error`: (kind, message) when it failed."""

    events: list[Event] = field(default_factory=list)
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    error: tuple[str, str] | None = None

    @property
    def last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


@dataclass(eq=False, kw_only=True)
class Job:
    """One answer to compute. `deadline` is in time.monotonic seconds; `receive` is called from the
    engine's thread.
    """

    prompt_ids: Sequence[int]
    options: SamplingOptions
    max_new_tokens: int
    stop_token_ids: frozenset[int]
    pipeline: Pipeline
    receive: Callable[[Output], None]
    deadline: float
    constraint: Constraint | None = None
    top_logprobs: int | None = None  # None: no logprobs at all
    cancelled: bool = False
    arrived: float = 0.0
    cached_tokens: int = 0
    output_tokens: int = 0
