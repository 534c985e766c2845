"""Commands by the paths of their directories, as a user gives them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert import cache, plan, verify
from neuron_minimax.convert.layout import Layout
from neuron_minimax.inspection import precision

Progress = Callable[[int], None]


def convert(
    source: str | Path,
    out: str | Path,
    layout: Layout | None = None,
    *,
    scale_convention: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda nbytes: None,
) -> plan.Converted:
    planned = plan.plan_conversion(Checkpoint.open(source, scale_convention), layout)
    return planned.write(out, overwrite=overwrite, progress=progress)


def inspect(directory: str | Path, *arguments: Any, **options: Any) -> precision.PrecisionReport:
    return precision.inspect(Checkpoint.open(directory), *arguments, **options)


def verify_conversion(source: str | Path, out: str | Path) -> verify.Verification:
    converted = plan.Converted.open(out)
    return verify.verify(Checkpoint.open(source), converted)


def build_cache(
    source: str | Path, directory: str | Path, dtype: str = "float32", **options: Any
) -> cache.CacheResult:
    return cache.build_cache(Checkpoint.open(source), directory, dtype, **options)
