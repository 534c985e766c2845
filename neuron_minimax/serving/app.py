"""The routes: OpenAI's endpoints, health, metrics and the chat page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from neuron_minimax.serving.gate import Gate, error_response, log_fields, read_body
from neuron_minimax.serving.prompts import chat_prompt
from neuron_minimax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Model,
    RequestError,
    TokenizeRequest,
    parse_request,
)
from neuron_minimax.serving.responses import (
    DONE,
    ChatChoice,
    Choice,
    Envelope,
    TextChoice,
    sse,
    usage,
)
from neuron_minimax.serving.service import Running, Service

PAGE_FILES = {"/": ("index.html", "text/html"), "/chat.js": ("chat.js", "text/javascript")}
PAGE_FILES["/chat.css"] = ("chat.css", "text/css")
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)


class EventStream(Response):
    """Sends server-sent events; `on_end` is called however it ends, at once when the client goes
    away.
    """

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._events = events
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._on_end()
            gone.cancel()
            sender.cancel()
            await asyncio.gather(sender, gone, return_exceptions=True)
        if not sender.cancelled() and (fault := sender.exception()):
            raise fault

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events:
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def create_app(service: Service) -> FastAPI:
    """The application over a service, which may still be loading."""
    app = FastAPI(title="neuron-minimax", docs_url=None, redoc_url=None, openapi_url=None)
    settings = service.settings
    metrics = service.metrics

    def on_error(kind: str) -> None:
        metrics.errors.labels(kind).inc()

    async def read(request: Request, kind: type[Model]) -> Model:
        body = await read_body(request.receive, settings.max_body)
        if settings.log_requests:
            log_fields.get()["body"] = body.decode("utf-8", "replace")
        return parse_request(kind, body)

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        on_error(error.kind)
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        return error_response(
            RequestError(
                f"{request.method} {request.url.path}: {error.detail}", status=error.status_code
            )
        )

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await read(request, ChatRequest)
        running = await service.start_chat(asked)
        tokenizer = service.model.tokenizer
        choices = [
            ChatChoice(index, tokenizer, settings.split_reasoning) for index in range(asked.n)
        ]
        return await _respond(
            request, asked, running, list(choices), Envelope(True, settings.model_name)
        )

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = await read(request, CompletionRequest)
        running = await service.start_completion(asked)
        choices = [TextChoice(index, service.model.tokenizer) for index in range(asked.n)]
        return await _respond(
            request, asked, running, list(choices), Envelope(False, settings.model_name)
        )

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = await read(request, TokenizeRequest)
        service.check_model_name(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("expected either prompt or messages", param="prompt")
        tokenizer = service.model.tokenizer
        text = asked.prompt if asked.prompt is not None else ""
        if asked.messages is not None:
            text = await asyncio.to_thread(chat_prompt, tokenizer, asked.messages, asked.tools)
        tokens = await asyncio.to_thread(tokenizer.encode, text)
        seq_len = service.model.backend.capabilities.seq_len
        return JSONResponse({"count": len(tokens), "max_model_len": seq_len, "tokens": tokens})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = await read(request, DetokenizeRequest)
        service.check_model_name(asked.model)
        size = service.model.backend.capabilities.vocab_size
        if any(not 0 <= token < size for token in asked.tokens):
            raise RequestError(f"tokens: expected 0 to {size - 1}", param="tokens")
        text = await asyncio.to_thread(service.model.tokenizer.spell, asked.tokens)
        return JSONResponse({"prompt": text})

    _add_plain_routes(app, service)
    app.add_middleware(Gate, api_keys=settings.api_keys, hosts=settings.hosts, on_error=on_error)
    return app


def _add_plain_routes(app: FastAPI, service: Service) -> None:
    """Models, health, metrics and the chat page."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_model_name(name)
        return _model_card(service)

    @app.get("/health/live")
    async def live() -> dict[str, Any]:
        return {"live": True}

    @app.get("/health")
    @app.get("/health/ready")
    async def ready() -> Response:
        return JSONResponse(
            {"live": True, "ready": service.ready}, status_code=200 if service.ready else 503
        )

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(
            service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    page = resources.files("neuron_minimax.serving") / "page"
    for path, (name, kind) in PAGE_FILES.items():
        contents = (page / name).read_bytes()
        headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
        app.add_route(path, _static(contents, kind, headers))


def _static(
    contents: bytes, kind: str, headers: dict[str, str]
) -> Callable[[Request], Awaitable[Response]]:
    async def respond(request: Request) -> Response:
        return Response(contents, media_type=f"{kind}; charset=utf-8", headers=headers)

    return respond


def _model_card(service: Service) -> dict[str, Any]:
    seq_len = service.model.backend.capabilities.seq_len
    return {
        "id": service.settings.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "neuron-minimax",
        "max_model_len": seq_len,
    }


async def _respond(
    request: Request,
    asked: ChatRequest | CompletionRequest,
    running: Running,
    choices: list[Choice],
    envelope: Envelope,
) -> Response:
    log_fields.get()["prompt_tokens"] = len(running.jobs[0].prompt_ids)
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(_chunks(running, choices, envelope, include_usage), running.cancel)
    collecting = asyncio.create_task(_collect(running, choices))
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((collecting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise RequestError("the client went away", status=499, kind="cancelled")
        collecting.result()
    finally:
        running.cancel()
        gone.cancel()
        collecting.cancel()
    log_fields.get()["completion_tokens"] = sum(job.output_tokens for job in running.jobs)
    return JSONResponse(
        envelope.whole([choice.whole(asked.top() is not None) for choice in choices], running.jobs)
    )


async def _collect(running: Running, choices: list[Choice]) -> None:
    async for index, output in running.outputs():
        choices[index].take(output)


async def _chunks(
    running: Running, choices: list[Choice], envelope: Envelope, include_usage: bool
) -> AsyncIterator[bytes]:
    """The stream of one answer; an error in its midst is an event too, which clients raise."""
    for choice in choices:
        if isinstance(choice, ChatChoice):
            delta = {"role": "assistant", "content": ""}
            yield envelope.chunk([{"index": choice.index, "delta": delta, "finish_reason": None}])
    try:
        async for index, output in running.outputs():
            for chunk in choices[index].take(output):
                yield envelope.chunk([chunk])
    except RequestError as error:
        yield sse(error.body())
        return
    if include_usage:
        yield envelope.chunk([], usage=usage(running.jobs))
    yield DONE


async def _gone(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
