"""Output directories that resume: locked, journaled shard by shard, and whole only when their
manifest is there.

A directory under construction holds `.unfinished/` with the identity of the run and one journal per
finished shard; the manifest appears last, so a directory with a manifest is whole.
"""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from neuron_minimax import __version__
from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.reader import INDEX_NAME, TensorDirectory
from neuron_minimax.checkpoint.records import (
    TensorRecord,
    damaged_tensors,
    read_records,
    records_as_json,
)
from neuron_minimax.checkpoint.streaming import PageDropper, in_processes
from neuron_minimax.checkpoint.writer import (
    PARTIAL_SUFFIX,
    ShardStream,
    StreamedShard,
    sync_directory,
    write_index,
    write_json,
)
from neuron_minimax.errors import ConversionError

UNFINISHED = ".unfinished"
# Who wrote an output is recorded, never compared. Earlier versions had it in the identity.
MADE_BY = "made_by"
# and seconds
LOCK_ATTEMPTS = 20
LOCK_PAUSE = 0.05


class OutputDirectory:
    """A directory that is being filled by one run, or was finished by an earlier one.

    `identity` says what would be made: source fingerprint, options and format version. Used as a
    context manager it holds a lock: a second run is refused. Raises ConversionError when the
    directory holds another output, unless `overwrite`.
    """

    def __init__(
        self, path: Path, manifest_name: str, identity: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.path = path
        self.manifest_path = path / manifest_name
        self.identity = comparable(json.loads(json.dumps(identity)))  # as it reads back from a file
        self.overwrite = overwrite
        self.unfinished = path / UNFINISHED
        self.reused_shards = 0

    def __enter__(self) -> "OutputDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConversionError(
                f"{self.path} cannot be used ({error.strerror}); choose another directory"
            ) from None
        try:
            self._lock()
            self._claim()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)  # releases the lock

    @property
    def finished(self) -> bool:
        """True when an earlier run has made exactly this output."""
        return self.manifest_path.exists()

    def write_shards(
        self,
        shards: Sequence[StreamedShard],
        source: TensorDirectory,
        progress: Callable[[int], None],
    ) -> dict[str, TensorRecord]:
        """Write the shards that are not there yet, after re-reading those that are; `progress` gets
        bytes done.

        Raises ConversionError before the first byte when the disk is too small; a CheckpointError
        from a piece stops the run and leaves finished shards for the next one.
        """
        records: dict[str, TensorRecord] = {}
        missing = []
        for shard in shards:
            found = self._trusted(shard)
            if found is None:
                missing.append(shard)
            else:
                records |= found
                self.reused_shards += 1
                progress(shard.nbytes)
        self._require_space(sum(shard.nbytes for shard in missing))
        if missing:
            records |= self._write(missing, source, progress)
        return {tensor.name: records[tensor.name] for shard in shards for tensor in shard.tensors}

    def finish(
        self,
        config: Mapping[str, Any],
        records: Mapping[str, TensorRecord],
        manifest: Mapping[str, Any],
    ) -> None:
        """Write index and config, then the manifest, whose presence says that the directory is
        whole.
        """
        if len({record.shard for record in records.values()}) > 1:
            weight_map = {name: record.shard for name, record in records.items()}
            write_index(self.path, weight_map, sum(record.nbytes for record in records.values()))
        write_json(self.path / "config.json", dict(config))
        write_json(
            self.manifest_path,
            {
                "identity": self.identity,
                MADE_BY: f"neuron-minimax {__version__}",
                **manifest,
                "tensors": records_as_json(records),
            },
        )
        shutil.rmtree(self.unfinished)
        sync_directory(self.path)

    def _lock(self) -> None:
        """Hold the directory; processes of a killed run may do so until their last piece, which is
        waited for.
        """
        for _ in range(LOCK_ATTEMPTS):
            try:
                return fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(LOCK_PAUSE)
        raise ConversionError(
            f"{self.path} is being written by another run; wait for it or stop it"
        )

    def _claim(self) -> None:
        stale = self._stale_reason()
        if stale and not self.overwrite:
            raise ConversionError(
                f"{self.path} {stale}; choose another directory, or pass --overwrite to replace it"
            )
        if stale:
            self._clear()
        if self.finished:  # of a run that ended between its manifest and its last line
            shutil.rmtree(self.unfinished, ignore_errors=True)
        else:
            self.unfinished.mkdir(exist_ok=True)
            write_json(self.unfinished / "identity.json", self.identity)

    def _stale_reason(self) -> str | None:
        for path in (self.manifest_path, self.unfinished / "identity.json"):
            if path.exists():
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                    found = comparable(found["identity"] if path == self.manifest_path else found)
                except (ValueError, KeyError, TypeError, AttributeError):
                    return f"holds a {path.name} that cannot be read"
                changed = sorted(
                    key for key in self.identity | found if self.identity.get(key) != found.get(key)
                )
                state = "finished" if path == self.manifest_path else "unfinished"
                return (
                    f"holds the {state} output of another run (differs in {', '.join(changed)})"
                    if changed
                    else None
                )
        others = [path for path in self.path.iterdir() if path != self.unfinished]
        if others:
            raise ConversionError(
                f"{self.path} is not empty (it holds {others[0].name}) and was not made by this "
                "command; choose a new or empty directory"
            )
        return None

    def _clear(self) -> None:
        self.manifest_path.unlink(missing_ok=True)  # from here on the directory is not whole
        for pattern in ("*.safetensors", "*" + PARTIAL_SUFFIX, INDEX_NAME, "config.json"):
            for path in self.path.glob(pattern):
                path.unlink()
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def _require_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path).free
        needed += needed // 100 + (16 << 20)  # headers, journals, the file system's own share
        if free < needed:
            raise ConversionError(
                f"{self.path} needs {size_text(needed, 2, 'GB')} more and its disk has "
                f"{size_text(free, 2, 'GB')} free; nothing was written: free some space or choose "
                "another disk"
            )

    def _trusted(self, shard: StreamedShard) -> dict[str, TensorRecord] | None:
        """Records of an already written shard whose bytes still match its journal."""
        journal = self.unfinished / f"{shard.name}.json"
        if not journal.exists() or not (self.path / shard.name).exists():
            return None
        try:
            records = read_records(json.loads(journal.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError):
            return None
        if set(records) != {tensor.name for tensor in shard.tensors}:
            return None
        stored = TensorDirectory(self.path, shards=[shard.name])
        return None if damaged_tensors(stored, records) else records

    def _write(
        self,
        shards: Sequence[StreamedShard],
        source: TensorDirectory,
        progress: Callable[[int], None],
    ) -> dict[str, TensorRecord]:
        for path in self.path.glob("*" + PARTIAL_SUFFIX):
            path.unlink()
        nbytes = sum(shard.nbytes for shard in shards)
        dropper = PageDropper((source,), max(nbytes, source.nbytes))
        streams = [ShardStream(shard, self.path, dropper) for shard in shards]
        memory = np.empty(max(stream.largest_piece for stream in streams), np.uint8)
        tasks = [task for stream in streams for task in stream.tasks(memory)]
        records: dict[str, TensorRecord] = {}
        finishing: Future[None] | None = None
        with closing(in_processes(tasks, nbytes)) as results, ThreadPoolExecutor(1) as syncer:
            for stream in streams:
                with self._named_disk_errors(stream):
                    found = stream.collect(results, syncer, progress)
                records |= found
                if finishing is not None:  # one shard is synced while the next is computed
                    finishing.result()
                finishing = syncer.submit(self._finish_shard, stream, found)
            if finishing is not None:
                finishing.result()
        dropper.finish()
        return records

    def _finish_shard(self, stream: ShardStream, records: Mapping[str, TensorRecord]) -> None:
        with self._named_disk_errors(stream):
            stream.writer.finish(stream.dropper.drops)
            write_json(self.unfinished / f"{stream.shard.name}.json", records_as_json(records))

    @contextmanager
    def _named_disk_errors(self, stream: ShardStream) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConversionError(
                f"{stream.writer.path} cannot be written ({error.strerror}); finished shards are "
                "kept: mend it and run again"
            ) from None


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an identity that decide whether two outputs are the same."""
    return {name: value for name, value in identity.items() if name != MADE_BY}


def reopen(output: OutputDirectory, records: Mapping[str, TensorRecord]) -> None:
    """Turn a finished directory back into an unfinished one, so that the next write redoes only its
    damaged shards.
    """
    output.unfinished.mkdir(exist_ok=True)
    for shard in {record.shard for record in records.values()}:
        journal = {name: record for name, record in records.items() if record.shard == shard}
        write_json(output.unfinished / f"{shard}.json", records_as_json(journal))
    write_json(output.unfinished / "identity.json", output.identity)
    output.manifest_path.unlink()
