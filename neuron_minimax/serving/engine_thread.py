"""The engine in a server: a thread that runs it, the queue before it, deadlines, and metrics."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from neuron_minimax.backends.base import Backend
from neuron_minimax.errors import BackendError, NeuronMiniMaxError, counted
from neuron_minimax.generation.engine import (
    Counters,
    Engine,
    Failure,
    NewToken,
    Request,
    Update,
)

logger = logging.getLogger(__name__)

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SHORT_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
PREFIX = "neuron_minimax"
IDLE_SECONDS = 1.0  # at most, between two looks at the backend
INTERNAL_ERROR = "internal error; the server's log has it"


class Metrics:
    """All metrics of one server, in a registry of their own.

    Names after the prefix follow vLLM where vLLM has the same thing.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, namespace=PREFIX, registry=self.registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, labels, namespace=PREFIX, registry=self.registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, namespace=PREFIX, registry=self.registry, buckets=buckets)

        self.waiting = gauge("num_requests_waiting", "Requests in the queue")
        self.running = gauge("num_requests_running", "Requests that hold a slot")
        self.kv_use = gauge(
            "kv_cache_usage_perc", "Share of all cache positions held by running requests, 0 to 1"
        )
        self.slots = gauge("slots", "Slots of the compiled model")
        self.load_seconds = gauge("model_load_seconds", "Time to load the compiled model")
        self.compile_seconds = gauge(
            "model_compile_seconds", "Time its compile took, from the manifest"
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", SECONDS
        )
        self.token_time = histogram(
            "time_per_output_token_seconds", "Between two tokens of a request", SHORT_SECONDS
        )
        self.request_time = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", SECONDS
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts, reused ones included")
        self.cached_tokens = counter(
            "prefix_cache_hits", "Prompt tokens found in a slot and not encoded again"
        )
        self.output_tokens = counter("generation_tokens", "Tokens generated")
        self.encoded = counter("encode_positions", "Positions of context encoding, by use", "use")
        self.stepped = counter("step_slots", "Slots of token generation steps, by use", "use")
        self.finished = counter("request_success", "Answers finished, by reason", "finished_reason")
        self.errors = counter("request_errors", "Requests that failed, by kind", "kind")

        self._seen = Counters()

    def follow(self, counters: Counters) -> None:
        """Raise the counters of tokens, positions and slots to what the engine has counted."""
        for name, seen in vars(self._seen).items():
            grown = getattr(counters, name) - seen
            if grown:
                self._counter_of(name).inc(grown)
        self._seen = replace(counters)

    def _counter_of(self, name: str) -> Counter:
        if name in ("encoded_positions", "padding_positions"):
            return self.encoded.labels("prompt" if name == "encoded_positions" else "padding")
        if name in ("active_slots", "idle_slots"):
            return self.stepped.labels(name.removesuffix("_slots"))
        counter: Counter = getattr(self, name)
        return counter

    def render(self) -> bytes:
        """Return the metrics in Prometheus's text format."""
        return generate_latest(self.registry)


class QueueFullError(NeuronMiniMaxError):
    """Too many requests are waiting."""


class DrainingError(NeuronMiniMaxError):
    """The server finishes what it has and takes nothing new."""


@dataclass(eq=False, kw_only=True)
class ServedRequest:
    """A request and who waits for it.

    `receive` is called from the engine's thread; `deadline` is in time.monotonic seconds.
    """

    request: Request
    receive: Callable[[Update], None]
    deadline: float
    cancelled: bool = False
    ended: bool = field(default=False, init=False)  # the last update was received
    last_token_at: float = field(default=0.0, init=False)


