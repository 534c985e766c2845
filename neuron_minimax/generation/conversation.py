"""The chat recipe: messages to a prompt, tokens to the events of a turn, a turn to history."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from neuron_minimax.backends.base import Backend
from neuron_minimax.generation.engine import Request
from neuron_minimax.generation.events import Message
from neuron_minimax.generation.generate import answer_room
from neuron_minimax.generation.plain_text import ChatPrompt
from neuron_minimax.generation.reader import AnswerReader
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.template import Scalar
from neuron_minimax.generation.tokenizer import TextTokenizer


@dataclass(frozen=True)
class Turn:
    """The prompt of the next assistant turn, and how to read what the model says after it.

    Without tools (None) there are no tool calls: their tags are text.
    """

    tokenizer: TextTokenizer
    prompt: ChatPrompt
    tools: Sequence[Mapping[str, Any]] | None = None

    @classmethod
    def after(
        cls,
        messages: Sequence[Mapping[str, Any]],
        tokenizer: TextTokenizer,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Scalar] | None = None,
    ) -> "Turn":
        """Render messages in OpenAI's form (arguments of tool calls as objects).

        `chat_template_kwargs` are the chat template's own, such as {"enable_thinking": False}.
        Raises GenerationError when the template does not take the messages, or lacks an argument.
        """
        return cls(tokenizer, tokenizer.render_chat(messages, tools, chat_template_kwargs), tools)

    @cached_property
    def prompt_ids(self) -> list[int]:
        """The tokens of the prompt."""
        return self.tokenizer.encode(self.prompt)

    @property
    def sampling(self) -> SamplingParams:
        """The checkpoint's defaults for the turn."""
        return self.tokenizer.sampling_after(self.prompt)

    def reader(self, *, stops: Sequence[str] = (), one_call: bool = False) -> AnswerReader:
        """Return a fresh reader of the turn's tokens; see AnswerReader."""
        form = self.tokenizer.chat_format
        parser = form.parser(in_reasoning=form.opens_reasoning(self.prompt), tools=self.tools)
        return AnswerReader(self.tokenizer, parser, stops=stops, one_call=one_call)

    def request(
        self, backend: Backend, params: SamplingParams | None, max_new_tokens: int | None = None
    ) -> Request:
        """Return the request for the turn, with the checkpoint's defaults where `params` is None.

        Raises GenerationError when it does not fit.
        """
        params = params or self.sampling
        return Request(
            prompt_ids=self.prompt_ids,
            params=params,
            max_new_tokens=answer_room(backend.capabilities, self.prompt_ids, max_new_tokens),
            stop_token_ids=frozenset(self.tokenizer.stop_token_ids),
            reader=self.reader(stops=params.stop),
        )


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
