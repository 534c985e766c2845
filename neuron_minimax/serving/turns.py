"""One assistant turn as a row of parts (reasoning, text, calls): what /v1/messages calls content
blocks, and /v1/responses output items.
"""

import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from neuron_minimax.generation.engine import Update
from neuron_minimax.generation.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Event,
    Reasoning,
    ReasoningEnd,
)


class Kind(Enum):
    """What a part is."""

    REASONING = "reasoning"
    TEXT = "text"
    CALL = "call"


@dataclass(eq=False)
class Part:
    """A part, of which `text` is known so far: of a call, the JSON of its arguments.

    A call that is cut off is not `complete`; its source follows as text.
    """

    kind: Kind
    index: int
    name: str = ""
    text: str = ""
    complete: bool = True
    key: str = field(default_factory=lambda: uuid.uuid4().hex)  # its own, for ids

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of a complete call."""
        return json.loads(self.text or "{}")


@dataclass(frozen=True)
class Opened:
    """A part begins."""

    part: Part


@dataclass(frozen=True)
class Grown:
    """A part goes on with `text`."""

    part: Part
    text: str


@dataclass(frozen=True)
class Closed:
    """A part is all there."""

    part: Part


Change = Opened | Grown | Closed


class Turn:
    """The parts of one answer as it grows, of which at most one is `open`; it begins `in_reasoning`
    where the prompt has opened that.
    """

    def __init__(self, *, in_reasoning: bool) -> None:
        self.parts: list[Part] = []
        self.finish_reason: str | None = None
        self.reasoning_tokens = 0
        self.open: Part | None = None
        self._in_reasoning = in_reasoning

    @property
    def calls(self) -> bool:
        """Say whether a complete call is among the parts."""
        return any(part.kind is Kind.CALL and part.complete for part in self.parts)

    def add(self, update: Update) -> Iterator[Change]:
        """Add the update of one token; yield the changes that it makes."""
        began_in_reasoning = self._in_reasoning
        for event in update.events:
            self._in_reasoning = isinstance(event, Reasoning)
            yield from self._add_event(event)
        self.reasoning_tokens += began_in_reasoning or self._in_reasoning
        if update.finish_reason is not None:
            self.finish_reason = update.finish_reason
            yield from self._close()

    def _add_event(self, event: Event) -> Iterator[Change]:
        match event:
            case Reasoning(text):
                yield from self._grow(Kind.REASONING, text)
            case Content(text):
                yield from self._grow(Kind.TEXT, text)
            case CallBegin(_, name):
                yield from self._open_part(Kind.CALL, name)
            case CallArguments(_, text):
                yield from self._grow(Kind.CALL, text)
            case CallEnd(_, complete):
                self.parts[-1].complete = complete
                yield from self._close()
            case ReasoningEnd():
                yield from self._close()

    def _grow(self, kind: Kind, text: str) -> Iterator[Change]:
        if self.open is None or self.open.kind is not kind:
            yield from self._open_part(kind)
        part = self.parts[-1]
        part.text += text
        yield Grown(part, text)

    def _open_part(self, kind: Kind, name: str = "") -> Iterator[Change]:
        yield from self._close()
        self.open = Part(kind, len(self.parts), name)
        self.parts.append(self.open)
        yield Opened(self.open)

    def _close(self) -> Iterator[Change]:
        part = self.open
        if part is not None:
            self.open = None
            yield Closed(part)
