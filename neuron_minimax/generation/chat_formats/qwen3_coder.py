"""Qwen3-Coder's format: text and tool calls without reasoning, in the marks of Qwen3.

Source: the checkpoints' chat template, which writes the calls of a turn one after another as

    <tool_call>
    <function=f>
    <parameter=k>
    v
    </parameter>
    </function>
    </tool_call>
"""

from collections.abc import Iterable, Mapping
from typing import Any

from neuron_minimax.generation.chat_formats.tagged_calls import (
    CallTags,
    TaggedCallFormat,
    TaggedCallParser,
)
from neuron_minimax.generation.chat_formats.turn import CALL, END_CALL, ChatMLFormat

FUNCTION = "<function="
TAGS = CallTags(
    block=CALL,
    end_block=END_CALL,
    call=FUNCTION,
    end_call="</function>",
    parameter="<parameter=",
    end_parameter="</parameter>",
    end_name=">",
    several=False,
    padded=True,
)


class Qwen3CoderFormat(TaggedCallFormat, ChatMLFormat):
    """The format as generation and serving ask for it (see ChatFormat)."""

    model_opens_reasoning = False
    call_tags = TAGS
    call_endings = TAGS.endings

    def parser(
        self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None
    ) -> TaggedCallParser:
        return TaggedCallParser(
            TAGS, in_reasoning=in_reasoning, may_reason=in_reasoning, tools=tools
        )
