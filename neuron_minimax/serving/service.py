"""The loaded model behind the HTTP routes: requests go to the engine, updates come back."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.backends import load
from neuron_minimax.backends.base import Backend
from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.conversation import Turn
from neuron_minimax.generation.engine import Request, Update
from neuron_minimax.generation.generate import answer_room
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.constraints import ANY_OBJECT, Constraint, Grammars
from neuron_minimax.serving.engine_thread import (
    DrainingError,
    EngineThread,
    Metrics,
    QueueFullError,
    ServedRequest,
)
from neuron_minimax.serving.protocol import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    NamedToolChoice,
    RequestError,
    check_depth,
    template_messages,
    tool_objects,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of serving; times in seconds, sizes in bytes."""

    model_name: str
    max_waiting: int = 256
    request_timeout: float = 600.0
    drain_timeout: float = 120.0
    split_reasoning: bool = True
    max_body: int = 8 << 20
    api_keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] = frozenset()
    log_requests: bool = False


@dataclass(frozen=True)
class Model:
    """Everything that exists once the compiled model is loaded."""

    backend: Backend
    tokenizer: TextTokenizer
    grammars: Grammars
    engine: EngineThread


class Submission:
    """The requests of one HTTP request, one per choice; their updates in order of arrival."""

    def __init__(self, engine: EngineThread, deadline: float, requests: Sequence[Request]) -> None:
        self.requests = requests
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
                raise RequestError(message, status=status, kind=kind)
            unfinished -= update.last
            yield index, update

    def cancel(self) -> None:
        for served in self._served:
            self._engine.cancel(served)

    def _receiver(self, index: int) -> Callable[[Update], None]:
        """Return where choice number `index` puts its updates, from the engine's thread."""

        def receive(update: Update) -> None:
            self._loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

        return receive


