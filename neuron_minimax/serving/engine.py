"""Continuous batching over a backend's fixed slots: requests join and leave between two steps.

One thread owns the backend. Each round it drops what was cancelled or is late, admits waiting
requests in order of arrival, encodes at most one largest bucket of prompt tokens (so that a long
prompt delays the others by one chunk), and advances every running request by one token. A slot
keeps its cache when its request ends, and a later prompt that begins with the same tokens starts
from there, where the backend can continue a slot.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from neuron_minimax.backends.base import Backend
from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.generation.sampling import Sampler, log_probabilities
from neuron_minimax.serving.jobs import DrainingError, Job, Output, QueueFullError, TokenLogprobs
from neuron_minimax.serving.metrics import Metrics

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class _Slot:
    number: int
    tokens: list[int] = field(default_factory=list)  # what the cache holds
    job: Job | None = None
    sampler: Sampler | None = None
    next_token: int | None = (
        None  # chosen, not yet computed; None while the prompt is being encoded
    )
    last_used: float = 0.0  # when its last token was chosen
    encoded_at: float = 0.0  # when its prompt last had its turn


class Engine:
    """Runs jobs on `backend`, at most `max_waiting` of them in the queue."""

    def __init__(self, backend: Backend, metrics: Metrics, max_waiting: int = 256) -> None:
        self.backend = backend
        self._metrics = metrics
        self._max_waiting = max_waiting
        self._slots = [_Slot(number) for number in range(backend.capabilities.slots)]
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._draining = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.slots.set(len(self._slots))

    def start(self) -> None:
        self._thread.start()

    def submit(self, *jobs: Job) -> None:
        """Queue jobs, all or none. Raises QueueFullError or DrainingError."""
        with self._changed:
            if self._draining:
                raise DrainingError("the server is shutting down; try another one")
            if len(self._waiting) + len(jobs) > self._max_waiting:
                raise QueueFullError(
                    f"{len(self._waiting)} requests are waiting already; try again later"
                )
            for job in jobs:
                job.arrived = time.monotonic()
                self._waiting.append(job)
            self._metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Forget a job: its slot is free before the next step. It receives nothing more."""
        with self._changed:
            job.cancelled = True
            self._changed.notify()

    def drain(self, timeout: float) -> bool:
        """Take nothing new and wait until everything has finished; False when `timeout` seconds did
        not suffice.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(self._idle, timeout)

    def stop(self) -> None:
        """End the thread after the current step; whatever is unfinished fails."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining

    def _idle(self) -> bool:
        return not self._waiting and not any(slot.job for slot in self._slots)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()  # drain() may be waiting for idleness
                self._changed.wait_for(lambda: self._stopping or not self._idle())
                if self._stopping:
                    break
            self._round()
        for slot in self._slots:
            self._fail(slot, "shutdown", "the server stopped")
        while self._waiting:
            self._waiting.popleft().receive(Output(error=("shutdown", "the server stopped")))

    def _round(self) -> None:
        try:
            self._drop()
            self._admit()
            self._encode()
            self._step()
        except (
            Exception
        ) as error:  # a fault of the backend ends the requests it had, not the server
            logger.exception("the backend failed")
            for slot in self._slots:
                slot.tokens = []
                self._fail(slot, "backend", f"the model failed: {type(error).__name__}")
        held = sum(len(slot.tokens) for slot in self._slots if slot.job)
        self._metrics.running.set(sum(slot.job is not None for slot in self._slots))
        self._metrics.kv_use.set(held / (len(self._slots) * self.backend.capabilities.seq_len))

    def _drop(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if slot.job and slot.job.cancelled:
                self._release(slot, "cancelled")
            elif slot.job and now > slot.job.deadline:
                self._fail(slot, "timeout", "the request took longer than the server allows")
        with self._changed:
            gone = [job for job in self._waiting if job.cancelled or now > job.deadline]
            for job in gone:
                self._waiting.remove(job)
            self._metrics.waiting.set(len(self._waiting))
        for job in gone:
            self._metrics.errors.labels("cancelled" if job.cancelled else "timeout").inc()
            if not job.cancelled:
                job.receive(
                    Output(error=("timeout", "the request waited longer than the server allows"))
                )

    def _admit(self) -> None:
        free = [slot for slot in self._slots if slot.job is None]
        while free:
            with self._changed:
                if not self._waiting:
                    return
                job = self._waiting.popleft()
                self._metrics.waiting.set(len(self._waiting))
                slot, kept = self._choose_slot(free, job.prompt_ids)
                slot.job = job
            free.remove(slot)
            slot.tokens = slot.tokens[:kept]
            slot.sampler = Sampler(job.options, job.prompt_ids)
            slot.next_token = None
            slot.encoded_at = job.arrived
            job.cached_tokens = kept
            self._metrics.prompt_tokens.inc(len(job.prompt_ids))
            self._metrics.cached_tokens.inc(kept)

    def _choose_slot(self, free: list[_Slot], prompt: Sequence[int]) -> tuple[_Slot, int]:
        """The free slot that holds most of the prompt's beginning, else the one unused for
        longest.
        """
        if not self.backend.capabilities.chunked_encoding:
            return min(free, key=lambda slot: slot.last_used), 0
        kept = {slot.number: _common_prefix(slot.tokens, prompt[:-1]) for slot in free}
        best = min(free, key=lambda slot: (-kept[slot.number], slot.last_used))
        return best, kept[best.number]

    def _encode(self) -> None:
        """Encode pieces of prompts in turn, up to one largest bucket in total."""
        buckets = self.backend.capabilities.buckets
        budget = buckets[-1]
        pending = [slot for slot in self._slots if slot.job and slot.next_token is None]
        for slot in sorted(pending, key=lambda slot: slot.encoded_at):
            job = slot.job
            assert job is not None
            piece = list(job.prompt_ids[len(slot.tokens) : len(slot.tokens) + buckets[-1]])
            bucket = self.backend.capabilities.bucket_for(len(piece))
            if bucket > budget:
                continue
            budget -= bucket
            logits = self.backend.encode(slot.number, piece, len(slot.tokens))
            slot.tokens += piece
            slot.encoded_at = time.monotonic()
            self._metrics.encoded.labels("prompt").inc(len(piece))
            self._metrics.encoded.labels("padding").inc(bucket - len(piece))
            if len(slot.tokens) == len(job.prompt_ids):
                self._advance(slot, job, logits)

    def _step(self) -> None:
        running = [slot for slot in self._slots if slot.job and slot.next_token is not None]
        if not running:
            return
        tokens = torch.zeros(len(self._slots), dtype=torch.int64)
        positions = tokens.clone()
        active = tokens.bool()
        for slot in running:
            tokens[slot.number] = slot.next_token or 0
            positions[slot.number] = len(slot.tokens)
            active[slot.number] = True
        logits = self.backend.step(tokens, positions, active)
        self._metrics.stepped.labels("active").inc(len(running))
        self._metrics.stepped.labels("idle").inc(len(self._slots) - len(running))
        for slot in running:
            assert slot.job is not None
            assert slot.next_token is not None
            slot.tokens.append(slot.next_token)
            self._advance(slot, slot.job, logits[slot.number])

    def _advance(self, slot: _Slot, job: Job, logits: torch.Tensor) -> None:
        """`_choose`, whose failure ends this request and no other."""
        try:
            self._choose(slot, job, logits)
        except NeuronMiniMaxError as error:
            self._fail(slot, "sampling", str(error))
        except Exception:
            logger.exception("a request failed")
            self._fail(slot, "internal_error", "internal error; the server's log has it")

    def _choose(self, slot: _Slot, job: Job, logits: torch.Tensor) -> None:
        """Choose the next token of a slot and tell its client; ends the job when that was the last
        one.
        """
        assert slot.sampler is not None
        constrained = job.constraint is not None and not job.pipeline.in_reasoning
        allowed = job.constraint.mask(logits) if job.constraint and constrained else logits
        token = slot.sampler.choose(allowed)
        if job.constraint and constrained and token not in job.stop_token_ids:
            job.constraint.advance(token)
        logprobs = None
        if job.top_logprobs is not None and token not in job.stop_token_ids:
            logprobs = TokenLogprobs(token, *log_probabilities(logits, token, job.top_logprobs))
        job.output_tokens += 1
        self._measure(slot, job)
        slot.next_token = token
        events = [] if token in job.stop_token_ids else job.pipeline.push(token)
        stopped = token in job.stop_token_ids or job.pipeline.stopped
        reason = (
            "stop" if stopped else "length" if job.output_tokens == job.max_new_tokens else None
        )
        if reason:
            events += job.pipeline.finish()
            self._metrics.request_time.observe(time.monotonic() - job.arrived)
            self._metrics.finished.labels(reason).inc()
            self._release(slot, None)
        if events or logprobs or reason:
            job.receive(Output(events=events, logprobs=logprobs, finish_reason=reason))

    def _measure(self, slot: _Slot, job: Job) -> None:
        now = time.monotonic()
        self._metrics.output_tokens.inc()
        if job.output_tokens == 1:
            self._metrics.first_token.observe(now - job.arrived)
        else:
            self._metrics.token_time.observe(now - slot.last_used)
        slot.last_used = now

    def _fail(self, slot: _Slot, kind: str, message: str) -> None:
        job = slot.job
        if job:
            self._release(slot, kind)
            job.receive(Output(error=(kind, message)))

    def _release(self, slot: _Slot, kind: str | None) -> None:
        """Free the slot; its cache stays for a prompt that begins with the same tokens."""
        if kind:
            self._metrics.errors.labels(kind).inc()
        slot.job = None
        slot.sampler = None
        slot.next_token = None


def _common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    pairs = zip(held, wanted, strict=False)
    return next(
        (place for place, (a, b) in enumerate(pairs) if a != b), min(len(held), len(wanted))
    )
