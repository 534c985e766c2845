"""Progress that remembers what it is told, for tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from neuron_minimax.progress import BYTES, Advance, Progress


@dataclass
class HeardStage:
    """A stage: how it was opened, and all that it was told."""

    what: str
    total: int | None
    unit: str
    counts: list[int] = field(default_factory=list)
    doing: list[str] = field(default_factory=list)
    ended: bool = False


class Heard(Progress):
    """Keeps lines and stages; `on_advance` is called with what was told of a stage."""

    def __init__(self, on_advance: Callable[[int, str], None] = lambda count, doing: None) -> None:
        self.on_advance = on_advance
        self.lines: list[str] = []
        self.stages: list[HeardStage] = []

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    @contextmanager
    def stage(self, what: str, total: int | None = None, unit: str = BYTES) -> Iterator[Advance]:
        stage = HeardStage(what, total, unit)
        self.stages.append(stage)

        def advance(count: int = 0, doing: str = "") -> None:
            if count:
                stage.counts.append(count)
            if doing:
                stage.doing.append(doing)
            self.on_advance(count, doing)

        yield advance
        stage.ended = True

    def named(self, what: str) -> HeardStage:
        """The one stage that is called so."""
        (found,) = (stage for stage in self.stages if stage.what == what)
        return found
