"""A dequantized twin of a checkpoint: a Hugging Face directory in float32 or bfloat16 that loads
without arithmetic.

Written by the same streaming, resuming and disk-checking code as a conversion. Its `cache.json`
holds the fingerprint of its source, so that a cache of something else is never used by mistake.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ConfigDict

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.finished import (
    Recorded,
    changed_source,
    examine,
    read_recorded,
    try_to_renew,
)
from neuron_minimax.checkpoint.header import STORED_DTYPES, TORCH_DTYPES, TensorSpec, size_text
from neuron_minimax.checkpoint.index import SINGLE_NAME
from neuron_minimax.checkpoint.kinds import CACHE_NAME
from neuron_minimax.checkpoint.output import Recipe, fill_directory
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.shards import Piece, StreamedShard, StreamedTensor
from neuron_minimax.convert.binding import source_groups
from neuron_minimax.errors import CheckpointError, counted
from neuron_minimax.files import stamp
from neuron_minimax.fp8 import bfloat16
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.progress import Advance, nothing

FORMAT_VERSION = 1
DTYPES = {"float32": "F32", "bf16": "BF16"}
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 8 << 20  # of output; a piece is whole rows of blocks


@dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What decides whether two caches are the same. Earlier versions have recorded here who made
    it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    source_fingerprint: str
    dtype: str
    scale_convention: str
    format_version: int
    made_by: str = ""


@dataclass(frozen=True, kw_only=True)
class CacheManifest(Recorded):
    """cache.json."""

    identity: CacheIdentity


@dataclass(frozen=True, kw_only=True)
class CacheResult(Rendered):
    """The outcome of a build: bytes in the cache, shards kept, what was made again, tensors found
    damaged or of another source, and whether all was there already.
    """

    directory: Path
    nbytes: int
    reused_shards: int = 0
    changes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    was_finished: bool = False

    def render(self) -> str:
        size = size_text(self.nbytes, 2)
        lines = [*self.changes[:10]]
        lines += [f"and {len(self.changes) - 10} more"] if len(self.changes) > 10 else []
        if self.was_finished:
            return "\n".join([*lines, f"{self.directory} is up to date ({size})"])
        shards = counted(self.reused_shards, "finished shard")
        kept = f", {shards} checked and kept" if self.reused_shards else ""
        return "\n".join([*lines, f"{self.directory}: {size} written{kept}"])


def build_cache(
    source: Checkpoint,
    directory: str | Path,
    dtype: str = "float32",
    *,
    check: bool = False,
    overwrite: bool = False,
    advance: Advance = nothing,
) -> CacheResult:
    """Write the cache, or finish an interrupted one, or make what of a finished one is missing.

    `check` reads every byte of a finished one, computes again what the source gives, and writes the
    shards that differ. `advance` is called with the bytes of each piece, in all `cache_bytes`. The
    router's gate and bias stay float32 in a bfloat16 cache. Raises CheckpointError on an unusable
    source, ConversionError when the directory holds something else, was made of another state of
    the source, another run uses it, or the disk is too small (before the first byte).
    """
    _require_dtype(dtype)
    path = Path(directory)
    source.require_usable()
    if os.path.realpath(path) == os.path.realpath(source.directory):
        raise CheckpointError(
            f"{path} is the checkpoint itself; choose another directory for its cache"
        )
    nbytes = cache_bytes(source, dtype)
    recipe = Recipe(
        manifest_name=CACHE_NAME,
        identity=_identity(source, dtype),
        source=source,
        shards=lambda: plan_shards(source, dtype),
        config=lambda: _config(source, dtype),
        manifest=lambda records: {},
        compare=(
            f"run `neuron-minimax cache {source.directory} {path} --dtype {dtype} --check`, which "
            "compares every byte and writes what differs"
        ),
    )
    filled = fill_directory(path, recipe, overwrite=overwrite, check=check, advance=advance)
    return CacheResult(
        directory=path,
        nbytes=nbytes,
        reused_shards=filled.reused_shards,
        changes=filled.changes,
        damaged=filled.damaged,
        was_finished=filled.was_finished,
    )


def cache_bytes(source: Checkpoint, dtype: str = "float32") -> int:
    """Bytes of weights in the cache of this checkpoint."""
    return sum(spec.nbytes for stack in _cached_specs(source, dtype) for spec in stack)


def open_cache(cache_dir: str | Path, source: Checkpoint, dtype: str = "float32") -> Checkpoint:
    """The cache as a checkpoint, its tensors mmapped, if it is whole, of this source and of this
    dtype. Files with another time stamp than recorded are read again.

    Raises CheckpointError saying which of these failed and the command that rebuilds it.
    """
    _require_dtype(dtype)
    path = Path(cache_dir)
    rebuild = f"`neuron-minimax cache {source.directory} {path} --dtype {dtype}"
    try:
        manifest = read_cache_manifest(path)
    except FileNotFoundError:
        found = "is not finished" if path.is_dir() and any(path.iterdir()) else "does not exist"
        raise CheckpointError(f"the cache {path} {found}; run {rebuild}`") from None
    for name, wanted in _identity(source, dtype).items():
        have = getattr(manifest.identity, name)
        if have != wanted:
            what = {
                "source_fingerprint": "was made of another checkpoint",
                "dtype": f"holds {have}",
            }
            reason = what.get(name, f"has {name} {have!r}, not {wanted!r}")
            raise CheckpointError(f"the cache {path} {reason}; run {rebuild} --overwrite`")
    changed = changed_source(manifest, source, stamp(path / CACHE_NAME).modified_ns)
    if changed:
        raise CheckpointError(
            f"the cache {path} was made of other bytes, it seems: {changed}; run {rebuild} "
            "--check`, which compares every byte and writes what differs"
        )
    files = examine(path, manifest)
    files.require_whole(path, f"{rebuild}` again", CheckpointError)
    try_to_renew(path / CACHE_NAME, manifest, files.files)
    cache = Checkpoint(path)
    cache.require_usable()
    return cache


def read_cache_manifest(cache_dir: Path) -> CacheManifest:
    """`cache.json`. Raises FileNotFoundError without one, CheckpointError when it cannot be
    used.
    """
    return read_recorded(
        cache_dir / CACHE_NAME,
        CacheManifest,
        CheckpointError,
        f"run `neuron-minimax cache CKPT {cache_dir} --overwrite`",
    )


def _identity(source: Checkpoint, dtype: str) -> dict[str, Any]:
    return {
        "source_fingerprint": source.fingerprint,
        "dtype": TORCH_DTYPES[DTYPES[dtype]],
        "scale_convention": str(source.convention),
        "format_version": FORMAT_VERSION,
    }


def _config(source: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json of the cache: the source's without its quantization, with the dtype that the
    weights have.
    """
    dropped = ("quantization_config", "torch_dtype", "dtype")
    return {key: value for key, value in source.config.raw.items() if key not in dropped} | {
        "dtype": TORCH_DTYPES[DTYPES[dtype]]
    }


