"""A conversation with a loaded model: its history over turns, told to the model anew each time."""

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.conversation import Turn
from neuron_minimax.generation.events import Event
from neuron_minimax.generation.generate import answer_room
from neuron_minimax.generation.llm import LLM, Heard, Reply
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.template import Scalar

HistoryMessage = dict[str, Any]
NOTHING = Reply(text="", reasoning="", tool_calls=(), token_ids=(), finish_reason="")


class Chat:
    """One conversation.

    `messages` is the history in OpenAI's form, reasoning and tool calls of earlier turns included,
    and `last` the last turn. Every prompt is rendered with the `system` message, if there is one,
    the `tools` and the `chat_template_kwargs`; these and `params` may be changed between turns.
    Without `params` the checkpoint's defaults apply.

    A turn is heard as it appears, token by token. When `stopped` says so, or the generator is
    closed, or an interruption ends it, what was said until then stays in the history. A turn that
    is refused or fails, or is stopped before its first token, leaves no trace.
    """

    def __init__(
        self,
        llm: LLM,
        *,
        system: str = "",
        params: SamplingParams | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Scalar] | None = None,
    ) -> None:
        self.llm = llm
        self.system = system
        self.tools = tools
        self.chat_template_kwargs = chat_template_kwargs
        self.params = params
        self.messages: list[HistoryMessage] = []
        self.last = NOTHING

    def reset(self) -> None:
        """Forget the conversation, but neither the system message nor the tools."""
        self.messages = []
        self.last = NOTHING

    def say(
        self,
        text: str,
        max_new_tokens: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Answer a user's message: yield the turn's events as they appear.

        `max_new_tokens` is the most that is said; what is left of the context bounds it too. Raises
        GenerationError when the message does not fit.
        """
        message = {"role": "user", "content": text}
        return self._turn(self.messages, [message], max_new_tokens, stopped)

    def give_results(
        self,
        results: Sequence[str],
        max_new_tokens: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Go on with the results of the tool calls of the last turn, in their order."""
        messages = [{"role": "tool", "content": result} for result in results]
        return self._turn(self.messages, messages, max_new_tokens, stopped)

    def answer_again(
        self,
        max_new_tokens: int | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Iterator[Event]:
        """Answer the user's last message anew, in the place of all that was said after it.

        Raises GenerationError when there is none yet.
        """
        place = next(
            (n for n in reversed(range(len(self.messages))) if self.messages[n]["role"] == "user"),
            None,
        )
        if place is None:
            raise GenerationError("nothing was said yet that could be answered again")
        return self._turn(self.messages[:place], [self.messages[place]], max_new_tokens, stopped)

    def next_turn(self) -> Turn:
        """Return the turn that an empty message would begin: its prompt is what is held so far.

        Raises GenerationError when the chat template does not take it, or lacks an argument.
        """
        return self._rendered([*self.messages, {"role": "user", "content": ""}])

    def as_request(self) -> dict[str, Any]:
        """Return what a request of OpenAI's chat API holds of it: messages, and tools if any."""
        calls = 0
        results = 0
        messages = []
        for message in [*self._instructions(), *self.messages]:
            sent = dict(message)
            if message["role"] == "assistant":
                results = calls
            if "tool_calls" in message:
                sent["tool_calls"] = [
                    _as_sent(call, calls + number)
                    for number, call in enumerate(message["tool_calls"])
                ]
                calls += len(message["tool_calls"])
            if message["role"] == "tool":
                sent["tool_call_id"] = _call_id(results)
                results += 1
            messages.append(sent)
        given = {"tools": self.tools, "chat_template_kwargs": self.chat_template_kwargs}
        return {"messages": messages} | {name: value for name, value in given.items() if value}

    def _instructions(self) -> list[HistoryMessage]:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _rendered(self, messages: Sequence[HistoryMessage]) -> Turn:
        everything = [*self._instructions(), *messages]
        return Turn.after(everything, self.llm.tokenizer, self.tools, self.chat_template_kwargs)

    def _turn(
        self,
        history: list[HistoryMessage],
        messages: list[HistoryMessage],
        max_new_tokens: int | None,
        stopped: Callable[[], bool],
    ) -> Generator[Event, None, None]:
        """Yield the events of the turn after `history` and `messages`, and remember it."""
        self.last = NOTHING
        turn = self._rendered([*history, *messages])
        room = answer_room(self.llm.backend.capabilities, turn.prompt_ids)
        most = room if max_new_tokens is None else min(room, max_new_tokens)
        request = turn.request(self.llm.backend, self.params, most)
        heard = Heard()
        remembered = True
        try:
            with closing(self.llm.engine.run(request, stopped)) as steps:
                for step in steps:
                    heard.add(step)
                    yield from step.events
        except Exception:
            remembered = False
            raise
        finally:
            # What was kept back, in case it became a tag, has been said as well.
            rest = [] if heard.finish_reason or not request.reader else request.reader.finish()
            heard.events += rest
            if remembered and heard.token_ids:
                self.last = heard.reply()
                self.messages = [*history, *messages, self.last.as_message()]
        yield from rest


def _call_id(number: int) -> str:
    return f"call_{number}"


def _as_sent(call: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Return a call of the history with arguments as text and the number that its result names."""
    function = call["function"]
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return {
        "id": _call_id(number),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }
