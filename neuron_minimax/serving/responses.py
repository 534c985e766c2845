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
from neuron_minimax.serving.preparation import Prompt
from neuron_minimax.serving.protocol import ChatRequest, CompletionRequest, RequestError

DONE = b"data: [DONE]\n\n"
# The log probabilities of one response that is not streamed: some hundred bytes each.
MAX_LOGPROBS = 200_000


def check_logprobs(
    asked: ChatRequest | CompletionRequest, prompts: Sequence[Prompt], rooms: Sequence[int]
) -> None:
    """Raise RequestError when a response would hold too many log probabilities. A stream holds
    those of the prompts, which come faster than a client may read.
    """
    top = asked.top()
    if top is None:
        return
    echo = isinstance(asked, CompletionRequest) and asked.echo
    of_prompts = sum(prompt.length for prompt in prompts) if echo else 0
    of_answers = 0 if asked.stream else sum(rooms)
    each = asked.n * (1 + top)
    entries = (of_prompts + of_answers) * each
    if entries <= MAX_LOGPROBS:
        return
    if of_prompts * each > MAX_LOGPROBS:
        found = f"{of_prompts * each} log probabilities of prompts"
        advice = "lower logprobs or n, send fewer or shorter prompts at once, or leave out echo"
    else:
        found = f"{entries} log probabilities"
        advice = "lower logprobs, max_tokens or n, send fewer prompts at once, or stream"
        if isinstance(asked, ChatRequest):
            advice = "lower top_logprobs, max_tokens or n, or stream"
    raise RequestError(
        f"{found} in one response; at most {MAX_LOGPROBS} are kept: {advice}", param="logprobs"
    )


def sse(value: Any) -> bytes:
    """Return one server-sent event."""
    return b"data: " + _json(value).encode() + b"\n\n"


def usage(requests: Sequence[Request], n: int) -> dict[str, Any]:
    """Return the token counts of one response; a prompt counts once for its `n` choices."""
    first_choices = requests[::n]
    prompt = sum(len(request.prompt_ids) for request in first_choices)
    cached = sum(request.cached_tokens for request in first_choices)
    answer = sum(request.output_tokens for request in requests)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


