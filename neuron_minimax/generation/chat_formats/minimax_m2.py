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
"""

from collections.abc import Iterable, Mapping
from typing import Any

from neuron_minimax.generation.chat_formats.tagged_calls import (
    CallTags,
    TaggedCallFormat,
    TaggedCallParser,
)
from neuron_minimax.generation.chat_formats.turn import END_THINK, THINK, TurnFormat
from neuron_minimax.generation.events import Message, collect

TOOLS = "<minimax:tool_call>"
END_TOOLS = "</minimax:tool_call>"
BEGIN_OF_TEXT = "]~!b["
ROLE = "]~b]"
END_OF_TURN = "[e~["
TAGS = CallTags(
    block=TOOLS,
    end_block=END_TOOLS,
    call='<invoke name="',
    end_call="</invoke>",
    parameter='<parameter name="',
    end_parameter="</parameter>",
    end_name='">',
    several=True,
    padded=False,
)


class MiniMaxM2Format(TaggedCallFormat, TurnFormat):
    """The format as generation and serving ask for it (see ChatFormat)."""

    turn_markers: tuple[str, ...] = (BEGIN_OF_TEXT, ROLE, END_OF_TURN)
    end_of_turn = END_OF_TURN
    end_of_turn_id = 200020
    model_opens_reasoning = False  # the template does
    calls_in_reasoning = True
    tags: tuple[str, ...] = (THINK, END_THINK, TOOLS, END_TOOLS)
    call_tags = TAGS
    calls_tag = TOOLS
    call_endings = TAGS.endings

    def parser(
        self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None
    ) -> "MiniMaxM2Parser":
        return MiniMaxM2Parser(in_reasoning=in_reasoning, tools=tools)


class MiniMaxM2Parser(TaggedCallParser):
    """Turns pieces of output text into events; calls count within the reasoning as well."""

    calls_in_reasoning = True

    def __init__(self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None) -> None:
        super().__init__(TAGS, in_reasoning=in_reasoning, may_reason=True, tools=tools)


def parse(
    text: str, *, in_reasoning: bool = False, tools: Iterable[Mapping[str, Any]] | None = None
) -> Message:
    """Parse one whole output; arguments as for MiniMaxM2Parser."""
    parser = MiniMaxM2Parser(in_reasoning=in_reasoning, tools=tools)
    return collect(parser.feed(text) + parser.finish())
