"""The one engine: continuous batching over a backend's fixed slots, one round at a time.

A round encodes at most one largest bucket of prompt tokens (so that a long prompt delays the others
by one chunk), and advances every running request by one token. Slots keep their caches when their
requests end, for later prompts that begin with the same tokens (prefix_cache.py). The engine has no
thread and no queue: whoever calls it has those.

Shapes: S slots, T prompt tokens, V vocabulary.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from neuron_minimax.backends.base import Backend
from neuron_minimax.errors import GenerationError, NeuronMiniMaxError, counted
from neuron_minimax.generation.events import Event
from neuron_minimax.generation.prefix_cache import PrefixCache
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.sampling import Sampler, SamplingParams, log_probabilities


class Constraint(Protocol):
    """A rule that the whole output has to follow, such as a grammar; its state is one answer's."""

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [V] with -inf for every token that is not allowed now."""

    def advance(self, token: int) -> None:
        """Take the chosen token."""


@dataclass(eq=False, kw_only=True)
class Request:
    """One answer to compute.

    The answer ends with one of `stop_token_ids`, which are not chosen before there are
    `min_new_tokens`, after `max_new_tokens` (0: the prompt alone is read), or where `reader` says
    so. Without a reader its tokens are not made into events. `top_logprobs` asks for log
    probabilities: of the token alone (0), or of that many likely ones too; `score_prompt` for those
    of the prompt's tokens as well, where the backend has the logits of all positions.
    `prompt_logits` receives the prompt's logits, in pieces whose rows join to [T,V], or to [1,V]
    where the backend has the last position only. Caches are shared within a `cache_scope` alone, so
    that neither times nor counts tell one client what another has asked. `arrived` is in
    time.monotonic seconds. The engine fills in the counts.
    """

    prompt_ids: Sequence[int]
    params: SamplingParams
    max_new_tokens: int
    min_new_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    reader: AnswerReader | None = None
    constraint: Constraint | None = None
    top_logprobs: int | None = None
    score_prompt: bool = False
    prompt_logits: list[torch.Tensor] | None = None
    cache_scope: Hashable = None
    arrived: float = field(default_factory=time.monotonic)
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def needs_all_positions(self) -> bool:
        """Say whether a prompt has to be encoded from its beginning: caches hold no logits."""
        return self.score_prompt or self.prompt_logits is not None


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probability of a token, and of the most probable ones at its place; None for a
    prompt's first token, which nothing precedes.
    """

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class Failure(NamedTuple):
    """Why a request ended without an answer: a kind for programs, a message for people."""

    kind: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Update:
    """One token, some tokens of its prompt, or the failure, of a request. The finish reason is
    "stop" or "length".
    """

    request: Request
    events: Sequence[Event] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    error: Failure | None = None
    cause: Exception | None = None

    @property
    def last(self) -> bool:
        """Say whether nothing follows."""
        return self.finish_reason is not None or self.error is not None


@dataclass(frozen=True, kw_only=True)
class NewToken(Update):
    """One new token, and the logits [V] that chose it."""

    token: int
    logits: torch.Tensor


