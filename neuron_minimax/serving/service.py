"""What the HTTP routes call: requests become jobs of the engine, their outputs come back to the
event loop.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.backends import load
from neuron_minimax.backends.base import Backend
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.generate import check_tokens, room_for_answer
from neuron_minimax.generation.minimax_format import opens_reasoning
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.constraints import ANY_OBJECT, Constraint, Grammars
from neuron_minimax.serving.engine import Engine
from neuron_minimax.serving.jobs import DrainingError, Job, Output, QueueFullError
from neuron_minimax.serving.metrics import Metrics
from neuron_minimax.serving.pipeline import Pipeline
from neuron_minimax.serving.prompts import chat_prompt, tool_dicts
from neuron_minimax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    NamedToolChoice,
    RequestError,
    check_depth,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to serve; times in seconds, sizes in bytes."""

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
    engine: Engine


class Running:
    """The jobs of one request; their outputs in order of arrival."""

    def __init__(self, engine: Engine) -> None:
        self.jobs: list[Job] = []
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()

    def receiver(self, index: int) -> Callable[[Output], None]:
        """Where job number `index` puts its outputs, from the engine's thread."""

        def receive(output: Output) -> None:
            self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))

        return receive

    async def outputs(self) -> AsyncIterator[tuple[int, Output]]:
        """Outputs of all jobs until each has ended. Raises RequestError when one fails."""
        unfinished = len(self.jobs)
        while unfinished:
            index, output = await self._outputs.get()
            if output.error:
                kind, message = output.error
                status = {"timeout": 504, "shutdown": 503}.get(kind, 500)
                raise RequestError(message, status=status, kind=kind)
            unfinished -= output.last
            yield index, output

    def cancel(self) -> None:
        for job in self.jobs:
            self._engine.cancel(job)


class Service:
    """The loaded model behind the routes. `ready` only between loading and draining."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.failure: Exception | None = None
        self._model: Model | None = None

    def load(self, traced: Path) -> None:
        """Load a compiled directory and start the engine. Raises BackendError or
        GenerationError.
        """
        started = time.monotonic()
        backend = load(traced)
        self.metrics.load_seconds.set(time.monotonic() - started)
        self.metrics.compile_seconds.set(_compile_seconds(traced))
        self.use(backend)

    def use(self, backend: Backend) -> None:
        """Serve a loaded backend, with the tokenizer from its directory."""
        tokenizer = TextTokenizer.from_dir(backend.model_directory)
        grammars = Grammars(tokenizer, backend.capabilities.vocab_size)
        engine = Engine(backend, self.metrics, self.settings.max_waiting)
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

    async def start_chat(self, request: ChatRequest) -> Running:
        """Queue a chat completion. Raises RequestError."""
        model = self.model
        self.check_model_name(request.model)
        tools = None if request.tool_choice == "none" else request.tools
        tool_objects = tool_dicts(tools)
        constraints = await asyncio.to_thread(self._constraints, request, tool_objects)
        prompt = await asyncio.to_thread(chat_prompt, model.tokenizer, request.messages, tools)
        ids = await asyncio.to_thread(self._encode, prompt)
        chat = {"in_reasoning": opens_reasoning(prompt), "tools": tool_objects}
        one_call = request.parallel_tool_calls is False
        return self._submit(request, ids, constraints, chat, one_call)

    async def start_completion(self, request: CompletionRequest) -> Running:
        """Queue a plain completion of one prompt. Raises RequestError."""
        self.check_model_name(request.model)
        ids = await asyncio.to_thread(self._prompt_ids, request.prompt)
        return self._submit(request, ids, [None] * request.n, None, False)

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
        # A token stands for at most a few dozen characters: refuse far too long texts before
        # tokenizing them.
        limit = self.model.backend.capabilities.seq_len * 64
        if len(text) > limit:
            raise RequestError(
                f"the prompt has {len(text)} characters; at most {limit} can fit", param="messages"
            )
        return self.model.tokenizer.encode(text)

    def _constraints(
        self, request: ChatRequest, tools: list[dict[str, Any]] | None
    ) -> list[Constraint | None]:
        """One state of the request's grammar, if it asks for one, per choice."""
        grammar = self._grammar(request, tools)
        return [
            self.model.grammars.constraint(grammar) if grammar else None for _ in range(request.n)
        ]

    def _grammar(self, request: ChatRequest, tools: list[dict[str, Any]] | None) -> str | None:
        """The grammar that the request asks for, if any."""
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
        request: ChatRequest | CompletionRequest,
        ids: Sequence[int],
        constraints: Sequence[Constraint | None],
        chat: dict[str, Any] | None,
        one_call: bool,
    ) -> Running:
        model = self.model
        can = self.model.backend.capabilities
        try:
            check_tokens(can, ids)
            room = room_for_answer(can, len(ids), request.limit())
        except GenerationError as error:
            param = "messages" if chat is not None else "prompt"
            raise RequestError(str(error), param=param, code="context_length_exceeded") from None
        running = Running(model.engine)
        for index, constraint in enumerate(constraints):
            running.jobs.append(
                Job(
                    prompt_ids=ids,
                    options=request.sampling(model.tokenizer.sampling, index),
                    max_new_tokens=room,
                    stop_token_ids=frozenset(model.tokenizer.stop_token_ids),
                    pipeline=Pipeline(
                        model.tokenizer, stops=request.stops(), chat=chat, one_call=one_call
                    ),
                    receive=running.receiver(index),
                    deadline=time.monotonic() + self.settings.request_timeout,
                    constraint=constraint,
                    top_logprobs=request.top(),
                )
            )
        try:
            model.engine.submit(*running.jobs)
        except QueueFullError as error:
            raise RequestError(
                str(error), status=429, kind="rate_limit_error", retry_after=1
            ) from None
        except DrainingError as error:
            raise RequestError(str(error), status=503, kind="unavailable", retry_after=10) from None
        return running


def _compile_seconds(traced: Path) -> float:
    """What the manifest says its graphs and loops took; 0 where nothing was compiled."""
    manifest = json.loads((traced / "manifest.json").read_text(encoding="utf-8"))
    return sum(float(graph.get("seconds", 0)) for graph in (manifest.get("graphs") or {}).values())
