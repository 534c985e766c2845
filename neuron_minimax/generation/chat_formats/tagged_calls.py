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
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neuron_minimax.generation.chat_formats.argument_types import (
    ParameterType,
    declared_parameters,
    object_variants,
    parameter_schema,
    parameter_type,
    with_definitions,
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

    @property
    def endings(self) -> tuple[str, ...]:
        """What closes a value, a call and a block."""
        return (_closing(self), self.end_call, self.end_block)

    @property
    def call_element(self) -> str:
        """The beginning of a call's tag, however its name is written."""
        return _ELEMENT.findall(self.call)[0]

    @property
    def parameter_element(self) -> str:
        """The beginning of a parameter's tag, however its name is written."""
        return _ELEMENT.findall(self.parameter)[0]


_ELEMENT = re.compile(r"<\w+")
# Ways to write the name in an opening tag: as an attribute among others, or assigned to the tag.
_VALUE = r"""(?:"([^"]*)"|'([^']*)'|([^\s"'<>=]+))"""
_ATTRIBUTES = re.compile(rf"\s+([\w:.-]+)\s*=\s*{_VALUE}")
_WITH_ATTRIBUTES = re.compile(rf"(?:{_ATTRIBUTES.pattern})+\s*/?>")
_ASSIGNED = re.compile(r"""\s*=\s*(?:"([^"]+)"|'([^']+)'|([^>\n]+?))\s*>""")
_UP_TO_THE_END = re.compile(r'\s+name="([^<>\n]+)">')  # a name with quotes in it
_END_OF_TAG = re.compile(">")
MAX_TAG = 2 * MAX_NAME


def _name_in(tag: str) -> str:
    """Return the name in an opening tag, given from behind its element on; "" where it has none."""
    if _WITH_ATTRIBUTES.fullmatch(tag):
        found = {match[1]: match[2] or match[3] or match[4] for match in _ATTRIBUTES.finditer(tag)}
        return found.get("name") or ""
    match = _ASSIGNED.fullmatch(tag) or _UP_TO_THE_END.fullmatch(tag)
    return next(filter(None, match.groups()), "") if match else ""


class TaggedCallParser(TurnParser):
    """Turns pieces of output text into events.

    `in_reasoning`: the prompt ended in `<think>`. `tools`: the request's tools in OpenAI's form,
    which type the arguments; None turns tool calls off, and their tags are text. Names are taken
    however they are quoted, and beside other attributes; a closing tag may be missing where the
    next one tells that it is; of a parameter that is given twice the first value counts.
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
        calls = tuple(tags.call_element + after for after in " \n\t=")
        ends = (*calls, tags.end_block)
        self.followers = {
            tags.block: calls,
            tags.end_parameter: (tags.parameter_element, tags.end_call, *ends),
            tags.end_call: ends,
        }
        self.last_tags = frozenset({tags.end_call})
        self.inside_values = frozenset() if tags.padded else frozenset({tags.end_parameter})
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._schemas = {
            function["name"]: function.get("parameters") or {} for function in functions
        }
        self._call_open = False
        self._given: set[str] = set()
        self._repeated = False
        self._function = ""
        self._value = ""
        self._ends: tuple[str, ...] = ()  # what may end the value under way
        self._parameter = ParameterType()

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
        if self._buffer.startswith(tags.call_element):
            self._state = self._name
        elif self._take(tags.end_block):
            self._end_calls()
        elif self._waits(tags.call_element, tags.end_block):
            return False
        else:
            self._abandon()
        return True

    def _name(self) -> bool:
        name = self._named(self._tags.call_element)
        if name:
            self._index += 1
            self._call_open = True
            self._given = set()
            self._function = name
            self._events.append(CallBegin(self._index, name))
            self._state = self._body
        return name is not None

    def _body(self) -> bool:
        """Inside a call, outside any parameter."""
        tags = self._tags
        self._skip_space()
        if self._buffer.startswith(tags.parameter_element):
            self._state = self._parameter_name
        elif self._take(tags.end_call) or self._at_next_call():
            self._events.append(CallArguments(self._index, "}" if self._given else "{}"))
            self._call_open = False
            self._end_call()
            self._state = self._block
        elif self._waits(tags.parameter_element, tags.end_call, tags.call_element, tags.end_block):
            return False
        else:
            self._abandon()
        return True

    def _at_next_call(self) -> bool:
        return self._buffer.startswith((self._tags.call_element, self._tags.end_block))

    def _parameter_name(self) -> bool:
        name = self._named(self._tags.parameter_element)
        if name:
            schema = self._schemas.get(self._function, {})
            self._parameter = parameter_type(schema, name)
            self._repeated = name in self._given
            opening = ", " if self._given else "{"
            self._argument(f"{opening}{json.dumps(name, ensure_ascii=False)}: ")
            self._given.add(name)
            missing = [key for key in declared_parameters(schema) if key not in self._given]
            following = tuple(
                f"{self._tags.parameter}{key}{self._tags.end_name}" for key in missing
            )
            self.on_new_lines = frozenset(following)
            self._ends = (
                self._tags.end_parameter,
                self._tags.end_call,
                self._tags.end_block,
                *following,
            )
            self._value = ""
            self._state = self._padding if self._tags.padded else self._parameter_value
            if self._parameter.streams:
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
        end, tag, after = self._find(self._ends)
        piece = self._consume(end)
        if tag == self._tags.end_parameter:
            self._consume(after - end)
        if self._parameter.streams:
            self._argument(json.dumps(piece, ensure_ascii=False)[1:-1])
        else:
            self._value += piece
        if tag is not None:
            whole = '"' if self._parameter.streams else self._parameter.spell(self._value)
            self._argument(whole)
            self._state = self._body
        return tag is not None

    # Steps shared by the states.

    def _argument(self, text: str) -> None:
        if text and not self._repeated:
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
        space = self._buffer[: len(self._buffer) - len(rest)]
        if self._source:
            self._source.append(space)
        else:
            self._note(space)
        self._buffer = rest

    def _named(self, element: str) -> str | None:
        """Take an opening tag and return the name in it. Return None to wait, "" when the call was
        abandoned.
        """
        start = len(element)
        for place in _END_OF_TAG.finditer(self._buffer, start, start + MAX_TAG):
            name = _name_in(self._buffer[start : place.end()])
            if name and len(name) <= MAX_NAME:
                self._consume(place.end())
                return name
        if len(self._buffer) < start + MAX_TAG:
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
        more = '("\\n" calls)?' if several and not tags.several else ""
        rules = [f"calls: {literal(tags.block)} called"]
        rules.append(f'called: "\\n" {call} {literal(tags.end_block)} {more}')
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
    """Return the rules of one tool's call: its parameters in the order of the schema, in each of
    the variants that the schema has.

    Strings are written bare, everything else as JSON.
    """
    parameters = function.get("parameters") or {}
    closing = _quote(_closing(tags) + "\n")
    bodies = []
    rules: list[str] = []
    for variant in object_variants(parameters):
        parts = []
        for key in variant.names:
            known = parameter_type(parameters, key)
            if known.streams:
                value = 'text "\\n"'
            elif known.is_text:
                value = f"({' | '.join(map(_quote, known.choices))}) {closing}"
            else:
                rule = f"value_{number}_{len(rules)}"
                schema = with_definitions(parameter_schema(parameters, key), parameters)
                rules.append(f"{rule}: {json_rule(schema)}")
                value = f"{rule} {closing}"
            part = f"{_quote(_opening(tags, key))} {value}"
            parts.append(part if key in variant.required else f"({part})?")
        bodies.append(" ".join(parts))
    opening = _quote(f"{tags.call}{function['name']}{tags.end_name}\n")
    end = _quote(f"{tags.end_call}\n")
    optional = "" if all(bodies) else "?"
    body = f"({' | '.join(filter(None, bodies))}){optional}" if any(bodies) else ""
    return [f"call_{number}: {opening} {body} {end}", *rules]


def _opening(tags: CallTags, name: str) -> str:
    return f"{tags.parameter}{name}{tags.end_name}" + ("\n" if tags.padded else "")


def _closing(tags: CallTags) -> str:
    return ("\n" if tags.padded else "") + tags.end_parameter


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
