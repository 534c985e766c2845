"""All benchmarks one after the other on one directory, and the table that they make together."""

import importlib
import json
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import Machine
from benchmarks.table import Row, render, render_markdown, summary, to_json

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A module of this package whose `rows(directory, **options)` gives its part of the table."""

    module: str
    options: Mapping[str, Any]

    def rows(self, directory: Path) -> list[Row]:
        return importlib.import_module(f"benchmarks.{self.module}").rows(directory, **self.options)


@dataclass(frozen=True, kw_only=True)
class Table:
    rows: tuple[Row, ...]
    machine: Machine
    seconds: Mapping[str, float]  # by module

    def render(self) -> str:
        took = ", ".join(f"{module} {seconds:.0f} s" for module, seconds in self.seconds.items())
        return "\n".join(
            [render(self.rows), "", summary(self.rows), self.machine.render(), f"took {took}"]
        )

    def write(self, directory: Path, name: str) -> None:
        """NAME.json and NAME.md."""
        directory.mkdir(exist_ok=True)
        fields = {
            "machine": self.machine.to_json(),
            "seconds": dict(self.seconds),
            "rows": to_json(self.rows),
        }
        (directory / f"{name}.json").write_text(
            json.dumps(fields, indent=1) + "\n", encoding="utf-8"
        )
        text = f"{self.machine.render()}\n\n{render_markdown(self.rows)}\n\n{summary(self.rows)}\n"
        (directory / f"{name}.md").write_text(text, encoding="utf-8")


def collect(
    parts: Iterable[tuple[str, Callable[[], list[Row]]]], progress: Callable[[str], None]
) -> tuple[list[Row], dict[str, float]]:
    """Return all rows, and the seconds by name.

    A part that fails becomes a row that says so; the others' rows are kept.
    """
    rows = []
    seconds = {}
    for name, work in parts:
        started = time.monotonic()
        try:
            found = work()
        except Exception as error:
            message = str(error).strip().splitlines() or ["no message"]
            progress(traceback.format_exc())
            found = [Row(what=name, failure=f"{type(error).__name__}: {message[-1]}")]
        seconds[name] = round(time.monotonic() - started, 1)
        progress(f"{name}: {seconds[name]:.0f} s\n{render(found)}\n")
        rows += found
    return rows, seconds
