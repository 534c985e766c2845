"""What long work tells while it runs. A library function opens stages and advances them, and never
prints; its caller decides what of that is shown, as the command line does (cli/progress.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

BYTES = "bytes"


class Advance(Protocol):
    """Counts what is done of a stage, and says what is being done now, "" for as before."""

    def __call__(self, count: int = 0, doing: str = "") -> None: ...


class Progress:
    """Hears what long work tells, and shows nothing; a subclass shows it.

    That of the command line, for standard error, is `neuron_minimax.cli.progress.Shown()`. The
    methods are called by any thread, and stages of several threads are open at once.
    """

    def __call__(self, line: str) -> None:
        """Take a line that is worth keeping, such as a warning."""

    @contextmanager
    def stage(self, what: str, total: int | None = None, unit: str = BYTES) -> Iterator[Advance]:
        """Open a stage, which ends with the block, and give the function that advances it.

        `total` is how many units it has, None where that is not known or nothing is counted;
        `unit` is a plural.

        >>> with progress.stage("reading values", checkpoint.nbytes) as advance:
        ...     advance(4096)
        """
        yield nothing


def nothing(count: int = 0, doing: str = "") -> None:
    """Advance a stage that nobody sees."""


SILENT = Progress()


def duration(seconds: float) -> str:
    """Return a time in its two largest units.

    >>> duration(59), duration(61), duration(7260)
    ('59 s', '1 min 1 s', '2 h 1 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60} min"
