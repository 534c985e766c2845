"""MiniMax-M2's format: reasoning, text and tool calls, parsed as they stream.

Source: the checkpoint's chat template, which writes an assistant's turn as

    <think>
    {reasoning}
    </think>

    {text}
    <minimax:tool_call>
    <invoke name="f">
    <parameter name="k">v</parameter>
    </invoke>
    </minimax:tool_call>

What only looks like a tag, such as `<minimax:tool_call>` without an `<invoke name="`, is text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from neuron_minimax.generation.chat_formats.argument_types import (
    allowed_types,
    parameter_schema,
    typed_value,
)
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

THINK = "<think>"
END_THINK = "</think>"
TOOLS = "<minimax:tool_call>"
END_TOOLS = "</minimax:tool_call>"
INVOKE = '<invoke name="'
END_INVOKE = "</invoke>"
PARAMETER = '<parameter name="'
END_PARAMETER = "</parameter>"
END_NAME = '">'
BEGIN_OF_TEXT = "]~!b["
ROLE = "]~b]"
END_OF_TURN = "[e~["
MAX_NAME = 256

_POSSIBLE_START = re.compile(r"[<\n]")
_SPACE = re.compile(r"\s*")


class MiniMaxM2Format:
    """The format as generation and serving ask for it (see ChatFormat)."""

    turn_markers: tuple[str, ...] = (BEGIN_OF_TEXT, ROLE, END_OF_TURN)
    end_of_turn = END_OF_TURN
    end_of_turn_id = 200020
    tags: tuple[str, ...] = (THINK, END_THINK, TOOLS, END_TOOLS)
    reasoning_tags = (THINK, END_THINK)

    def opens_reasoning(self, prompt: str) -> bool:
        """Say whether a rendered prompt leaves the reasoning open: the output starts in it."""
        return prompt.rstrip().endswith(THINK)

    def parser(
        self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None
    ) -> "MiniMaxM2Parser":
        return MiniMaxM2Parser(in_reasoning=in_reasoning, tools=tools)

    def call_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        literal: Callable[[str], str],
        json_rule: Callable[[Mapping[str, Any]], str],
    ) -> list[str]:
        call = "call+" if several else "call"
        rules = [f'calls: {literal(TOOLS)} "\\n" {call} {literal(END_TOOLS)}']
        rules.append("call: " + " | ".join(f"call_{number}" for number in range(len(tools))))
        rules.append(f'text[suffix="{END_PARAMETER}"]: /(?s:.*)/')
        for number, tool in enumerate(tools):
            rules += _call_rules(number, tool["function"], json_rule)
        return rules


def parse(
    text: str, *, in_reasoning: bool = False, tools: Iterable[Mapping[str, Any]] | None = None
) -> Message:
    """Parse one whole output; arguments as for MiniMaxM2Parser."""
    parser = MiniMaxM2Parser(in_reasoning=in_reasoning, tools=tools)
    return collect(parser.feed(text) + parser.finish())


class MiniMaxM2Parser:
    """Turns pieces of output text into events.

    `in_reasoning`: the prompt ended in `<think>` (see opens_reasoning). `tools`: the request's
    tools in OpenAI's form, which type the arguments; None turns tool calls off, and their tags are
    text.
    """

    def __init__(self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None) -> None:
        functions = [tool.get("function", tool) for tool in tools or ()]
        self._schemas = {
            function["name"]: function.get("parameters") or {} for function in functions
        }
        self._tools_on = tools is not None
        self._reasoning = in_reasoning
        self._buffer = ""
        self._final = False
        self._newlines_to_drop = 0.0
        self._state: Callable[[], bool] = self._start
        self._events: list[Event] = []
        self._source = ""  # of the tool call under way, in case it turns out to be none
        self._index = -1
        self._call_open = False
        self._any_parameter = False
        self._function = ""
        self._value = ""
        self._types: frozenset[str] = frozenset()

    @property
    def in_reasoning(self) -> bool:
        """Say whether what comes next is reasoning, unless it is a tag."""
        return self._reasoning

    def feed(self, text: str) -> list[Event]:
        """Return the events that `text` completes; its last characters may wait for more."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """Return the events left when the output has ended; a call cut off ends as text."""
        self._final = True
        events = self._run()
        if self._state not in (self._text, self._start):
            self._abandon()
        self._say(self._buffer)
        self._buffer = ""
        events += self._events
        self._events = []
        return events

    def _run(self) -> list[Event]:
        while self._state():
            pass
        events = self._events
        self._events = []
        return events

    # States: each consumes from the buffer and returns whether to go on at once.

    def _start(self) -> bool:
        """Nothing said yet: an explicit `<think>` counts here only."""
        stripped = self._buffer.lstrip()
        if stripped.startswith(THINK):
            self._buffer = stripped[len(THINK) :]
            self._newlines_to_drop = 1
            self._reasoning = True
        elif THINK.startswith(stripped) and not self._final:
            return False
        self._state = self._text
        return True

    def _text(self) -> bool:
        """Reasoning or answer."""
        while self._newlines_to_drop and self._buffer.startswith("\n"):
            self._buffer = self._buffer[1:]
            self._newlines_to_drop -= 1
        if self._buffer:
            self._newlines_to_drop = 0
        tags: tuple[str, ...] = (END_THINK,) if self._reasoning else ()
        end, tag, after = self._find(tags + ((TOOLS,) if self._tools_on else ()))
        self._say(self._buffer[:end])
        source = self._buffer[end:after]
        self._buffer = self._buffer[after:]
        if tag == END_THINK:
            self._reasoning = False
            self._newlines_to_drop = 2
            self._events.append(ReasoningEnd())
        elif tag == TOOLS:
            self._state = self._block
            self._source = source
        return tag is not None

    def _block(self) -> bool:
        """Between `<minimax:tool_call>` and its end, outside any `<invoke>`."""
        self._skip_space()
        if self._take(INVOKE):
            self._state = self._name
        elif self._take(END_TOOLS):
            self._source = ""
            self._newlines_to_drop = float("inf")
            self._state = self._text
        elif self._waits(INVOKE, END_TOOLS):
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
        """Inside `<invoke>`, outside any `<parameter>`."""
        self._skip_space()
        if self._take(PARAMETER):
            self._state = self._parameter_name
        elif self._take(END_INVOKE):
            self._argument("}" if self._any_parameter else "{}")
            self._events.append(CallEnd(self._index, True))
            self._call_open = False
            self._source = ""
            self._state = self._block
        elif self._waits(PARAMETER, END_INVOKE):
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
            self._state = self._parameter_value
            if self._types <= {"string"}:
                self._argument('"')
        return name is not None

    def _parameter_value(self) -> bool:
        """A string streams; any other type has to be whole before it can be typed."""
        end, tag, after = self._find((END_PARAMETER,))
        piece = self._buffer[:end]
        self._source += self._buffer[:after]
        self._buffer = self._buffer[after:]
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

    def _say(self, text: str) -> None:
        if text:
            self._events.append(Reasoning(text) if self._reasoning else Content(text))

    def _argument(self, text: str) -> None:
        self._events.append(CallArguments(self._index, text))

    def _abandon(self) -> None:
        """Say that what has been read of the call under way is text after all."""
        if self._call_open:
            self._events.append(CallEnd(self._index, False))
        self._call_open = False
        self._say(self._source)
        self._source = ""
        self._state = self._text

    def _skip_space(self) -> None:
        rest = self._buffer.lstrip()
        if self._source:
            self._source += self._buffer[: len(self._buffer) - len(rest)]
        self._buffer = rest

    def _take(self, literal: str) -> bool:
        if not self._buffer.startswith(literal):
            return False
        self._source += literal
        self._buffer = self._buffer[len(literal) :]
        return True

    def _waits(self, *literals: str) -> bool:
        return any(literal.startswith(self._buffer) for literal in literals)

    def _quoted(self) -> str | None:
        """Take the name up to `">`. Return None to wait, "" when the call had to be abandoned."""
        name, end, rest = self._buffer.partition(END_NAME)
        if end and name and len(name) <= MAX_NAME:
            self._source += name + end
            self._buffer = rest
            return name
        if not end and len(name) <= MAX_NAME + 1:
            return None
        self._abandon()
        return ""

    def _find(self, tags: tuple[str, ...]) -> tuple[int, str | None, int]:
        """Find the first of `tags`: (end of the text before, tag or None, where to go on).

        Text that may still become a tag is kept back until more has arrived.
        """
        for place in _POSSIBLE_START.finditer(self._buffer):
            start = place.start()
            for tag in tags:
                after = self._match(tag, start)
                if after is not None:
                    return (start, tag, after) if after else (start, None, start)
        return len(self._buffer), None, len(self._buffer)

    def _match(self, tag: str, start: int) -> int | None:
        """Return the end of `tag` at `start`, 0 when only more text can tell, None without it."""
        buffer = self._buffer
        literal = "\n" + tag if buffer[start] == "\n" and tag != END_PARAMETER else tag
        if not buffer.startswith(literal, start):
            return 0 if not self._final and literal.startswith(buffer[start:]) else None
        end = start + len(literal)
        followers = {TOOLS: (INVOKE,), END_PARAMETER: (PARAMETER, END_INVOKE)}.get(tag)
        if followers is None:
            return end
        space = _SPACE.match(buffer, end)
        rest = buffer[space.end() if space else end :][: len(PARAMETER)]
        if any(rest.startswith(follower) for follower in followers):
            return end
        return (
            0
            if not self._final and any(follower.startswith(rest) for follower in followers)
            else None
        )


def _call_rules(
    number: int, function: Mapping[str, Any], json_rule: Callable[[Mapping[str, Any]], str]
) -> list[str]:
    """Return the rules of one tool's call: its parameters in the order of the schema.

    Strings are written bare, everything else as JSON.
    """
    parameters = function.get("parameters") or {}
    required = parameters.get("required") or ()
    parts = []
    rules = []
    for place, key in enumerate(parameters.get("properties") or {}):
        schema = parameter_schema(parameters, key)
        opening = _quote(f"{PARAMETER}{key}{END_NAME}")
        is_text = allowed_types(schema, parameters) <= {"string"}
        if is_text and "enum" not in schema and "const" not in schema:
            part = f'{opening} text "\\n"'
        elif is_text:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            choices = " | ".join(_quote(str(value)) for value in values)
            part = f'{opening} ({choices}) "{END_PARAMETER}\\n"'
        else:
            definitions = {
                name: parameters[name] for name in ("$defs", "definitions") if name in parameters
            }
            rules.append(f"value_{number}_{place}: {json_rule({**definitions, **schema})}")
            part = f'{opening} value_{number}_{place} "{END_PARAMETER}\\n"'
        parts.append(part if key in required else f"({part})?")
    opening = _quote(f"{INVOKE}{function['name']}{END_NAME}\n")
    return [f'call_{number}: {opening} {" ".join(parts)} "{END_INVOKE}\\n"', *rules]


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
