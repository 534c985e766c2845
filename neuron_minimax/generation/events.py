"""The events of an assistant turn as it streams, and the whole message they join to."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reasoning:
    """A piece of the reasoning."""

    text: str


@dataclass(frozen=True)
class ReasoningEnd:
    """The reasoning was closed by its tag."""


@dataclass(frozen=True)
class Content:
    """A piece of the answer's text."""

    text: str


@dataclass(frozen=True)
class CallBegin:
    """Tool call number `index` of this turn starts."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """The next piece of the call's arguments; the pieces join to one JSON object."""

    index: int
    text: str


@dataclass(frozen=True)
class CallEnd:
    """The call is complete, or, when `complete` is false, cut off: its source follows as text."""

    index: int
    complete: bool


Event = Reasoning | ReasoningEnd | Content | CallBegin | CallArguments | CallEnd


@dataclass
class ToolCall:
    """A complete call; `arguments` is the text of a JSON object."""

    name: str
    arguments: str = ""


@dataclass
class Message:
    """One whole assistant turn."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)


def collect(events: Iterable[Event]) -> Message:
    """Join the events of one turn; calls that were cut off are part of the text."""
    message = Message()
    calls = {}
    for event in events:
        match event:
            case Reasoning(text):
                message.reasoning += text
            case Content(text):
                message.content += text
            case CallBegin(index, name):
                calls[index] = ToolCall(name)
            case CallArguments(index, text):
                calls[index].arguments += text
            case CallEnd(index, complete) if not complete:
                del calls[index]
    message.tool_calls = [calls[index] for index in sorted(calls)]
    return message
