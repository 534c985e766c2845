"""Checkpoint directories: every header checked without reading data, tensors as rows that are read
or as zero-copy views of the mapped files, block scales as the factors that they mean.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np

from neuron_minimax.checkpoint import kinds, schema
from neuron_minimax.checkpoint.header import (
    ADVICE,
    STORED_DTYPES,
    TORCH_DTYPES,
    TensorEntry,
    TensorSpec,
    size_text,
)
from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.checkpoint.hub_files import HubFiles
from neuron_minimax.checkpoint.index import INDEX_NAME, SINGLE_NAME, read_weight_map
from neuron_minimax.checkpoint.kinds import Wanted
from neuron_minimax.checkpoint.scaled import ScaledWeights
from neuron_minimax.checkpoint.schema import Problem
from neuron_minimax.checkpoint.shard_files import Read, ShardFiles
from neuron_minimax.config import MOST_TENSORS, ModelConfig
from neuron_minimax.errors import CheckpointError, counted, some_of
from neuron_minimax.files import Stamp, read_bytes
from neuron_minimax.fp8 import ConventionChoice, ScaleConvention
from neuron_minimax.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")  # as PEFT names them
FOREIGN = re.compile(r".+\.gguf|pytorch_model.*\.bin")  # weights as others store them
SAMPLE_BYTES = 64 << 10  # of a fingerprint


class TensorDirectory:
    """The tensors of every safetensors file that a directory's index names (or of its single file).

    Headers are read when it is made; what is wrong with files is collected in `problems`, not
    raised, so that an inspection can list all of it. `require_usable` raises. Given `shards`, just
    these files are read, without an index. `files` gives the files' bytes, and their stamps from
    before the first was read.

    Raises CheckpointError when there is nothing to read: no directory, no safetensors files, a
    broken index.
    """

    def __init__(
        self,
        directory: str | Path,
        shards: Sequence[str] = (),
        files: ShardFiles | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.files = files or ShardFiles(self.directory)
        self.problems: list[Problem] = []
        self.entries: dict[str, TensorEntry] = {}
        self.leftovers: list[Problem] = []
        weight_map = {} if shards else read_weight_map(self.directory)
        if weight_map and not any(self.files.exists(shard) for shard in {*weight_map.values()}):
            weight_map = self._without_stale_index(weight_map)
        self.shards = list(shards) or sorted(set(weight_map.values())) or [self._single_file()]
        if not shards:
            self._note_leftovers(bool(weight_map))
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
        mapped, size = self.files.map(entry.shard)
        if size < entry.end:
            raise CheckpointError(_ends_within(entry))
        # A plain view: every operation on a memmap costs Python time.
        raw = np.asarray(mapped)[entry.start : entry.end]
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
        with self.files.opened(entry.shard) as read:
            for first in range(0, entry.shape[0], rows):
                found = strip[: entry.shape[0] - first]
                _read_into(found, read, position, entry)
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
        with self.files.opened(entry.shard) as read:
            _read_into(found, read, start, entry)
        return found

    def fill(self, name: str, parts: Iterable[tuple[np.ndarray, int]]) -> None:
        """Fill each part, which is contiguous memory, with the tensor's bytes from an offset on.

        Raises CheckpointError when the file cannot be read, or has become shorter.
        """
        entry = self._readable(name)
        with self.files.opened(entry.shard) as read:
            for part, offset in parts:
                _read_into(part, read, entry.start + offset, entry)

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
        raw = np.asarray(self.files.map(entries[0].shard)[0])
        raw = raw[entries[0].start : entries[-1].end]
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

    @property
    def stamps(self) -> dict[str, Stamp]:
        return self.files.stamps

    def unmap(self) -> None:
        """Let go of the mapped files; arrays that are still in use keep theirs."""
        self.files.unmap()

    def drop_pages(self) -> None:
        """Drop the files' pages from the page cache, where no array of any process maps them."""
        self.files.drop_pages(self.shards)

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
        places = [
            (shard, start)
            for shard, end in ends.items()
            for start in (0, end // 2, max(0, end - SAMPLE_BYTES))
        ]
        for sample in self.overlapped(lambda at: self.files.sample(*at, SAMPLE_BYTES), places):
            digest.update(sample)
        return digest.hexdigest()

    def overlapped(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """See ShardFiles.overlapped."""
        return self.files.overlapped(function, items)

    def require_usable(self) -> None:
        """Raise CheckpointError listing the problems (the first ten of them) when there are any."""
        if self.problems:
            lines = [str(problem) for problem in self.problems[:10]]
            more = len(self.problems) - len(lines)
            tail = (
                [f"... and {more} more; `neuron-minimax inspect {self.files.title}` lists all"]
                if more
                else []
            )
            raise CheckpointError("\n".join([*lines, *tail]))

    def _problem(self, subject: str, message: str, kind: str) -> None:
        self.problems.append(Problem(subject, message, kind))

    def _without_stale_index(self, weight_map: dict[str, str]) -> dict[str, str]:
        """Return an index, or none where the single file is there and no file that it lists."""
        if not self.files.exists(SINGLE_NAME):
            return weight_map
        message = (
            f"{INDEX_NAME} lists {counted(len({*weight_map.values()}), 'file')}, none of which is "
            f"there; {SINGLE_NAME} is read instead, as transformers does: remove the index"
        )
        self.leftovers.append(Problem(INDEX_NAME, message, "leftover"))
        return {}

    def _single_file(self) -> str:
        files = [name for name in self.files.names() if name not in ADAPTERS]
        if len(files) == 1 or SINGLE_NAME in files:
            return files[0] if len(files) == 1 else SINGLE_NAME
        found = "no safetensors files of a model"
        if files:
            found = f"{len(files)} safetensors files and no {INDEX_NAME}"
        elif self.files.names():
            found = f"{self.files.names()[0]}, an adapter for another model, and not that model"
        raise CheckpointError(
            f"{self.directory} has {found}; expected {INDEX_NAME} with its shards, or {SINGLE_NAME}"
        )

    def _note_leftovers(self, has_index: bool) -> None:
        """Note the files of weights that are not read."""
        others = [name for name in self.files.names() if name not in self.shards]
        others += [name for name in ADAPTERS if name in self.stamps and name not in others]
        read = f"{INDEX_NAME}, which does not list it" if has_index else SINGLE_NAME
        foreign = [name for name in sorted(self.stamps) if FOREIGN.fullmatch(name)]
        if foreign:
            message = (
                f"{some_of(foreign)}: weights of another format, not compared and not read; those "
                "of the safetensors files are. Remove what is not meant"
            )
            self.leftovers.append(Problem(foreign[0], message, "leftover"))
        for name in others:
            if name in ADAPTERS:
                message = (
                    f"{name} is an adapter and is not applied: the model answers as without it; "
                    "merge it in first (PEFT's merge_and_unload) if it is meant, or remove it"
                )
            elif name == SINGLE_NAME:
                message = (
                    f"{name} lies beside {read}: transformers would read it and not the shards; "
                    "here the index decides. Remove the one that is not meant"
                )
            else:
                message = (
                    f"{name} lies beside {read}, and is not read; merge it in first if it belongs "
                    "to the model, or remove it"
                )
            self.leftovers.append(Problem(name, message, "leftover"))

    def _read_shard(self, shard: str, weight_map: Mapping[str, str]) -> None:
        try:
            entries = self.files.entries(shard)
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
        files: ShardFiles | None = None,
    ) -> None:
        if files is None:
            kinds.require(Path(directory), Wanted.CHECKPOINT, CheckpointError)
            files = ShardFiles(Path(directory))
        self.config = ModelConfig.from_dir(directory)
        self.convention_choice = ConventionChoice(scale_convention)
        super().__init__(directory, files=files)
        self.config = schema.with_stored_head(self.config, self.entries)
        self.title = self.files.title
        self.mtp_names = schema.mtp_names(self.entries, self.config)
        predicting = set(self.mtp_names)
        self.cache_scale_names = [
            name
            for name in schema.cache_scale_names(self.entries, self.config)
            if name not in predicting
        ]
        if not self.entries and self.problems:
            return  # no file could be read, which is a problem
        left_out = set(self.left_out)
        found = [
            problem
            for problem in schema.check_against_schema(self.entries, self.config, left_out)
            if problem.subject not in self.unread
        ]
        if {"extra"} < {problem.kind for problem in found}:  # names that may explain what else is
            others = {name: entry for name, entry in self.entries.items() if name not in left_out}
            foreign = schema.foreign_format(others, self.config)
            found = found if foreign is None else [foreign]
        self.problems += found

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
        choice = _chosen(scale_convention)
        directory = local_directory(path, progress=progress)
        with progress.stage(f"opening {directory}"):
            return cls(directory, choice)

    @classmethod
    def streamed(
        cls,
        hub_id: str | Path,
        directory: Path,
        scale_convention: str = ConventionChoice.AUTO,
        *,
        progress: Progress = SILENT,
    ) -> Self:
        """Open a checkpoint on the hub without its shards: headers and samples alone are fetched.

        A conversion of it downloads each shard into the directory while that is needed. Raises as
        `open`, and CheckpointError when the hub cannot be asked.
        """
        choice = _chosen(scale_convention)
        files = HubFiles.open(hub_id, directory, progress)
        with progress.stage(f"reading headers and samples of {hub_id}"):
            found = cls(directory, choice, files)
            if not found.problems:  # what the plan of a conversion asks for
                with suppress(CheckpointError):
                    _ = (found.fingerprint, found.scale_reading)
            return found

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


def _chosen(scale_convention: str) -> ConventionChoice:
    try:
        return ConventionChoice(scale_convention)
    except ValueError:
        raise CheckpointError(
            f"scale_convention is {scale_convention!r}; expected one of "
            f"{', '.join(ConventionChoice)}",
            usage=True,
        ) from None


def _read_into(memory: np.ndarray, read: Read, position: int, entry: TensorEntry) -> None:
    """Fill contiguous memory with a file's bytes from a position on. Raises OSError."""
    left = memory.reshape(-1).view(np.uint8).data
    while left:
        count = read(left, position)
        if not count:
            raise CheckpointError(_ends_within(entry))
        left = left[count:]
        position += count


def _ends_within(entry: TensorEntry) -> str:
    return f"{entry.shard} ends within {entry.name}; it has changed: {ADVICE}"
