"""What the formats of assistants' turns have in common: reasoning, text, and calls between tags.

    <think>
    {reasoning}
    </think>

    {text}
    <tool_call>...

One newline before a tag belongs to it, as do two after `</think>` and all after calls: chat
templates write them. How calls are written is each format's own.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from neuron_minimax.generation.events import CallEnd, Content, Event, Reasoning, ReasoningEnd

THINK = "<think>"
END_THINK = "</think>"
ROLE = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
CALL = "<tool_call>"
END_CALL = "</tool_call>"
MAX_NAME = 256  # characters of a function

_POSSIBLE_START = re.compile(r"[<\n]")
_SPACE = re.compile(r"\s*")


class TurnFormat:
    """What a format says of the reasoning in its rendered prompts (see ChatFormat)."""

    reasoning_tags = (THINK, END_THINK)
    always_stops: tuple[str, ...] = ()
    calls_in_reasoning = False

    def for_template(self, source: str) -> Any:
        """Return the format of a checkpoint by its chat template: this one."""
        return self

    def opens_reasoning(self, prompt: str) -> bool:
        """Say whether a rendered prompt leaves the reasoning open: the output starts in it."""
        return prompt.rstrip().endswith(THINK)

    def closes_reasoning(self, prompt: str) -> bool:
        """Say whether a rendered prompt has closed the reasoning: there will be none."""
        return prompt.rstrip().endswith(END_THINK)


class ChatMLFormat(TurnFormat):
    """The marks of turns that Qwen and MiniMind share (ChatML), under Qwen's numbers."""

    turn_markers: tuple[str, ...] = (ROLE, END_OF_TURN, END_OF_TEXT)
    end_of_turn = END_OF_TURN
    end_of_turn_id = 151645
    always_stops: tuple[str, ...] = (END_OF_TURN, END_OF_TEXT)
    calls_tag = CALL
    tags: tuple[str, ...] = (THINK, END_THINK, CALL, END_CALL)


@dataclass
class _Waiting:
    """Reasoning that has calls in it: events from number `before` on, and the text they are of."""

    before: int
    source: list[str] = field(default_factory=list)
    calls: bool = False


