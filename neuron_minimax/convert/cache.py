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
from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.checkpoint.output import OutputDirectory, reopen
from neuron_minimax.checkpoint.reader import SINGLE_NAME, Checkpoint
from neuron_minimax.checkpoint.records import damaged_tensors, read_records
from neuron_minimax.checkpoint.writer import Piece, StreamedShard, StreamedTensor, copy_companions
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import ScaleConvention, bfloat16, ceil_div

MANIFEST_NAME = "cache.json"
FORMAT_VERSION = 1
DTYPES = {"float32": "F32", "bfloat16": "BF16"}
SHARD_BYTES = 5 * 10**9
PIECE_BYTES = 8 << 20  # of output; a piece is whole rows of blocks


@dataclass(frozen=True, kw_only=True)
class CacheResult:
    """What a build did: bytes in the cache, shards kept, tensors found damaged, and whether all was
    there already.
    """

    nbytes: int
    reused_shards: int = 0
    damaged: tuple[str, ...] = ()
    was_finished: bool = False

    def render(self, directory: Path) -> str:
        if self.was_finished:
            return f"{directory} is up to date ({self.nbytes / 1e9:.3f} GB)"
        lines = [f"{name} did not match its digest" for name in self.damaged[:10]]
        lines += [f"and {len(self.damaged) - 10} more"] if len(self.damaged) > 10 else []
        kept = (
            f", {self.reused_shards} finished shards checked and kept" if self.reused_shards else ""
        )
        return "\n".join([*lines, f"{directory}: {self.nbytes / 1e9:.3f} GB written{kept}"])


def build_cache(
    source_dir: str | Path,
    cache_dir: str | Path,
    dtype: str = "float32",
    *,
    check: bool = False,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> CacheResult:
    """Write the cache, or finish an interrupted one; `check` re-reads a finished one and rebuilds
    what is damaged.

    `progress` is called with the bytes of each piece. The router's gate and bias stay float32 in a
    bfloat16 cache. Raises CheckpointError on an unusable source, ConversionError when the directory
    holds something else, another run writes it, or the disk is too small (before the first byte).
    """
    source = Checkpoint(source_dir)
    path = Path(cache_dir)
    source.require_usable()
    identity = _identity(source, dtype)
    shards = plan_shards(source, dtype, ScaleConvention(identity["scale_convention"]))
    nbytes = sum(shard.nbytes for shard in shards)
    damaged: list[str] = []
    if path.resolve() == source.directory.resolve():
        raise CheckpointError(
            f"{path} is the checkpoint itself; choose another directory for its cache"
        )
    with OutputDirectory(path, MANIFEST_NAME, identity, overwrite) as output:
        if output.finished and check:
            records = read_records(read_cache_manifest(path)["tensors"])
            damaged = damaged_tensors(path, records)
            if damaged:
                reopen(output, records)
        if output.finished:
            return CacheResult(nbytes=nbytes, was_finished=True)
        records = output.write_shards(shards, source, progress)
        copy_companions(source.directory, path)
        output.finish(_config(source, dtype), records, {})
    return CacheResult(nbytes=nbytes, reused_shards=output.reused_shards, damaged=tuple(damaged))


def cache_bytes(source_dir: str | Path, dtype: str = "float32") -> int:
    """Bytes of weights in the cache of this checkpoint."""
    config = Checkpoint(source_dir).config
    return sum(
        weight.elements * STORED_DTYPES[_stored_dtype(weight, dtype)].itemsize
        for weight in schema.expected(config)
        if not weight.is_scale
    )


def open_cache(cache_dir: str | Path, source: Checkpoint, dtype: str = "float32") -> Checkpoint:
    """The cache as a checkpoint, its tensors mmapped, if it is whole, of this source and of this
    dtype.

    Raises CheckpointError saying which of these failed and the command that rebuilds it.
    """
    path = Path(cache_dir)
    rebuild = f"`neuron-minimax cache {source.directory} {path} --dtype {dtype}"
    if not (path / MANIFEST_NAME).exists():
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
    path = cache_dir / MANIFEST_NAME
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        return {"identity": manifest["identity"], "tensors": manifest["tensors"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error!r}); run `neuron-minimax cache CKPT {cache_dir} "
            "--overwrite`"
        ) from None


