"""Two checkpoints side by side: names, dtypes and shapes from headers, and, when asked, every
byte.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import counted
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.progress import Advance, nothing

SHOWN = 10
PIECE = 8 << 20


@dataclass(frozen=True, kw_only=True)
class Comparison(Rendered):
    """The differences of two checkpoints; `different_values` is None when only headers were
    compared.
    """

    first: str
    second: str
    tensors: int
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]
    different_headers: tuple[tuple[str, str, str], ...]  # name, and "dtype [shape]" of each
    different_values: tuple[str, ...] | None
    config_fields: tuple[tuple[str, Any, Any], ...]

    @property
    def equal(self) -> bool:
        """True when the tensors are the same, as far as they were compared; config.json does not
        count.
        """
        return not (
            self.only_in_first
            or self.only_in_second
            or self.different_headers
            or self.different_values
        )

    def render(self) -> str:
        """Plain text: the verdict, then each kind of difference with its first names."""
        compared = (
            "names, dtypes and shapes"
            if self.different_values is None
            else "names, dtypes, shapes and bytes"
        )
        verdict = (
            f"the same {compared} in {counted(self.tensors, 'tensor')}"
            if self.equal
            else f"different in {compared}"
        )
        lines = [f"{self.first} against {self.second}: {verdict}"]
        lines += _listed(f"only in {self.first}", self.only_in_first)
        lines += _listed(f"only in {self.second}", self.only_in_second)
        lines += _listed(
            "different dtype or shape",
            [f"{n}: {a} against {b}" for n, a, b in self.different_headers],
        )
        lines += _listed("different values", self.different_values or ())
        lines += _listed(
            "different in config.json",
            [f"{n}: {a!r} against {b!r}" for n, a, b in self.config_fields],
        )
        return "\n".join(lines) + "\n"

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values; the keys are described in docs/inspect.md."""
        return {"equal": self.equal, **vars(self)}


def compare(
    first: Checkpoint,
    second: Checkpoint,
    values: bool = False,
    advance: Advance = nothing,
) -> Comparison:
    """Compare two opened checkpoints; with `values` every byte of the tensors that both have in the
    same form.

    `advance` is called with the bytes compared of the first one.
    """
    both = [name for name in first.entries if name in second.entries]

    def form(checkpoint: Checkpoint, name: str) -> str:
        entry = checkpoint.entries[name]
        return entry.spec.form

    forms = [(name, form(first, name), form(second, name)) for name in both]
    same = [name for name, one, other in forms if one == other]
    keys = sorted(first.config.raw.keys() | second.config.raw.keys())
    pairs = [(key, first.config.raw.get(key), second.config.raw.get(key)) for key in keys]
    return Comparison(
        first=str(first.directory),
        second=str(second.directory),
        tensors=len(both),
        only_in_first=tuple(name for name in first.entries if name not in second.entries),
        only_in_second=tuple(name for name in second.entries if name not in first.entries),
        different_headers=tuple(row for row in forms if row[1] != row[2]),
        different_values=tuple(_different(first, second, same, advance)) if values else None,
        config_fields=tuple(pair for pair in pairs if pair[1] != pair[2]),
    )


def _different(
    first: Checkpoint, second: Checkpoint, names: list[str], advance: Advance
) -> Iterator[str]:
    def differs(name: str) -> bool:
        pairs = zip(_bytes_of(first, name), _bytes_of(second, name), strict=True)
        return any(not np.array_equal(one, other) for one, other in pairs)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for name, different in zip(names, pool.map(differs, names), strict=True):
            advance(first.entry(name).nbytes)
            if different:
                yield name


def _bytes_of(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """Yield a tensor's bytes, some at a time."""
    entry = checkpoint.entry(name)
    if not entry.shape:
        yield checkpoint.rows(name).reshape(1).view(np.uint8)
        return
    for strip in checkpoint.strips(name, max(1, PIECE * entry.shape[0] // max(1, entry.nbytes))):
        yield strip.reshape(-1).view(np.uint8)


def _listed(title: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    more = [f"    ... and {len(names) - SHOWN:,} more"] if len(names) > SHOWN else []
    return [f"  {title}: {len(names):,}", *(f"    {name}" for name in names[:SHOWN]), *more]
