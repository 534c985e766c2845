"""Checkpoint directories: every header checked without reading data, tensors as rows that are read
or as zero-copy views of the mapped files, block scales as the factors that they mean.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from neuron_minimax.checkpoint import header, kinds, schema
from neuron_minimax.checkpoint.header import (
    ADVICE,
    STORED_DTYPES,
    TORCH_DTYPES,
    TensorEntry,
    TensorSpec,
    size_text,
)
from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_weight_map
from neuron_minimax.checkpoint.kinds import Wanted
from neuron_minimax.checkpoint.scaled import ScaledWeights
from neuron_minimax.checkpoint.schema import Problem
from neuron_minimax.checkpoint.streaming import drop_pages
from neuron_minimax.config import MOST_TENSORS, ModelConfig
from neuron_minimax.errors import CheckpointError, counted, some_of
from neuron_minimax.files import Stamp, open_regular, read_bytes, stamp
from neuron_minimax.fp8 import ConventionChoice, ScaleConvention
from neuron_minimax.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

SAMPLE_BYTES = 64 << 10  # of a fingerprint


def stamps_of(directory: Path) -> dict[str, Stamp]:
    """Return the stamps of a directory's regular files, by name; none without a directory."""
    found: dict[str, Stamp] = {}
    with suppress(OSError):
        for path in directory.iterdir():
            with suppress(OSError):
                found[path.name] = stamp(path)
    return found


