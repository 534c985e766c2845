"""Answers in the form of /v1/responses: whole objects, and the events of a stream."""

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cached_property
from typing import Any

from neuron_minimax.generation.engine import Request
from neuron_minimax.serving.protocol import RequestError
from neuron_minimax.serving.responses_api.requests import PreparedResponse
from neuron_minimax.serving.responses_api.store import Stored
from neuron_minimax.serving.service import Submission
from neuron_minimax.serving.translation import seal
from neuron_minimax.serving.turns import Change, Closed, Grown, Kind, Opened, Part, Turn

PREFIXES = {Kind.REASONING: "rs", Kind.TEXT: "msg", Kind.CALL: "fc"}


class ResponseAnswer:
    """The answer to one request."""

    def __init__(self, asked: PreparedResponse, model: str, request: Request) -> None:
        self.id = f"resp_{uuid.uuid4().hex}"
        self._asked = asked
        self._model = model
        self._request = request
        self._created = int(time.time())
        self._turn = Turn(in_reasoning=asked.chat.in_reasoning)
        self._sequence = 0

    async def collect(self, submission: Submission) -> None:
        """Take in all of an answer. Raises RequestError."""
        async for _, update in submission.updates():
            for _ in self._turn.add(update):
                pass

    @cached_property
    def whole(self) -> dict[str, Any]:
        """The finished response."""
        cut_off = self._turn.finish_reason == "length"
        details = {"reason": "max_output_tokens"} if cut_off else None
        return self._response(
            "incomplete" if cut_off else "completed",
            completed_at=int(time.time()),
            incomplete_details=details,
            output=[self._item(part) for part in self._turn.parts],
            usage=self._usage(),
        )

    def stored(self) -> Stored:
        """Return the finished response, and its conversation."""
        calls = [part for part in self._turn.parts if part.kind is Kind.CALL and part.complete]
        message = {
            "role": "assistant",
            "content": self._text(Kind.TEXT),
            "reasoning_content": self._text(Kind.REASONING),
            "tool_calls": [
                {
                    "id": _call_id(part),
                    "type": "function",
                    "function": {"name": part.name, "arguments": part.text},
                }
                for part in calls
            ],
        }
        given = {name: value for name, value in message.items() if value or name == "content"}
        before = self._asked.messages[:-1]
        between = b"" if before == b"[" else b", "
        messages = before + between + json.dumps(given).encode() + b"]"
        items = tuple(_item_id(part) for part in self._turn.parts)
        return Stored(json.dumps(self.whole).encode(), messages, items)

    async def events(
        self, submission: Submission, on_finished: Callable[[], None]
    ) -> AsyncIterator[bytes]:
        """Yield the stream; an error in its midst is its last event."""
        empty = self._response("in_progress")
        yield self._event("response.created", response=empty)
        yield self._event("response.in_progress", response=empty)
        try:
            async for _, update in submission.updates():
                for change in self._turn.add(update):
                    for event in self._change(change):
                        yield event
        except RequestError as error:
            code = "rate_limit_exceeded" if error.status == 429 else "server_error"
            if error.status == 400:
                code = "invalid_prompt"
            failure = {"code": code, "message": str(error)}
            output = [self._item(part) for part in self._turn.parts]
            failed = self._response("failed", error=failure, output=output)
            yield self._event("response.failed", response=failed)
            return
        on_finished()
        response = self.whole
        yield self._event(f"response.{response['status']}", response=response)

    def _response(self, status: str, **fields: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "model": self._model,
            "output": [],
            "service_tier": "default",
            "temperature": self._request.params.temperature,
            "top_p": self._request.params.top_p,
            "usage": None,
            **self._asked.echo,
            **fields,
        }

    def _change(self, change: Change) -> Iterator[bytes]:
        part = change.part
        place: dict[str, Any] = {"item_id": _item_id(part), "output_index": part.index}
        name = {
            Kind.REASONING: "response.reasoning_text",
            Kind.TEXT: "response.output_text",
            Kind.CALL: "response.function_call_arguments",
        }[part.kind]
        logprobs: dict[str, Any] = {"logprobs": []} if part.kind is Kind.TEXT else {}
        if part.kind is not Kind.CALL:
            place["content_index"] = 0
        match change:
            case Opened():
                empty = self._item(part, open=True)
                yield self._event("response.output_item.added", output_index=part.index, item=empty)
                if part.kind is not Kind.CALL:
                    begun = _content(part)
                    yield self._event("response.content_part.added", **place, part=begun)
            case Grown(_, text):
                yield self._event(f"{name}.delta", **place, delta=text, **logprobs)
            case Closed():
                field = "arguments" if part.kind is Kind.CALL else "text"
                named = {"name": part.name} if part.kind is Kind.CALL else {}
                yield self._event(
                    f"{name}.done", **place, **{field: part.text}, **named, **logprobs
                )
                if part.kind is not Kind.CALL:
                    done = _content(part)
                    yield self._event("response.content_part.done", **place, part=done)
                item = self._item(part)
                yield self._event("response.output_item.done", output_index=part.index, item=item)

    def _item(self, part: Part, *, open: bool = False) -> dict[str, Any]:
        status = "in_progress" if open else self._status(part)
        item: dict[str, Any] = {"id": _item_id(part), "status": status}
        if part.kind is Kind.CALL:
            call = {"call_id": _call_id(part), "name": part.name, "arguments": part.text}
            return item | {"type": "function_call"} | call
        content = [] if open else [_content(part)]
        if part.kind is Kind.TEXT:
            return item | {"type": "message", "role": "assistant", "content": content}
        item |= {"type": "reasoning", "summary": [], "content": content}
        if self._asked.seal_reasoning:
            item["encrypted_content"] = seal(part.text)
        return item

    def _status(self, part: Part) -> str:
        """Return the status of a part that does not go on: the limit cuts the last one off, and a
        failure the open one.
        """
        last = part is self._turn.parts[-1] and part.kind is not Kind.CALL
        cut_off = last and self._turn.finish_reason == "length"
        complete = part.complete and part is not self._turn.open and not cut_off
        return "completed" if complete else "incomplete"

    def _text(self, kind: Kind) -> str:
        return "".join(part.text for part in self._turn.parts if part.kind is kind)

    def _usage(self) -> dict[str, Any]:
        prompt = len(self._request.prompt_ids)
        answer = self._request.output_tokens
        cached = {"cached_tokens": self._request.cached_tokens, "cache_write_tokens": 0}
        return {
            "input_tokens": prompt,
            "input_tokens_details": cached,
            "output_tokens": answer,
            "output_tokens_details": {"reasoning_tokens": self._turn.reasoning_tokens},
            "total_tokens": prompt + answer,
        }

    def _event(self, type: str, **fields: Any) -> bytes:
        data = json.dumps({"type": type, "sequence_number": self._sequence, **fields})
        self._sequence += 1
        return f"event: {type}\ndata: {data}\n\n".encode()


def _item_id(part: Part) -> str:
    return f"{PREFIXES[part.kind]}_{part.key}"


def _call_id(part: Part) -> str:
    return f"call_{part.key[:24]}"


def _content(part: Part) -> dict[str, Any]:
    if part.kind is Kind.TEXT:
        return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": part.text}
