"""Resumable streaming of shards into a directory: locked, journaled, digested, computed and written in parallel.

A directory under construction holds `.unfinished/` with the identity of the run and one journal per finished shard;
the manifest appears last, so a directory with a manifest is whole.
"""

import fcntl
import json
import os
import shutil
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.checkpoint.reader import INDEX_NAME
from neuron_minimax.checkpoint.records import (
    WORKERS,
    TensorRecord,
    damaged_tensors,
    read_records,
    records_as_json,
)
from neuron_minimax.checkpoint.writer import PARTIAL_SUFFIX, ShardWriter, sync_directory, write_index, write_json
from neuron_minimax.errors import ConversionError

UNFINISHED = ".unfinished"
SYNC_EVERY = 128 << 20  # bytes between background syncs, so that writing back overlaps computing

# Computes the next elements of a tensor and how many codes it had to round.
Piece = Callable[[], tuple[np.ndarray, int]]


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor to write: name, stored dtype and shape, and the pieces that give its elements in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Sequence[Piece]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * STORED_DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class StreamedShard:
    """One file to write and its tensors, in order."""

    name: str
    tensors: tuple[StreamedTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


class OutputDirectory:
    """A directory that is being filled by one run, or was finished by an earlier one.

    `identity` says what would be made (source fingerprint and options). Used as a context manager it holds a lock:
    a second run is refused. Raises ConversionError when the directory holds another output, unless `overwrite`.
    """

    def __init__(self, path: Path, manifest_name: str, identity: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = path
        self.manifest_path = path / manifest_name
        self.identity = json.loads(json.dumps(identity))  # as it reads back from a file
        self.overwrite = overwrite
        self.unfinished = path / UNFINISHED
        self.reused_shards = 0

    def __enter__(self) -> "OutputDirectory":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise ConversionError(f"{self.path} cannot be used ({error.strerror}); choose another directory") from None
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._descriptor)
            raise ConversionError(f"{self.path} is being written by another run; wait for it or stop it") from None
        try:
            self._claim()
        except BaseException:
            os.close(self._descriptor)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._descriptor)  # releases the lock

    @property
    def finished(self) -> bool:
        """Whether an earlier run has made exactly this output."""
        return self.manifest_path.exists()

    def write_shards(
        self, shards: Sequence[StreamedShard], progress: Callable[[int], None] = lambda nbytes: None
    ) -> dict[str, TensorRecord]:
        """Write the shards that are not there yet, after re-reading those that are; `progress` gets bytes done.

        Raises ConversionError before the first byte when the disk is too small; a CheckpointError from a piece stops
        the run and leaves finished shards for the next one.
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
        with ThreadPoolExecutor(WORKERS) as pool, ThreadPoolExecutor(1) as syncer:
            for shard in missing:
                try:
                    records |= self._write_shard(shard, pool, syncer, progress)
                except OSError as error:
                    raise ConversionError(
                        f"{self.path / shard.name} cannot be written ({error.strerror}); finished shards are kept: "
                        "mend it and run again"
                    ) from None
        return {tensor.name: records[tensor.name] for shard in shards for tensor in shard.tensors}

    def finish(
        self, config: Mapping[str, Any], records: Mapping[str, TensorRecord], manifest: Mapping[str, Any]
    ) -> None:
        """Write index and config, then the manifest, whose presence says that the directory is whole."""
        sizes = (prod(record.shape) * STORED_DTYPES[record.dtype].itemsize for record in records.values())
        if len({record.shard for record in records.values()}) > 1:
            write_index(self.path, {name: record.shard for name, record in records.items()}, sum(sizes))
        write_json(self.path / "config.json", dict(config))
        write_json(self.manifest_path, {"identity": self.identity, **manifest, "tensors": records_as_json(records)})
        shutil.rmtree(self.unfinished)
        sync_directory(self.path)

    def _claim(self) -> None:
        stale = self._stale_reason()
        if stale and not self.overwrite:
            raise ConversionError(f"{self.path} {stale}; choose another directory, or pass --overwrite to replace it")
        if stale:
            self._clear()
        if not self.finished:
            self.unfinished.mkdir(exist_ok=True)
            write_json(self.unfinished / "identity.json", self.identity)

    def _stale_reason(self) -> str | None:
        for path in (self.manifest_path, self.unfinished / "identity.json"):
            if path.exists():
                try:
                    found = json.loads(path.read_text(encoding="utf-8"))
                    found = found["identity"] if path == self.manifest_path else found
                except (ValueError, KeyError, TypeError):
                    return f"holds a {path.name} that cannot be read"
                changed = sorted(key for key in self.identity | found if self.identity.get(key) != found.get(key))
                state = "finished" if path == self.manifest_path else "unfinished"
                return f"holds the {state} output of another run (differs in {', '.join(changed)})" if changed else None
        others = [path for path in self.path.iterdir() if path != self.unfinished]
        if others:
            raise ConversionError(
                f"{self.path} is not empty (it holds {others[0].name}) and was not made by this command; "
                "choose a new or empty directory"
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
                f"{self.path} needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
                "nothing was written: free some space or choose another disk"
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
        good = not damaged_tensors(self.path, records, shard.name)
        return records if good and set(records) == {tensor.name for tensor in shard.tensors} else None

    def _write_shard(
        self,
        shard: StreamedShard,
        pool: ThreadPoolExecutor,
        syncer: ThreadPoolExecutor,
        progress: Callable[[int], None],
    ) -> dict[str, TensorRecord]:
        crc: dict[str, int] = dict.fromkeys((tensor.name for tensor in shard.tensors), 0)
        rounded: dict[str, int] = dict.fromkeys(crc, 0)
        layout = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        syncing: Future[None] | None = None
        unsynced = 0
        with ShardWriter(self.path / shard.name, layout) as writer:
            for name, (elements, count) in _in_order(shard, pool, window=2 * WORKERS):
                data = np.ascontiguousarray(elements).reshape(-1).view(np.uint8)
                crc[name] = zlib.crc32(data.data, crc[name])
                rounded[name] += count
                writer.write(data)
                progress(data.nbytes)
                unsynced += data.nbytes
                if unsynced >= SYNC_EVERY and (syncing is None or syncing.done()):
                    syncing, unsynced = syncer.submit(writer.sync), 0
            if syncing is not None:
                syncing.result()
        records = {
            tensor.name: TensorRecord(
                shard.name, tensor.dtype, tensor.shape, f"{crc[tensor.name]:08x}", rounded[tensor.name]
            )
            for tensor in shard.tensors
        }
        write_json(self.unfinished / f"{shard.name}.json", records_as_json(records))
        return records


def _in_order(
    shard: StreamedShard, pool: ThreadPoolExecutor, window: int
) -> Iterator[tuple[str, tuple[np.ndarray, int]]]:
    """Compute pieces in parallel, at most `window` ahead, and give them in order."""
    pending: deque[tuple[str, Future[tuple[np.ndarray, int]]]] = deque()
    try:
        for tensor in shard.tensors:
            for piece in tensor.pieces:
                pending.append((tensor.name, pool.submit(piece)))
                if len(pending) > window:
                    name, future = pending.popleft()
                    yield name, future.result()
        while pending:
            name, future = pending.popleft()
            yield name, future.result()
    finally:
        for _, future in pending:
            future.cancel()


def reopen(output: OutputDirectory, records: Mapping[str, TensorRecord]) -> None:
    """Turn a finished directory back into an unfinished one, so that the next write redoes only its damaged shards."""
    output.unfinished.mkdir(exist_ok=True)
    for shard in {record.shard for record in records.values()}:
        journal = {name: record for name, record in records.items() if record.shard == shard}
        write_json(output.unfinished / f"{shard}.json", records_as_json(journal))
    write_json(output.unfinished / "identity.json", output.identity)
    output.manifest_path.unlink()
