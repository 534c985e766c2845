"""The record of an unfinished output: what is made there, of which files, and which of its shards
are finished.

`.unfinished/identity.json`    what would be made
`.unfinished/source.json`      the stamps of the source's files
`.unfinished/SHARD.json`       the records of a shard that is whole, with a digest of them
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from neuron_minimax.checkpoint.finished import (
    FileRecord,
    Files,
    Recorded,
    changed_source,
    files_as_json,
)
from neuron_minimax.checkpoint.kinds import UNFINISHED
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.records import (
    TensorFields,
    TensorRecord,
    damaged_tensors,
    read_records,
    records_as_json,
)
from neuron_minimax.checkpoint.shards import StreamedShard
from neuron_minimax.checkpoint.writer import sync_directory, write_json
from neuron_minimax.errors import ConversionError
from neuron_minimax.files import FileName, read_json, stamp

IDENTITY_NAME = "identity.json"


@dataclass(frozen=True, kw_only=True)
class _Journal:
    """The records of one shard, with a digest: the shard's bytes do not vouch for all of them."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    tensors: Mapping[str, TensorFields]
    sha256: str


class Unfinished:
    """The folder `.unfinished/` of an output directory, whether it is there or not."""

    def __init__(self, directory: Path, source: TensorDirectory, source_files: Files) -> None:
        self.directory = directory
        self.source = source
        self.source_files = source_files
        self.path = directory / UNFINISHED
        self.identity_path = self.path / IDENTITY_NAME
        self.source_path = self.path / "source.json"

    def identity(self, advice: str) -> dict[str, Any] | None:
        """Return what an earlier run would have made, None without one. Raises ConversionError,
        with the advice, when it cannot be read.
        """
        try:
            return read_json(self.identity_path, dict[str, Any], ConversionError, advice)
        except FileNotFoundError:
            return None

    def begin(self, identity: Mapping[str, Any], afresh: bool) -> None:
        """Make the directory an unfinished one of this run, which keeps the shards of an earlier
        one unless `afresh`.

        At no point of it does the directory belong to nobody, or are journals trusted that are of
        another run or of another state of the source.
        """
        if self.path.is_symlink() or not self.path.is_dir():
            self.path.unlink(missing_ok=True)
            self.path.mkdir()
        sync_directory(self.directory)  # before anything else has a name here
        if afresh or not self._journals_are_of_this_source():
            for path in self.path.iterdir():
                if path != self.identity_path:
                    path.unlink()
        write_json(self.source_path, files_as_json(self.source_files))
        write_json(self.identity_path, identity)

    def write_journal(self, shard: str, records: Mapping[str, TensorRecord]) -> None:
        """Record a shard that is whole; not in a finished directory, whose manifest does."""
        if self.path.is_dir():
            fields = records_as_json(records)
            write_json(self._journal(shard), {"tensors": fields, "sha256": _digest(fields)})

    def trusted(self, shard: StreamedShard) -> dict[str, TensorRecord] | None:
        """Return the records of an already written shard whose bytes still match its journal."""
        if not (self.directory / shard.name).is_file():
            return None
        try:
            journal = read_json(self._journal(shard.name), _Journal, ConversionError, "")
        except (FileNotFoundError, ConversionError):
            return None
        records = read_records(journal.tensors)
        if _digest(records_as_json(records)) != journal.sha256:
            return None
        planned = {tensor.spec: shard.name for tensor in shard.tensors}
        if {record.spec: record.shard for record in records.values()} != planned:
            return None
        stored = TensorDirectory(self.directory, shards=[shard.name])
        return None if damaged_tensors(stored, records) else records

    def journaled(self) -> set[str]:
        """Return the names of the shards that have a journal."""
        if self.path.is_symlink():
            return set()
        others = (self.identity_path.name, self.source_path.name)
        return {path.stem for path in self.path.glob("*.json") if path.name not in others}

    def remove(self) -> None:
        """Remove the folder, and put that on the disk. Raises OSError."""
        if self.path.is_symlink():
            self.path.unlink()
        elif self.path.exists():
            shutil.rmtree(self.path)
            sync_directory(self.directory)

    def _journal(self, shard: str) -> Path:
        return self.path / f"{shard}.json"

    def _journals_are_of_this_source(self) -> bool:
        recorded: Files | None = None
        written_ns = 0
        try:
            recorded = read_json(self.source_path, dict[FileName, FileRecord], ConversionError, "")
        except ConversionError:
            return False
        except FileNotFoundError:  # of an earlier version
            with suppress(OSError):
                written_ns = stamp(self.identity_path).modified_ns
        before = Recorded(tensors={}, source_files=recorded)
        return not changed_source(before, self.source, written_ns)


def _digest(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
