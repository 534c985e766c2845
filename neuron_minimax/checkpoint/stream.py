"""Shards written in parallel: one process computes, digests and writes a piece of a tensor, another the next."""

import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.checkpoint.page_cache import Trail
from neuron_minimax.checkpoint.records import TensorRecord, joined_crc32
from neuron_minimax.checkpoint.writer import ShardWriter

SYNC_EVERY = 128 << 20  # bytes between background syncs, so that writing back overlaps computing


@dataclass(frozen=True)
class Piece:
    """Some elements of a tensor: their bytes, and what puts them into memory (uint8 [nbytes]) and returns how many
    codes it had to round."""

    nbytes: int
    fill: Callable[[np.ndarray], int]


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


@dataclass(frozen=True)
class Written:
    """What is known of a piece on its way to the disk: its crc32, and how many of its codes were rounded."""

    crc32: int
    rounded: int


class ShardStream:
    """A shard on its way to its file: the tasks that write its pieces, and what their results add up to."""

    def __init__(self, shard: StreamedShard, directory: Path, trail: Trail) -> None:
        self.shard, self.trail = shard, trail
        layout = {tensor.name: (tensor.dtype, tensor.shape) for tensor in shard.tensors}
        self.writer = ShardWriter(directory / shard.name, layout)
        self.largest_piece = max((piece.nbytes for tensor in shard.tensors for piece in tensor.pieces), default=0)

    def tasks(self, memory: np.ndarray) -> Iterator[Callable[[], Written]]:
        """One for each piece, in order; `memory` holds the largest and is used again for each by every process."""
        start = 0
        for tensor in self.shard.tensors:
            position = start
            for piece in tensor.pieces:
                yield partial(self._write_piece, position, piece, memory[: piece.nbytes])
                position += piece.nbytes
            start += tensor.nbytes
            assert position == start, f"the pieces of {tensor.name} end at byte {position}, its elements at {start}"

    def collect(
        self, results: Iterator[Written], syncer: ThreadPoolExecutor, progress: Callable[[int], None]
    ) -> dict[str, TensorRecord]:
        """Take the results of this shard's tasks and join them into records; the file is synced on the way.

        Raises OSError when a sync failed.
        """
        records = {}
        syncing: Future[None] | None = None
        synced = 0
        for tensor in self.shard.tensors:
            crc = rounded = 0
            for piece in tensor.pieces:
                written = next(results)
                crc = joined_crc32(crc, written.crc32, piece.nbytes)
                rounded += written.rounded
                self.writer.written += piece.nbytes
                progress(piece.nbytes)
                self.trail.advance(piece.nbytes)
                if self.writer.written - synced >= SYNC_EVERY and (syncing is None or syncing.done()):
                    if syncing is not None:
                        syncing.result()  # the kernel reports an error once: the last sync would not see it again
                    syncing, synced = syncer.submit(self.writer.sync, self.trail.drops), self.writer.written
            records[tensor.name] = TensorRecord(self.shard.name, tensor.dtype, tensor.shape, f"{crc:08x}", rounded)
        if syncing is not None:
            syncing.result()
        return records

    def _write_piece(self, position: int, piece: Piece, memory: np.ndarray) -> Written:
        rounded = piece.fill(memory)
        crc32 = zlib.crc32(memory.data)
        self.writer.write_at(position, memory)
        self.trail.unmap()
        return Written(crc32, rounded)
