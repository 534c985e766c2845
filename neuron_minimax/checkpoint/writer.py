"""Files that appear whole or not at all, under names that no link leads elsewhere."""

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from neuron_minimax.checkpoint.header import TensorSpec, size_text
from neuron_minimax.checkpoint.index import INDEX_NAME, SINGLE_NAME
from neuron_minimax.checkpoint.kinds import CONFIG_NAME, SNAPSHOTS
from neuron_minimax.checkpoint.streaming import drop_pages
from neuron_minimax.errors import CheckpointError, NeuronMiniMaxError
from neuron_minimax.files import open_regular
from neuron_minimax.progress import Advance, nothing

PARTIAL_SUFFIX = ".partial"
TOKENIZER_BYTES = 100_000_000  # of one file; the published tokenizer.json has a tenth of it
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
COPY_BYTES = 1 << 20
# Neither created through a link nor inherited by a program that is started.
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name at the end of the block, whole and synced, with the
    mode that the umask allows. A link that has the name is replaced, never written through.

    An exception leaves what had the name before.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    partial.unlink(missing_ok=True)  # of a run that was ended, or a link set by somebody else
    try:
        with open(os.open(partial, NEW_FILE | os.O_EXCL, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _put_in_place(partial, path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing and syncing name no file
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _put_in_place(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    sync_directory(path.parent)


def copy_file(source: Path, target: Path, advance: Advance = nothing) -> None:
    """Copy a regular file's bytes; the copy has its name only when it is whole and synced.
    `advance` is called with the bytes of each piece.

    Raises OSError, also when the source is a FIFO, a socket or a device.
    """
    with open(open_regular(source), "rb") as original, replacing(target) as copy:
        while piece := original.read(COPY_BYTES):
            copy.write(piece)
            advance(len(piece))


def require_space(
    directory: Path,
    needed: int,
    error: type[NeuronMiniMaxError],
    advice: str = "free some space or choose another disk",
) -> None:
    """Raise `error`, with the advice, when the disk of a directory has not so many bytes free."""
    free = shutil.disk_usage(directory).free
    needed += needed // 100 + (16 << 20)  # headers, journals, the file system's own share
    if free < needed:
        raise error(
            f"{directory} needs {size_text(needed, 2)} more and its disk has "
            f"{size_text(free, 2)} free; nothing was written: {advice}"
        )


def sync_directory(directory: Path) -> None:
    """Put a directory's entries on the disk. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(paths: Iterable[Path]) -> None:
    """Put files that other code has written, or links to them, on the disk, bytes and names: before
    the manifest that vouches for them. Raises OSError.
    """
    directories = {}
    for path in paths:
        descriptor = open_regular(path)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        directories[path.parent] = True
    for directory in directories:
        sync_directory(directory)


def require_place(directory: Path, error: type[NeuronMiniMaxError]) -> None:
    """Raise `error` when no directory can be made there: it, or a folder that it is to be in, is a
    file. For a command to say so before it works.
    """
    for path in (directory, *directory.parents):
        if path.is_dir():
            return
        if os.path.lexists(path):
            raise error(f"{path} is no directory; choose another place for the output")


def make_directory(path: Path) -> None:
    """Make a directory, its parents with it, and put their names on the disk; one that is there
    stays as it is. Raises OSError.
    """
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir(exist_ok=True)
    except FileExistsError:
        found = NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        raise found from None
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
        return os.open(self.partial, NEW_FILE, 0o666)

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
        file.write((json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, chat template and generation config, as far as they exist; return their
    names.

    Raises CheckpointError as `find_companions` does, OSError when the target cannot be written.
    """
    originals = find_companions(source)
    for name, path in originals.items():
        copy_file(path, target / name)
    return list(originals)


def find_companions(source: Path) -> dict[str, Path]:
    """Return the paths of the files that are copied, links followed, by name.

    Raises CheckpointError naming one that is no regular file within the checkpoint, or that cannot
    be read.
    """
    found = {name: companion(source, name) for name in COMPANION_FILES}
    return {name: path for name, path in found.items() if path is not None}


def companion(directory: Path, name: str) -> Path | None:
    """Return the path of a checkpoint's small file, links followed; None when there is none.

    Links may lead to files of the checkpoint's own directory, and from a snapshot of a hub cache to
    its blobs: what is copied becomes public with the output. Raises CheckpointError for another
    link, and for what is no regular file or cannot be read.
    """
    path = directory / name
    if not os.path.lexists(path):
        return None
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == SNAPSHOTS:
        allowed.append(home.parent.parent / "blobs")
    try:
        found = path.resolve(strict=True)
        if found.parent not in allowed:
            raise CheckpointError(
                f"{path} is a link to {found}, outside of the checkpoint; put a copy of the file "
                "there, or remove the link"
            )
        os.close(open_regular(found))
    except (OSError, RuntimeError) as error:
        problem = getattr(error, "strerror", None) or "it is a link to itself"
        raise CheckpointError(
            f"{path} cannot be used ({problem}); expected a regular file, or none"
        ) from None
    return found


def token_numbers(tokenizer: Mapping[str, Any]) -> list[int]:
    """Return the numbers that a parsed tokenizer.json gives to its tokens."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    added = tokenizer.get("added_tokens")
    numbers = [*vocabulary.values()] if isinstance(vocabulary, dict) else []
    if isinstance(added, list):
        numbers += [each.get("id") for each in added if isinstance(each, dict)]
    return [number for number in numbers if isinstance(number, int)]


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
    advance: Advance = nothing,
) -> None:
    """Write a whole checkpoint directory from (name, safetensors dtype, array of stored elements)
    that fit in memory.

    FP8 arrays are uint8 codes, BF16 arrays uint16. Tensors are spread evenly over the shards, in
    order; `advance` is called with the bytes of each.
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
                advance(array.nbytes)
    if shards > 1:
        write_index(directory, weight_map, sum(array.nbytes for _, _, array in rows))
    write_json(directory / CONFIG_NAME, dict(config))
