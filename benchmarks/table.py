"""The rows of the benchmarks' table, their peers, limits and goals, as text and Markdown."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEADINGS = ("what", "ours", "peer", "ratio", "limit", "share", "goal")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A peer or a limit of the machine, and `times`, how many times as good ours is.

    `value` is its figure; `lowest` and `highest` are `times` of single rounds.
    """

    name: str
    value: float
    times: float
    lowest: float
    highest: float

    def render_ratio(self) -> str:
        """Return the ratio and, of several rounds, the lowest and the highest."""
        if self.lowest == self.highest:
            return _number(self.times)
        return f"{_number(self.times)} ({_number(self.lowest)} to {_number(self.highest)})"


@dataclass(frozen=True, kw_only=True)
class Goal:
    """`figure` ("ours", "ratio" or "share") at least or at most `value`."""

    figure: str
    value: float
    at_most: bool = False

    def render(self) -> str:
        return f"{self.figure} {'at most' if self.at_most else 'at least'} {self.value:,.4g}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure, how many times as good it is as its peer (ratio) and as its limit (share).

    More is better, whatever the unit. A benchmark that failed is a row too, and one whose peer is
    not installed: `failure` or `skipped` says why, and it has no figure.
    """

    what: str
    ours: float | None = None
    unit: str = ""
    less_is_better: bool = False
    peer: Comparison | None = None
    limit: Comparison | None = None
    goal: Goal | None = None
    failure: str = ""
    skipped: str = ""

    @property
    def ratio(self) -> float | None:
        return self.peer.times if self.peer else None

    @property
    def share(self) -> float | None:
        return self.limit.times if self.limit else None

    @property
    def reached(self) -> bool | None:
        """True when the goal is reached; None without a goal."""
        if self.goal is None:
            return None
        found = getattr(self, self.goal.figure)
        if found is None:
            return False
        return found <= self.goal.value if self.goal.at_most else found >= self.goal.value

    def cells(self) -> tuple[str, ...]:
        """Return the texts under HEADINGS."""
        if self.failure or self.skipped:
            why = f"FAILED: {self.failure}" if self.failure else f"skipped: {self.skipped}"
            return (self.what, why, "", "", "", "", "")
        assert self.ours is not None
        reached = {None: "", True: ": reached", False: ": NOT REACHED"}[self.reached]
        return (
            self.what,
            f"{_number(self.ours)} {self.unit}".rstrip(),
            f"{_number(self.peer.value)} {self.peer.name}" if self.peer else "",
            self.peer.render_ratio() if self.peer else "",
            f"{_number(self.limit.value)} {self.limit.name}" if self.limit else "",
            f"{self.limit.times:.0%}" if self.limit else "",
            f"{self.goal.render()}{reached}" if self.goal else "",
        )


def row(
    what: str,
    ours: Sequence[float],
    unit: str,
    *,
    less_is_better: bool = False,
    peer: tuple[str, Sequence[float]] | None = None,
    limit: tuple[str, Sequence[float]] | None = None,
    goal: Goal | None = None,
) -> Row:
    """Make a row of the rounds of one run: medians, a ratio being that of the rounds' own ratios.

    The peer's and the limit's figures are in the same unit, one per round or one for all.
    """

    def compared(other: tuple[str, Sequence[float]] | None) -> Comparison | None:
        if other is None:
            return None
        name, values = other
        values = list(values) * len(ours) if len(values) == 1 else values
        pairs = zip(ours, values, strict=True)
        times = [theirs / mine if less_is_better else mine / theirs for mine, theirs in pairs]
        return Comparison(
            name=name,
            value=statistics.median(values),
            times=statistics.median(times),
            lowest=min(times),
            highest=max(times),
        )

    return Row(
        what=what,
        ours=statistics.median(ours),
        unit=unit,
        less_is_better=less_is_better,
        peer=compared(peer),
        limit=compared(limit),
        goal=goal,
    )


def render(rows: Sequence[Row]) -> str:
    """Return columns of text."""
    lines = [HEADINGS, *(each.cells() for each in rows)]
    # A message would widen its column for all.
    measured = [HEADINGS, *(each.cells() for each in rows if each.ours is not None)]
    widths = [max(len(line[column]) for line in measured) for column in range(len(HEADINGS))]
    widths[0] = max(len(line[0]) for line in lines)
    rendered = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in rendered)


def render_markdown(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ("---",) * len(HEADINGS), *(each.cells() for each in rows)]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def summary(rows: Sequence[Row]) -> str:
    """Say in one line how many goals were reached, and what failed or was skipped."""
    goals = [each.reached for each in rows if each.reached is not None]
    failed = sum(bool(each.failure) for each in rows)
    parts = [f"{sum(goals)} of {len(goals)} goals reached"] if goals else []
    parts += [f"{failed} {'benchmark' if failed == 1 else 'benchmarks'} FAILED"] if failed else []
    skipped = sum(bool(each.skipped) for each in rows)
    parts += [f"{skipped} skipped"] if skipped else []
    return "; ".join(parts) or f"{len(rows)} rows, no goals"


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [{**asdict(each), "reached": each.reached} for each in rows]


def from_json(found: Sequence[dict[str, Any]]) -> list[Row]:
    def part(kind: Any, fields: dict[str, Any] | None) -> Any:
        return None if fields is None else kind(**fields)

    return [
        Row(
            **{
                key: value
                for key, value in each.items()
                if key not in ("reached", "peer", "limit", "goal")
            },
            peer=part(Comparison, each["peer"]),
            limit=part(Comparison, each["limit"]),
            goal=part(Goal, each["goal"]),
        )
        for each in found
    ]


def read_rows(path: Path) -> list[Row]:
    return from_json(json.loads(path.read_text(encoding="utf-8"))["rows"])


def _number(value: float) -> str:
    """Return three digits that count; thousands in groups."""
    if value == 0 or not abs(value) >= 0.001:
        return f"{value:.1e}" if value else "0"
    digits = max(0, 2 - len(str(int(abs(value)))) + 1) if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"
