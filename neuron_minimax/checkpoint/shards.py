"""Shards that several processes write: one computes, digests and writes a piece of a tensor,
another the next.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from neuron_minimax.checkpoint.header import HasSpec, TensorSpec
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.records import TensorRecord, joined_crc32
from neuron_minimax.checkpoint.streaming import PageDropper, in_processes
from neuron_minimax.checkpoint.writer import ShardWriter, require_space
from neuron_minimax.errors import ConversionError
from neuron_minimax.progress import Advance

SYNC_EVERY = 128 << 20  # bytes between background syncs, so that writing back overlaps computing


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
    """One file to write and its tensors, in order; `sources` are the files they are made of, where
    these may have to be brought.
    """

    name: str
    tensors: tuple[StreamedTensor, ...]
    sources: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True)
class WrittenPiece:
    """The crc32 of a piece, and how many of its codes were rounded."""

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
        advance: Advance,
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
                advance(piece.nbytes)
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


def write_shards(
    shards: Sequence[StreamedShard],
    source: TensorDirectory,
    directory: Path,
    finished: Callable[[str, Mapping[str, TensorRecord]], None],
    advance: Advance,
) -> dict[str, TensorRecord]:
    """Write shards into a directory; each has its name only when it is whole and synced, and
    `finished` then gets the name and the records.

    Raises ConversionError before the first byte when the disk is too small, and when a file cannot
    be written; what is raised by a piece stops the run.
    """
    if not shards:
        return {}
    nbytes = sum(shard.nbytes for shard in shards)
    require_space(directory, nbytes, ConversionError)
    dropper = PageDropper((source,), max(nbytes, source.nbytes))
    streams = [ShardStream(shard, directory, dropper) for shard in shards]
    memory = np.empty(max(stream.largest_piece for stream in streams), np.uint8)
    tasks = [task for stream in streams for task in stream.tasks(memory)]
    records: dict[str, TensorRecord] = {}
    finishing: Future[None] | None = None

    def finish(stream: ShardStream, found: Mapping[str, TensorRecord]) -> None:
        with _named_disk_errors(stream):
            stream.writer.finish(stream.dropper.drops)
            finished(stream.shard.name, found)

    with closing(in_processes(tasks, nbytes)) as results, ThreadPoolExecutor(1) as syncer:
        for stream in streams:
            with _named_disk_errors(stream):
                found = stream.collect(results, syncer, advance)
            records |= found
            if finishing is not None:  # one shard is synced while the next is computed
                finishing.result()
            finishing = syncer.submit(finish, stream, found)
        if finishing is not None:
            finishing.result()
    dropper.finish()
    return records


@contextmanager
def _named_disk_errors(stream: ShardStream) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"{stream.writer.path} cannot be written ({error.strerror}); finished shards are "
            "kept: mend it and run again"
        ) from None


def digests_of(
    shards: Sequence[StreamedShard],
    source: TensorDirectory,
    advance: Advance,
) -> dict[str, TensorRecord]:
    """Return the records of what the shards would hold, computed from the source and not written;
    `advance` is called with the bytes of each piece.
    """
    pieces = [
        (shard, tensor, piece)
        for shard in shards
        for tensor in shard.tensors
        for piece in tensor.pieces
    ]
    nbytes = sum(shard.nbytes for shard in shards)
    memory = np.empty(max((piece.nbytes for *_, piece in pieces), default=0), np.uint8)
    dropper = PageDropper((source,), source.nbytes)
    tasks = [partial(_digest_piece, piece, memory[: piece.nbytes], dropper) for *_, piece in pieces]
    records = {
        tensor.name: TensorRecord(tensor.spec, shard.name, f"{0:08x}")
        for shard in shards
        for tensor in shard.tensors
    }
    with closing(in_processes(tasks, nbytes)) as results:
        for (shard, tensor, piece), result in zip(pieces, results, strict=True):
            before = records[tensor.name]
            crc32 = joined_crc32(int(before.crc32, 16), result.crc32, piece.nbytes)
            rounded = before.rounded_codes + result.rounded
            records[tensor.name] = TensorRecord(tensor.spec, shard.name, f"{crc32:08x}", rounded)
            advance(piece.nbytes)
            dropper.advance(piece.nbytes)
    dropper.finish()
    return records


def _digest_piece(piece: Piece, memory: np.ndarray, dropper: PageDropper) -> WrittenPiece:
    rounded = piece.fill(memory)
    dropper.unmap()
    return WrittenPiece(zlib.crc32(memory.data), rounded)