def plan_shards(source: Checkpoint, dtype: str) -> list[StreamedShard]:
    """The cache's files, of at most 5 GB or one stack of experts (one file when all fits).

    What the model stacks lies together, in the order of the stack, so that it can be mapped.
    """
    groups: list[list[StreamedTensor]] = [[]]
    filled = 0
    for stack in _cached_specs(source, dtype):
        tensors = [StreamedTensor(spec, list(_pieces(source, spec))) for spec in stack]
        nbytes = sum(tensor.nbytes for tensor in tensors)
        if groups[-1] and filled + nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1] += tensors
        filled += nbytes
    if len(groups) == 1:
        return [StreamedShard(SINGLE_NAME, tuple(groups[0]))]
    return [
        StreamedShard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _require_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"a cache of dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}",
            usage=True,
        )


def _cached_specs(source: Checkpoint, dtype: str) -> Iterator[list[TensorSpec]]:
    """Yield the tensors that become one of the model's, in its order of them."""
    _require_dtype(dtype)
    config = source.config
    specs = {
        wanted.name: TensorSpec(
            wanted.name, "F32" if wanted.weight.float32_only else DTYPES[dtype], wanted.shape
        )
        for wanted in schema.expected(config)
        if not wanted.is_scale
    }
    for layer in (None, *range(config.num_hidden_layers)):
        for rule in config.family.rules:
            if layer not in config.layers_with(config.family.weight(rule.sources[0])):
                continue
            names = [name for group in source_groups(rule, layer, config) for name in group]
            if names[0] in specs:  # a tied head is not
                yield [specs[name] for name in names]


def _pieces(source: Checkpoint, spec: TensorSpec) -> Iterator[Piece]:
    shape = spec.shape
    block_rows = source.config.weight_block_size[0]
    row_elements = prod(shape[1:])
    step = max(1, PIECE_BYTES // (4 * row_elements * block_rows)) * block_rows
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        nbytes = spec.nbytes // shape[0] * (rows.stop - rows.start)
        yield Piece(nbytes, partial(_fill_rows, source, spec, rows))


def _fill_rows(source: Checkpoint, spec: TensorSpec, rows: slice, memory: np.ndarray) -> int:
    """Fill `memory` with rows of a weight as float32 elements or BF16 bits, and return 0: no codes
    are rounded. Values are checked on the way.
    """
    name = spec.name
    elements = source.rows(name, rows)
    values = memory.view(STORED_DTYPES[spec.dtype]).reshape(elements.shape)
    if source.is_fp8(name):
        _dequantize(source, name, rows, elements, values)
        return 0
    bfloat16.check_finite(name, elements)
    if spec.dtype == "F32":
        values[...] = bfloat16.to_float32(elements)
    else:
        values[...] = (
            elements if elements.dtype == np.uint16 else bfloat16.round_to_bfloat16(elements)
        )
    return 0


def _dequantize(
    source: Checkpoint, name: str, rows: slice, codes: np.ndarray, values: np.ndarray
) -> None:
    """Put code * scale of its block into `values`, one row of blocks at a time so that temporaries
    stay in the processor's cache.
    """
    block_rows, block_columns = source.config.weight_block_size
    fp8.check_codes(name, codes)
    scales = source.multipliers(name, rows)
    largest = f"{schema.scale_name(name)} times 448"
    bfloat16.check_finite(largest, scales * np.float32(fp8.OCP_MAX))
    for start, scale in zip(range(0, len(codes), block_rows), scales, strict=True):
        part = values[start : start + block_rows]
        strip = part if part.dtype == np.float32 else np.empty(part.shape, dtype=np.float32)
        fp8.decode_scaled(
            codes[start : start + block_rows],
            np.repeat(scale, block_columns)[: codes.shape[1]],
            strip,
        )
        if strip is not part:
            part[:] = bfloat16.round_to_bfloat16(strip)
