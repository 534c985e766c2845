"""Choosing the next token from one row of logits.

Shapes: V vocabulary, C candidates. The order of operations is that of transformers: penalties,
temperature, top-k, top-p, min-p.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from neuron_minimax.errors import GenerationError
from neuron_minimax.families.family import SAMPLING_RANGES, out_of_range

HEAD = 1024  # tokens that hold the mass of top_p nearly always


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """The options of choosing a token; temperature 0 is greedy, top_k 0 or -1 keeps every token.

    How long an answer may be is not among them: that depends on the prompt and the model.
    `repetition_penalty` divides positive and multiplies negative logits of every token of prompt
    and answer (CTRL, arXiv:1909.05858); `presence_penalty` and `frequency_penalty` are subtracted
    for tokens of the answer, once and per occurrence (OpenAI's definition). The answer's text, not
    the reasoning before it, ends before the first of the `stop` texts; one text may be given alone.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Raises GenerationError with usage=True; a reader of a file raises its own, which names
        the file.
        """
        for name in SAMPLING_RANGES:
            value = getattr(self, name)
            if (
                not isinstance(value, int | float)
                or isinstance(value, bool)
                or not math.isfinite(value)
            ):
                raise _refusal(f"{name} is {value!r}; expected a number")
            problem = out_of_range(name, value)
            if problem:
                raise _refusal(problem)
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < -1:
            raise _refusal(
                f"top_k is {self.top_k!r}; expected a count of tokens, or 0 or -1 for every token"
            )
        if self.seed is not None and (
            not isinstance(self.seed, int) or not -(2**63) <= self.seed < 2**63
        ):
            raise _refusal(f"seed is {self.seed!r}; expected a 64-bit integer")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple) or not all(
            isinstance(text, str) and text for text in stop
        ):
            raise _refusal(f"stop is {self.stop!r}; expected texts that end an answer")
        object.__setattr__(self, "stop", tuple(stop))


def _refusal(problem: str) -> GenerationError:
    return GenerationError(problem, usage=True)


GREEDY = SamplingParams(temperature=0.0)


class Sampler:
    """Chooses the tokens of one sequence, whose random numbers depend on its seed alone."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self.params = params
        self._prompt = prompt_ids
        self._mask: torch.Tensor | None = None
        self._counts: Counter[int] = Counter()
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """Choose a token from logits [V] (any float dtype; -inf forbids one) and remember it.

        Raises GenerationError when the logits hold NaN, or forbid every token.
        """
        scores = self._penalized(logits.detach().to("cpu", torch.float32))
        best = int(scores.argmax())
        if not math.isfinite(float(scores[best])):
            raise GenerationError(
                f"the largest of {scores.numel()} logits is {float(scores[best])}; the model's "
                "output is broken, run `neuron-minimax verify` on the converted checkpoint"
            )
        token = best if self.params.temperature == 0 else self._draw(scores)
        self._counts[token] += 1
        return token

    def distribution(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the candidate tokens [C] and their probabilities [C] in float64."""
        return self._candidates(self._penalized(logits.detach().to("cpu", torch.float32)))

    def _penalized(self, scores: torch.Tensor) -> torch.Tensor:
        params = self.params
        if params.repetition_penalty != 1.0:
            divided = scores / params.repetition_penalty
            multiplied = scores * params.repetition_penalty
            scores = torch.where(
                self._seen(scores.numel()), torch.where(scores > 0, divided, multiplied), scores
            )
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            index = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=torch.float32)
            penalty = params.presence_penalty + params.frequency_penalty * counts
            scores = scores.index_put((index,), scores[index] - penalty)
        return scores

    def _seen(self, vocab_size: int) -> torch.Tensor:
        """Return the mask [V] of the tokens that the prompt and the answer have had."""
        if self._mask is None:
            self._mask = torch.zeros(vocab_size, dtype=torch.bool)
            self._mask[torch.tensor(self._prompt, dtype=torch.int64)] = True
        self._mask[list(self._counts)] = True
        return self._mask

    def _candidates(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        params = self.params
        scaled = (scores - scores.max()) / max(params.temperature, 1e-6)
        weights = scaled.exp()  # the largest is 1
        if 0 < params.top_k < weights.numel():
            weights, tokens = weights.topk(params.top_k)
            total = weights.sum(dtype=torch.float64)
        elif params.top_p < 1:
            total = weights.sum(dtype=torch.float64)
            weights, tokens = _largest(weights, params.top_p * float(total))
        else:
            total = weights.sum(dtype=torch.float64)
            tokens = torch.arange(weights.numel())
        keep = (weights >= params.min_p) & (weights > 0)
        if params.top_p < 1:
            before = weights.cumsum(0, dtype=torch.float64) - weights
            keep &= before < params.top_p * total
        kept = weights[keep].double()
        return tokens[keep], kept / kept.sum()

    def _draw(self, scores: torch.Tensor) -> int:
        tokens, probabilities = self._candidates(scores)
        point = torch.rand((), generator=self._random, dtype=torch.float64)
        place = int(torch.searchsorted(probabilities.cumsum(0), point, right=True))
        return int(tokens[min(place, tokens.numel() - 1)])


def _largest(weights: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest weights and their places, enough to reach `mass`.

    A few of them hold it nearly always; sorting a whole vocabulary is slow.
    """
    if weights.numel() > HEAD:
        values, places = weights.topk(HEAD)
        if float(values.sum(dtype=torch.float64)) >= mass:
            return values, places
    values, places = weights.sort(descending=True, stable=True)
    return values, places


def log_probabilities(
    logits: torch.Tensor, token: int, top: int
) -> tuple[float, list[tuple[int, float]]]:
    """Return the natural-log probability of `token`, and the `top` likeliest tokens with theirs.

    They are those of the raw logits [V], before penalties, temperature and filters, as in vLLM.
    """
    values = logits.detach().to("cpu", torch.float32).log_softmax(0)
    best = values.topk(min(top, values.numel())) if top else None
    pairs = (
        [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    )
    return float(values[token]), pairs


def distinct_ratio(token_ids: Sequence[int], window: int = 50) -> float:
    """Return the share of distinct tokens among the last `window`; repetition falls towards 0."""
    last = list(token_ids)[-window:]
    return len(set(last)) / len(last) if last else 1.0
