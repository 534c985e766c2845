"""The loaded model behind the HTTP routes: requests go to the engine, updates come back."""

import asyncio
import gc
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.backends import load
from neuron_minimax.backends.base import Backend
from neuron_minimax.backends.directory import check_compiled, read_manifest
from neuron_minimax.errors import BackendError, GenerationError, counted
from neuron_minimax.generation.engine import Request, Update
from neuron_minimax.generation.generate import room_for_answer
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.limited import warm_up
from neuron_minimax.progress import SILENT, Progress
from neuron_minimax.serving.access import client
from neuron_minimax.serving.constraints import Constraint, Endings
from neuron_minimax.serving.desks import MODULES, Desks, check_tokenizer
from neuron_minimax.serving.engine_thread import (
    DrainingError,
    EngineThread,
    Metrics,
    QueueFullError,
    ServedRequest,
)
from neuron_minimax.serving.grammars import GrammarError, Grammars, make_grammar
from neuron_minimax.serving.preparation import Prepared, Prompt
from neuron_minimax.serving.protocol import ChatRequest, CompletionRequest, RequestError
from neuron_minimax.serving.responses import check_logprobs

# The answers, running or waiting, that follow a grammar: each may hold its own megabytes.
MAX_CONSTRAINED = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of serving; times in seconds, sizes in bytes."""

    model_name: str
    max_waiting: int = 256
    request_timeout: float = 600.0
    drain_timeout: float = 120.0
    exit_timeout: float = 10.0
    split_reasoning: bool = True
    strict: bool = False
    max_body: int = 8 << 20
    max_connections: int = 1024
    client_timeout: float = 60.0
    keep_alive: float = 75.0
    api_keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] = frozenset()
    log_requests: bool = False


@dataclass(frozen=True)
class Model:
    """Everything that exists once the compiled model is loaded."""

    backend: Backend
    tokenizer: TextTokenizer
    grammars: Grammars
    desks: Desks
    engine: EngineThread


class Submission:
    """The requests of one HTTP request, one per choice; their updates in order of arrival."""

    def __init__(self, engine: EngineThread, deadline: float, requests: Sequence[Request]) -> None:
        self.requests = requests
        self.on_end: Callable[[], None] = lambda: None
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._served = [
            ServedRequest(request=request, receive=self._receiver(index), deadline=deadline)
            for index, request in enumerate(requests)
        ]

    def start(self) -> None:
        """Queue the requests. Raises QueueFullError or DrainingError."""
        self._engine.submit(*self._served)

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield the updates of all requests, with the choice's number, until each has ended.

        Raises RequestError when one fails.
        """
        unfinished = len(self.requests)
        while unfinished:
            index, update = await self._updates.get()
            if update.error:
                kind, message = update.error
                status = {"timeout": 504, "shutdown": 503}.get(kind, 500)
                if isinstance(update.cause, GrammarError):  # the client's
                    status = 400
                raise RequestError(message, status=status, kind=kind, counted=True)
            unfinished -= update.last
            yield index, update

    def cancel(self) -> None:
        """End the requests, whether or not they have ended; call it once."""
        for served in self._served:
            self._engine.cancel(served)
        self.on_end()

    def _receiver(self, index: int) -> Callable[[Update], None]:
        """Return where choice number `index` puts its updates, from the engine's thread."""

        def receive(update: Update) -> None:
            with suppress(RuntimeError):  # the loop has ended: nobody waits any more
                self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return receive


