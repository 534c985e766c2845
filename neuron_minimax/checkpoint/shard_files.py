"""The safetensors files of a directory as who reads tensors sees them: names, headers and bytes."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np

from neuron_minimax.checkpoint import header
from neuron_minimax.checkpoint.header import ADVICE, TensorEntry
from neuron_minimax.checkpoint.streaming import drop_pages
from neuron_minimax.errors import CheckpointError
from neuron_minimax.files import Stamp, open_regular, stamp

Item = TypeVar("Item")
Result = TypeVar("Result")
# Of each target the files that it is made of.
Needs = Mapping[str, Set[str]]


class Read(Protocol):
    """Puts the bytes of a file from a position on into memory; returns how many there were."""

    def __call__(self, memory: memoryview, position: int) -> int: ...


class ShardFiles:
    """The safetensors files of a local directory, all of which are there.

    `stamps` are those that the directory's files have when this is made, before any is read.
    `published` are SHA-256 digests by file, of files that are known by these and not by a stamp.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.stamps: dict[str, Stamp] = {}
        self.published: dict[str, str] = {}
        self._maps: dict[str, np.memmap] = {}
        with suppress(OSError):
            for path in directory.iterdir():
                with suppress(OSError):
                    self.stamps[path.name] = stamp(path)

    @property
    def title(self) -> str:
        """How messages call the checkpoint, and how commands take it."""
        return str(self.directory)

    @property
    def stream_option(self) -> str:
        """What a command needs, beside the title, to take it as it was taken here."""
        return ""

    def names(self) -> list[str]:
        """Return the names of all safetensors files, sorted."""
        return sorted(path.name for path in self.directory.glob("*.safetensors"))

    def exists(self, shard: str) -> bool:
        return (self.directory / shard).exists()

    def entries(self, shard: str) -> list[TensorEntry]:
        """Return the tensors of a file, as `read_header` does."""
        return header.read_header(self.directory / shard)

    @contextmanager
    def opened(self, shard: str) -> Iterator[Read]:
        """Give the function that reads a file, and name the file in what goes wrong."""
        path = self.directory / shard
        try:
            descriptor = open_regular(path)
            try:
                yield lambda memory, position: os.preadv(descriptor, [memory], position)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}), or no longer; {ADVICE}"
            ) from None

    def sample(self, shard: str, start: int, nbytes: int) -> bytes:
        """Return so many bytes of a file from a place on, fewer at its end."""
        memory = bytearray(nbytes)
        with self.opened(shard) as read:
            return bytes(memory[: read(memoryview(memory), start)])

    def map(self, shard: str) -> tuple[np.memmap, int]:
        """Return a file's bytes, mapped, and how many of them it has now. Raises OSError."""
        if shard not in self._maps:
            with open(open_regular(self.directory / shard), "rb") as file:
                # Private copy-on-write pages: writable to torch's mind, never written back.
                self._maps[shard] = np.memmap(file, dtype=np.uint8, mode="c")
        return self._maps[shard], (self.directory / shard).stat().st_size

    def unmap(self) -> None:
        """Let go of the mapped files; arrays that are still in use keep theirs."""
        self._maps.clear()

    def drop_pages(self, shards: Iterable[str]) -> None:
        """Drop files' pages from the page cache, where no array of any process maps them."""
        self.unmap()
        for shard in shards:
            with open(open_regular(self.directory / shard), "rb") as file:
                drop_pages(file.fileno())

    def overlapped(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """Yield what a function that reads gives for each item, in order."""
        return map(function, items)

    def at_hand(self, needs: Needs) -> Iterator[list[str]]:
        """Yield the targets in groups whose files are there while the group is looked at: here all
        in one.
        """
        yield list(needs)

    def require_room(self, needs: Needs, nbytes: Mapping[str, int], directory: Path) -> None:
        """Raise ConversionError when a directory's disk has no room for the files that `at_hand`
        brings, beside the bytes of each target.
        """

    def remove(self) -> None:
        """Remove what was only kept for the work."""
