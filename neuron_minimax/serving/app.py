"""The routes: OpenAI's endpoints, health, metrics and the chat page."""

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from neuron_minimax.serving.access import (
    PAGE_FILES,
    AccessControl,
    error_response,
    log_fields,
)
from neuron_minimax.serving.handling import (
    EventStream,
    collected,
    deadline_of,
    prepare,
    receive_body,
)
from neuron_minimax.serving.messages_api.routes import add_message_routes
from neuron_minimax.serving.preparation import (
    check_model_name,
    detokenize,
    prepare_chat,
    prepare_completion,
    tokenize,
)
from neuron_minimax.serving.protocol import ChatRequest, CompletionRequest, RequestError
from neuron_minimax.serving.responses import (
    DONE,
    ChatChoice,
    Choice,
    CompletionObject,
    TextChoice,
    sse,
)
from neuron_minimax.serving.responses_api.routes import add_response_routes
from neuron_minimax.serving.service import Service, Submission

PAGE_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for "
    "'script'; trusted-types 'none'"
)


def create_app(service: Service) -> FastAPI:
    """Return the application over a service, which may still be loading."""
    app = FastAPI(title="neuron-minimax", docs_url=None, redoc_url=None, openapi_url=None)

    def on_error(kind: str) -> None:
        service.metrics.errors.labels(kind).inc()

    @app.exception_handler(RequestError)
    async def refuse(request: Request, error: RequestError) -> Response:
        if not error.counted:
            on_error(error.kind)
        return error_response(error, request.url.path)

    @app.exception_handler(HTTPException)
    async def refuse_route(request: Request, error: HTTPException) -> Response:
        place = f"{request.method} {request.url.path}"
        refusal = RequestError(f"{place}: {error.detail}", status=error.status_code)
        return await refuse(request, refusal)

    _add_completion_routes(app, service)
    add_message_routes(app, service)
    add_response_routes(app, service)
    _add_token_routes(app, service)
    _add_plain_routes(app, service)
    settings = service.settings
    app.add_middleware(
        AccessControl, api_keys=settings.api_keys, hosts=settings.hosts, on_error=on_error
    )
    return app


def _add_completion_routes(app: FastAPI, service: Service) -> None:
    settings = service.settings

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        async with deadline_of(service) as deadline:
            prepared = await prepare(service, prepare_chat, await receive_body(request, service))
            submission = await service.start_chat(prepared, deadline)
        asked = prepared.asked
        tokenizer = service.model.tokenizer
        choices: list[Choice] = [
            ChatChoice(
                index,
                tokenizer,
                settings.split_reasoning,
                hides_reasoning=not asked.shows_reasoning(),
                in_reasoning=prepared.in_reasoning,
                streamed=asked.stream,
            )
            for index in range(asked.n)
        ]
        completion = CompletionObject(True, settings.model_name, asked.n)
        return await _respond(request, asked, submission, choices, completion)

    @app.post("/v1/completions")
    async def complete(request: Request) -> Response:
        async with deadline_of(service) as deadline:
            prepared = await prepare(
                service, prepare_completion, await receive_body(request, service)
            )
            submission = service.start_completion(prepared, deadline)
        asked = prepared.asked
        tokenizer = service.model.tokenizer
        echoed = [prompt.echoed for prompt in prepared.prompts for _ in range(asked.n)]
        choices: list[Choice] = [
            TextChoice(index, tokenizer, text, streamed=asked.stream)
            for index, text in enumerate(echoed)
        ]
        completion = CompletionObject(False, settings.model_name, asked.n)
        return await _respond(request, asked, submission, choices, completion)


def _add_token_routes(app: FastAPI, service: Service) -> None:
    """Add text to tokens and back."""

    @app.post("/tokenize")
    async def to_tokens(request: Request) -> Response:
        async with deadline_of(service):
            tokens = await prepare(service, tokenize, await receive_body(request, service))
        return Response(tokens, media_type="application/json")

    @app.post("/detokenize")
    async def to_text(request: Request) -> Response:
        async with deadline_of(service):
            text = await prepare(service, detokenize, await receive_body(request, service))
        return Response(text, media_type="application/json")


def _add_plain_routes(app: FastAPI, service: Service) -> None:
    """Add models, health, metrics and the chat page."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(service)]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        check_model_name(name, service.settings.model_name)
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

    headers = {"content-security-policy": PAGE_POLICY, "x-content-type-options": "nosniff"}
    for path, file in PAGE_FILES.items():
        kind = PAGE_TYPES[file.name.rpartition(".")[2]]
        app.add_route(path, _static(file.read_bytes(), kind, headers))


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
    prompts = submission.requests[:: asked.n]
    log_fields.get()["prompt_tokens"] = sum(len(each.prompt_ids) for each in prompts)
    if asked.stream:
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        return EventStream(
            _chunks(submission, choices, completion, include_usage), submission.cancel
        )
    await collected(request, submission, _collect(submission, choices))
    log_fields.get()["completion_tokens"] = sum(each.output_tokens for each in submission.requests)
    body = completion.whole([choice.whole() for choice in choices], submission.requests)
    return Response(body, media_type="application/json")


async def _collect(submission: Submission, choices: list[Choice]) -> None:
    async for index, update in submission.updates():
        choices[index].add(update)


async def _chunks(
    submission: Submission, choices: list[Choice], completion: CompletionObject, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the stream of one response; an error in its midst is an event that clients raise."""
    for choice in choices:
        for chunk in choice.opening():
            yield completion.chunk([chunk])
    try:
        async for index, update in submission.updates():
            for chunk in choices[index].add(update):
                yield completion.chunk([chunk])
    except RequestError as error:
        yield sse(error.body())
    else:
        if include_usage:
            yield completion.usage_chunk(submission.requests)
    yield DONE
