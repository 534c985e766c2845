"""One inspection as the command runs it: the report, values when asked, and a second checkpoint to
compare with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.inspection.compare import Comparison, compare
from neuron_minimax.inspection.precision import PrecisionReport, report_of
from neuron_minimax.inspection.values import check_values

# Opens a progress bar for (what, total bytes) and gives the function that advances it.
Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar that nobody sees."""
    yield lambda nbytes: None


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A report and, with a second checkpoint, the comparison."""

    report: PrecisionReport
    comparison: Comparison | None = None

    @property
    def usable(self) -> bool:
        return self.report.usable

    def render(self) -> str:
        parts = [self.report.render(), self.comparison.render() if self.comparison else ""]
        return "\n".join(part for part in parts if part)

    def to_json(self) -> dict[str, Any]:
        """The report's JSON with `comparison` added; the keys are described in docs/inspect.md."""
        return self.report.to_json() | {
            "comparison": self.comparison.to_json() if self.comparison else None
        }

    def render_page(self) -> str:
        """One self-contained HTML page."""
        from neuron_minimax.inspection.page import render_page

        return render_page(self.report, self.comparison)


def run_inspection(
    checkpoint: Checkpoint,
    modules_to_not_convert: Sequence[str] | None = None,
    values: bool = False,
    other: Checkpoint | None = None,
    bar: Bar = no_bar,
) -> Inspection:
    """Inspect an opened checkpoint; with `values` every byte is read, with another one the two are
    compared.
    """
    total = checkpoint.nbytes
    found = None
    comparison = None
    if values:
        with bar("reading values", total) as advance:
            found = check_values(checkpoint, advance)
    if other is not None:
        with bar("comparing", total) if values else no_bar("", 0) as advance:
            comparison = compare(checkpoint, other, values, advance)
    return Inspection(
        report=report_of(checkpoint, modules_to_not_convert, found), comparison=comparison
    )


def write_text(path: str | Path, text: str) -> None:
    """Write a report file; raises NeuronMiniMaxError naming it when that is impossible."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise NeuronMiniMaxError(
            f"{path} cannot be written ({error.strerror}); name another file"
        ) from None
