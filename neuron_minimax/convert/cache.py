"""A dequantized twin of a checkpoint: a Hugging Face directory in float32 or bfloat16 that loads
without arithmetic.

Written by the same streaming, resuming and disk-checking code as a conversion. Its `cache.json`
holds the fingerprint of its source, so that a cache of something else is never used by mistake.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import STORED_DTYPES, TensorSpec, size_text
from neuron_minimax.checkpoint.output import OutputDirectory, reopen
from neuron_minimax.checkpoint.reader import SINGLE_NAME, Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.records import damaged_tensors, read_records
from neuron_minimax.checkpoint.writer import Piece, StreamedShard, StreamedTensor, copy_companions
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import bfloat16
from neuron_minimax.inspection.document import Rendered

CACHE_NAME = "cache.json"
FORMAT_VERSION = 1
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 8 << 20  # of output; a piece is whole rows of blocks


@dataclass(frozen=True, kw_only=True)
class CacheResult(Rendered):
    """The outcome of a build: bytes in the cache, shards kept, tensors found damaged, and whether
    all was there already.
    """

    directory: Path
    nbytes: int
    reused_shards: int = 0
    damaged: tuple[str, ...] = ()
    was_finished: bool = False

    def render(self) -> str:
        size = size_text(self.nbytes, 3, "GB")
        if self.was_finished:
            return f"{self.directory} is up to date ({size})"
        lines = [f"{name} did not match its digest" for name in self.damaged[:10]]
        lines += [f"and {len(self.damaged) - 10} more"] if len(self.damaged) > 10 else []
        kept = (
            f", {self.reused_shards} finished shards checked and kept" if self.reused_shards else ""
        )
        return "\n".join([*lines, f"{self.directory}: {size} written{kept}"])


def build_cache(
    source: Checkpoint,
    directory: str | Path,
    dtype: str = "float32",
    *,
    check: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> CacheResult:
    """Write the cache, or finish an interrupted one; `check` re-reads a finished one and rebuilds
    what is damaged.

    `progress` is called with the bytes of each piece, in all `cache_bytes`. The router's gate and
    bias stay float32 in a bfloat16 cache. Raises CheckpointError on an unusable source,
    ConversionError when the directory holds something else, another run writes it, or the disk is
    too small (before the first byte).
    """
    path = Path(directory)
    source.require_usable()
    identity = _identity(source, dtype)
    shards = plan_shards(source, dtype)
    nbytes = sum(shard.nbytes for shard in shards)
    damaged: list[str] = []
    if path.resolve() == source.directory.resolve():
        raise CheckpointError(
            f"{path} is the checkpoint itself; choose another directory for its cache"
        )
    with OutputDirectory(path, CACHE_NAME, identity, overwrite) as output:
        if output.finished and check:
            records = read_records(read_cache_manifest(path)["tensors"])
            stored = TensorDirectory(path, sorted({record.shard for record in records.values()}))
            damaged = damaged_tensors(stored, records)
            if damaged:
                reopen(output, records)
        if output.finished:
            progress(nbytes)
            return CacheResult(directory=path, nbytes=nbytes, was_finished=True)
        records = output.write_shards(shards, source, progress)
        copy_companions(source.directory, path)
        output.finish(_config(source, dtype), records, {})
    return CacheResult(
        directory=path,
        nbytes=nbytes,
        reused_shards=output.reused_shards,
        damaged=tuple(damaged),
    )


def cache_bytes(source: Checkpoint, dtype: str = "float32") -> int:
    """Bytes of weights in the cache of this checkpoint."""
    return sum(spec.nbytes for spec in _cached_specs(source, dtype))


def open_cache(cache_dir: str | Path, source: Checkpoint, dtype: str = "float32") -> Checkpoint:
    """The cache as a checkpoint, its tensors mmapped, if it is whole, of this source and of this
    dtype.

    Raises CheckpointError saying which of these failed and the command that rebuilds it.
    """
    path = Path(cache_dir)
    rebuild = f"`neuron-minimax cache {source.directory} {path} --dtype {dtype}"
    if not (path / CACHE_NAME).exists():
        found = "is not finished" if path.is_dir() and any(path.iterdir()) else "does not exist"
        raise CheckpointError(f"the cache {path} {found}; run {rebuild}`")
    identity = read_cache_manifest(path)["identity"]
    for name, wanted in _identity(source, dtype).items():
        if identity.get(name) != wanted:
            what = {
                "source_fingerprint": "was made of another checkpoint",
                "dtype": f"holds {identity.get('dtype')}",
            }
            reason = what.get(name, f"has {name} {identity.get(name)!r}, not {wanted!r}")
            raise CheckpointError(f"the cache {path} {reason}; run {rebuild} --overwrite`")
    cache = Checkpoint(path)
    cache.require_usable()
    return cache


def read_cache_manifest(cache_dir: Path) -> dict[str, Any]:
    """`cache.json`. Raises CheckpointError when it cannot be read."""
    path = cache_dir / CACHE_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"identity": manifest["identity"], "tensors": manifest["tensors"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}); run `neuron-minimax cache CKPT {cache_dir} "
            "--overwrite`"
        ) from None


def _identity(source: Checkpoint, dtype: str) -> dict[str, Any]:
    return {
        "source_fingerprint": source.fingerprint,
        "dtype": dtype,
        "scale_convention": str(source.convention),
        "format_version": FORMAT_VERSION,
    }


def _config(source: Checkpoint, dtype: str) -> dict[str, Any]:
    """config.json of the cache: the source's without its quantization, with the dtype that the
    weights have.
    """
    dropped = ("quantization_config", "torch_dtype", "dtype")
    return {key: value for key, value in source.config.raw.items() if key not in dropped} | {
        "dtype": dtype
    }


def plan_shards(source: Checkpoint, dtype: str) -> list[StreamedShard]:
    """The cache's files, at most 5 GB each (one file when all fits), tensors in the order of the
    table.
    """
    groups: list[list[StreamedTensor]] = [[]]
    filled = 0
    for spec in _cached_specs(source, dtype):
        tensor = StreamedTensor(spec, list(_pieces(source, spec)))
        if groups[-1] and filled + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return [StreamedShard(SINGLE_NAME, tuple(groups[0]))]
    return [
        StreamedShard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, start=1)
    ]


def _cached_specs(source: Checkpoint, dtype: str) -> Iterator[TensorSpec]:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"a cache of dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}"
        )
    for wanted in schema.expected(source.config):
        if not wanted.is_scale:
            stored = "F32" if wanted.weight.float32_only else DTYPES[dtype]
            yield TensorSpec(wanted.name, stored, wanted.shape)


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
    elements = source.array(name)[rows]
    values = memory.view(STORED_DTYPES[spec.dtype]).reshape(elements.shape)
    if source.is_fp8(name):
        _dequantize(source, name, rows, values)
        return 0
    bfloat16.check_finite(name, elements)
    if spec.dtype == "F32":
        values[...] = bfloat16.to_float32(elements)
    else:
        values[...] = (
            elements if elements.dtype == np.uint16 else bfloat16.round_to_bfloat16(elements)
        )
    return 0


def _dequantize(source: Checkpoint, name: str, rows: slice, values: np.ndarray) -> None:
    """Put code * scale of its block into `values`, one row of blocks at a time so that temporaries
    stay in the processor's cache.
    """
    block_rows, block_columns = source.config.weight_block_size
    codes = source.array(name)[rows]
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
