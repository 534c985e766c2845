"""The progress of a command on standard error: live bars where that is a terminal, else a line for
each stage now and then.

Standard output is left alone: it may be JSON.
"""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from neuron_minimax.cli.ending import say
from neuron_minimax.errors import printable
from neuron_minimax.progress import BYTES, Advance, Progress, duration

FIRST = 2.0  # seconds before a stage is told of: most have ended then
EVERY = 10.0  # seconds between two lines of a stage; a tenth of its time when it takes longer


@dataclass
class Stage:
    """A stage that is open: what it is, how far it is, and since when."""

    what: str
    total: int | None
    unit: str
    done: int = 0
    doing: str = ""
    began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def advance(self, count: int = 0, doing: str = "") -> None:
        """Advance it, from any thread."""
        with self._lock:
            self.done += count
            self.doing = doing or self.doing

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def line(self) -> str:
        """Say all of it."""
        return f"{self.what}: {self.state()}"

    def state(self) -> str:
        """Say what is being done, how much is, in what time, and how long the rest will take."""
        seconds = self.seconds
        parts = [self.doing] if self.doing else []
        if self.total:
            parts.append(
                f"{_count(self.done, self.total, self.unit)}, {self.done / self.total:.0%}"
            )
        elif self.done:
            parts.append(_count(self.done, None, self.unit))
        parts.append(duration(seconds))
        if self.total and 0 < self.done < self.total:
            left = seconds * (self.total - self.done) / self.done
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def ending(self) -> str:
        """Say how much it was, and what time it took."""
        what = _count(self.done, None, self.unit) if self.done else "done"
        return f"{self.what}: {what} in {duration(self.seconds)}"


class Shown(Progress):
    """Shows stages on standard error from their `first` second on, and their ends.

    Where that is not a terminal, each has a line every `every` seconds, which become more when it
    takes long.
    """

    def __init__(self, first: float = FIRST, every: float = EVERY) -> None:
        self.first = first
        self.every = every
        self._lock = threading.Lock()
        self._bars: Any = None
        self._open = 0

    def __call__(self, line: str) -> None:
        with self._lock:  # or lines of several threads would run into each other
            if self._bars is None:
                say(line)
            else:  # above the bars, which stay
                text = printable(line)
                self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, what: str, total: int | None = None, unit: str = BYTES) -> Iterator[Advance]:
        stage = Stage(what, total, unit)
        with self._bar(stage) if _on_terminal() else self._lines(stage):
            yield stage.advance
            if stage.seconds >= self.first:
                self(stage.ending())

    @contextmanager
    def _lines(self, stage: Stage) -> Iterator[None]:
        ended = threading.Event()

        def tell() -> None:
            pause = self.first
            while not ended.wait(pause):
                self(stage.line())
                pause = max(self.every, stage.seconds / 10)

        teller = threading.Thread(target=tell, name="progress", daemon=True)
        teller.start()
        try:
            yield
        finally:
            ended.set()
            teller.join()

    @contextmanager
    def _bar(self, stage: Stage) -> Iterator[None]:
        with self._lock:
            self._open += 1
            if self._bars is None:
                self._bars = _live()
                self._bars.start()
            bars = self._bars
        task = bars.add_task(printable(stage.what), total=stage.total, stage=stage)
        try:
            yield
        finally:
            bars.remove_task(task)
            with self._lock:
                self._open -= 1
                if not self._open:
                    self._bars = None
                    bars.stop()


def _count(done: int, total: int | None, unit: str) -> str:
    if unit == BYTES:
        from rich.filesize import decimal  # here, so that --help does without

        return decimal(done) + (f" of {decimal(total)}" if total else "")
    of = f" of {total:,}" if total else ""
    return f"{done:,}{of} {unit}"


def _on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def _live() -> Any:
    """Return bars that leave no trace, of stages that are in their tasks' fields.

    Rich is imported for terminals alone, and takes no other output over.
    """
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import ProgressColumn, SpinnerColumn, TextColumn
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    class Bar(ProgressColumn):
        def render(self, task: Any) -> Any:
            stage: Stage = task.fields["stage"]
            if not stage.total:
                return Text("")
            return ProgressBar(total=stage.total, completed=stage.done, width=24)

    class State(ProgressColumn):
        def render(self, task: Any) -> Any:
            return Text(printable(task.fields["stage"].state()))

    return Bars(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        Bar(),
        State(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,
        redirect_stderr=False,
    )
