"""Files for benchmarks: into the page cache, out of it, copied, written plainly."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from neuron_minimax.checkpoint.writer import WRITE_BYTES


def read_into_cache(directory: Path) -> None:
    """Read every file into the page cache, after earlier writes have gone to disk."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(16 << 20):
                pass


def drop_from_cache(directory: Path) -> None:
    """Push a directory's files out of the page cache, after earlier writes have gone to disk."""
    os.sync()
    for path in directory.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pause() -> None:
    """Wait before each side that writes, so that no side writes into memory just freed.

    A virtual machine gives free blocks of 2 MB back to its host within two seconds and gets them
    again page by page, so that writing into them is slow for whoever does it (README.md).
    """
    time.sleep(4)


STATES: dict[str, Callable[[Path], None]] = {"warm": read_into_cache, "cold": drop_from_cache}


def shards_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def time_copy(source: Path, destination: Path) -> float:
    """Return the seconds of `cp -r` and fsync of every file; the copy is removed again."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(destination)], check=True)
    for path in destination.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


def time_cat(source: Path) -> float:
    start = time.perf_counter()
    with open("/dev/null", "wb") as nowhere:
        subprocess.run(["cat", *sorted(source.glob("*.safetensors"))], check=True, stdout=nowhere)
    return time.perf_counter() - start


def time_plain_write(sizes: list[int], target: Path) -> float:
    """Return the seconds to write and sync files of these sizes; they are removed again.

    Blocks are as large as the ones that the library writes.
    """
    block = np.random.default_rng(0).integers(0, 256, WRITE_BYTES, dtype=np.uint8)
    target.mkdir()
    start = time.perf_counter()
    for number, size in enumerate(sizes):
        with (target / str(number)).open("wb", buffering=0) as file:
            for position in range(0, size, block.size):
                file.write(block[: size - position].data)
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds
