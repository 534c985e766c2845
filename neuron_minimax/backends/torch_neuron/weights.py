"""One rank's part of a converted directory: where it lies, and a reader of its slices alone.

A dimension of a converted tensor is divided by its letter in the family's table of weights; its
block scales follow. What a rank holds of a dimension are runs of source elements, and zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import torch

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import STORED_DTYPES, TORCH_DTYPES, TensorEntry
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError, counted
from neuron_minimax.families.family import Rule, Weight, target_scale_name
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.layers import Linear
from neuron_minimax.model.parallel import Shard
from neuron_minimax.planner.sharding import head_layout

# First source element, or None for zeros, and how many.
Run = tuple[int | None, int]
READ_DTYPES = ("F8_E4M3", "BF16", "F32")


def shard_of(
    config: ModelConfig, rank: int, tp_degree: int, moe_ep_degree: int = 1, group: str = ""
) -> Shard:
    """A rank's share, its heads as the planner places them; experts go to consecutive ranks.

    Raises ConfigError when the group cannot hold the model.
    """
    if tp_degree == 1:
        return Shard(config=config, rank=rank, moe_ep_degree=moe_ep_degree)
    layout = head_layout(config.num_attention_heads, config.num_key_value_heads, tp_degree)
    return Shard(
        config=config,
        rank=rank,
        tp_degree=tp_degree,
        moe_ep_degree=moe_ep_degree,
        group=group,
        query_slots=layout.query_slots_of(rank),
        key_value_slots=layout.key_value_slots_of(rank),
        key_value_copies=layout.key_value_copies,
    )


@dataclass(frozen=True, kw_only=True)
class LoadedRank:
    """A rank's model over its weights, in memory of its own; FP8 codes are uint8."""

    model: Decoder
    bytes_read: int  # of tensors' data


def load_rank(
    directory: str | Path, shard: Shard, compute: torch.dtype = torch.float32
) -> LoadedRank:
    """Read a rank's slices of every tensor of a converted directory.

    Raises CheckpointError when a tensor is missing, belongs to no rule, or has another shape or
    dtype than the rule implies: nothing is left out, and nothing cast.
    """
    tensors = TensorDirectory(directory)
    tensors.require_usable()
    model = Decoder(shard.config, compute=compute, shard=shard)
    reader = SliceReader(tensors)
    state: dict[str, torch.Tensor] = {}
    for rule, layer in _targets(shard.config):
        weight = shard.config.family.weight(rule.sources[0])
        name = rule.target.format(l=layer)
        if name not in tensors.entries and schema.is_tied(weight, shard.config):
            continue
        entry = tensors.entry(name)
        _require_stored(entry, rule, weight, shard.config)
        runs = [merged(each) for each in _dimension_runs(rule, weight, shard)]
        state[name] = reader.read(entry, runs)
        scale = target_scale_name(name)
        if entry.dtype == "F8_E4M3" and scale in tensors.entries:
            state[scale] = _read_scale(reader, tensors.entry(scale), rule, weight, model)
    unused = tensors.entries.keys() - reader.names
    if unused:
        raise CheckpointError(
            f"{tensors.directory} holds {counted(len(unused), 'tensor')} that no rank reads, such "
            f"as {min(unused)}; expected the converted tensors of its config.json"
        )
    model.assign(state)
    return LoadedRank(model=model, bytes_read=reader.bytes_read)


class SliceReader:
    """Reads runs of tensors, no byte more, and counts what it read."""

    def __init__(self, tensors: TensorDirectory) -> None:
        self.tensors = tensors
        self.bytes_read = 0
        self.names: set[str] = set()

    def read(self, entry: TensorEntry, runs: Sequence[Sequence[Run]]) -> torch.Tensor:
        """The runs of each dimension, in memory of their own; FP8 codes as uint8.

        Raises CheckpointError when the file cannot be read, or ends before.
        """
        shape = tuple(sum(count for _, count in each) for each in runs)
        found = np.zeros(shape, STORED_DTYPES[entry.dtype])
        parts = _contiguous(found, entry, runs)
        self.tensors.fill(entry.name, parts)
        self.bytes_read += sum(part.nbytes for part, _ in parts)
        self.names.add(entry.name)
        dtype = "uint8" if entry.dtype == "F8_E4M3" else TORCH_DTYPES[entry.dtype]
        return torch.from_numpy(found).view(getattr(torch, dtype))


def _contiguous(
    found: np.ndarray, entry: TensorEntry, runs: Sequence[Sequence[Run]]
) -> list[tuple[np.ndarray, int]]:
    """The parts of `found` that lie in a row both there and in the file, with the offsets of their
    bytes within the tensor.
    """
    divided = [at for at, each in enumerate(runs) if list(each) != [(0, entry.shape[at])]]
    last = divided[-1] if divided else 0
    row_bytes = found.itemsize * prod(entry.shape[last + 1 :])
    strides = [row_bytes * prod(entry.shape[at + 1 : last + 1]) for at in range(last + 1)]
    outer = [list(enumerate(_indices(each))) for each in runs[:last]]
    parts = []
    for places in product(*outer):
        if any(source is None for _, source in places):
            continue
        offset = sum(
            (source or 0) * stride for (_, source), stride in zip(places, strides, strict=False)
        )
        row = found[tuple(place for place, _ in places)]
        filled = 0
        for start, count in runs[last]:
            part = row[filled : filled + count]
            filled += count
            if start is not None and part.size:
                parts.append((part, offset + start * strides[last]))
    return parts


