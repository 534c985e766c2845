"""Checkpoint directories: every header checked without reading data, tensors as zero-copy views of
the mapped files, block scales as the factors that they mean.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import header, schema
from neuron_minimax.checkpoint.header import (
    STORED_DTYPES,
    TORCH_DTYPES,
    TensorEntry,
    TensorSpec,
    size_text,
)
from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.checkpoint.schema import Problem
from neuron_minimax.checkpoint.streaming import drop_pages
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError, ScaleConventionError
from neuron_minimax.fp8 import ConventionChoice, ScaleConvention, ScaleEvidence, ceil_div

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class TensorDirectory:
    """The tensors of every safetensors file that a directory's index names (or of its single file).

    Headers are read when it is made; what is wrong with files is collected in `problems`, not
    raised, so that an inspection can list all of it. `require_usable` raises. Given `shards`, just
    these files are read, without an index.

    Raises CheckpointError when there is nothing to read: no directory, no safetensors files, a
    broken index.
    """

    def __init__(self, directory: str | Path, shards: Sequence[str] = ()) -> None:
        self.directory = Path(directory)
        self.problems: list[Problem] = []
        self.entries: dict[str, TensorEntry] = {}
        self._maps: dict[str, np.memmap] = {}
        weight_map = {} if shards else self._weight_map()
        self.shards = list(shards) or sorted(set(weight_map.values())) or [self._single_file()]
        for shard in self.shards:
            self._read_shard(shard, weight_map)
        for name, shard in weight_map.items():
            if name not in self.entries and not any(
                problem.subject == shard for problem in self.problems
            ):
                self._problem(
                    name,
                    f"{name} is listed in {INDEX_NAME} as part of {shard}, but is not in that file",
                    "index",
                )

    def array(self, name: str) -> np.ndarray:
        """The stored elements, zero-copy: uint8 codes for FP8, uint16 for BF16, else the dtype's
        own.
        """
        entry = self.entry(name)
        # A plain view: every operation on a memmap costs Python time.
        raw = np.asarray(self._map(entry.shard))[entry.start : entry.end]
        return raw.view(STORED_DTYPES[entry.dtype]).reshape(entry.shape)

    def strips(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """Yield so many rows (along the first dimension) at a time, as `array` has them, each time
        in the same memory. A tensor without a dimension or an element has none.

        Read, not mapped: of what is looked at once, mapping each page takes longer than copying it.
        Raises CheckpointError when the file has become shorter.
        """
        entry = self.entry(name)
        if not entry.shape or not entry.nbytes:
            return
        strip = np.empty((min(rows, entry.shape[0]), *entry.shape[1:]), STORED_DTYPES[entry.dtype])
        with open(self.directory / entry.shard, "rb", buffering=0) as file:
            file.seek(entry.start)
            for first in range(0, entry.shape[0], rows):
                left = strip[: entry.shape[0] - first].data.cast("B")
                while left:
                    count = file.readinto(left)
                    if not count:
                        raise CheckpointError(
                            f"{entry.shard} ends within {name}; it has changed: download it again"
                        )
                    left = left[count:]
                yield strip[: entry.shape[0] - first]

    def tensor(self, name: str) -> "torch.Tensor":
        """The tensor in its stored dtype, zero-copy over the mapped file."""
        import torch

        dtype = TORCH_DTYPES[self.entry(name).dtype]
        return torch.from_numpy(self.array(name)).view(getattr(torch, dtype))

    def entry(self, name: str) -> TensorEntry:
        try:
            return self.entries[name]
        except KeyError:
            raise CheckpointError(f"{self.directory} has no tensor {name}") from None

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
            with open(self.directory / shard, "rb") as file:
                drop_pages(file.fileno())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over config.json, every header entry, and three 64 KiB samples of each shard's
        data.
        """
        digest = hashlib.sha256()
        config = self.directory / "config.json"
        digest.update(config.read_bytes() if config.exists() else b"")
        for entry in sorted(self.entries.values(), key=lambda entry: entry.name):
            digest.update(f"{entry.name} {entry.dtype} {entry.shape}\n".encode())
        for shard in self.shards:
            ends = [entry.end for entry in self.entries.values() if entry.shard == shard] or [0]
            data = self._map(shard)
            for start in (0, max(ends) // 2, max(0, max(ends) - 65536)):
                digest.update(data[start : start + 65536].tobytes())
        return digest.hexdigest()

    def require_usable(self) -> None:
        """Raise CheckpointError listing the problems (the first ten of them) when there are any."""
        if self.problems:
            shown = [str(problem) for problem in self.problems[:10]]
            more = len(self.problems) - len(shown)
            tail = (
                [f"... and {more} more; `neuron-minimax inspect {self.directory}` lists all"]
                if more
                else []
            )
            raise CheckpointError("\n".join([*shown, *tail]))

    def _problem(self, subject: str, message: str, kind: str) -> None:
        self.problems.append(Problem(subject, message, kind))

    def _map(self, shard: str) -> np.memmap:
        if shard not in self._maps:
            # Private copy-on-write pages: writable to torch's mind, never written back.
            self._maps[shard] = np.memmap(self.directory / shard, dtype=np.uint8, mode="c")
        return self._maps[shard]

    def _weight_map(self) -> dict[str, str]:
        if not self.directory.is_dir():
            raise CheckpointError(
                f"{self.directory} is not a directory; expected a checkpoint directory"
            )
        path = self.directory / INDEX_NAME
        if not path.exists():
            return {}
        try:
            weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
                raise ValueError("weight_map is empty or maps to something other than file names")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is no usable index ({error!r}); download it again"
            ) from None
        for shard in set(weight_map.values()):
            if Path(shard).name != shard:
                raise CheckpointError(
                    f"{path} names the shard {shard!r}; expected a file name in the same directory"
                )
        return weight_map

    def _single_file(self) -> str:
        files = sorted(path.name for path in self.directory.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
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
            entries = list(header.read_header(self.directory / shard))
        except CheckpointError as error:
            self._problem(shard, str(error), "shard")
            return
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
            if other is None or weight_map.get(entry.name) == shard:
                self.entries[entry.name] = entry


class ScaledWeights:
    """Weights whose FP8 codes have block scales, in files or in memory.

    What a stored `weight_scale_inv` means is decided here, once: `multipliers` gives the factors of
    the codes, whatever is stored. A subclass sets the fields and gives `array`.
    """

    title: str  # begins an error message
    config: ModelConfig
    convention_choice: ConventionChoice

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""
        raise NotImplementedError

    def array(self, name: str) -> np.ndarray:
        """The stored elements; see TensorDirectory.array."""
        raise NotImplementedError

    def is_fp8(self, name: str) -> bool:
        """Read off the tensor, never off config.json."""
        return self.specs[name].dtype == "F8_E4M3"

    def sample_scales(self, most: int = 512) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, codes of the first block row, their scales [1, blocks]) of FP8 weights spread over
        the model.
        """
        names = [
            name
            for name in self.specs
            if self.is_fp8(name) and schema.scale_name(name) in self.specs
        ]
        rows = self.config.weight_block_size[0]
        for name in names[:: max(1, ceil_div(len(names), most))]:
            yield name, self.array(name)[:rows], self.array(schema.scale_name(name))[:1]

    @cached_property
    def scale_reading(self) -> tuple[ScaleConvention | None, ScaleEvidence]:
        """The meaning of `weight_scale_inv` that its values show, with the evidence; None when it
        is mixed. Raises CheckpointError naming sampled scales that are not positive numbers.
        """
        return fp8.decide_convention(self.sample_scales(), self.config.weight_block_size)

    @cached_property
    def convention(self) -> ScaleConvention:
        """The meaning of `weight_scale_inv`: what the user chose, or else what its values show.

        Raises ScaleConventionError when the evidence is mixed.
        """
        if self.convention_choice is not ConventionChoice.AUTO:
            return ScaleConvention(self.convention_choice)
        found, evidence = self.scale_reading
        if found is None and any(spec.dtype == "F8_E4M3" for spec in self.specs.values()):
            raise ScaleConventionError(
                f"{self.title}: what weight_scale_inv means is unclear: {evidence.render()} "
                f"(such as {', '.join(evidence.dissenters) or 'none'}); look at these tensors; "
                "`neuron-minimax convert` takes --scale-convention"
            )
        return found or ScaleConvention.MULTIPLIER

    def multipliers(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The float32 factors of an FP8 weight's codes, one for each block that these rows of the
        weight touch.

        Raises CheckpointError naming stored scales that are not positive finite numbers.
        """
        block_rows = self.config.weight_block_size[0]
        start, stop, _ = rows.indices(self.specs[name].shape[0])
        scale_name = schema.scale_name(name)
        stored = self.array(scale_name)[start // block_rows : ceil_div(stop, block_rows)]
        fp8.check_scales(scale_name, stored)
        return np.float32(1) / stored if self.convention is ScaleConvention.RECIPROCAL else stored


class Checkpoint(TensorDirectory, ScaledWeights):
    """A MiniMax-M2 checkpoint in Hugging Face layout, FP8 or dense, checked against the table for
    its config.

    `problems` also holds what `schema.check_against_schema` finds; `mtp_names` the tolerated
    multi-token-prediction tensors. `scale_convention` says what `weight_scale_inv` means where its
    values do not. Raises ConfigError or CheckpointError without such a checkpoint.
    """

    def __init__(
        self,
        directory: str | Path,
        scale_convention: ConventionChoice | ScaleConvention = ConventionChoice.AUTO,
    ) -> None:
        self.config = ModelConfig.from_dir(directory)
        self.convention_choice = ConventionChoice(scale_convention)
        super().__init__(directory)
        self.config = schema.with_stored_head(self.config, self.entries)
        self.title = str(self.directory)
        self.mtp_names: list[str] = [
            name for name in self.entries if schema.is_mtp(name, self.config)
        ]
        self.problems += schema.check_against_schema(self.entries, self.config, set(self.mtp_names))

    @classmethod
    def open(cls, path: str | Path, scale_convention: str = ConventionChoice.AUTO) -> Self:
        """Open a checkpoint by its directory, or by its hub id `org/name[@revision]`.

        `scale_convention` is auto, multiplier or reciprocal. Raises CheckpointError for another
        one, and ConfigError or CheckpointError when the checkpoint does not exist.
        """
        try:
            choice = ConventionChoice(scale_convention)
        except ValueError:
            raise CheckpointError(
                f"scale_convention is {scale_convention!r}; expected one of "
                f"{', '.join(ConventionChoice)}"
            ) from None
        return cls(local_directory(path), choice)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        return {name: entry.spec for name, entry in self.entries.items()}

    @property
    def convention_record(self) -> dict[str, Any]:
        """The convention as manifests hold it: what it is, who chose it, and the evidence."""
        return {
            "convention": str(self.convention),
            "chosen_by": str(self.convention_choice),
            "evidence": asdict(self.scale_reading[1]),
        }

    def __str__(self) -> str:
        """The directory, and how much is in it."""
        config = self.config
        state = f"; {len(self.problems)} problems" if self.problems else ""
        return (
            f"{self.directory}: {len(self.entries):,} tensors, {size_text(self.nbytes)}, "
            f"{config.num_hidden_layers} layers, {config.num_local_experts} experts{state}"
        )