def _identity(source: Checkpoint, dtype: str) -> dict[str, Any]:
    convention, evidence = source.scale_convention()
    has_fp8 = any(source.is_fp8(name) for name in source.entries)
    if convention is None and has_fp8:
        raise CheckpointError(
            f"{source.directory}: what weight_scale_inv means is unclear: {evidence.render()}; "
            "look at these tensors"
        )
    return {
        "source_fingerprint": source.fingerprint,
        "dtype": dtype,
        "scale_convention": str(convention or ScaleConvention.MULTIPLIER),
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


def plan_shards(source: Checkpoint, dtype: str, convention: ScaleConvention) -> list[StreamedShard]:
    """The cache's files, at most 5 GB each (one file when all fits), tensors in the order of the
    table.
    """
    groups: list[list[StreamedTensor]] = [[]]
    filled = 0
    for wanted in schema.expected(source.config):
        if wanted.is_scale:
            continue
        stored = _stored_dtype(wanted, dtype)
        tensor = StreamedTensor(
            wanted.name,
            stored,
            wanted.shape,
            list(_pieces(source, wanted.name, stored, convention)),
        )
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


def _stored_dtype(weight: schema.Expected, dtype: str) -> str:
    if dtype not in DTYPES:
        raise CheckpointError(
            f"a cache of dtype {dtype!r} is not supported; expected one of {', '.join(DTYPES)}"
        )
    return "F32" if weight.weight.float32_only else DTYPES[dtype]


def _pieces(
    source: Checkpoint, name: str, stored: str, convention: ScaleConvention
) -> Iterator[Piece]:
    shape = source.entry(name).shape
    block_rows = source.config.weight_block_size[0]
    row_elements = prod(shape[1:])
    step = max(1, PIECE_BYTES // (4 * row_elements * block_rows)) * block_rows
    for start in range(0, shape[0], step):
        rows = slice(start, min(start + step, shape[0]))
        nbytes = (rows.stop - rows.start) * row_elements * STORED_DTYPES[stored].itemsize
        yield Piece(nbytes, partial(_fill_rows, source, name, rows, stored, convention))


def _fill_rows(
    source: Checkpoint,
    name: str,
    rows: slice,
    stored: str,
    convention: ScaleConvention,
    memory: np.ndarray,
) -> int:
    """Some rows of a weight as float32 elements or BF16 bits; values are checked on the way. No
    codes are rounded.
    """
    elements = source.array(name)[rows]
    values = memory.view(STORED_DTYPES[stored]).reshape(elements.shape)
    if source.is_fp8(name):
        _dequantize(source, name, elements, rows.start, convention, values)
        return 0
    bfloat16.check_finite(name, elements)
    if stored == "F32":
        values[...] = bfloat16.to_float32(elements)
    else:
        values[...] = (
            elements if elements.dtype == np.uint16 else bfloat16.round_to_bfloat16(elements)
        )
    return 0


def _dequantize(
    source: Checkpoint,
    name: str,
    codes: np.ndarray,
    first_row: int,
    convention: ScaleConvention,
    values: np.ndarray,
) -> None:
    """values = code * scale of its block, one row of blocks at a time so that temporaries stay in
    the processor's cache.
    """
    block_rows, block_columns = source.config.weight_block_size
    scale_name = schema.scale_name(name)
    scales = source.array(scale_name)[first_row // block_rows :][: ceil_div(len(codes), block_rows)]
    fp8.check_codes(name, codes)
    fp8.check_scales(scale_name, scales)
    if convention is ScaleConvention.RECIPROCAL:
        scales = np.float32(1) / scales
    bfloat16.check_finite(f"{scale_name} times 448", scales * np.float32(fp8.OCP_MAX))
    for start, scale in zip(range(0, len(codes), block_rows), scales, strict=True):
        part = values[start : start + block_rows]
        strip = part if part.dtype == np.float32 else np.empty(part.shape, dtype=np.float32)
        _decode_scaled(
            codes[start : start + block_rows],
            np.repeat(scale, block_columns)[: codes.shape[1]],
            strip,
        )
        if strip is not part:
            part[:] = bfloat16.round_to_bfloat16(strip)


def _decode_scaled(codes: np.ndarray, scale: np.ndarray, out: np.ndarray) -> None:
    """out = code * scale in float32, rounded once, without a table: as the top bits of a float32 (8
    exponent bits, bias 127) the bits of an E4M3 code (4, bias 7) mean its value times 2^-120,
    subnormal codes included.
    """
    bits = out.view(np.int32)
    np.copyto(bits, codes.view(np.int8))
    bits <<= 20
    bits &= np.int32(0x87F00000 - 2**32)
    if scale.max(initial=0) < 2.0**7:
        out *= scale * np.float32(2.0**120)
    else:  # that factor would overflow
        out *= np.float32(2.0**120)
        out *= scale
