"""MiniMax-M2's output format, parsed as it streams: reasoning, text and tool calls, the same for
any split of the text.

Format (the checkpoint's chat template):
`<think>\\n{reasoning}\\n</think>\\n\\n{text}\\n<minimax:tool_call>\\n <invoke
name="f">\\n<parameter name="k">v</parameter>\\n</invoke>\\n</minimax:tool_call>`. What only looks
like a tag, such as a `<minimax:tool_call>` without an `<invoke name="`, is text.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from neuron_minimax.generation.argument_types import allowed_types, parameter_schema, typed_value
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
FORMAT_MARKERS = (THINK, END_THINK, TOOLS, END_TOOLS)
MAX_NAME = 256

_POSSIBLE_START = re.compile(r"[<\n]")
_SPACE = re.compile(r"\s*")


def opens_reasoning(prompt: str) -> bool:
    """Whether a rendered prompt leaves the reasoning open, so that the output starts inside it."""
    return prompt.rstrip().endswith(THINK)


def parse(
    text: str, *, in_reasoning: bool = False, tools: Iterable[Mapping[str, Any]] | None = None
) -> Message:
    """Parse one whole output; arguments as for MiniMaxParser."""
    parser = MiniMaxParser(in_reasoning=in_reasoning, tools=tools)
    return collect(parser.feed(text) + parser.finish())


class MiniMaxParser:
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
        self._call_open = self._any_parameter = False
        self._function = self._parameter = self._value = ""
        self._types: frozenset[str] = frozenset()

    @property
    def in_reasoning(self) -> bool:
        """Whether what comes next is reasoning, unless it is a tag."""
        return self._reasoning

    def feed(self, text: str) -> list[Event]:
        """The events that `text` completes; the last few characters may wait for what follows."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """The events left when the output has ended; a call that was cut off ends as text."""
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
        tags = (END_THINK,) if self._reasoning else ()
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
        """What has been read of the call under way is text after all."""
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
        """The name up to `">`; None to wait. Abandons the call (and returns "") when this is no
        name.
        """
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
        """(end of the text before, tag or None, where to go on), for the first of `tags` in the
        buffer. Text that may still become a tag is kept back until more has arrived.
        """
        for place in _POSSIBLE_START.finditer(self._buffer):
            start = place.start()
            for tag in tags:
                after = self._match(tag, start)
                if after is not None:
                    return (start, tag, after) if after else (start, None, start)
        return len(self._buffer), None, len(self._buffer)

    def _match(self, tag: str, start: int) -> int | None:
        """End of `tag` at `start` of the buffer, 0 when only more text can tell, None when it is
        not there.
        """
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
