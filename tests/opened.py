"""Commands by the paths of their directories, as a user gives them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert import cache, plan, verify
from neuron_minimax.convert.layout import Layout
from neuron_minimax.inspection import precision

Advance = Callable[[int], None]


def convert(
    source: str | Path,
    out: str | Path,
    layout: Layout | None = None,
    *,
    scale_convention: str = "auto",
    overwrite: bool = False,
    advance: Advance = lambda nbytes: None,
) -> plan.Converted:
    planned = plan.plan_conversion(Checkpoint.open(source, scale_convention), layout)
    return planned.write(out, overwrite=overwrite, advance=advance)


def inspect(directory: str | Path, *arguments: Any, **options: Any) -> precision.PrecisionReport:
    return precision.inspect(Checkpoint.open(directory), *arguments, **options)


def verify_conversion(source: str | Path, out: str | Path) -> verify.Verification:
    converted = plan.Converted.open(out, read_shards=False)
    return verify.verify(Checkpoint.open(source), converted)


def build_cache(
    source: str | Path, directory: str | Path, dtype: str = "float32", **options: Any
) -> cache.CacheResult:
    return cache.build_cache(Checkpoint.open(source), directory, dtype, **options)


def contents(directory: Path) -> dict[str, Any]:
    """Every file's bytes; of the manifest all but what no two runs have in common: who wrote it,
    and when.
    """
    found: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name in found.keys() & {"conversion.json", "cache.json"}:
        fields = json.loads(found[name])
        fields.pop("made_by")
        for record in (*fields["files"].values(), *fields["source_files"].values()):
            record.pop("modified_ns")
        found[name] = fields
    return found


def journal_of(records: dict[str, Any]) -> str:
    """The journal of a finished shard, of records as its manifest has them."""
    digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    return json.dumps({"tensors": records, "sha256": digest})
