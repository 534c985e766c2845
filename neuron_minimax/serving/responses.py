"""Responses in OpenAI's format: whole objects, and the chunks of a stream."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

from neuron_minimax.generation.engine import Request, TokenLogprobs, Update
from neuron_minimax.generation.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Message,
    Reasoning,
    ReasoningEnd,
    collect,
)
from neuron_minimax.generation.tokenizer import TextTokenizer

DONE = b"data: [DONE]\n\n"


def sse(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


def usage(requests: Sequence[Request]) -> dict[str, Any]:
    """Return the token counts of one response; the prompt counts once for all choices."""
    prompt = len(requests[0].prompt_ids)
    answer = sum(request.output_tokens for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": requests[0].cached_tokens},
    }


class Choice:
    """One answer as it grows."""

    def __init__(self, index: int, tokenizer: TextTokenizer) -> None:
        self.index = index
        self.tokenizer = tokenizer
        self.finish_reason: str | None = None
        self._events: list[Event] = []
        self._logprobs: list[TokenLogprobs] = []

    def add(self, update: Update) -> list[dict[str, Any]]:
        """Add an update; return the choices of the chunks that tell a client about it."""
        events = self._adapted(update.events)
        self._events += events
        new_logprobs = [update.logprobs] if update.logprobs else []
        self._logprobs += new_logprobs
        self.finish_reason = self._reason(update.finish_reason)
        chunks: list[dict[str, Any]] = [
            self._chunk(event) for event in events if not _is_silent(event)
        ]
        if not chunks and (new_logprobs or self.finish_reason):
            chunks = [self._chunk(None)]
        for number, chunk in enumerate(chunks):
            chunk["index"] = self.index
            chunk["finish_reason"] = None
            if new_logprobs:
                chunk["logprobs"] = self._render_logprobs(new_logprobs) if number == 0 else None
        if self.finish_reason:
            chunks[-1]["finish_reason"] = self.finish_reason
        return chunks

    def whole(self, with_logprobs: bool) -> dict[str, Any]:
        """Return the finished choice of a response that is not streamed."""
        logprobs = self._render_logprobs(self._logprobs) if with_logprobs else None
        body = self._body(collect(self._events))
        return {
            "index": self.index,
            **body,
            "logprobs": logprobs,
            "finish_reason": self.finish_reason,
        }

    def _adapted(self, events: Sequence[Event]) -> Sequence[Event]:
        return events

    def _reason(self, reason: str | None) -> str | None:
        return reason

    def _chunk(self, event: Event | None) -> dict[str, Any]:
        raise NotImplementedError

    def _body(self, message: Message) -> dict[str, Any]:
        raise NotImplementedError

    def _render_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        raise NotImplementedError


class TextChoice(Choice):
    """A choice of /v1/completions."""

    _offset = 0

    def _chunk(self, event: Event | None) -> dict[str, Any]:
        return {"text": event.text if isinstance(event, Content) else ""}

    def _body(self, message: Message) -> dict[str, Any]:
        self._offset = 0
        return {"text": message.content}

    def _render_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        text = self.tokenizer.token_text
        offsets = []
        for entry in logprobs:
            offsets.append(self._offset)
            self._offset += len(text(entry.token))
        return {
            "tokens": [text(entry.token) for entry in logprobs],
            "token_logprobs": [entry.logprob for entry in logprobs],
            "top_logprobs": [
                {text(token): value for token, value in entry.top} for entry in logprobs
            ],
            "text_offset": offsets,
        }


class ChatChoice(Choice):
    """A choice of /v1/chat/completions.

    Without `split_reasoning` the reasoning stays in the content, with its tags.
    """

    def __init__(self, index: int, tokenizer: TextTokenizer, split_reasoning: bool = True) -> None:
        super().__init__(index, tokenizer)
        self._split = split_reasoning
        self._reasoned = False
        self._complete_calls = 0
        self._call_ids: dict[int, str] = {}

    def _adapted(self, events: Sequence[Event]) -> Sequence[Event]:
        self._complete_calls += sum(
            isinstance(event, CallEnd) and event.complete for event in events
        )
        if self._split:
            return events
        opening, closing = self.tokenizer.chat_format.reasoning_tags
        inline: list[Event] = []
        for event in events:
            if isinstance(event, Reasoning):
                inline.append(Content(event.text if self._reasoned else f"{opening}\n{event.text}"))
                self._reasoned = True
            elif isinstance(event, ReasoningEnd):
                inline += [Content(f"\n{closing}\n\n")] if self._reasoned else []
            else:
                inline.append(event)
        return inline

    def _reason(self, reason: str | None) -> str | None:
        return "tool_calls" if reason == "stop" and self._complete_calls else reason

    def _chunk(self, event: Event | None) -> dict[str, Any]:
        match event:
            case Reasoning(text):
                delta: dict[str, Any] = {"reasoning_content": text}
            case Content(text):
                delta = {"content": text}
            case CallBegin(index, name):
                function = {"name": name, "arguments": ""}
                call = {
                    "index": index,
                    "id": self._call_id(index),
                    "type": "function",
                    "function": function,
                }
                delta = {"tool_calls": [call]}
            case CallArguments(index, text):
                delta = {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
            case _:
                delta = {}
        return {"delta": delta}

    def _body(self, message: Message) -> dict[str, Any]:
        body: dict[str, Any] = {"role": "assistant", "content": message.content or None}
        if message.reasoning:
            body["reasoning_content"] = message.reasoning
        if message.tool_calls:
            body["tool_calls"] = [
                {
                    "id": self._call_id(number),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for number, call in enumerate(message.tool_calls)
            ]
        elif not message.reasoning:
            body["content"] = message.content
        return {"message": body}

    def _call_id(self, index: int) -> str:
        return self._call_ids.setdefault(index, f"call_{uuid.uuid4().hex[:24]}")

    def _render_logprobs(self, logprobs: list[TokenLogprobs]) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            spelled = self.tokenizer.token_bytes(token)
            return {
                "token": self.tokenizer.token_text(token),
                "logprob": logprob,
                "bytes": list(spelled),
            }

        return {
            "content": [
                {
                    **entry(one.token, one.logprob),
                    "top_logprobs": [entry(*pair) for pair in one.top],
                }
                for one in logprobs
            ]
        }


class CompletionObject:
    """The object of one response, without its choices: id, kind, model and time."""

    def __init__(self, chat: bool, model: str) -> None:
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._kind = "chat.completion" if chat else "text_completion"
        self._chunk_kind = "chat.completion.chunk" if chat else "text_completion"
        self._rest = {"created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], requests: Sequence[Request]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self._kind,
            **self._rest,
            "choices": choices,
            "usage": usage(requests),
        }

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return sse(
            {"id": self.id, "object": self._chunk_kind, **self._rest, "choices": choices, **more}
        )


def _is_silent(event: Event) -> bool:
    return isinstance(event, ReasoningEnd | CallEnd)
