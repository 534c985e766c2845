"""The routes: OpenAI's endpoints, health, metrics and the chat page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib import resources
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from neuron_minimax.serving.access import AccessControl, error_response, log_fields, read_body
from neuron_minimax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Model,
    RequestError,
    TokenizeRequest,
    parse_request,
    tool_objects,
)
from neuron_minimax.serving.responses import (
    DONE,
    ChatChoice,
    Choice,
    CompletionObject,
    TextChoice,
    sse,
    usage,
)
from neuron_minimax.serving.service import Service, Submission, render_turn

PAGE_FILES = {
    "/": ("index.html", "text/html"),
    "/chat.js": ("chat.js", "text/javascript"),
    "/chat.css": ("chat.css", "text/css"),
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:"
)


class EventStream(Response):
    """Sends server-sent events; calls `on_end` however it ends, at once if the client leaves."""

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
    """Return the application over a service, which may still be loading."""
    app = FastAPI(title="neuron-minimax", docs_url=None, redoc_url=None, openapi_url=None)

    def on_error(kind: str) -> None:
        service.metrics.errors.labels(kind).inc()

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

    _add_completion_routes(app, service)
    _add_token_routes(app, service)
    _add_plain_routes(app, service)
    settings = service.settings
    app.add_middleware(
        AccessControl, api_keys=settings.api_keys, hosts=settings.hosts, on_error=on_error
    )
    return app


async def _read(request: Request, kind: type[Model], service: Service) -> Model:
    """Read a request's body as `kind`."""
    body = await read_body(request.receive, service.settings.max_body)
    if service.settings.log_requests:
        log_fields.get()["body"] = body.decode("utf-8", "replace")
    return parse_request(kind, body)


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = await _read(request, ChatRequest, service)
        submission = await service.start_chat(asked)
        tokenizer = service.model.tokenizer
        choices: list[Choice] = [
            ChatChoice(index, tokenizer, settings.split_reasoning) for index in range(asked.n)
        ]
        completion = CompletionObject(True, settings.model_name)
        return await _respond(request, asked, submission, choices, completion)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        asked = await _read(request, CompletionRequest, service)
        submission = await service.start_completion(asked)
        tokenizer = service.model.tokenizer
        choices: list[Choice] = [TextChoice(index, tokenizer) for index in range(asked.n)]
        completion = CompletionObject(False, settings.model_name)
        return await _respond(request, asked, submission, choices, completion)


def _add_token_routes(app: FastAPI, service: Service) -> None:
    """Add text to tokens and back."""

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        asked = await _read(request, TokenizeRequest, service)
        service.check_model_name(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise RequestError("expected either prompt or messages", param="prompt")
        tokenizer = service.model.tokenizer
        text = asked.prompt or ""
        if asked.messages is not None:
            tools = tool_objects(asked.tools)
            turn = await asyncio.to_thread(render_turn, tokenizer, asked.messages, tools)
            text = turn.prompt
        tokens = await asyncio.to_thread(tokenizer.encode, text)
        seq_len = service.model.backend.capabilities.seq_len
        return JSONResponse({"count": len(tokens), "max_model_len": seq_len, "tokens": tokens})

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        asked = await _read(request, DetokenizeRequest, service)
        service.check_model_name(asked.model)
        size = service.model.backend.capabilities.vocab_size
        if any(not 0 <= token < size for token in asked.tokens):
            raise RequestError(f"tokens: expected 0 to {size - 1}", param="tokens")
        text = await asyncio.to_thread(service.model.tokenizer.spell, asked.tokens)
        return JSONResponse({"prompt": text})


def _add_plain_routes(app: FastAPI, service: Service) -> None:
    """Add models, health, metrics and the chat page."""

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
    submission: Submission,
    choices: list[Choice],
    completion: CompletionObject,
) -> Response:
    log_fields.get()["prompt_tokens"] = len(submission.requests[0].prompt_ids)
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(
            _chunks(submission, choices, completion, include_usage), submission.cancel
        )
    collecting = asyncio.create_task(_collect(submission, choices))
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait((collecting, gone), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            raise RequestError("the client went away", status=499, kind="cancelled")
        collecting.result()
    finally:
        submission.cancel()
        gone.cancel()
        collecting.cancel()
    log_fields.get()["completion_tokens"] = sum(each.output_tokens for each in submission.requests)
    return JSONResponse(
        completion.whole(
            [choice.whole(asked.top() is not None) for choice in choices], submission.requests
        )
    )


async def _collect(submission: Submission, choices: list[Choice]) -> None:
    async for index, update in submission.updates():
        choices[index].add(update)


async def _chunks(
    submission: Submission, choices: list[Choice], completion: CompletionObject, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the stream of one response; an error in its midst is an event that clients raise."""
    for choice in choices:
        if isinstance(choice, ChatChoice):
            delta = {"role": "assistant", "content": ""}
            yield completion.chunk([{"index": choice.index, "delta": delta, "finish_reason": None}])
    try:
        async for index, update in submission.updates():
            for chunk in choices[index].add(update):
                yield completion.chunk([chunk])
    except RequestError as error:
        yield sse(error.body())
        return
    if include_usage:
        yield completion.chunk([], usage=usage(submission.requests))
    yield DONE


async def _gone(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
