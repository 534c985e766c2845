"""Output that has to follow a grammar, token by token."""

import time
from collections.abc import Sequence

import torch
from llguidance import LLMatcher

from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.grammars import GrammarError

# Seconds of processor time in the engine's thread: what one answer may spend at once, and on
# average per token. Grammars of real tools take a fraction of a millisecond.
BURST = 0.25
PER_TOKEN = 0.01
CLOSINGS = ("}", "]", '"')  # of JSON; within a text the former two end nothing
ANYTHING = "a"  # what may follow where something has not ended


class Endings:
    """The texts that end something which a grammar has open, as tokens; the stops of the model."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        form = tokenizer.chat_format
        texts = (form.reasoning_tags[1], *form.call_endings, *CLOSINGS)
        self.all = [tokenizer.encode(text) for text in texts]
        self.anything = tokenizer.encode(ANYTHING)
        self.stops = list(tokenizer.stop_token_ids)


class Constraint:
    """The grammar's state for one answer, and the time that it has taken.

    A stop waits until the grammar is satisfied: where the model would rather end its turn than say
    anything that is allowed, it is led to the end of what is open, the reasoning first of all.
    """

    def __init__(self, matcher: LLMatcher, endings: Endings) -> None:
        self._matcher = matcher
        self._endings = endings
        self._ending: Sequence[int] = ()  # what is left of the one that has begun
        self._left = BURST

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [V] with -inf for every token that the grammar does not allow now.

        Raises GrammarError when the grammar library gives up, or takes too long.
        """
        started = time.thread_time()
        bias = self._matcher.compute_logit_bias()
        allowed = torch.frombuffer(bytearray(bias), dtype=torch.uint8)
        masked = logits.masked_fill(allowed == 0, -torch.inf)
        stops = self._endings.stops
        if not allowed[stops].any() and logits[stops].max() > masked.max():
            self._ending = self._next_ending(allowed)
            if self._ending:
                masked[torch.arange(len(masked)) != self._ending[0]] = -torch.inf
        self._left = min(self._left + PER_TOKEN, BURST) - (time.thread_time() - started)
        self._check()
        return masked

    def advance(self, token: int) -> None:
        """Take the chosen token. Raises GrammarError as `mask` does."""
        goes_on = bool(self._ending) and token == self._ending[0]
        self._ending = self._ending[1:] if goes_on else ()
        started = time.thread_time()
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)
        self._left -= time.thread_time() - started
        self._check()

    def _next_ending(self, allowed: torch.Tensor) -> Sequence[int]:
        """Return the rest of the ending under way, or one that the grammar allows and behind which
        it does not allow just anything; none if there is none.
        """
        if self._ending and allowed[self._ending[0]]:
            return self._ending
        for ending in self._endings.all:
            taken = self._matcher.validate_tokens([*ending, *self._endings.anything])
            if allowed[ending[0]] and taken == len(ending):
                return ending
        return ()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(f"the output cannot follow its grammar: {self._matcher.get_error()}")
        if self._left < 0:
            raise GrammarError(
                "the output's grammar takes too long to follow; use a simpler schema"
            )
