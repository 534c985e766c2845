"""The routes of Anthropic's protocol."""

from fastapi import FastAPI, Request
from fastapi.responses import Response

from neuron_minimax.serving.access import log_fields
from neuron_minimax.serving.handling import (
    EventStream,
    collected,
    deadline_of,
    prepare,
    receive_body,
)
from neuron_minimax.serving.messages_api.answers import MessageAnswer
from neuron_minimax.serving.messages_api.requests import NAMES, count_tokens, prepare_message
from neuron_minimax.serving.service import Service
from neuron_minimax.serving.translation import in_names


def add_message_routes(app: FastAPI, service: Service) -> None:
    """Add messages, and the count of their tokens."""

    @app.post("/v1/messages")
    async def create(request: Request) -> Response:
        async with deadline_of(service) as deadline:
            body = await receive_body(request, service)
            asked = await prepare(service, prepare_message, body)
            with in_names(NAMES):
                submission = await service.start_chat(asked.chat, deadline)
        (answered,) = submission.requests
        answer = MessageAnswer(asked, service.settings.model_name, answered)
        fields = log_fields.get()
        fields["prompt_tokens"] = len(answered.prompt_ids)
        if asked.chat.asked.stream:
            events = answer.events(submission, fields["request_id"])
            return EventStream(events, submission.cancel)
        await collected(request, submission, answer.collect(submission))
        fields["completion_tokens"] = answered.output_tokens
        return Response(answer.whole(), media_type="application/json")

    @app.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        async with deadline_of(service):
            counted = await prepare(service, count_tokens, await receive_body(request, service))
        return Response(counted, media_type="application/json")
