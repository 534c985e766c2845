"""What the slots of a backend hold, and the longest beginning of a prompt among them.

Shapes: S slots, C positions, T tokens of a prompt.
"""

import time
from collections.abc import Hashable, Sequence

import numpy as np

from neuron_minimax.backends.base import Backend


class PrefixCache:
    """The caches of a backend's slots by the tokens in them, so that a prompt starts from the
    longest beginning of it that any slot holds, where the backend can do that.

    A slot's tokens are of one scope, and only prompts of that scope use them. They are compared
    with a prompt as they are: that takes as long as reading them, and no index has to follow what
    becomes of the caches.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._can = backend.capabilities
        slots = self._can.slots
        self._tokens_SC = np.empty((slots, self._can.seq_len), np.int64)
        self._lengths = [0] * slots
        self._scopes: list[Hashable] = [None] * slots
        self._used_at = [0.0] * slots
        # Of the prompt that a slot has worked for last: its length, and what may be reused of it.
        self._prompt_lengths = [0] * slots
        self._reusable = [np.empty(0, np.int64)] * slots

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return self._lengths[slot]

    def append(self, slot: int, tokens: Sequence[int] | np.ndarray) -> None:
        """Note that a slot holds more tokens, now that they are computed."""
        start = self._lengths[slot]
        self._lengths[slot] += len(tokens)
        self._tokens_SC[slot, start : self._lengths[slot]] = tokens
        self._used_at[slot] = time.monotonic()

    def clear(self) -> None:
        """Note that no slot holds anything."""
        self._lengths = [0] * self._can.slots

    def take(
        self, free: Sequence[int], prompt_ids: Sequence[int], scope: Hashable, *, whole: bool
    ) -> int:
        """Choose one of the free slots for a prompt, and leave in it what both begin with; nothing
        where the prompt is to be encoded as a `whole`.

        That is the slot which holds most of the prompt's beginning. Where the others' tokens can be
        copied it is taken only if the prompt that it was for goes on in this one, but for what fits
        the smallest bucket; else the one that was used least recently, so that one conversation
        does not overwrite another that has the same system prompt.
        """
        # The last token is always computed: its logits are in no cache.
        last = 0 if whole or not self._can.chunked_encoding else len(prompt_ids) - 1
        reusable_T = np.array(prompt_ids[:last], np.int64)
        kept = {slot: self._shared(slot, reusable_T, scope) for slot in free}

        def worth(slot: int) -> int:
            lost = min(self._lengths[slot], self._prompt_lengths[slot]) - kept[slot]
            spared = self._can.slot_copies and lost > self._can.buckets[0]
            return 0 if spared else kept[slot]

        slot = max(sorted(free, key=lambda slot: self._used_at[slot]), key=worth)
        self._lengths[slot] = kept[slot]
        self._scopes[slot] = scope
        self._prompt_lengths[slot] = len(prompt_ids)
        self._reusable[slot] = reusable_T
        return slot

    def extend(self, slot: int) -> int:
        """Copy what another slot holds of this one's prompt beyond its own; return how many tokens.

        The other may be at work: prompts that begin alike and come together are encoded in turns.
        """
        if not self._can.slot_copies:
            return 0
        prompt_T = self._reusable[slot]
        start = self._lengths[slot]
        shared = [
            self._shared(other, prompt_T, self._scopes[slot]) for other in range(self._can.slots)
        ]
        end = max(shared)
        if end <= start:
            return 0
        self._backend.copy(shared.index(end), slot, start, end)
        self.append(slot, prompt_T[start:end])
        return end - start

    def _shared(self, slot: int, prompt_T: np.ndarray, scope: Hashable) -> int:
        """Return how many tokens a slot and a prompt have in common from the beginning on."""
        if self._scopes[slot] != scope:
            return 0
        length = min(self._lengths[slot], len(prompt_T))
        differing = np.flatnonzero(self._tokens_SC[slot, :length] != prompt_T[:length])
        return int(differing[0]) if len(differing) else length