class Choice:
    """One answer as it grows; it is kept for `whole` unless it is `streamed`."""

    def __init__(self, index: int, tokenizer: TextTokenizer, *, streamed: bool) -> None:
        self.index = index
        self.tokenizer = tokenizer
        self._streamed = streamed
        self.finish_reason: str | None = None
        self._events: list[Event] = []
        # The log probabilities so far, by list of the answer: each entry is JSON already, so that
        # the end of a long answer is not one long piece of work.
        self._logprobs: dict[str, list[str]] = {}

    def add(self, update: Update) -> list[dict[str, Any]]:
        """Add an update; return the choices of the chunks that tell a client about it."""
        events = self._adapted(update.events)
        rendered: dict[str, list[Any]] = {}
        for each in (*update.prompt_logprobs, *([update.logprobs] if update.logprobs else [])):
            for name, entry in self._render_logprobs(each).items():
                rendered.setdefault(name, []).append(entry)
        if not self._streamed:
            self._events += events
            for name, entries in rendered.items():
                self._logprobs.setdefault(name, []).extend(map(_json, entries))
        self.finish_reason = self._reason(update.finish_reason)
        chunks: list[dict[str, Any]] = [
            self._chunk(event) for event in events if not _is_silent(event)
        ]
        if not chunks and (rendered or self.finish_reason):
            chunks = [self._chunk(None)]
        for number, chunk in enumerate(chunks):
            chunk["index"] = self.index
            chunk["finish_reason"] = None
            if rendered:
                chunk["logprobs"] = rendered if number == 0 else None
        if self.finish_reason:
            chunks[-1]["finish_reason"] = self.finish_reason
        return chunks

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices of the chunks that a stream begins with."""
        return []

    def whole(self) -> str:
        """Return the finished choice of a response that is not streamed, as JSON."""
        choice = {
            "index": self.index,
            **self._body(collect(self._events)),
            "finish_reason": self.finish_reason,
        }
        lists = [f'"{name}": [{", ".join(each)}]' for name, each in self._logprobs.items()]
        logprobs = f"{{{', '.join(lists)}}}" if lists else "null"
        return f'{_json(choice)[:-1]}, "logprobs": {logprobs}}}'

    def _adapted(self, events: Sequence[Event]) -> Sequence[Event]:
        return events

    def _reason(self, reason: str | None) -> str | None:
        return reason

    def _chunk(self, event: Event | None) -> dict[str, Any]:
        raise NotImplementedError

    def _body(self, message: Message) -> dict[str, Any]:
        raise NotImplementedError

    def _render_logprobs(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        """Return what a token adds to each list of log probabilities."""
        raise NotImplementedError


class TextChoice(Choice):
    """A choice of /v1/completions, which begins with the text `echoed`."""

    def __init__(
        self, index: int, tokenizer: TextTokenizer, echoed: str = "", *, streamed: bool
    ) -> None:
        super().__init__(index, tokenizer, streamed=streamed)
        self._echoed = echoed
        self._offset = 0

    def opening(self) -> list[dict[str, Any]]:
        if not self._echoed:
            return []
        chunk = {"index": self.index, "text": self._echoed, "logprobs": None}
        return [chunk | {"finish_reason": None}]

    def _chunk(self, event: Event | None) -> dict[str, Any]:
        return {"text": event.text if isinstance(event, Content) else ""}

    def _body(self, message: Message) -> dict[str, Any]:
        return {"text": self._echoed + message.content}

    def _render_logprobs(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        text = self.tokenizer.token_text(logprobs.token)
        offset = self._offset
        self._offset += len(text)
        return {
            "tokens": text,
            "token_logprobs": logprobs.logprob,
            "top_logprobs": self._render_top(logprobs),
            "text_offset": offset,
        }

    def _render_top(self, logprobs: TokenLogprobs) -> dict[str, float] | None:
        """Return the likely tokens and the chosen one, as OpenAI does; of those that are spelled
        alike, as parts of characters are, the likeliest.
        """
        if logprobs.logprob is None:
            return None
        likely: dict[str, float] = {}
        for token, value in (*logprobs.top, (logprobs.token, logprobs.logprob)):
            likely.setdefault(self.tokenizer.token_text(token), value)
        return likely


class ChatChoice(Choice):
    """A choice of /v1/chat/completions.

    Without `split_reasoning` the reasoning stays in the content, with its tags. It is left out,
    with the log probabilities of its tokens, where `hides_reasoning`; the answer begins
    `in_reasoning` where the prompt has opened that.
    """

    def __init__(
        self,
        index: int,
        tokenizer: TextTokenizer,
        split_reasoning: bool = True,
        *,
        hides_reasoning: bool = False,
        in_reasoning: bool = False,
        streamed: bool,
    ) -> None:
        super().__init__(index, tokenizer, streamed=streamed)
        self._split = split_reasoning
        self._hides = hides_reasoning
        self._in_reasoning = in_reasoning
        self._hides_token = False
        self._reasoned = False
        self._complete_calls = 0
        self._call_ids: dict[int, str] = {}

    def opening(self) -> list[dict[str, Any]]:
        delta = {"role": "assistant", "content": ""}
        return [{"index": self.index, "delta": delta, "finish_reason": None}]

    def _adapted(self, events: Sequence[Event]) -> Sequence[Event]:
        self._complete_calls += sum(
            isinstance(event, CallEnd) and event.complete for event in events
        )
        if self._hides:
            return self._without_reasoning(events)
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

    def _without_reasoning(self, events: Sequence[Event]) -> Sequence[Event]:
        """Return the events of a token but for its reasoning; note whether the token is of it."""
        began = self._in_reasoning
        if events:
            self._in_reasoning = isinstance(events[-1], Reasoning)
        self._hides_token = began or self._in_reasoning
        return [event for event in events if not isinstance(event, Reasoning | ReasoningEnd)]

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

    def _render_logprobs(self, logprobs: TokenLogprobs) -> dict[str, Any]:
        def entry(token: int, logprob: float | None) -> dict[str, Any]:
            spelled = self.tokenizer.token_bytes(token)
            return {
                "token": self.tokenizer.token_text(token),
                "logprob": logprob,
                "bytes": list(spelled),
            }

        if self._hides_token:
            return {}
        chosen = entry(logprobs.token, logprobs.logprob)
        return {"content": {**chosen, "top_logprobs": [entry(*pair) for pair in logprobs.top]}}


class CompletionObject:
    """The object of one response, without its choices: id, kind, model and time. Each of its
    prompts has `n` choices.
    """

    def __init__(self, chat: bool, model: str, n: int) -> None:
        self.id = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        self._kind = "chat.completion" if chat else "text_completion"
        self._chunk_kind = "chat.completion.chunk" if chat else "text_completion"
        self._n = n
        self._rest = {"created": int(time.time()), "model": model}

    def whole(self, choices: list[str], requests: Sequence[Request]) -> bytes:
        """Return a whole response as JSON; the choices are JSON already."""
        counts = usage(requests, self._n)
        head = {"id": self.id, "object": self._kind, **self._rest, "usage": counts}
        return f'{_json(head)[:-1]}, "choices": [{", ".join(choices)}]}}'.encode()

    def usage_chunk(self, requests: Sequence[Request]) -> bytes:
        return self.chunk([], usage=usage(requests, self._n))

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return sse(
            {"id": self.id, "object": self._chunk_kind, **self._rest, "choices": choices, **more}
        )


def _is_silent(event: Event) -> bool:
    return isinstance(event, ReasoningEnd | CallEnd)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
