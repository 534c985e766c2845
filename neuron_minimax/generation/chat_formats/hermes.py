"""Formats whose tool calls are JSON between tags (Hermes 2 Pro's way): Qwen's and MiniMind's.

A turn is as chat_formats/turn.py describes it; its calls follow each other as

    <tool_call>
    {"name": "f", "arguments": {"k": "v"}}
    </tool_call>

Source: the chat templates of the published checkpoints. A call is one JSON object with `name`, a
string, and `arguments`, an object or its JSON in a string; other members are passed over, and
their order does not matter. Anything else behind the tag is text, from the tag on. At the end of
the output the closing tag may be missing. Arguments are written as JsonStream does.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from neuron_minimax.generation.chat_formats.json_stream import JsonStream
from neuron_minimax.generation.chat_formats.qwen3_coder import FUNCTION, Qwen3CoderFormat
from neuron_minimax.generation.chat_formats.turn import (
    CALL,
    END_CALL,
    MAX_NAME,
    ChatMLFormat,
    TurnParser,
)
from neuron_minimax.generation.events import CallArguments, CallBegin, CallEnd, Message, collect

NAME = "name"
ARGUMENTS = "arguments"
# Where a schema may declare parameters beside its own `properties`.
ELSEWHERE = frozenset({"$ref", "anyOf", "oneOf", "allOf", "patternProperties", "if"})
_SPACE = " \t\n\r"


class HermesFormat(ChatMLFormat):
    """What generation and serving ask such a format for (see ChatFormat)."""

    model_opens_reasoning = True
    call_endings: tuple[str, ...] = ()  # but those of JSON: the rest follows

    def parser(
        self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None
    ) -> "HermesParser":
        return HermesParser(
            in_reasoning=in_reasoning,
            may_reason=self.model_opens_reasoning or in_reasoning,
            tools_on=tools is not None,
        )

    def call_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        literal: Callable[[str], str],
        json_rule: Callable[[Mapping[str, Any]], str],
    ) -> list[str]:
        more = '("\\n" calls)?' if several else ""
        rules = [f"calls: {literal(CALL)} called"]
        body = " | ".join(f"body_{number}" for number in range(len(tools)))
        rules.append(f'called: "\\n" ({body}) "\\n" {literal(END_CALL)} {more}')
        for number, tool in enumerate(tools):
            function = tool["function"]
            name = json.dumps(function["name"], ensure_ascii=False)
            opening = json.dumps(f'{{"{NAME}": {name}, "{ARGUMENTS}": ', ensure_ascii=False)
            schema = json_rule(_object_schema(function.get("parameters") or {}))
            rules += [f'body_{number}: {opening} arguments_{number} "}}"']
            rules += [f"arguments_{number}: {schema}"]
        return rules


class Qwen2Format(HermesFormat):
    """Qwen2's and Qwen2.5's; the prompts of QwQ, of the same family, open the reasoning."""

    model_opens_reasoning = False


class Qwen3Format(HermesFormat):
    """Qwen3's: the template closes the reasoning at once where `enable_thinking` is false."""

    def for_template(self, source: str) -> "Qwen3Format | Qwen3CoderFormat":
        """Return the format of a checkpoint by its chat template: Qwen3-Coder's are other calls."""
        return Qwen3CoderFormat() if FUNCTION in source else self


class MiniMindFormat(HermesFormat):
    """MiniMind's, of a vocabulary of 6400: the template closes the reasoning unless asked."""

    end_of_turn_id = 2


def parse(
    text: str,
    *,
    in_reasoning: bool = False,
    tools: Iterable[Mapping[str, Any]] | None = None,
    may_reason: bool = True,
) -> Message:
    """Parse one whole output; arguments as for HermesFormat."""
    parser = HermesParser(
        in_reasoning=in_reasoning, may_reason=may_reason or in_reasoning, tools_on=tools is not None
    )
    return collect(parser.feed(text) + parser.finish())


