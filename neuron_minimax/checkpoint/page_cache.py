"""What a stream leaves in the page cache: all of it when it fits, so that the next command is fast,
else nothing.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

WINDOW = 512 << 20  # bytes streamed between two droppings


class Forgetful(Protocol):
    """Files whose pages can be dropped."""

    def unmap(self) -> None: ...

    def forget(self) -> None: ...


def too_large_to_keep(nbytes: int, available: int) -> bool:
    """Whether a checkpoint of this size would push out other programs' files: more than half of
    available memory.
    """
    return nbytes > available // 2


def available_memory() -> int:
    """Bytes that can be had without swapping, page cache included (MemAvailable); no limit where it
    is not known.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return sys.maxsize
    lines = meminfo.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def drop_pages(descriptor: int) -> None:
    """Drop a file's clean pages that no process has mapped."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class Trail:
    """Drops the pages of these directories behind a stream, when the larger side of it has too many
    bytes to keep.
    """

    def __init__(self, directories: Sequence[Forgetful], nbytes: int) -> None:
        self.drops = too_large_to_keep(nbytes, available_memory())
        self.directories = directories if self.drops else ()
        self.passed = 0
        self.unmap()  # pages that are mapped cannot be dropped

    def unmap(self) -> None:
        """After each task, in the process that ran it."""
        for directory in self.directories:
            directory.unmap()

    def advance(self, nbytes: int) -> None:
        """After each result, in the caller's process."""
        self.passed += nbytes
        if self.passed >= WINDOW:
            self.passed = 0
            self.finish()

    def finish(self) -> None:
        """When all is streamed."""
        for directory in self.directories:
            directory.forget()