class TurnParser:
    """Turns pieces of output text into events; a format adds the states in which calls are read.

    `in_reasoning`: the prompt ended in `<think>`. Without `tools_on` there are no calls: their tags
    are text. `calls_tag` opens calls; `followers` are what has to come after a tag, white space
    aside, for it to be one, and behind one of `last_tags` the output may also end; a newline before
    one of `inside_values` is not part of it, and belongs to each of `on_new_lines`.
    `may_reason`: the model may open the reasoning itself, at the beginning of its turn.
    `calls_in_reasoning`: calls are looked for there as well. They are calls where the turn ends
    with the reasoning; where an answer follows, they were quoted, and are text. Until that is
    known, the reasoning from the first of them on waits.
    """

    calls_tag: str
    followers: Mapping[str, tuple[str, ...]]
    last_tags: frozenset[str] = frozenset()
    inside_values: frozenset[str] = frozenset()
    on_new_lines: frozenset[str] = frozenset()
    calls_in_reasoning = False

    def __init__(self, *, in_reasoning: bool, may_reason: bool, tools_on: bool) -> None:
        self._tools_on = tools_on
        self._reasoning = in_reasoning
        self._buffer = ""
        self._final = False
        self._newlines_to_drop = 0.0
        self._state: Callable[[], bool] = self._start if may_reason else self._text
        self._events: list[Event] = []
        self._source: list[str] = []  # of the call under way, in case it turns out to be none
        self._waiting: _Waiting | None = None
        self._index = -1  # of the last call that has begun

    def feed(self, text: str) -> list[Event]:
        """Return the events that `text` completes; its last characters may wait for more."""
        self._buffer += text
        return self._run()

    def finish(self) -> list[Event]:
        """Return the events left when the output has ended; a call cut off ends as text."""
        self._final = True
        events = self._run()
        while self._state not in (self._text, self._start):
            self._cut_off()
            events += self._run()
        self._say(self._buffer)
        self._buffer = ""
        self._settle(as_calls=True)
        return events + self._released()

    def _run(self) -> list[Event]:
        while self._state():
            pass
        return self._released()

    def _released(self) -> list[Event]:
        if self._waiting is not None:
            return []
        events = self._events
        self._events = []
        return events

    # What a format adds.

    def _open_calls(self) -> None:
        """Enter the first state of calls; their tag has been read."""
        raise NotImplementedError

    def _cut_off(self) -> None:
        """Leave the states of calls: the output has ended."""
        raise NotImplementedError

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
        if self._waiting is not None and not self._waiting.calls:
            self._settle(as_calls=False)
        while self._newlines_to_drop and self._buffer.startswith("\n"):
            self._note("\n")
            self._buffer = self._buffer[1:]
            self._newlines_to_drop -= 1
        if self._buffer:
            self._newlines_to_drop = 0
        tags: tuple[str, ...] = (END_THINK,) if self._reasoning else ()
        if self._tools_on and (self.calls_in_reasoning or not self._reasoning):
            tags += (self.calls_tag,)
        end, tag, after = self._find(tags)
        self._say(self._buffer[:end])
        source = self._buffer[end:after]
        self._buffer = self._buffer[after:]
        if tag == END_THINK and self._waiting is not None:
            self._state = self._after_calls
        elif tag == END_THINK:
            self._end_reasoning()
        elif tag is not None:
            if self._reasoning and self._waiting is None:
                self._waiting = _Waiting(before=len(self._events))
            self._source = [source]
            self._open_calls()
        return tag is not None

    def _after_calls(self) -> bool:
        """Behind reasoning that has calls in it: an answer makes quotations of them."""
        answers = bool(self._buffer.strip())
        if answers or self._final:
            self._settle(as_calls=not answers)
            self._end_reasoning()
        return answers or self._final

    def _end_reasoning(self) -> None:
        self._reasoning = False
        self._newlines_to_drop = 2
        self._events.append(ReasoningEnd())
        self._state = self._text

    def _settle(self, *, as_calls: bool) -> None:
        """Let what waits go, as calls or as the text that it was."""
        waiting = self._waiting
        if waiting is None:
            return
        self._waiting = None
        if not (as_calls and waiting.calls):
            del self._events[waiting.before :]
            self._say("".join(waiting.source))
            self._index = -1

    # Steps shared by the states.

    def _say(self, text: str) -> None:
        if text:
            self._note(text)
            self._events.append(Reasoning(text) if self._reasoning else Content(text))

    def _note(self, text: str) -> None:
        """Keep the source of what waits."""
        if self._waiting is not None:
            self._waiting.source.append(text)

    def _end_call(self) -> None:
        """The call under way is complete."""
        self._events.append(CallEnd(self._index, True))
        if self._waiting is not None:
            self._waiting.calls = True
        self._close_source()

    def _end_calls(self) -> None:
        """Go back to text: the calls that stand together have been read."""
        self._close_source()
        self._newlines_to_drop = math.inf
        self._state = self._text

    def _close_source(self) -> None:
        self._note("".join(self._source))
        self._source = []

    def _consume(self, length: int) -> str:
        """Take so many characters of the call under way from the buffer."""
        taken = self._buffer[:length]
        self._source.append(taken)
        self._buffer = self._buffer[length:]
        return taken

    def _take(self, literal: str) -> bool:
        if not self._buffer.startswith(literal):
            return False
        self._consume(len(literal))
        return True

    def _waits(self, *literals: str) -> bool:
        return any(literal.startswith(self._buffer) for literal in literals)

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
        newline = buffer[start] == "\n" and tag not in self.inside_values
        if not newline and tag in self.on_new_lines:
            return None
        literal = "\n" + tag if newline else tag
        if not buffer.startswith(literal, start):
            return 0 if not self._final and literal.startswith(buffer[start:]) else None
        end = start + len(literal)
        followers = self.followers.get(tag)
        if followers is None:
            return end
        space = _SPACE.match(buffer, end)
        rest = buffer[space.end() if space else end :][: max(map(len, followers))]
        ends = self._final and not rest and tag in self.last_tags
        if ends or any(rest.startswith(follower) for follower in followers):
            return end
        return (
            0
            if not self._final and any(follower.startswith(rest) for follower in followers)
            else None
        )
