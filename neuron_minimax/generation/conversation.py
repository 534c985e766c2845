"""The chat recipe: messages to a prompt, tokens to the events of a turn, a turn to history."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from neuron_minimax.backends.base import Backend
from neuron_minimax.generation.engine import Engine, Request
from neuron_minimax.generation.events import Event, Message, collect
from neuron_minimax.generation.generate import answer_room
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Turn:
    """The prompt of the next assistant turn, and how to read what the model says after it.

    Without tools (None) there are no tool calls: their tags are text.
    """

    tokenizer: TextTokenizer
    prompt: str
    tools: Sequence[Mapping[str, Any]] | None = None

    @classmethod
    def after(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: TextTokenizer,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> "Turn":
        """Render messages in OpenAI's form (arguments of tool calls as objects).

        Raises GenerationError when the chat template does not take them.
        """
        return cls(tokenizer, tokenizer.render_chat(messages, tools), tools)

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        return self.tokenizer.encode(self.prompt)

    def reader(self, *, stops: Sequence[str] = (), one_call: bool = False) -> AnswerReader:
        """Return a fresh reader of the turn's tokens; see AnswerReader."""
        form = self.tokenizer.chat_format
        parser = form.parser(in_reasoning=form.opens_reasoning(self.prompt), tools=self.tools)
        return AnswerReader(self.tokenizer, parser, stops=stops, one_call=one_call)

    def request(
        self, backend: Backend, params: SamplingParams, max_new_tokens: int | None = None
    ) -> Request:
        """Return the request for the turn. Raises GenerationError when it does not fit."""
        return Request(
            prompt_ids=self.prompt_ids,
            params=params,
            max_new_tokens=answer_room(backend.capabilities, self.prompt_ids, max_new_tokens),
            stop_token_ids=frozenset(self.tokenizer.stop_token_ids),
            reader=self.reader(),
        )


class Chat:
    """One conversation in slot 0 of a backend.

    `messages` is the history in OpenAI's form, reasoning and tool calls of earlier turns included;
    `tools` are offered in every turn. `token_ids` holds the tokens of the last turn.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: TextTokenizer,
        *,
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.tools = tools
        self.params = params or tokenizer.sampling
        self.messages: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.last = Message()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def say(self, text: str, max_new_tokens: int | None = None) -> Iterator[Event]:
        """Answer a user's message: yield the turn's events as they appear.

        Raises GenerationError when the message does not fit; then nothing is remembered.
        """
        return self._turn([{"role": "user", "content": text}], max_new_tokens)

    def give_results(
        self, results: Sequence[str], max_new_tokens: int | None = None
    ) -> Iterator[Event]:
        """Go on with the results of the tool calls of the last turn, in their order."""
        messages = [{"role": "tool", "content": result} for result in results]
        return self._turn(messages, max_new_tokens)

    def _turn(self, messages: list[dict[str, Any]], max_new_tokens: int | None) -> Iterator[Event]:
        turn = Turn.after([*self.messages, *messages], self.tokenizer, self.tools)
        request = turn.request(self.backend, self.params, max_new_tokens)
        self.token_ids = []
        events: list[Event] = []
        try:
            with closing(Engine(self.backend, [0]).run(request)) as steps:
                for step in steps:
                    self.token_ids.append(step.token)
                    events += step.events
                    yield from step.events
        finally:
            self.backend.reset(0)
        self.last = collect(events)
        self.messages += [*messages, as_history(self.last)]


def as_history(message: Message) -> dict[str, Any]:
    """Return a finished turn as a message in OpenAI's form, arguments of calls as objects."""
    entry: dict[str, Any] = {"role": "assistant", "content": message.content}
    if message.reasoning:
        entry["reasoning_content"] = message.reasoning
    if message.tool_calls:
        entry["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    return entry
