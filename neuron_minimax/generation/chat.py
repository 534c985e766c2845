"""A conversation with a loaded model: history in, a turn's events out, the turn remembered."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neuron_minimax.backends.base import Backend
from neuron_minimax.generation.events import Event, Message, collect
from neuron_minimax.generation.generate import generate, stream_text
from neuron_minimax.generation.minimax_format import MiniMaxParser, opens_reasoning
from neuron_minimax.generation.sampling import SamplingOptions
from neuron_minimax.generation.tokenizer import TextTokenizer


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
        options: SamplingOptions | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.backend = backend
        self.tokenizer = tokenizer
        self.tools = tools
        self.options = options or tokenizer.sampling
        self.messages: list[dict[str, Any]] = []
        self.token_ids: list[int] = []
        self.last = Message()

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages.clear()

    def say(self, text: str, max_new_tokens: int | None = None) -> Iterator[Event]:
        """Answer a user's message: the turn's events as they appear. Raises GenerationError when it
        does not fit.
        """
        return self._turn([{"role": "user", "content": text}], max_new_tokens)

    def give_results(
        self, results: Sequence[str], max_new_tokens: int | None = None
    ) -> Iterator[Event]:
        """Go on with the results of the tool calls of the last turn, in their order."""
        return self._turn(
            [{"role": "tool", "content": result} for result in results], max_new_tokens
        )

    def _turn(self, messages: list[dict[str, Any]], max_new_tokens: int | None) -> Iterator[Event]:
        prompt = self.tokenizer.render_chat([*self.messages, *messages], self.tools)
        steps = generate(
            self.backend,
            self.tokenizer.encode(prompt),
            options=self.options,
            stop_token_ids=self.tokenizer.stop_token_ids,
            max_new_tokens=max_new_tokens,
        )
        parser = MiniMaxParser(in_reasoning=opens_reasoning(prompt), tools=self.tools)
        self.token_ids = []
        events = []
        for text, step in stream_text(steps, self.tokenizer):
            self.token_ids.append(step.token)
            for event in parser.feed(text) + (parser.finish() if step.finish_reason else []):
                events.append(event)
                yield event
        self.last = collect(events)
        self.messages += [*messages, _as_history(self.last)]


def _as_history(message: Message) -> dict[str, Any]:
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
