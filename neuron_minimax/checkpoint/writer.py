"""Files that appear whole or not at all, and shards that several processes write: one computes,
digests and writes a piece of a tensor, another the next.
"""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from neuron_minimax.checkpoint.header import HasSpec, TensorSpec
from neuron_minimax.checkpoint.reader import INDEX_NAME, SINGLE_NAME
from neuron_minimax.checkpoint.records import TensorRecord, joined_crc32
from neuron_minimax.checkpoint.streaming import PageDropper, drop_pages

PARTIAL_SUFFIX = ".partial"
# What travels with the weights, as it is, when the source has it; code files are never copied.
COMPANION_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# Bytes at a time. The page cache takes memory in blocks as large as a write, up to 2 MB, and a
# virtual machine gives free blocks of 2 MB back to its host, so larger writes are slower there
# (benchmarks/README.md).
WRITE_BYTES = 64 << 10
# Bytes; where the data starts in a file. A register of a mapped weight then lies in one cache line,
# not in two.
ALIGNMENT = 64
SYNC_EVERY = 128 << 20  # bytes between background syncs, so that writing back overlaps computing


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name at the end of the block, whole and synced.

    An exception leaves only the partial file, and what had the name before.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    _put_in_place(partial, path)


def _put_in_place(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    sync_directory(path.parent)


class ShardWriter:
    """One safetensors file, declared first and then filled: in order by `write`, or anywhere by
    `write_at`.

    `finish`, or leaving the `with` block, syncs the file and gives it its final name; an exception
    leaves only the partial file. The file is opened when it is first written to, in each process
    that does.
    """

    def __init__(self, path: Path, tensors: Iterable[TensorSpec]) -> None:
        self.path = path
        self.partial = path.with_name(path.name + PARTIAL_SUFFIX)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in tensors:
            end = position + spec.nbytes
            header[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % ALIGNMENT)
        self._header = len(text).to_bytes(8, "little") + text
        self.nbytes = position
        self.written = 0  # bytes behind the header; who writes by `write_at` counts them

    def write(self, data: np.ndarray) -> None:
        """Append the elements of a contiguous array."""
        self.write_at(self.written, data)
        self.written += data.nbytes

    def write_at(self, position: int, data: np.ndarray) -> None:
        """Put the elements of a contiguous array at a byte position behind the header."""
        assert position + data.nbytes <= self.nbytes, f"more bytes than {self.path.name} declares"
        self._write_all(len(self._header) + position, data.reshape(-1).view(np.uint8).data)

    def sync(self, drop: bool = False) -> None:
        """Push what any process has written so far to the disk, and `drop` it from the page
        cache.
        """
        os.fdatasync(self._descriptor)
        if drop:
            drop_pages(self._descriptor)

    def finish(self, drop: bool = False) -> None:
        """Write the header, sync the file, which must be whole, and give it its name; `drop` as in
        `sync`.
        """
        assert self.written == self.nbytes, (
            f"{self.path.name} lacks {self.nbytes - self.written} of its declared bytes"
        )
        self._write_all(0, memoryview(self._header))
        os.fsync(self._descriptor)
        if drop:
            drop_pages(self._descriptor)
        self.close()
        _put_in_place(self.partial, self.path)

    def close(self) -> None:
        """Close the file in this process, as it is."""
        if "_descriptor" in self.__dict__:
            os.close(self.__dict__.pop("_descriptor"))

    @cached_property
    def _descriptor(self) -> int:
        return os.open(self.partial, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def _write_all(self, position: int, data: memoryview) -> None:
        # Processes that write into one file wait for each other in any case, and without this lock
        # they spin meanwhile. A file system that has no locks is written without.
        with suppress(OSError):
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            while data:
                count = os.pwrite(self._descriptor, data[:WRITE_BYTES], position)
                data = data[count:]
                position = position + count
        finally:
            with suppress(OSError):
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)

    def __enter__(self) -> "ShardWriter":
        self.partial.unlink(missing_ok=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.close()


def write_json(path: Path, value: Any) -> None:
    """Write JSON under its final name only when it is whole and synced."""
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, chat template and generation config, as far as they exist."""
    for name in COMPANION_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_index(directory: Path, weight_map: Mapping[str, str], total_size: int) -> None:
    """Write the index that names each tensor's shard, in Hugging Face's format."""
    write_json(
        directory / INDEX_NAME,
        {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)},
    )


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Iterable[tuple[str, str, np.ndarray]],
    shards: int = 1,
) -> None:
    """Write a whole checkpoint directory from (name, safetensors dtype, array of stored elements)
    that fit in memory.

    FP8 arrays are uint8 codes, BF16 arrays uint16. Tensors are spread evenly over the shards, in
    order.
    """
    directory.mkdir(parents=True, exist_ok=True)
    rows = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = rows[number * len(rows) // shards : (number + 1) * len(rows) // shards]
        name = SINGLE_NAME if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        specs = [TensorSpec(key, dtype, array.shape) for key, dtype, array in part]
        with ShardWriter(directory / name, specs) as writer:
            for key, _, array in part:
                weight_map[key] = name
                writer.write(np.ascontiguousarray(array))
    if shards > 1:
        write_index(directory, weight_map, sum(array.nbytes for _, _, array in rows))
    write_json(directory / "config.json", dict(config))


@dataclass(frozen=True)
class Piece:
    """Some elements of a tensor: how many bytes, and the function that puts them into memory
    (uint8 [nbytes]) and returns how many codes it had to round.
    """

    nbytes: int
    fill: Callable[[np.ndarray], int]


@dataclass(frozen=True)
class StreamedTensor(HasSpec):
    """A tensor to write, and the pieces that give its elements in order."""

    spec: TensorSpec
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class StreamedShard:
    """One file to write and its tensors, in order."""

    name: str
    tensors: tuple[StreamedTensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class WrittenPiece:
    """The crc32 of a piece on its way to the disk, and how many of its codes were rounded."""

    crc32: int
    rounded: int


class ShardStream:
    """A shard on its way to its file: the tasks that write its pieces, and the records that their
    results add up to.
    """

    def __init__(self, shard: StreamedShard, directory: Path, dropper: PageDropper) -> None:
        self.shard = shard
        self.dropper = dropper
        self.writer = ShardWriter(directory / shard.name, [tensor.spec for tensor in shard.tensors])
        self.largest_piece = max(
            (piece.nbytes for tensor in shard.tensors for piece in tensor.pieces), default=0
        )

    def tasks(self, memory: np.ndarray) -> Iterator[Callable[[], WrittenPiece]]:
        """Yield one task for each piece, in order; `memory` holds the largest and is used again
        for each by every process.
        """
        start = 0
        for tensor in self.shard.tensors:
            position = start
            for piece in tensor.pieces:
                yield partial(self._write_piece, position, piece, memory[: piece.nbytes])
                position += piece.nbytes
            start += tensor.nbytes
            assert position == start, (
                f"the pieces of {tensor.name} end at byte {position}, its elements at {start}"
            )

    def collect(
        self,
        results: Iterator[WrittenPiece],
        syncer: ThreadPoolExecutor,
        progress: Callable[[int], None],
    ) -> dict[str, TensorRecord]:
        """Take the results of this shard's tasks and join them into records; the file is synced on
        the way.

        Raises OSError when a sync failed.
        """
        records = {}
        syncing: Future[None] | None = None
        synced = 0
        for tensor in self.shard.tensors:
            crc = 0
            rounded = 0
            for piece in tensor.pieces:
                written = next(results)
                crc = joined_crc32(crc, written.crc32, piece.nbytes)
                rounded += written.rounded
                self.writer.written += piece.nbytes
                progress(piece.nbytes)
                self.dropper.advance(piece.nbytes)
                if self.writer.written - synced >= SYNC_EVERY and (
                    syncing is None or syncing.done()
                ):
                    if syncing is not None:
                        # The kernel reports an error once: the last sync would not see it again
                        syncing.result()
                    syncing = syncer.submit(self.writer.sync, self.dropper.drops)
                    synced = self.writer.written
            records[tensor.name] = TensorRecord(tensor.spec, self.shard.name, f"{crc:08x}", rounded)
        if syncing is not None:
            syncing.result()
        return records

    def _write_piece(self, position: int, piece: Piece, memory: np.ndarray) -> WrittenPiece:
        rounded = piece.fill(memory)
        crc32 = zlib.crc32(memory.data)
        self.writer.write_at(position, memory)
        self.dropper.unmap()
        return WrittenPiece(crc32, rounded)