def _indices(runs: Sequence[Run]) -> list[int | None]:
    """The source element of each local one; None for zeros."""
    return [
        None if start is None else start + step for start, count in runs for step in range(count)
    ]


def merged(runs: Sequence[Run]) -> list[Run]:
    """The same with neighbours in the source as one run, and without empty ones."""
    joined: list[Run] = []
    for start, count in runs:
        if count and joined:
            before, length = joined[-1]
            if start is None is before or (
                before is not None and start is not None and before + length == start
            ):
                joined[-1] = (before, length + count)
                continue
        if count:
            joined.append((start, count))
    return joined


def _targets(config: ModelConfig) -> list[tuple[Rule, int | None]]:
    """Every converted tensor but the scales, by its rule and layer."""
    return [
        (rule, layer)
        for rule in config.family.rules
        for layer in config.layers_with(config.family.weight(rule.sources[0]))
    ]


def _require_stored(entry: TensorEntry, rule: Rule, weight: Weight, config: ModelConfig) -> None:
    """Raise CheckpointError when a tensor is not as its rule stores it."""
    sizes = schema.dimension_sizes(config)
    shape = [sizes[letter] for letter in _letters(rule, weight)]
    shape[-1] *= len(rule.sources)
    dtypes = ("F32",) if weight.float32_only else READ_DTYPES
    if list(entry.shape) != shape or entry.dtype not in dtypes:
        raise CheckpointError(
            f"{entry.name} is {entry.spec.form}; expected {shape} in {' or '.join(dtypes)}: "
            "convert the checkpoint again"
        )


def _letters(rule: Rule, weight: Weight) -> tuple[str, ...]:
    """Letters of a converted tensor's dimensions; stacked experts are transposed."""
    return ("E", *weight.dimensions[::-1]) if rule.per_expert else weight.dimensions


def _dimension_runs(rule: Rule, weight: Weight, shard: Shard) -> list[list[Run]]:
    """What a rank holds of each dimension; the last has one part per source, side by side."""
    letters = _letters(rule, weight)
    runs = [_runs(letter, weight, shard) for letter in letters]
    size = schema.dimension_sizes(shard.config)[letters[-1]]
    runs[-1] = [
        (None if start is None else start + part * size, count)
        for part in range(len(rule.sources))
        for start, count in runs[-1]
    ]
    return runs


def _runs(letter: str, weight: Weight, shard: Shard) -> list[Run]:
    """What a rank holds of a dimension of one weight."""
    size = schema.dimension_sizes(shard.config)[letter]
    slots = {"Q": shard.query_slots, "K": shard.key_value_slots}.get(letter)
    if slots:
        head_dim = shard.config.head_dim
        return [(None if slot is None else slot * head_dim, head_dim) for slot in slots]
    if letter == "V":
        share = shard.vocab_size
        first = min(shard.rank * share, size)
        count = min(share, size - first)
        return [(first, count), (None, share - count)]
    if letter == "E" and weight.per_expert:
        held = len(shard.experts)
        return [(shard.experts.start, held), (None, shard.held_experts - held)]
    ranks = {"I": shard.mlp_ranks, "F": shard.tp_degree, "S": shard.tp_degree}.get(letter, 1)
    share = size // ranks
    return [(shard.rank % ranks * share, share)]


def _read_scale(
    reader: SliceReader, entry: TensorEntry, rule: Rule, weight: Weight, model: Decoder
) -> torch.Tensor:
    """A rank's block scales: of the blocks that it holds, repeated where its own are smaller."""
    config = model.config
    shard = model.shard
    published = config.weight_block_size
    if rule.per_expert:
        published = published[::-1]
        blocks = shard.expert_block
    else:
        module = model.get_submodule(entry.name.removesuffix(".scale"))
        assert isinstance(module, Linear)
        blocks = module.block
    sizes = schema.dimension_sizes(config)
    letters = _letters(rule, weight)
    grid = [ceil_div(sizes[letters[at]], published[at]) for at in (-2, -1)]
    grid[-1] *= len(rule.sources)
    if list(entry.shape[-2:]) != grid or entry.dtype != "F32":
        raise CheckpointError(
            f"{entry.name} is {entry.spec.form}; expected scales {grid} in F32: convert the "
            "checkpoint again"
        )
    runs: list[Sequence[Run]] = [_runs(letter, weight, shard) for letter in letters[:-2]]
    picks = []
    for at in (-2, -1):
        elements = _indices(_runs(letters[at], weight, shard))[:: blocks[at]]
        parts = len(rule.sources) if at == -1 else 1
        per_part = grid[at] // parts
        sources = [
            None if element is None else element // published[at] + part * per_part
            for part in range(parts)
            for element in elements
        ]
        held = sorted({source for source in sources if source is not None})
        runs.append(merged([(source, 1) for source in held]))
        picks.append([None if source is None else held.index(source) for source in sources])
    scale = reader.read(entry, runs)
    for dimension, pick in zip((-2, -1), picks, strict=True):
        zeros = torch.tensor([place is None for place in pick])
        index = torch.tensor([place or 0 for place in pick])
        shape = [-1, 1] if dimension == -2 else [-1]
        scale = scale.index_select(dimension, index).masked_fill(zeros.view(shape), 0)
    return scale