class Service:
    """The loaded model behind the routes. `ready` only between loading and draining."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.failure: Exception | None = None
        self._model: Model | None = None
        self._stopped = False
        self._starting = threading.Lock()  # held where either of the two changes
        self._following = 0

    def check(self, traced: Path, progress: Progress = SILENT) -> None:
        """Find out what can be known without loading the weights: whether the directory can be
        loaded, and its tokenizer works in the processes that are to use it.

        Raises BackendError, GenerationError or SetupError.
        """
        warm_up(*MODULES)
        opened = check_compiled(traced, progress)
        check_tokenizer(TextTokenizer.from_dir(opened.directory))

    def load(
        self, traced: Path, on_lost: Callable[[BackendError], None] = lambda why: None
    ) -> None:
        """Load a compiled directory, start the engine; `on_lost` is called when it has failed for
        good. Raises BackendError or GenerationError.
        """
        started = time.monotonic()
        backend = load(traced)
        self.metrics.load_seconds.set(time.monotonic() - started)
        self.metrics.compile_seconds.set(read_manifest(traced).compile_seconds)
        self.use(backend, on_lost)
        # What is loaded stays: the garbage collector would look at all of it again and again, and
        # everybody waits for that.
        gc.collect()
        gc.freeze()

    def use(
        self, backend: Backend, on_lost: Callable[[BackendError], None] = lambda why: None
    ) -> None:
        """Serve a loaded backend, with the tokenizer from its directory; nothing is started after
        `drain`, `give_up` or `stop`.
        """
        tokenizer = TextTokenizer.from_dir(backend.model_directory)
        can = backend.capabilities
        grammars = Grammars(
            tokenizer.hugging_face,
            tokenizer.chat_format,
            tokenizer.stop_token_ids,
            can.vocab_size,
        )
        with self._starting:
            if self._stopped:
                return
            desks = Desks(
                tokenizer,
                self.settings.model_name,
                can.seq_len,
                can.vocab_size,
                strict=self.settings.strict,
            )
            engine = EngineThread(backend, self.metrics, self.settings.max_waiting, on_lost)
            engine.start()
            self._model = Model(backend, tokenizer, grammars, desks, engine)

    def load_in_background(
        self,
        traced: Path,
        on_loaded: Callable[[], None],
        on_failure: Callable[[], None],
    ) -> None:
        """Load while the server already answers health checks; a failure then or later is kept in
        `failure`. A model that is stopped before it is loaded is neither.
        """

        def failed(error: Exception) -> None:
            self.failure = error
            on_failure()

        def run() -> None:
            try:
                self.load(traced, failed)
            except Exception as error:
                failed(error)
            else:
                if self._model is not None:
                    on_loaded()

        threading.Thread(target=run, name="load", daemon=True).start()

    @property
    def ready(self) -> bool:
        return (
            self._model is not None and self._model.engine.alive and not self._model.engine.draining
        )

    @property
    def model(self) -> Model:
        if self._model is None:
            raise RequestError(
                "the model is still being loaded", status=503, kind="unavailable", retry_after=5
            )
        return self._model

    def drain(self) -> bool:
        """Finish what runs, give up what has not reached the engine; False when it took longer
        than the settings allow.
        """
        model = self._stop_starting()
        if model is None:
            return True
        finished = model.engine.drain(self.settings.drain_timeout)
        model.desks.close()
        return finished

    def give_up(self) -> None:
        """Let all requests fail at once that are unfinished."""
        model = self._stop_starting()
        if model is not None:
            model.desks.close()
            model.engine.give_up()

    def stop(self, timeout: float | None = None) -> None:
        """End everything. Wait at most `timeout` seconds for the engine."""
        model = self._stop_starting()
        if model is not None:
            model.desks.close()
            model.engine.stop(timeout)

    def _stop_starting(self) -> Model | None:
        """Let no model start from now on; return the one that has."""
        with self._starting:
            self._stopped = True
            return self._model

    async def start_chat(self, prepared: Prepared[ChatRequest], deadline: float) -> Submission:
        """Queue a chat completion; `deadline` is in time.monotonic seconds. Raises RequestError."""
        asked = prepared.asked
        tokenizer = self.model.tokenizer
        parsers = [
            tokenizer.chat_format.parser(in_reasoning=prepared.in_reasoning, tools=prepared.tools)
            for _ in range(asked.n)
        ]
        one_call = asked.parallel_tool_calls is False
        readers = [
            AnswerReader(tokenizer, parser, one_call=one_call, **reading(asked))
            for parser in parsers
        ]
        if prepared.wish is None:
            return self._submit(prepared, deadline, readers, [None] * asked.n)
        with ExitStack() as places:
            places.enter_context(self._places(asked.n))
            constraints = await self._constraints(prepared.wish, asked.n)
            submission = self._submit(prepared, deadline, readers, constraints)
            submission.on_end = places.pop_all().close
        return submission

    def start_completion(
        self, prepared: Prepared[CompletionRequest], deadline: float
    ) -> Submission:
        """Queue the choices of each prompt in turn; as `start_chat`. Raises RequestError."""
        asked = prepared.asked
        model = self.model
        scores = asked.echo and asked.logprobs is not None
        if scores and not model.backend.capabilities.all_position_logits:
            raise RequestError(
                "echo with logprobs needs the logits of every position of a prompt, which this "
                "compiled model does not give; leave one of them out, or serve a model that is "
                "compiled for the cpu backend",
                param="echo",
            )
        count = len(prepared.prompts) * asked.n
        readers = [AnswerReader(model.tokenizer, **reading(asked)) for _ in range(count)]
        return self._submit(prepared, deadline, readers, [None] * count)

    @contextmanager
    def _places(self, count: int) -> Iterator[None]:
        """Have places for answers that follow a grammar. Raises RequestError (429) without any."""
        if self._following + count > MAX_CONSTRAINED:
            raise RequestError(
                f"{counted(self._following, 'answer')} with a grammar already; try again later",
                status=429,
                kind="rate_limit_error",
                retry_after=1,
            )
        self._following += count
        try:
            yield
        finally:
            self._following -= count

    async def _constraints(self, wish: bytes, count: int) -> Sequence[Constraint]:
        """Return one state of the request's grammar per choice.

        What a limited process has compiled within its limits, our library compiles in a thread.
        """
        model = self.model
        try:
            with model.desks.grammars.place():
                grammar = await model.desks.grammars.work(make_grammar, wish)
                first = await asyncio.to_thread(model.grammars.matcher, grammar)
        except GrammarError as error:
            raise RequestError(f"{error.param}: {error}", param=error.param) from None
        matchers = [first, *(first.deep_copy() for _ in range(count - 1))]
        endings = Endings(model.tokenizer)
        return [Constraint(matcher, endings) for matcher in matchers]

    def _submit(
        self,
        prepared: Prepared[ChatRequest] | Prepared[CompletionRequest],
        deadline: float,
        readers: Sequence[AnswerReader],
        constraints: Sequence[Constraint | None],
    ) -> Submission:
        """Queue one request per choice of each prompt."""
        rooms = [self._room(prepared.asked, prompt) for prompt in prepared.prompts]
        check_logprobs(prepared.asked, prepared.prompts, rooms)
        engine = self.model.engine
        if len(readers) > engine.capacity:
            raise RequestError(
                f"{len(readers)} answers at once; this server runs and lets wait at most "
                f"{engine.capacity}: lower n, or send fewer prompts at once"
            )
        tokens = [prompt.ids.tolist() for prompt in prepared.prompts]
        n = prepared.asked.n
        requests = [
            Request(
                prompt_ids=tokens[index // n],
                max_new_tokens=rooms[index // n],
                params=self._params(prepared, index % n),
                reader=reader,
                constraint=constraint,
                **self._same_for_all(prepared.asked),
            )
            for index, (reader, constraint) in enumerate(zip(readers, constraints, strict=True))
        ]
        submission = Submission(engine, deadline, requests)
        try:
            submission.start()
        except QueueFullError as error:
            raise RequestError(
                str(error), status=429, kind="rate_limit_error", retry_after=1
            ) from None
        except DrainingError as error:
            raise RequestError(str(error), status=503, kind="unavailable", retry_after=10) from None
        return submission

    def _params(
        self, prepared: Prepared[ChatRequest] | Prepared[CompletionRequest], choice: int
    ) -> SamplingParams:
        tokenizer = self.model.tokenizer
        without_reasoning = prepared.without_reasoning
        defaults = tokenizer.sampling_without_reasoning if without_reasoning else tokenizer.sampling
        return prepared.asked.sampling(defaults, choice)

    def _same_for_all(self, asked: ChatRequest | CompletionRequest) -> dict[str, Any]:
        """Return what the engine is told alike of all answers to a request."""
        stops = frozenset(asked.stop_token_ids or ())
        if not asked.ignore_eos:
            stops |= frozenset(self.model.tokenizer.stop_token_ids)
        echo = isinstance(asked, CompletionRequest) and asked.echo
        return {
            "min_new_tokens": asked.min_tokens,
            "stop_token_ids": stops,
            "top_logprobs": asked.top(),
            "score_prompt": echo and asked.top() is not None,
            "cache_scope": (client.get(), asked.cache_salt),
        }

    def _room(self, asked: ChatRequest | CompletionRequest, prompt: Prompt) -> int:
        """Return how many tokens the answers to a prompt may have. Raises RequestError."""
        limit = asked.limit()
        try:
            room = room_for_answer(self.model.backend.capabilities, prompt.length, limit or None)
        except GenerationError as error:
            param = "messages" if isinstance(asked, ChatRequest) else "prompt"
            # By this code clients know to shorten a prompt, which an empty one cannot be.
            code = "context_length_exceeded" if prompt.length else None
            raise RequestError(str(error), param=param, code=code) from None
        room = 0 if limit == 0 else room
        if asked.min_tokens > room:
            raise RequestError(
                f"min_tokens is {asked.min_tokens}, but the answer may have at most {room}",
                param="min_tokens",
            )
        return room


def reading(asked: ChatRequest | CompletionRequest) -> dict[str, Any]:
    """Return what a request says about how its answer is read, as AnswerReader takes it."""
    return {
        "stops": asked.stops(),
        "min_tokens": asked.min_tokens,
        "control_tokens": not asked.skip_special_tokens,
    }
