"""From tokens to events: text as it completes, its parts apart, stop strings honoured."""

from collections.abc import Sequence

from neuron_minimax.generation.chat_formats import OutputParser
from neuron_minimax.generation.events import CallBegin, CallEnd, Content, Event
from neuron_minimax.generation.tokenizer import TextTokenizer

UNFINISHED = "\ufffd"  # how a decoder shows bytes that are not a whole character yet
# Tokens after which every byte before them is decided: a character has at most this many and one.
HELD = 3


class StreamDecoder:
    """The text of a growing answer; the pieces join to `TextTokenizer.decode` of all tokens, or
    to `TextTokenizer.spell` with `control_tokens`.
    """

    def __init__(self, tokenizer: TextTokenizer, *, control_tokens: bool = False) -> None:
        self._hidden = frozenset() if control_tokens else tokenizer.hidden_ids
        self._decode = tokenizer.spell if control_tokens else tokenizer.decode
        self._ids: list[int] = []
        # Tokens before `_shown` are out; those from `_context` on give the next ones their context.
        self._context = 0
        self._shown = 0

    def push(self, token: int) -> str:
        """Return the text that `token` completes, nothing in the middle of a character."""
        if token in self._hidden:
            return ""
        self._ids.append(token)
        old, new = self._texts()
        end = len(self._ids)
        if new.endswith(UNFINISHED):
            # Bytes that are no character, or the character itself, may go on for ever.
            end -= HELD
            settled = self._decode(self._ids[self._context : end])
            new = settled if new.startswith(settled) else ""
        if end <= self._shown or len(new) <= len(old):
            return ""
        self._context = self._shown
        self._shown = end
        return new[len(old) :]

    def finish(self) -> str:
        """Return what is left when no more tokens come."""
        old, new = self._texts()
        self._context = len(self._ids)
        self._shown = len(self._ids)
        return new[len(old) :]

    def _texts(self) -> tuple[str, str]:
        tail = self._ids[self._context :]
        shown = tail[: self._shown - self._context]
        return self._decode(shown), self._decode(tail)


class StopStrings:
    """Cuts text before the first stop string; what may become one is kept back for more text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the text that may be shown; nothing after a stop string was found."""
        if self.found is not None:
            return ""
        self._held += text
        places = {stop: place for stop in self._stops if (place := self._held.find(stop)) >= 0}
        if places:
            self.found = min(places, key=places.__getitem__)
            shown = self._held[: places[self.found]]
            self._held = ""
            return shown
        kept = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        shown = self._held[: len(self._held) - kept]
        self._held = self._held[len(self._held) - kept :]
        return shown

    def finish(self) -> str:
        """Return what was kept back for nothing."""
        shown = self._held
        self._held = ""
        return shown


class AnswerReader:
    """Turns the tokens of one answer into events.

    Without a parser all text is Content. Stop strings apply to the answer's text, not to the
    reasoning before it or to calls, and not to that of its first `min_tokens` tokens. With
    `one_call` the answer ends with its first tool call. `control_tokens` are text too, if asked
    for.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        parser: OutputParser | None = None,
        *,
        stops: Sequence[str] = (),
        one_call: bool = False,
        min_tokens: int = 0,
        control_tokens: bool = False,
    ) -> None:
        self._one_call = one_call
        self._called = False
        self._decoder = StreamDecoder(tokenizer, control_tokens=control_tokens)
        self._free = min_tokens  # tokens to come in which no stop string is looked for
        self._parser = parser
        self._stops = StopStrings(stops)

    @property
    def stopped(self) -> bool:
        """Say whether a stop string was found, or the only call that is allowed is complete."""
        return self.stop_string is not None or (self._one_call and self._called)

    @property
    def stop_string(self) -> str | None:
        """Return the stop string that was found, if one was."""
        return self._stops.found

    def push(self, token: int) -> list[Event]:
        """Return the events that `token` completes."""
        text = self._decoder.push(token)
        events = self._cut(self._parse(text)) if text else []
        self._free = max(0, self._free - 1)
        return events

    def finish(self) -> list[Event]:
        """Return the events left when no more tokens come."""
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
            if isinstance(event, Content) and not self._free:
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
    """Return the length of the longest proper beginning of `stop` that `text` ends with."""
    sizes = range(min(len(text), len(stop) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(stop[:size])), 0)