class Service:
    """The loaded model behind the routes. `ready` only between loading and draining."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.failure: Exception | None = None
        self._model: Model | None = None

    def load(self, traced: Path) -> None:
        """Load a compiled directory, start the engine. Raises BackendError or GenerationError."""
        started = time.monotonic()
        backend = load(traced)
        self.metrics.load_seconds.set(time.monotonic() - started)
        self.metrics.compile_seconds.set(_compile_seconds(traced))
        self.use(backend)

    def use(self, backend: Backend) -> None:
        """Serve a loaded backend, with the tokenizer from its directory."""
        tokenizer = TextTokenizer.from_dir(backend.model_directory)
        grammars = Grammars(tokenizer, backend.capabilities.vocab_size)
        engine = EngineThread(backend, self.metrics, self.settings.max_waiting)
        engine.start()
        self._model = Model(backend, tokenizer, grammars, engine)

    def load_in_background(self, traced: Path, on_failure: Callable[[], None]) -> None:
        """Load while the server already answers health checks; a failure is kept in `failure`."""

        def run() -> None:
            try:
                self.load(traced)
            except Exception as error:
                self.failure = error
                on_failure()

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
        """Finish what runs; False when it took longer than the settings allow."""
        return self._model is None or self._model.engine.drain(self.settings.drain_timeout)

    def stop(self) -> None:
        if self._model is not None:
            self._model.engine.stop()

    def check_model_name(self, name: str | None) -> None:
        if name is not None and name != self.settings.model_name:
            raise RequestError(
                f"model {name!r} does not exist; this server has {self.settings.model_name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    async def start_chat(self, request: ChatRequest) -> Submission:
        """Queue a chat completion. Raises RequestError."""
        tokenizer = self.model.tokenizer
        self.check_model_name(request.model)
        tools = None if request.tool_choice == "none" else tool_objects(request.tools)
        constraints = await asyncio.to_thread(self._constraints, request, tools)
        turn = await asyncio.to_thread(render_turn, tokenizer, request.messages, tools)
        self._check_length(turn.prompt)
        ids = await asyncio.to_thread(lambda: turn.prompt_ids)
        one_call = request.parallel_tool_calls is False
        readers = [turn.reader(stops=request.stops(), one_call=one_call) for _ in constraints]
        return self._submit(request, ids, readers, constraints)

    async def start_completion(self, request: CompletionRequest) -> Submission:
        """Queue a plain completion of one prompt. Raises RequestError."""
        self.check_model_name(request.model)
        ids = await asyncio.to_thread(self._prompt_ids, request.prompt)
        tokenizer = self.model.tokenizer
        readers = [AnswerReader(tokenizer, stops=request.stops()) for _ in range(request.n)]
        return self._submit(request, ids, readers, [None] * request.n)

    def _prompt_ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self._encode(prompt)
        if prompt and all(isinstance(token, int) for token in prompt):
            return prompt
        if len(prompt) == 1:
            return self._prompt_ids(prompt[0])
        raise RequestError(
            "prompt: one prompt per request is supported; send the others separately",
            param="prompt",
        )

    def _encode(self, text: str) -> list[int]:
        self._check_length(text)
        return self.model.tokenizer.encode(text)

    def _check_length(self, text: str) -> None:
        """Refuse far too long texts before they are made into tokens.

        A token stands for at most a few dozen characters.
        """
        limit = self.model.backend.capabilities.seq_len * 64
        if len(text) > limit:
            raise RequestError(
                f"the prompt has {len(text)} characters; at most {limit} can fit", param="messages"
            )

    def _constraints(
        self, request: ChatRequest, tools: list[dict[str, Any]] | None
    ) -> list[Constraint | None]:
        """Return one state of the request's grammar, if it asks for one, per choice."""
        grammar = self._grammar(request, tools)
        return [
            self.model.grammars.constraint(grammar) if grammar else None for _ in range(request.n)
        ]

    def _grammar(self, request: ChatRequest, tools: list[dict[str, Any]] | None) -> str | None:
        """Return the grammar that the request asks for, if any."""
        choice = request.tool_choice
        answer = request.response_format
        wants_json = answer is not None and answer.type != "text"
        forced = choice == "required" or isinstance(choice, NamedToolChoice)
        if forced and not tools:
            raise RequestError("tool_choice needs tools", param="tool_choice")
        if forced and wants_json:
            raise RequestError(
                "response_format and a forced tool_choice exclude each other",
                param="response_format",
            )
        try:
            if forced and tools:
                if isinstance(choice, NamedToolChoice):
                    tools = [
                        tool for tool in tools if tool["function"]["name"] == choice.function.name
                    ]
                    if not tools:
                        raise RequestError(
                            f"tool_choice: no tool is named {choice.function.name!r}",
                            param="tool_choice",
                        )
                several = choice == "required" and request.parallel_tool_calls is not False
                return self.model.grammars.tool_calls(tools, several)
            if answer is not None and wants_json:
                if answer.type == "json_object":
                    return self.model.grammars.json(ANY_OBJECT)
                if answer.json_schema is None:
                    raise RequestError(
                        "response_format.json_schema is missing", param="response_format"
                    )
                check_depth(answer.json_schema.schema_, "response_format.json_schema.schema")
                return self.model.grammars.json(answer.json_schema.schema_)
        except GenerationError as error:
            param = "tools" if forced else "response_format"
            raise RequestError(f"{param}: {error}", param=param) from None
        return None

    def _submit(
        self,
        asked: ChatRequest | CompletionRequest,
        ids: Sequence[int],
        readers: Sequence[AnswerReader],
        constraints: Sequence[Constraint | None],
    ) -> Submission:
        """Queue one request per choice."""
        model = self.model
        try:
            room = answer_room(model.backend.capabilities, ids, asked.limit())
        except GenerationError as error:
            param = "messages" if isinstance(asked, ChatRequest) else "prompt"
            raise RequestError(str(error), param=param, code="context_length_exceeded") from None
        requests = [
            Request(
                prompt_ids=ids,
                params=asked.sampling(model.tokenizer.sampling, index),
                max_new_tokens=room,
                stop_token_ids=frozenset(model.tokenizer.stop_token_ids),
                reader=reader,
                constraint=constraint,
                top_logprobs=asked.top(),
            )
            for index, (reader, constraint) in enumerate(zip(readers, constraints, strict=True))
        ]
        deadline = time.monotonic() + self.settings.request_timeout
        submission = Submission(model.engine, deadline, requests)
        try:
            submission.start()
        except QueueFullError as error:
            raise RequestError(
                str(error), status=429, kind="rate_limit_error", retry_after=1
            ) from None
        except DrainingError as error:
            raise RequestError(str(error), status=503, kind="unavailable", retry_after=10) from None
        return submission


def render_turn(
    tokenizer: TextTokenizer, messages: Sequence[ChatMessage], tools: list[dict[str, Any]] | None
) -> Turn:
    """Render the prompt of a chat. Raises RequestError when the messages cannot be rendered."""
    try:
        return Turn.after(template_messages(messages), tokenizer, tools)
    except GenerationError as error:
        raise RequestError(str(error), param="messages") from None


def _compile_seconds(traced: Path) -> float:
    """Return what the manifest says its graphs took; 0 where nothing was compiled."""
    graphs = read_manifest(traced).graphs.values()
    return sum(float(graph.get("seconds", 0)) for graph in graphs)
