"""Tool calls whose arguments are each between tags: MiniMax-M2's and Qwen3-Coder's.

A block of calls follows the text of a turn (chat_formats/turn.py), such as

    <minimax:tool_call>
    <invoke name="f">
    <parameter name="k">v</parameter>
    </invoke>
    </minimax:tool_call>

Strings are written bare, everything else as JSON, or as Python spells it. What only looks like a
tag, such as that of a block without that of a call, is text.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron_minimax.generation.chat_formats.argument_types import (
    allowed_types,
    parameter_schema,
    typed_value,
)
from neuron_minimax.generation.chat_formats.turn import MAX_NAME, TurnParser
from neuron_minimax.generation.events import CallArguments, CallBegin, CallEnd


@dataclass(frozen=True, kw_only=True)
class CallTags:
    """The tags of a format: of a block, of a call up to its name, of a parameter up to its name.

    `end_name` closes the latter two. With `several` a block has all calls of a turn, else one each.
    With `padded` a value stands on lines of its own.
    """

    block: str
    end_block: str
    call: str
    end_call: str
    parameter: str
    end_parameter: str
    end_name: str
    several: bool
    padded: bool


class TaggedCallParser(TurnParser):
    """Turns pieces of output text into events.

    `in_reasoning`: the prompt ended in `<think>`. `tools`: the request's tools in OpenAI's form,
    which type the arguments; None turns tool calls off, and their tags are text.
    """

    def __init__(
        self,
        tags: CallTags,
        *,
        in_reasoning: bool,
        may_reason: bool,
        tools: Iterable[Mapping[str, Any]] | None,
    ) -> None:
        super().__init__(
            in_reasoning=in_reasoning, may_reason=may_reason, tools_on=tools is not None
        )
        self._tags = tags
        self.calls_tag = tags.block
        self.followers = {
            tags.block: (tags.call,),
            tags.end_parameter: (tags.parameter, tags.end_call),
        }
        self.inside_values = frozenset() if tags.padded else frozenset({tags.end_parameter})
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._schemas = {
            function["name"]: function.get("parameters") or {} for function in functions
        }
        self._index = -1
        self._call_open = False
        self._any_parameter = False
        self._function = ""
        self._value = ""
        self._types: frozenset[str] = frozenset()

    def _open_calls(self) -> None:
        self._state = self._block

    def _cut_off(self) -> None:
        """Say what is left, but for the beginning of a closing tag behind the one call of a
        block.
        """
        complete = not self._source and not self._tags.several
        if complete and self._waits(self._tags.end_block):
            self._buffer = ""
        self._abandon()
        self._say(self._buffer)
        self._buffer = ""

    # States: each consumes from the buffer and returns whether to go on at once.

    def _block(self) -> bool:
        """Within a block of calls, outside any of them."""
        tags = self._tags
        self._skip_space()
        if self._take(tags.call):
            self._state = self._name
        elif self._take(tags.end_block):
            self._source = []
            self._newlines_to_drop = float("inf")
            self._state = self._text
        elif self._waits(tags.call, tags.end_block):
            return False
        else:
            self._abandon()
        return True

    def _name(self) -> bool:
        name = self._quoted()
        if name:
            self._index += 1
            self._call_open = True
            self._any_parameter = False
            self._function = name
            self._events.append(CallBegin(self._index, name))
            self._state = self._body
        return name is not None

    def _body(self) -> bool:
        """Inside a call, outside any parameter."""
        tags = self._tags
        self._skip_space()
        if self._take(tags.parameter):
            self._state = self._parameter_name
        elif self._take(tags.end_call):
            self._argument("}" if self._any_parameter else "{}")
            self._events.append(CallEnd(self._index, True))
            self._call_open = False
            self._source = []
            self._state = self._block
        elif self._waits(tags.parameter, tags.end_call):
            return False
        else:
            self._abandon()
        return True

    def _parameter_name(self) -> bool:
        name = self._quoted()
        if name:
            schema = self._schemas.get(self._function, {})
            self._types = allowed_types(parameter_schema(schema, name), schema)
            self._argument(
                (", " if self._any_parameter else "{") + json.dumps(name, ensure_ascii=False) + ": "
            )
            self._any_parameter = True
            self._value = ""
            self._state = self._padding if self._tags.padded else self._parameter_value
            if self._types <= {"string"}:
                self._argument('"')
        return name is not None

    def _padding(self) -> bool:
        """Before a value that stands on lines of its own."""
        if self._buffer:
            self._take("\n")
            self._state = self._parameter_value
        return bool(self._buffer)

    def _parameter_value(self) -> bool:
        """A string streams; any other type has to be whole before it can be typed."""
        end, tag, after = self._find((self._tags.end_parameter,))
        piece = self._consume(after)[:end]
        streams = self._types <= {"string"}
        if streams and piece:
            self._argument(json.dumps(piece, ensure_ascii=False)[1:-1])
        self._value += "" if streams else piece
        if tag is not None:
            value = (
                '"'
                if streams
                else json.dumps(typed_value(self._value, self._types), ensure_ascii=False)
            )
            self._argument(value)
            self._state = self._body
        return tag is not None

    # Steps shared by the states.

    def _argument(self, text: str) -> None:
        self._events.append(CallArguments(self._index, text))

    def _abandon(self) -> None:
        """Say that what has been read of the call under way is text after all."""
        if self._call_open:
            self._events.append(CallEnd(self._index, False))
        self._call_open = False
        self._say("".join(self._source))
        self._source = []
        self._state = self._text

    def _skip_space(self) -> None:
        rest = self._buffer.lstrip()
        if self._source:
            self._source.append(self._buffer[: len(self._buffer) - len(rest)])
        self._buffer = rest

    def _quoted(self) -> str | None:
        """Take the name up to its end. Return None to wait, "" when the call was abandoned."""
        name, end, _ = self._buffer.partition(self._tags.end_name)
        if end and name and len(name) <= MAX_NAME:
            self._consume(len(name + end))
            return name
        if not end and len(name) <= MAX_NAME + 1:
            return None
        self._abandon()
        return ""


class TaggedCallFormat:
    """The part of a format (see ChatFormat) that follows from its `call_tags`."""

    call_tags: CallTags

    def call_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        literal: Callable[[str], str],
        json_rule: Callable[[Mapping[str, Any]], str],
    ) -> list[str]:
        tags = self.call_tags
        call = "call+" if several and tags.several else "call"
        block = f'{literal(tags.block)} "\\n" {call} {literal(tags.end_block)}'
        blocks = 'block ("\\n" block)*' if several and not tags.several else "block"
        rules = [f"calls: {blocks}", f"block: {block}"]
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
        rules.append(f"text[suffix={_quote(_closing(tags))}]: /(?s:.*)/")
        for number, tool in enumerate(tools):
            rules += _call_rules(tags, number, tool["function"], json_rule)
        return rules


def _call_rules(
    tags: CallTags,
    number: int,
    function: Mapping[str, Any],
    json_rule: Callable[[Mapping[str, Any]], str],
) -> list[str]:
    """Return the rules of one tool's call: its parameters in the order of the schema.

    Strings are written bare, everything else as JSON.
    """
    parameters = function.get("parameters") or {}
    required = frozenset(parameters.get("required") or ())
    closing = _quote(_closing(tags) + "\n")
    parts = []
    rules = []
    for place, key in enumerate(parameters.get("properties") or {}):
        schema = parameter_schema(parameters, key)
        opening = _quote(_opening(tags, key))
        is_text = allowed_types(schema, parameters) <= {"string"}
        if is_text and "enum" not in schema and "const" not in schema:
            part = f'{opening} text "\\n"'
        elif is_text:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            choices = " | ".join(_quote(str(value)) for value in values)
            part = f"{opening} ({choices}) {closing}"
        else:
            definitions = {
                name: parameters[name] for name in ("$defs", "definitions") if name in parameters
            }
            rules.append(f"value_{number}_{place}: {json_rule({**definitions, **schema})}")
            part = f"{opening} value_{number}_{place} {closing}"
        parts.append(part if key in required else f"({part})?")
    opening = _quote(f"{tags.call}{function['name']}{tags.end_name}\n")
    end = _quote(f"{tags.end_call}\n")
    return [f"call_{number}: {opening} {' '.join(parts)} {end}", *rules]


def _opening(tags: CallTags, name: str) -> str:
    return f"{tags.parameter}{name}{tags.end_name}" + ("\n" if tags.padded else "")


def _closing(tags: CallTags) -> str:
    return ("\n" if tags.padded else "") + tags.end_parameter


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
