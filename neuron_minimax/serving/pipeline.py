"""From tokens to what a client sees: text as it completes, MiniMax's format taken apart, stop
strings honoured.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from neuron_minimax.generation.events import CallBegin, CallEnd, Content, Event
from neuron_minimax.generation.minimax_format import MiniMaxParser
from neuron_minimax.generation.tokenizer import StreamDecoder, TextTokenizer


class StopStrings:
    """Cuts text before the first stop string; what may become one is kept back until more text has
    come.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown; nothing after a stop string was found."""
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            shown = self._held[: min(places)]
            self._held = ""
            return shown
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]
        return shown

    def finish(self) -> str:
        """What was kept back for nothing."""
        shown = self._held
        self._held = ""
        return shown


class Pipeline:
    """Tokens of one answer to events. Stop strings apply to the answer's text, not to the reasoning
    before it.

    `chat` is None for plain completions (all text is Content), else the arguments of MiniMaxParser.
    With `one_call` the answer ends with its first tool call.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        stops: Sequence[str] = (),
        chat: Mapping[str, Any] | None = None,
        one_call: bool = False,
    ) -> None:
        self._one_call = one_call
        self._called = False
        self._decoder = StreamDecoder(tokenizer)
        self._parser = MiniMaxParser(**chat) if chat is not None else None
        self._stops = StopStrings(stops)

    @property
    def in_reasoning(self) -> bool:
        """Whether the answer proper has not begun."""
        return self._parser is not None and self._parser.in_reasoning

    @property
    def stopped(self) -> bool:
        """Whether the answer is over: a stop string was found, or the only call that was allowed is
        complete.
        """
        return self._stops.found or (self._one_call and self._called)

    def push(self, token: int) -> list[Event]:
        """The events that `token` completes."""
        text = self._decoder.push(token)
        return self._cut(self._parse(text)) if text else []

    def finish(self) -> list[Event]:
        """The events left when no more tokens come."""
        if self.stopped:
            return []
        events = self._parse(self._decoder.finish()) + (
            self._parser.finish() if self._parser else []
        )
        left = self._cut(events)
        return left if self.stopped else left + _content(self._stops.finish())

    def _parse(self, text: str) -> list[Event]:
        return self._parser.feed(text) if self._parser else _content(text)

    def _cut(self, events: list[Event]) -> list[Event]:
        shown: list[Event] = []
        for event in events:
            if isinstance(event, Content):
                shown += _content(self._stops.push(event.text))
            else:
                shown += _content(self._stops.finish()) if isinstance(event, CallBegin) else []
                shown.append(event)
                self._called |= isinstance(event, CallEnd) and event.complete
            if self.stopped:
                break
        return shown


def _content(text: str) -> list[Event]:
    return [Content(text)] if text else []


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of `stop` that `text` ends with."""
    return next(
        (
            size
            for size in range(min(len(text), len(stop) - 1), 0, -1)
            if text.endswith(stop[:size])
        ),
        0,
    )