class EngineThread:
    """Owns an engine over `backend`, with at most `max_waiting` requests in the queue beside those
    that have a slot at once.

    Each round it drops what was cancelled or is late, admits waiting requests in order of arrival,
    and lets the engine do one round. When the backend has failed for good, amid a round or while
    nothing was asked of it, it gives up, and calls `on_lost` with why.
    """

    def __init__(
        self,
        backend: Backend,
        metrics: Metrics,
        max_waiting: int = 256,
        on_lost: Callable[[BackendError], None] = lambda why: None,
    ) -> None:
        self.metrics = metrics
        self._on_lost = on_lost
        self._engine = Engine(backend)
        self._max_waiting = max_waiting
        self._waiting: deque[ServedRequest] = deque()
        self._running: dict[Request, ServedRequest] = {}
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.slots.set(self._engine.slots)

    @property
    def capacity(self) -> int:
        """The number of requests that may run and wait at the same time."""
        return self._engine.slots + self._max_waiting

    @property
    def _unserved(self) -> int:
        return len(self._waiting) + len(self._running)

    def start(self) -> None:
        self._thread.start()

    def submit(self, *served: ServedRequest) -> None:
        """Queue requests, all or none. Raises QueueFullError or DrainingError."""
        with self._changed:
            if self._draining:
                raise DrainingError("the server is shutting down; try another one")
            if self._unserved + len(served) > self.capacity:
                raise QueueFullError(
                    f"{counted(len(self._waiting), 'request')} waiting already; try again later"
                )
            for one in served:
                one.request.arrived = time.monotonic()
                self._waiting.append(one)
            self.metrics.waiting.set(len(self._waiting))
            self._changed.notify()

    def cancel(self, served: ServedRequest) -> None:
        """Forget a request: its slot is free before the next round. It receives nothing more."""
        with self._changed:
            served.cancelled = True
            self._changed.notify()

    def drain(self, timeout: float) -> bool:
        """Take nothing new and wait until everything has finished.

        Returns False when `timeout` seconds did not suffice.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(self._idle, timeout)

    def give_up(self) -> None:
        """Take nothing new, and let everything fail at once that is unfinished, however long the
        current round takes.
        """
        with self._changed:
            self._draining = True
            self._stopping = True
            unfinished = [*self._running.values(), *self._waiting]
            self._waiting.clear()
            self._changed.notify()
        for served in unfinished:
            self._tell_failure(served, Failure("shutdown", "the server stopped"))

    def stop(self, timeout: float | None = None) -> None:
        """Give up; wait at most `timeout` seconds for the end of the thread."""
        self.give_up()
        if self._thread.is_alive():
            self._thread.join(timeout)

    @property
    def alive(self) -> bool:
        """Say whether the thread runs."""
        return self._thread.is_alive()

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def occupied(self) -> int:
        """The number of slots that work for a request."""
        return self._engine.occupied

    def _idle(self) -> bool:
        return not self._waiting and not self._running

    def _run(self) -> None:
        try:
            while self._has_work():
                self._round()
        finally:
            self._end()

    def _has_work(self) -> bool:
        """Wait for work, or until it is time to look whether the backend has failed; False when the
        thread is to stop.
        """
        with self._changed:
            self._changed.notify_all()  # drain() may be waiting for idleness
            self._changed.wait_for(lambda: self._stopping or not self._idle(), IDLE_SECONDS)
            return not self._stopping

    def _end(self) -> None:
        """Let everything fail that is unfinished, whatever has ended the thread."""
        self.give_up()
        for served in list(self._running.values()):
            self._release(served)

    def _round(self) -> None:
        try:
            self._drop()
            self._admit()
            for update in self._engine.step():
                self.metrics.follow(self._engine.counters)
                self._deliver(self._running[update.request], update)
        # A fault of ours, or of a library, whose panic is no Exception, ends the requests that run,
        # not the server.
        except BaseException:
            logger.exception("the engine's thread failed")
            for served in list(self._running.values()):
                self._fail(served, "internal_error", INTERNAL_ERROR)
        self.metrics.follow(self._engine.counters)
        engine = self._engine
        positions = engine.slots * engine.backend.capabilities.seq_len
        self.metrics.running.set(engine.occupied)
        self.metrics.kv_use.set(engine.held_tokens / positions)
        if engine.backend.failure is not None:
            self.give_up()
            self._on_lost(engine.backend.failure)

    def _drop(self) -> None:
        """Give up what was cancelled or is late, running or waiting."""
        now = time.monotonic()
        for served in list(self._running.values()):
            if served.cancelled:
                self._release(served)
                self.metrics.errors.labels("cancelled").inc()
            elif now > served.deadline:
                self._fail(served, "timeout", "the request took longer than the server allows")
        with self._changed:
            gone = [one for one in self._waiting if one.cancelled or now > one.deadline]
            for served in gone:
                self._waiting.remove(served)
            self.metrics.waiting.set(len(self._waiting))
        for served in gone:
            if served.cancelled:
                self.metrics.errors.labels("cancelled").inc()
            else:
                message = "the request waited longer than the server allows"
                self._tell_failure(served, Failure("timeout", message))

    def _admit(self) -> None:
        while self._engine.occupied < self._engine.slots:
            with self._changed:
                if not self._waiting:
                    return
                served = self._waiting.popleft()
                self.metrics.waiting.set(len(self._waiting))
                self._running[served.request] = served
            self._engine.add(served.request)

    def _deliver(self, served: ServedRequest, update: Update) -> None:
        """Measure an update and tell the client, unless there is nothing to tell, or it has been
        told that the request failed.
        """
        if update.last:
            self._release(served)
        if served.ended or (update.last and not self._ends(served)):
            return
        if isinstance(update, NewToken):
            self._measure(served)
        if update.finish_reason:
            self.metrics.request_time.observe(time.monotonic() - served.request.arrived)
            self.metrics.finished.labels(update.finish_reason).inc()
        if update.error:
            self.metrics.errors.labels(update.error.kind).inc()
            if update.error.kind != "sampling":
                logger.error("a request failed (%s)", update.error.kind, exc_info=update.cause)
        if update.error and update.error.kind == "internal_error":
            error = Failure("internal_error", INTERNAL_ERROR)
            update = replace(update, error=error)
        if update.last or update.events or update.logprobs or update.prompt_logprobs:
            served.receive(_without_logits(update))

    def _measure(self, served: ServedRequest) -> None:
        now = time.monotonic()
        if served.request.output_tokens == 1:
            self.metrics.first_token.observe(now - served.request.arrived)
        else:
            self.metrics.token_time.observe(now - served.last_token_at)
        served.last_token_at = now

    def _fail(self, served: ServedRequest, kind: str, message: str) -> None:
        self._release(served)
        self._tell_failure(served, Failure(kind, message))

    def _tell_failure(self, served: ServedRequest, failure: Failure) -> None:
        """Count and tell a failure, unless the request has ended before; from any thread."""
        if self._ends(served):
            self.metrics.errors.labels(failure.kind).inc()
            served.receive(Update(request=served.request, error=failure))

    def _ends(self, served: ServedRequest) -> bool:
        """Note that a request ends; say whether it did not before."""
        with self._changed:
            ends = not served.ended
            served.ended = True
            return ends

    def _release(self, served: ServedRequest) -> None:
        self._engine.cancel(served.request)
        with self._changed:
            del self._running[served.request]


def _without_logits(update: Update) -> Update:
    """Return what a client is told: logits would wait with it until the client has read."""
    return Update(
        request=update.request,
        events=update.events,
        prompt_logprobs=update.prompt_logprobs,
        logprobs=update.logprobs,
        finish_reason=update.finish_reason,
        error=update.error,
        cause=update.cause,
    )