class TensorDirectory:
    """The tensors of every safetensors file that a directory's index names (or of its single file).

    Headers are read when it is made; what is wrong with files is collected in `problems`, not
    raised, so that an inspection can list all of it. `require_usable` raises. Given `shards`, just
    these files are read, without an index. `stamps` are those that the directory's files had before
    the first was read.

    Raises CheckpointError when there is nothing to read: no directory, no safetensors files, a
    broken index.
    """

    def __init__(self, directory: str | Path, shards: Sequence[str] = ()) -> None:
        self.directory = Path(directory)
        self.stamps = stamps_of(self.directory)
        self.problems: list[Problem] = []
        self.entries: dict[str, TensorEntry] = {}
        self._maps: dict[str, np.memmap] = {}
        self.leftovers: list[Problem] = []
        weight_map = {} if shards else read_weight_map(self.directory)
        if weight_map and not any(
            (self.directory / shard).exists() for shard in {*weight_map.values()}
        ):
            weight_map = self._without_stale_index(weight_map)
        self.shards = list(shards) or sorted(set(weight_map.values())) or [self._single_file()]
        for shard in self.shards:
            self._read_shard(shard, weight_map)
        unread = {problem.subject for problem in self.problems if problem.kind == "shard"}
        self.unread = {name for name, shard in weight_map.items() if shard in unread}
        for name, shard in weight_map.items():
            if name not in self.entries and name not in self.unread:
                self._problem(
                    name,
                    f"{name} is listed in {INDEX_NAME} as part of {shard}, but is not in that file",
                    "index",
                )

    def array(self, name: str) -> np.ndarray:
        """The stored elements, zero-copy: uint8 codes for FP8, uint16 for BF16, else the dtype's
        own.

        The kernel ends a process that touches a mapped page behind the end of its file, so what
        streams takes `rows` or `strips`. Raises CheckpointError when the file is too short already.
        """
        entry = self._readable(name)
        path = self.directory / entry.shard
        if path.stat().st_size < entry.end:
            raise CheckpointError(_ends_within(entry))
        # A plain view: every operation on a memmap costs Python time.
        raw = np.asarray(self._map(entry.shard))[entry.start : entry.end]
        return raw.view(STORED_DTYPES[entry.dtype]).reshape(entry.shape)

    def strips(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """Yield so many rows (along the first dimension) at a time, as `array` has them, each time
        in the same memory. A tensor without a dimension or an element has none.

        Read, not mapped: of what is looked at once, mapping each page takes longer than copying it.
        Raises CheckpointError when the file has become shorter.
        """
        entry = self._readable(name)
        if not entry.shape or not entry.nbytes:
            return
        strip = np.empty((min(rows, entry.shape[0]), *entry.shape[1:]), STORED_DTYPES[entry.dtype])
        position = entry.start
        with self._opened(entry.shard) as descriptor:
            for first in range(0, entry.shape[0], rows):
                found = strip[: entry.shape[0] - first]
                _read_into(found, descriptor, position, entry)
                position += found.nbytes
                yield found

    def rows(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows (along the first dimension), as `array` has them, read into memory of their
        own.

        Raises CheckpointError when the file cannot be read, or has become shorter.
        """
        entry = self._readable(name)
        shape = entry.shape
        start = entry.start
        if rows != slice(None):
            (first, stop, _) = rows.indices(shape[0])
            start += first * (entry.nbytes // shape[0])
            shape = (max(0, stop - first), *shape[1:])
        found = np.empty(shape, STORED_DTYPES[entry.dtype])
        with self._opened(entry.shard) as descriptor:
            _read_into(found, descriptor, start, entry)
        return found

    def fill(self, name: str, parts: Iterable[tuple[np.ndarray, int]]) -> None:
        """Fill each part, which is contiguous memory, with the tensor's bytes from an offset on.

        Raises CheckpointError when the file cannot be read, or has become shorter.
        """
        entry = self._readable(name)
        with self._opened(entry.shard) as descriptor:
            for part, offset in parts:
                _read_into(part, descriptor, entry.start + offset, entry)

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor in its stored dtype, zero-copy over the mapped file."""
        import torch

        dtype = TORCH_DTYPES[self._readable(name).dtype]
        return torch.from_numpy(self.array(name)).view(getattr(torch, dtype))

    def entry(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name}") from None

    def adjacent(self, names: Sequence[str]) -> "torch.Tensor | None":
        """Tensors [R,C] that lie behind each other in one file, as one [sum of R,C], zero-copy;
        None where they do not.
        """
        import torch

        entries = [self._readable(name) for name in names]
        for before, entry in pairwise(entries):
            follows = (entry.shard, entry.start) == (before.shard, before.end)
            if not follows or entry.dtype != before.dtype or entry.shape[1:] != before.shape[1:]:
                return None
        self.array(names[-1])  # which the file is long enough for
        raw = np.asarray(self._map(entries[0].shard))[entries[0].start : entries[-1].end]
        dtype = getattr(torch, TORCH_DTYPES[entries[0].dtype])
        return torch.from_numpy(raw).view(dtype).view(-1, *entries[0].shape[1:])

    def _readable(self, name: str) -> TensorEntry:
        entry = self.entry(name)
        if entry.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{name} in {entry.shard} is {entry.dtype}, which is not read; expected one of "
                f"{', '.join(STORED_DTYPES)}"
            )
        return entry

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def unmap(self) -> None:
        """Let go of the mapped files; arrays that are still in use keep theirs."""
        self._maps.clear()

    def drop_pages(self) -> None:
        """Drop the files' pages from the page cache, where no array of any process maps them."""
        self.unmap()
        for shard in self.shards:
            with open(open_regular(self.directory / shard), "rb") as file:
                drop_pages(file.fileno())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, every tensor's name, dtype and shape, and three 64 KiB samples
        of each shard's data: it tells checkpoints apart before their data are read.

        It does not see a change elsewhere in the data; the files' stamps do, and `verify` and
        `cache --check`, which read all of it. Raises CheckpointError when a file cannot be read.
        """
        digest = hashlib.sha256()
        config = self.directory / kinds.CONFIG_NAME
        digest.update(read_bytes(config) if config.exists() else b"")
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name):
            digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
        ends = dict.fromkeys(self.shards, 0)
        for entry in self.entries.values():
            ends[entry.shard] = max(ends[entry.shard], entry.end)
        for shard, end in ends.items():
            with self._opened(shard) as descriptor:
                for start in (0, end // 2, max(0, end - SAMPLE_BYTES)):
                    digest.update(os.pread(descriptor, SAMPLE_BYTES, start))
        return digest.hexdigest()

    def require_usable(self) -> None:
        """Raise CheckpointError listing the problems (the first ten of them) when there are any."""
        if self.problems:
            lines = [str(problem) for problem in self.problems[:10]]
            more = len(self.problems) - len(lines)
            tail = (
                [f"... and {more} more; `neuron-minimax inspect {self.directory}` lists all"]
                if more
                else []
            )
            raise CheckpointError("\n".join([*lines, *tail]))

    def _problem(self, subject: str, message: str, kind: str) -> None:
        self.problems.append(Problem(subject, message, kind))

    @contextmanager
    def _opened(self, shard: str) -> Iterator[int]:
        """Give a descriptor of a file, and name the file in what goes wrong."""
        path = self.directory / shard
        try:
            descriptor = open_regular(path)
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}), or no longer; {ADVICE}"
            ) from None

    def _map(self, shard: str) -> np.memmap:
        if shard not in self._maps:
            with open(open_regular(self.directory / shard), "rb") as file:
                # Private copy-on-write pages: writable to torch's mind, never written back.
                self._maps[shard] = np.memmap(file, dtype=np.uint8, mode="c")
        return self._maps[shard]

    def _without_stale_index(self, weight_map: dict[str, str]) -> dict[str, str]:
        """Return an index, or none where the single file is there and no file that it lists."""
        if not (self.directory / SINGLE_NAME).exists():
            return weight_map
        message = (
            f"{INDEX_NAME} lists {counted(len({*weight_map.values()}), 'file')}, none of which is "
            f"there; {SINGLE_NAME} is read instead, as transformers does: remove the index"
        )
        self.leftovers.append(Problem(INDEX_NAME, message, "leftover"))
        return {}

    def _single_file(self) -> str:
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        if SINGLE_NAME in files:
            others = [name for name in files if name != SINGLE_NAME]
            message = (
                f"{some_of(others)} beside {SINGLE_NAME} is not read; merge it in first where it "
                "belongs to the model, as an adapter does, or remove it"
            )
            self.leftovers.append(Problem(others[0], message, "leftover"))
            return SINGLE_NAME
        found = (
            f"{len(files)} safetensors files and no {INDEX_NAME}"
            if files
            else "no safetensors files"
        )
        raise CheckpointError(
            f"{self.directory} has {found}; expected {INDEX_NAME} with its shards, or {SINGLE_NAME}"
        )

    def _read_shard(self, shard: str, weight_map: Mapping[str, str]) -> None:
        try:
            entries = header.read_header(self.directory / shard)
        except CheckpointError as error:
            self._problem(shard, str(error), "shard")
            return
        count = len(self.entries) + len(entries)
        if count > MOST_TENSORS:
            raise CheckpointError(
                f"{self.directory} has at least {count} tensors; at most {MOST_TENSORS} are read: "
                "it is of no supported model"
            )
        for entry in entries:
            other = self.entries.get(entry.name)
            if other is not None:
                self._problem(
                    entry.name,
                    f"{entry.name} is in two shards, {other.shard} and {shard}",
                    "duplicate",
                )
            elif weight_map and entry.name not in weight_map:
                self._problem(
                    entry.name,
                    f"{entry.name} is in {shard}, but {INDEX_NAME} does not list it",
                    "index",
                )
            elif weight_map and weight_map[entry.name] != shard:
                self._problem(
                    entry.name,
                    f"{entry.name} is in {shard}, but {INDEX_NAME} says {weight_map[entry.name]}",
                    "index",
                )
            if other is None or weight_map.get(entry.name) == shard:
                self.entries[entry.name] = entry


class Checkpoint(TensorDirectory, ScaledWeights):
    """A checkpoint of a supported family in Hugging Face layout, FP8 or dense, checked against the
    table for its config.

    `problems` also holds what `schema.check_against_schema` finds; `mtp_names` the tolerated
    multi-token-prediction tensors, `cache_scale_names` those of an FP8 key/value cache, and
    `left_out` both. `scale_convention` says what `weight_scale_inv` means where its
    values do not. Raises ConfigError or CheckpointError without such a checkpoint.
    """

    def __init__(
        self,
        directory: str | Path,
        scale_convention: ConventionChoice | ScaleConvention = ConventionChoice.AUTO,
    ) -> None:
        kinds.require(Path(directory), Wanted.CHECKPOINT, CheckpointError)
        before = stamps_of(Path(directory))
        self.config = ModelConfig.from_dir(directory)
        self.convention_choice = ConventionChoice(scale_convention)
        super().__init__(directory)
        self.stamps = before
        self.config = schema.with_stored_head(self.config, self.entries)
        self.title = str(self.directory)
        self.mtp_names = schema.mtp_names(self.entries, self.config)
        self.cache_scale_names = schema.cache_scale_names(self.entries, self.config)
        if not self.entries and self.problems:
            return  # no file could be read, which is a problem
        foreign = schema.foreign_format(self.entries, self.config)
        if foreign is not None:
            self.problems.append(foreign)
            return
        found = schema.check_against_schema(self.entries, self.config, set(self.left_out))
        self.problems += [each for each in found if each.subject not in self.unread]

    @classmethod
    def open(
        cls,
        path: str | Path,
        scale_convention: str = ConventionChoice.AUTO,
        *,
        progress: Progress = SILENT,
    ) -> Self:
        """Open a checkpoint by its directory, or by its hub id `org/name[@revision]`.

        `scale_convention` is auto, multiplier or reciprocal. Raises CheckpointError for another
        one, and ConfigError or CheckpointError when the checkpoint does not exist.
        """
        try:
            choice = ConventionChoice(scale_convention)
        except ValueError:
            raise CheckpointError(
                f"scale_convention is {scale_convention!r}; expected one of "
                f"{', '.join(ConventionChoice)}",
                usage=True,
            ) from None
        directory = local_directory(path, progress=progress)
        with progress.stage(f"opening {directory}"):
            return cls(directory, choice)

    @property
    def left_out(self) -> list[str]:
        """The names of tensors that are tolerated, and not run."""
        return self.mtp_names + self.cache_scale_names

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: entry.spec for name, entry in self.entries.items()}

    @property
    def convention_record(self) -> dict[str, Any]:
        """The convention as manifests hold it: what it is, who chose it, and the evidence."""
        return {
            "convention": str(self.convention),
            "chosen_by": str(self.convention_choice),
            "evidence": {
                name: None if value != value else value  # a median of nothing is NaN
                for name, value in asdict(self.scale_reading[1]).items()
            },
        }

    def __str__(self) -> str:
        """The directory, and how much is in it."""
        config = self.config
        state = f"; {counted(len(self.problems), 'problem')}" if self.problems else ""
        experts = "no experts"
        if config.num_local_experts:
            experts = counted(config.num_local_experts, "expert")
        return (
            f"{self.directory}: {counted(len(self.entries), 'tensor')}, {size_text(self.nbytes)}, "
            f"{counted(config.num_hidden_layers, 'layer')}, {experts}{state}"
        )


def _read_into(memory: np.ndarray, descriptor: int, position: int, entry: TensorEntry) -> None:
    """Fill contiguous memory with a file's bytes from a position on. Raises OSError."""
    left = memory.reshape(-1).view(np.uint8).data
    while left:
        count = os.preadv(descriptor, [left], position)
        if not count:
            raise CheckpointError(_ends_within(entry))
        left = left[count:]
        position += count


def _ends_within(entry: TensorEntry) -> str:
    return f"{entry.shard} ends within {entry.name}; it has changed: {ADVICE}"
