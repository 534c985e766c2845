"""Answers in Anthropic's format: whole messages, the events of a stream, errors."""

import json
import uuid
from collections.abc import AsyncIterator, Iterator
from typing import Any

from neuron_minimax.generation.engine import Request
from neuron_minimax.serving.handling import with_pauses
from neuron_minimax.serving.messages_api.errors import body_of
from neuron_minimax.serving.messages_api.requests import PreparedMessage
from neuron_minimax.serving.protocol import RequestError
from neuron_minimax.serving.service import Submission
from neuron_minimax.serving.translation import seal, sign
from neuron_minimax.serving.turns import Change, Closed, Grown, Kind, Opened, Part, Turn

PING_SECONDS = 15.0  # of silence, behind which proxies and clients give a connection up


class MessageAnswer:
    """The answer to one request."""

    def __init__(self, asked: PreparedMessage, model: str, request: Request) -> None:
        self._asked = asked
        self._model = model
        self._request = request
        self._id = f"msg_{uuid.uuid4().hex[:24]}"
        self._turn = Turn(in_reasoning=asked.chat.in_reasoning)

    async def collect(self, submission: Submission) -> None:
        """Take in all of an answer. Raises RequestError."""
        async for _, update in submission.updates():
            for _ in self._turn.add(update):
                pass

    def whole(self) -> bytes:
        """Return the finished message. A call that was cut off is only in the text behind it."""
        parts = [part for part in self._turn.parts if part.complete]
        message = self._message([self._block(part) for part in parts]) | self._end()
        return json.dumps(message).encode()

    async def events(self, submission: Submission, request_id: str) -> AsyncIterator[bytes]:
        """Yield the stream; an error in its midst is its last event."""
        empty = self._message([]) | {"stop_reason": None, "stop_sequence": None}
        # How much of the prompt is cached is known when it has been read.
        empty["usage"] = self._usage(0, 0)
        yield _event("message_start", message=empty)
        yield _event("ping")
        try:
            async for item in with_pauses(submission.updates(), PING_SECONDS):
                if item is None:
                    yield _event("ping")
                    continue
                for change in self._turn.add(item[1]):
                    for event in self._change(change):
                        yield event
        except RequestError as error:
            yield _event(**body_of(error, request_id))
            return
        end = self._end()
        yield _event("message_delta", usage=end.pop("usage"), delta=end)
        yield _event("message_stop")

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
        }

    def _change(self, change: Change) -> Iterator[bytes]:
        part = change.part
        match change:
            case Opened():
                block = self._block(Part(part.kind, part.index, part.name, key=part.key))
                if part.kind is Kind.REASONING:
                    block["signature"] = ""
                yield _event("content_block_start", index=part.index, content_block=block)
            case Grown(_, text):
                if part.kind is Kind.REASONING and self._asked.omit_thinking:
                    return
                delta = {
                    Kind.REASONING: {"type": "thinking_delta", "thinking": text},
                    Kind.TEXT: {"type": "text_delta", "text": text},
                    Kind.CALL: {"type": "input_json_delta", "partial_json": text},
                }[part.kind]
                yield _event("content_block_delta", index=part.index, delta=delta)
            case Closed():
                if part.kind is Kind.REASONING:
                    signature = self._block(part)["signature"]
                    delta = {"type": "signature_delta", "signature": signature}
                    yield _event("content_block_delta", index=part.index, delta=delta)
                yield _event("content_block_stop", index=part.index)

    def _block(self, part: Part) -> dict[str, Any]:
        if part.kind is Kind.TEXT:
            return {"type": "text", "text": part.text}
        if part.kind is Kind.CALL:
            return {
                "type": "tool_use",
                "id": f"toolu_{part.key[:24]}",
                "name": part.name,
                "input": part.arguments(),
            }
        if self._asked.omit_thinking:
            return {"type": "thinking", "thinking": "", "signature": seal(part.text)}
        return {"type": "thinking", "thinking": part.text, "signature": sign(part.text)}

    def _end(self) -> dict[str, Any]:
        reason, sequence = self._stop()
        usage = self._usage(self._request.cached_tokens, self._request.output_tokens)
        return {"stop_reason": reason, "stop_sequence": sequence, "usage": usage}

    def _stop(self) -> tuple[str, str | None]:
        """Return why the answer has ended, and with which stop sequence."""
        if self._turn.finish_reason == "length":
            full = self._request.output_tokens < self._asked.max_tokens
            return "model_context_window_exceeded" if full else "max_tokens", None
        if self._turn.calls:
            return "tool_use", None
        reader = self._request.reader
        if reader is not None and reader.stop_string is not None:
            return "stop_sequence", reader.stop_string
        return "end_turn", None

    def _usage(self, cached: int, output: int) -> dict[str, Any]:
        return {
            "input_tokens": len(self._request.prompt_ids) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": output,
            "output_tokens_details": {"thinking_tokens": self._turn.reasoning_tokens},
        }


def _event(type: str, **fields: Any) -> bytes:
    data = json.dumps({"type": type, **fields}, ensure_ascii=False)
    return f"event: {type}\ndata: {data}\n\n".encode()
