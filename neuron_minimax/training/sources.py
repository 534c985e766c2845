"""Where training rows come from: anything indexable; here, JSON Lines files and the demo's own
conversations.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from neuron_minimax.errors import TrainingError
from neuron_minimax.training.data import demo_conversation


class Source(Protocol):
    """Row `index` of an endless sequence; it depends on the index alone, so a position is all that
    resume needs.
    """

    name: str  # what a resumed run must agree with

    def row(self, index: int) -> Mapping[str, Any]: ...


class DemoSource:
    """The demo's training conversations of one seed; with `focus`, every other one of these
    kinds.
    """

    def __init__(self, seed: int, focus: Sequence[str] = ()) -> None:
        self.seed = seed
        self.focus = tuple(focus)
        self.name = "demo" + (f", focus on {', '.join(self.focus)}" if self.focus else "")

    def row(self, index: int) -> Mapping[str, Any]:
        conversation = demo_conversation(self.seed, index, self.focus)
        return {"messages": conversation.messages, "tools": conversation.tools}


class JsonLines:
    """Rows of a JSON Lines file, each epoch in an order of its own that the seed decides.

    Raises TrainingError naming file and line when a row is not JSON, or when there are none.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.seed = seed
        self.rows = list(_read(path))
        self.name = f"{path.name}, {len(self.rows)} rows"
        if not self.rows:
            raise TrainingError(f"{path} has no rows; expected one JSON object per line")
        self._epoch = -1
        self._order = list(range(len(self.rows)))

    def row(self, index: int) -> Mapping[str, Any]:
        epoch, place = divmod(index, len(self.rows))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self.rows)))
            random.Random(f"{self.seed}:{epoch}").shuffle(self._order)
        return self.rows[self._order[place]]


def _read(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict) or not (
                        "messages" in row or isinstance(row.get("text"), str)
                    ):
                        raise TrainingError(
                            f"{path} line {number} has neither 'text' nor 'messages'"
                        )
                    yield row
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise TrainingError(
            f"{path} line {number} is not JSON ({error}); expected one object per line"
        ) from None
