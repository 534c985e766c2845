"""Output that has to follow a grammar, token by token."""

import time

import torch
from llguidance import LLMatcher

from neuron_minimax.serving.grammars import GrammarError

# Seconds of processor time in the engine's thread: what one answer may spend at once, and on
# average per token. Grammars of real tools take a fraction of a millisecond.
BURST = 0.25
PER_TOKEN = 0.01


class Constraint:
    """The grammar's state for one answer, and the time that it has taken.

    The answer may begin with the token `opening` instead, after which the grammar is not asked
    until reasoning has ended.
    """

    def __init__(self, matcher: LLMatcher, opening: int | None = None) -> None:
        self._matcher = matcher
        self._opening = opening
        self._left = BURST

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [V] with -inf for every token that the grammar does not allow now.

        Raises GrammarError when the grammar library gives up, or takes too long.
        """
        started = time.thread_time()
        bias = self._matcher.compute_logit_bias()
        self._left = min(self._left + PER_TOKEN, BURST) - (time.thread_time() - started)
        self._check()
        allowed = torch.frombuffer(bytearray(bias), dtype=torch.uint8)
        if self._opening is not None:
            allowed[self._opening] = 1
        return logits.masked_fill(allowed == 0, -torch.inf)

    def advance(self, token: int) -> None:
        """Take the chosen token. Raises GrammarError as `mask` does."""
        opens = token == self._opening
        self._opening = None
        if opens:
            return
        started = time.thread_time()
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._left -= time.thread_time() - started
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the output cannot follow its grammar: {self._matcher.get_error()}")
        if self._left < 0:
            raise GrammarError(
                "the output's grammar takes too long to follow; use a simpler schema"
            )