class HermesParser(TurnParser):
    """Turns pieces of output text into events; arguments appear as they are written.

    They do once the name is known, which the templates write first.
    """

    calls_tag = CALL
    followers: Mapping[str, tuple[str, ...]] = {CALL: ("{",)}

    def __init__(self, *, in_reasoning: bool, may_reason: bool, tools_on: bool) -> None:
        super().__init__(in_reasoning=in_reasoning, may_reason=may_reason, tools_on=tools_on)
        self._call_open = False
        self._members: dict[str, Any] = {}
        self._key = ""
        self._value: list[str] = []
        self._stream = JsonStream()

    def _open_calls(self) -> None:
        self._call_open = False
        self._members = {}
        self._state = self._opening

    def _cut_off(self) -> None:
        """End a call whose object is complete; any other is text."""
        if self._state == self._closing and self._waits(END_CALL):
            self._consume(len(self._buffer))
            self._end_call()
            self._end_calls()
        else:
            self._abandon()

    # States: each consumes from the buffer and returns whether to go on at once.

    def _opening(self) -> bool:
        self._skip(str.isspace)
        return self._punctuation({"{": self._begin_key})

    def _begin_key(self) -> bool:
        self._skip(_SPACE.__contains__)
        if not self._buffer:
            return False
        if self._buffer.startswith('"'):
            self._begin_value(self._read_key)
        else:
            self._abandon()
        return True

    def _read_key(self) -> bool:
        if not self._read_value():
            return False
        if self._stream.failed:
            return True
        self._key = json.loads("".join(self._value))
        if self._key in self._members:
            self._abandon()
        else:
            self._state = self._colon
        return True

    def _colon(self) -> bool:
        self._skip(_SPACE.__contains__)
        return self._punctuation({":": self._member})

    def _member(self) -> bool:
        """Before a value: arguments stream when their name is known."""
        self._skip(_SPACE.__contains__)
        if not self._buffer:
            return False
        streams = self._key == ARGUMENTS and NAME in self._members and self._buffer[0] == "{"
        if streams:
            self._begin_call()
        self._begin_value(self._read_arguments if streams else self._read_member)
        return True

    def _read_arguments(self) -> bool:
        """Pass arguments on as they come."""
        self._consume(self._stream.feed(self._buffer))
        piece = self._stream.written()
        if piece:
            self._events.append(CallArguments(self._index, piece))
        if self._stream.failed:
            self._abandon()
        elif self._stream.ended:
            self._members[ARGUMENTS] = ""
            self._state = self._after_member
        return self._stream.ended or self._stream.failed

    def _read_member(self) -> bool:
        if not self._read_value():
            return False
        if not self._stream.failed:
            known = self._key in (NAME, ARGUMENTS)
            value = _known("".join(self._value), self._key) if known else ""
            if value is None:
                self._abandon()
            else:
                self._members[self._key] = value
                self._state = self._after_member
        return True

    def _after_member(self) -> bool:
        self._skip(_SPACE.__contains__)
        return self._punctuation({",": self._begin_key, "}": self._close_object})

    def _close_object(self) -> bool:
        if not self._call_open:
            if not {NAME, ARGUMENTS} <= self._members.keys():
                self._abandon()
                return True
            self._begin_call()
            self._events.append(CallArguments(self._index, self._members[ARGUMENTS]))
        self._state = self._closing
        return True

    def _closing(self) -> bool:
        """Between the object and the closing tag."""
        self._skip(str.isspace)
        if self._take(END_CALL):
            self._end_call()
            self._end_calls()
        elif self._waits(END_CALL):
            return False
        else:
            self._abandon()
        return True

    # Steps shared by the states.

    def _skip(self, is_space: Callable[[str], bool]) -> None:
        rest = next(
            (place for place, one in enumerate(self._buffer) if not is_space(one)),
            len(self._buffer),
        )
        self._consume(rest)

    def _punctuation(self, next_states: Mapping[str, Callable[[], bool]]) -> bool:
        """Take one character and go on in its state; without one, wait; else it is no call."""
        if not self._buffer:
            return False
        state = next_states.get(self._buffer[0])
        if state is None:
            self._abandon()
        else:
            self._consume(1)
            self._state = state
        return True

    def _begin_value(self, state: Callable[[], bool]) -> None:
        self._stream = JsonStream()
        self._value = []
        self._state = state

    def _read_value(self) -> bool:
        """Read a value that has to be whole; say whether it is, or is none and was abandoned."""
        self._consume(self._stream.feed(self._buffer))
        self._value.append(self._stream.written())
        if self._stream.failed:
            self._abandon()
        return self._stream.ended or self._stream.failed

    def _begin_call(self) -> None:
        self._index += 1
        self._call_open = True
        self._events.append(CallBegin(self._index, self._members[NAME]))

    def _abandon(self) -> None:
        """Say that the tag is text after all, and go on behind it."""
        if self._call_open:
            self._events.append(CallEnd(self._index, False))
        tag, *rest = self._source
        self._say(tag)
        self._buffer = "".join(rest) + self._buffer
        self._source = []
        self._state = self._text


def _known(text: str, key: str) -> str | None:
    """Return the name, or the arguments as the text of an object; None when they are none."""
    value = json.loads(text)
    if key == ARGUMENTS:
        if isinstance(value, str):
            return _object(value)
        return text if isinstance(value, dict) else None
    return value if isinstance(value, str) and 0 < len(value) <= MAX_NAME else None


def _object(text: str) -> str | None:
    """Return the JSON of the object that `text` spells, None where it spells none."""
    text = text.strip(_SPACE)
    stream = JsonStream()
    length = stream.feed(text)
    return stream.written() if stream.ended and length == len(text) and text[0] == "{" else None


def _object_schema(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema of a call's arguments: an object, of the declared parameters alone where
    the tool lists them and does not say otherwise.
    """
    closed = {} if parameters.keys() & ELSEWHERE else {"additionalProperties": False}
    return {**closed, **parameters, "type": "object"}
