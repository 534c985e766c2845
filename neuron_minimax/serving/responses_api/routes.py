"""The routes of /v1/responses."""

import json
from collections.abc import Hashable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from neuron_minimax.serving.access import client, log_fields
from neuron_minimax.serving.handling import (
    EventStream,
    collected,
    deadline_of,
    prepare,
    receive_body,
)
from neuron_minimax.serving.protocol import RequestError
from neuron_minimax.serving.responses_api.answers import ResponseAnswer
from neuron_minimax.serving.responses_api.requests import (
    NAMES,
    PreparedResponse,
    References,
    prepare_response,
)
from neuron_minimax.serving.responses_api.store import Store
from neuron_minimax.serving.service import Service
from neuron_minimax.serving.translation import in_names


def add_response_routes(app: FastAPI, service: Service) -> None:
    """Add responses: their creation, and those that are stored."""
    store = Store()

    @app.post("/v1/responses")
    async def create(request: Request) -> Response:
        async with deadline_of(service) as deadline:
            asked = await _prepared(service, store, await receive_body(request, service))
            with in_names(NAMES):
                submission = await service.start_chat(asked.chat, deadline)
        (answered,) = submission.requests
        answer = ResponseAnswer(asked, service.settings.model_name, answered)
        owner = client.get()
        fields = log_fields.get()
        fields["prompt_tokens"] = len(answered.prompt_ids)

        def keep() -> None:
            if asked.store:
                store.put(owner, answer.id, answer.stored())

        if asked.chat.asked.stream:
            return EventStream(answer.events(submission, keep), submission.cancel)
        await collected(request, submission, answer.collect(submission))
        fields["completion_tokens"] = answered.output_tokens
        keep()
        return _json(answer.whole)

    @app.get("/v1/responses/{name}")
    async def retrieve(name: str, request: Request) -> Response:
        asked = [item for item in request.query_params.items() if item != ("stream", "false")]
        if asked:
            param = asked[0][0]
            raise RequestError(
                f"{param[:64]}: a stored response is given as it is; leave it out", param=param
            )
        stored = store.get(client.get(), name)
        return Response(stored.response, media_type="application/json")

    @app.delete("/v1/responses/{name}")
    async def delete(name: str) -> Response:
        store.delete(client.get(), name)
        return _json({"id": name, "object": "response", "deleted": True})


async def _prepared(service: Service, store: Store, body: bytes) -> PreparedResponse:
    """Prepare a request with what it refers to of the store. Raises RequestError."""
    asked = await prepare(service, prepare_response, body)
    if isinstance(asked, References):
        owner = client.get()
        responses = store.holding(owner, asked.items, asked.reasoning)
        earlier = b"[]" if asked.previous is None else _earlier(store, owner, asked.previous)
        asked = await prepare(service, prepare_response, body, earlier, *responses)
    assert isinstance(asked, PreparedResponse)
    return asked


def _earlier(store: Store, owner: Hashable, name: str) -> bytes:
    """Return the messages of the conversation up to a response. Raises RequestError."""
    try:
        return store.get(owner, name).messages
    except RequestError as error:
        raise RequestError(
            f"previous_response_id: {error}",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from None


def _json(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value).encode(), media_type="application/json")