@dataclass
class Counters:
    """The work of an engine so far, in tokens, positions of encode, and slots of steps."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    encoded_positions: int = 0
    padding_positions: int = 0
    active_slots: int = 0
    idle_slots: int = 0


@dataclass(eq=False)
class _Slot:
    """A slot of the backend, and whom it works for.

    `next_token` is chosen but not yet computed, None while the prompt is being encoded.
    `encoded_at` is when its prompt last had its turn.
    """

    number: int
    request: Request | None = None
    sampler: Sampler | None = None
    next_token: int | None = None
    encoded_at: float = 0.0


class Engine:
    """Runs requests on `backend`, in `slots` (all of them unless given), one thread at a time.

    Use either `run`, which gives the steps of one request and may be used for several at once in
    turns, or `add` and `step`, which give the updates of all.
    """

    def __init__(self, backend: Backend, slots: Sequence[int] | None = None) -> None:
        self.backend = backend
        self.counters = Counters()
        self._caches = PrefixCache(backend)
        numbers = range(backend.capabilities.slots) if slots is None else slots
        self._slots = [_Slot(number) for number in numbers]
        self._round: Iterator[Update] = iter(())
        self._inboxes: dict[Request, deque[Update]] = {}

    @property
    def slots(self) -> int:
        return len(self._slots)

    @property
    def occupied(self) -> int:
        """The number of slots that work for a request."""
        return sum(slot.request is not None for slot in self._slots)

    @property
    def held_tokens(self) -> int:
        """The number of tokens in the caches of occupied slots."""
        return sum(self._caches.length(slot.number) for slot in self._slots if slot.request)

    def add(self, request: Request) -> None:
        """Give a request a slot. Raises GenerationError when none is free."""
        free = {slot.number: slot for slot in self._slots if slot.request is None}
        if not free:
            raise GenerationError(
                f"{counted(self.slots, 'slot')} taken, none is free; finish or close an answer "
                "before the next one"
            )
        scope = request.cache_scope
        whole = request.needs_all_positions
        number = self._caches.take(list(free), request.prompt_ids, scope, whole=whole)
        slot = free[number]
        slot.request = request
        slot.sampler = Sampler(request.params, request.prompt_ids)
        slot.next_token = None
        slot.encoded_at = request.arrived
        self.counters.prompt_tokens += len(request.prompt_ids)
        self._count_cached(request, self._caches.length(number))

    def _count_cached(self, request: Request, tokens: int) -> None:
        request.cached_tokens += tokens
        self.counters.cached_tokens += tokens

    def cancel(self, request: Request) -> None:
        """Free the slot of a request, if it has one; nothing more is computed for it."""
        for slot in self._slots:
            if slot.request is request:
                self._release(slot)

    def step(self) -> Iterator[Update]:
        """Do one round: encode pieces of prompts, then advance what runs; yield as tokens appear.

        A fault of the backend ends the requests it had, each with an error of kind "backend", and
        nothing of the caches is used again; the engine goes on. What fails in choosing a token
        ("sampling") or reading it ("internal_error") ends that request alone.
        """
        try:
            yield from self._encode()
            yield from self._decode()
        except Exception as error:
            failure = Failure("backend", f"the model failed: {type(error).__name__}")
            broken = [slot.request for slot in self._slots if slot.request]
            self._caches.clear()
            for slot in self._slots:
                self._release(slot)
            for request in broken:
                yield Update(request=request, error=failure, cause=error)

    def run(
        self, request: Request, stopped: Callable[[], bool] = lambda: False
    ) -> Generator[NewToken, None, None]:
        """Yield the steps of one request, which has its slot until the iterator ends or is closed.

        `stopped` is asked before each round whether to end it early. Raises GenerationError when no
        slot is free, and the exception that made the request fail.
        """
        self.add(request)
        inbox: deque[Update] = deque()
        self._inboxes[request] = inbox
        try:
            while True:
                while not inbox:
                    if stopped():
                        return
                    self._deliver()
                update = inbox.popleft()
                if isinstance(update, NewToken):
                    yield update
                elif update.cause:
                    raise update.cause
                if update.last:
                    return
        finally:
            del self._inboxes[request]
            self.cancel(request)

    def _deliver(self) -> None:
        """Put the next update into its inbox, or begin the next round."""
        update = next(self._round, None)
        if update is None:
            self._round = self.step()
        elif update.request in self._inboxes:
            self._inboxes[update.request].append(update)

    def _encode(self) -> Iterator[Update]:
        """Encode pieces of prompts in turn, up to one largest bucket in total."""
        can = self.backend.capabilities
        budget = can.buckets[-1]
        pending = [slot for slot in self._slots if slot.request and slot.next_token is None]
        for slot in sorted(pending, key=lambda slot: slot.encoded_at):
            request = slot.request
            if request is None or budget < can.encoded_length(1):  # None: cancelled in between
                continue
            self._count_cached(request, self._caches.extend(slot.number))
            start = self._caches.length(slot.number)
            piece = list(request.prompt_ids[start : start + can.buckets[-1]])
            encoded = can.encoded_length(len(piece))
            if encoded > budget:
                continue
            budget -= encoded
            logits = yield from self._encode_piece(slot, request, piece)
            if slot.request is not request:
                continue
            self._caches.append(slot.number, piece)
            slot.encoded_at = time.monotonic()
            self.counters.encoded_positions += len(piece)
            self.counters.padding_positions += encoded - len(piece)
            if start + len(piece) == len(request.prompt_ids):
                yield self._begin(slot, request, logits)

    def _begin(self, slot: _Slot, request: Request, logits_V: torch.Tensor) -> Update:
        """Choose the first token after a prompt, unless the prompt was all that was wanted."""
        if request.max_new_tokens:
            return self._advance(slot, request, logits_V)
        self._release(slot)
        return Update(request=request, finish_reason="length")

    def _encode_piece(
        self, slot: _Slot, request: Request, piece: list[int]
    ) -> Generator[Update, None, torch.Tensor]:
        """Encode a piece of a prompt; return the logits [V] of its last position."""
        start = self._caches.length(slot.number)
        if request.score_prompt:
            return (yield from self._score_piece(slot, request, piece))
        if request.prompt_logits is None:
            return self.backend.encode(slot.number, piece, start)
        if self.backend.capabilities.all_position_logits:
            logits_TV = self.backend.encode(slot.number, piece, start, all_positions=True)
            request.prompt_logits.append(logits_TV)
            return logits_TV[-1]
        logits_V = self.backend.encode(slot.number, piece, start)
        request.prompt_logits[:] = [logits_V[None]]
        return logits_V

    def _score_piece(
        self, slot: _Slot, request: Request, piece: list[int]
    ) -> Generator[Update, None, torch.Tensor]:
        """Encode a piece of a prompt; yield the log probabilities of the tokens after each of its
        positions, some rows of logits at a time, and before all those of the first token.
        """
        place = self._caches.length(slot.number)
        logits_RV = torch.empty(0)
        first = TokenLogprobs(request.prompt_ids[0], None, [])
        for logits_RV in self.backend.encode_rows(slot.number, piece, place):
            followers = request.prompt_ids[place + 1 : place + 1 + len(logits_RV)]
            scored = [first] if place == 0 else []
            try:
                scored += [
                    _logprobs_of(logits_V, token, request.top_logprobs)
                    for logits_V, token in zip(logits_RV, followers, strict=False)
                ]
            except NeuronMiniMaxError as error:
                self._release(slot)
                failure = Failure("sampling", str(error))
                yield Update(request=request, error=failure, cause=error)
            else:
                yield Update(request=request, prompt_logprobs=scored)
            if slot.request is not request:
                break
            place += len(logits_RV)
        return logits_RV[-1]

    def _decode(self) -> Iterator[Update]:
        """Advance every running request by one token."""
        running = [
            (slot, slot.request, slot.next_token)
            for slot in self._slots
            if slot.request and slot.next_token is not None
        ]
        if not running:
            return
        tokens = [0] * self.backend.capabilities.slots
        positions = tokens.copy()
        active = [False] * len(tokens)
        for slot, _, token in running:
            tokens[slot.number] = token
            positions[slot.number] = self._caches.length(slot.number)
            active[slot.number] = True
        logits_SV = self.backend.step(
            torch.tensor(tokens), torch.tensor(positions), torch.tensor(active)
        )
        self.counters.active_slots += len(running)
        self.counters.idle_slots += self.slots - len(running)
        for slot, _, token in running:
            self._caches.append(slot.number, [token])
        for slot, request, _ in running:
            if slot.request is request:  # else cancelled between two updates
                yield self._advance(slot, request, logits_SV[slot.number])

    def _advance(self, slot: _Slot, request: Request, logits_V: torch.Tensor) -> Update:
        """Choose the next token of a slot; a failure ends this request and no other."""
        try:
            return self._choose(slot, request, logits_V)
        except NeuronMiniMaxError as error:
            failure = Failure("sampling", str(error))
            cause: Exception = error
        except Exception as error:
            failure = Failure("internal_error", f"the answer failed: {type(error).__name__}")
            cause = error
        self._release(slot)
        return Update(request=request, error=failure, cause=cause)

    def _choose(self, slot: _Slot, request: Request, logits_V: torch.Tensor) -> NewToken:
        """Choose and read the next token; free the slot when it was the last one."""
        assert slot.sampler is not None
        reader = request.reader
        constraint = request.constraint
        allowed_V = logits_V if constraint is None else constraint.mask(logits_V)
        if request.output_tokens < request.min_new_tokens:
            ends = torch.tensor(sorted(request.stop_token_ids), dtype=torch.int64)
            allowed_V = allowed_V.index_fill(0, ends, -torch.inf)
        token = slot.sampler.choose(allowed_V)
        stops = token in request.stop_token_ids
        if constraint is not None and not stops:
            constraint.advance(token)
        logprobs = None
        if request.top_logprobs is not None:
            logprobs = _logprobs_of(logits_V, token, request.top_logprobs)
        request.output_tokens += 1
        self.counters.output_tokens += 1
        slot.next_token = token
        events = reader.push(token) if reader and not stops else []
        reason = None
        if stops or (reader and reader.stopped):
            reason = "stop"
        elif request.output_tokens == request.max_new_tokens:
            reason = "length"
        if reason:
            events += reader.finish() if reader else []
            self._release(slot)
        return NewToken(
            request=request,
            events=events,
            logprobs=logprobs,
            finish_reason=reason,
            token=token,
            logits=logits_V,
        )

    def _release(self, slot: _Slot) -> None:
        """Free the slot; its cache stays for a prompt that begins with the same tokens."""
        slot.request = None
        slot.sampler = None
        slot.next_token = None


def _logprobs_of(logits_V: torch.Tensor, token: int, top: int | None) -> TokenLogprobs:
    """Raises GenerationError when the logits hold NaN."""
    logprob, likely = log_probabilities(logits_V, token, top or 0)
    if math.isnan(logprob):
        raise GenerationError(
            f"the log probability of token {token} is NaN; the model's output is broken, run "
            "`neuron-minimax verify` on the converted checkpoint"
        )
    return TokenLogprobs(token, logprob, likely)
