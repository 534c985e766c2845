"""The key/value caches: what the decoder asks of one, and the kinds that it knows.

Shapes: S slots (sequences), C capacity in positions, K key/value heads, D head_dim, B rows of a
batch, T tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import torch

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import GenerationError, counted
from neuron_minimax.kernels.reference import as_cached, cached_width

if TYPE_CHECKING:
    from transformers import DynamicCache


class LayerCache(Protocol):
    """What a layer asks of a cache."""

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Store T tokens of sequences `rows_B` at their positions."""
        ...

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of sequences `rows_B`, or of all in order (None)."""
        ...


@runtime_checkable
class Cache(LayerCache, Protocol):
    """What the decoder asks of a cache: once a pass, and in every layer as LayerCache says.

    lengths   [B] int64, how many positions each sequence holds: where its next token stands.
              Setting smaller ones shortens the sequences
    keys      one tensor [S,K,C,D] per layer; none in a cache whose first pass makes them
    """

    lengths: torch.Tensor

    @property
    def keys(self) -> list[torch.Tensor]: ...

    def reserve(self, tokens: int, real_B: torch.Tensor) -> int:
        """Make room for T more tokens, of which the first `real_B` [B] stay in each sequence.

        Returns how many positions attention reads. Raises GenerationError naming the sequence that
        does not fit, before anything is written.
        """
        ...


class KVCache:
    """Keys and values [S,K,C,D] per layer, written in place; it grows when it is full.

    `lengths` [S] says how many positions of each sequence are filled. What lies behind is never
    read, so setting a smaller one shortens the sequence.
    """

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], lengths: torch.Tensor
    ) -> None:
        self.keys = list(keys)
        self.values = list(values)
        self.lengths = lengths

    @classmethod
    def allocate(
        cls, config: ModelConfig, slots: int, capacity: int, dtype: torch.dtype = torch.float32
    ) -> Self:
        """An empty cache; `dtype` is the model's `cache_dtype`, one of KV_CACHE_DTYPES."""
        width = cached_width(config.head_dim, dtype)
        shape = (slots, config.num_key_value_heads, capacity, width)
        layers = range(config.num_hidden_layers)
        lengths = torch.zeros(slots, dtype=torch.int64)
        return cls(
            [torch.zeros(shape, dtype=dtype) for _ in layers],
            [torch.zeros(shape, dtype=dtype) for _ in layers],
            lengths,
        )

    @property
    def slots(self) -> int:
        return self.keys[0].shape[0]

    @property
    def capacity(self) -> int:
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all slots, filled or not."""
        return sum(tensor.nbytes for tensor in self.keys + self.values)

    def reserve(self, tokens: int, real_B: torch.Tensor) -> int:
        """Make room for T more tokens, padding included, at least doubling the capacity, so that
        decoding does not copy each time; return how many positions attention reads.
        """
        filled = int(self.lengths.max()) + tokens
        self._grow(filled)
        return filled

    def _grow(self, positions: int) -> None:
        if positions > self.capacity:
            extra = max(positions, 2 * self.capacity) - self.capacity
            self.keys = [torch.nn.functional.pad(keys, (0, 0, 0, extra)) for keys in self.keys]
            self.values = [torch.nn.functional.pad(each, (0, 0, 0, extra)) for each in self.values]

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Store T tokens of slots `rows_B` at their positions, in place."""
        for stored, new_BTKD in ((self.keys, key_BTKD), (self.values, value_BTKD)):
            rows = as_cached(new_BTKD, stored[layer].dtype)
            stored[layer][rows_B[:, None], :, positions_BT] = rows

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of slots `rows_B`, or of all slots in order, without a
        copy (None).
        """
        keys = self.keys[layer][:, :, :filled]
        values = self.values[layer][:, :, :filled]
        return (keys, values) if rows_B is None else (keys[rows_B], values[rows_B])


class FullCache(KVCache):
    """A KVCache whose memory is all taken when it is made: it refuses what does not fit."""

    def reserve(self, tokens: int, real_B: torch.Tensor) -> int:
        """Raise GenerationError naming a sequence that would be longer than the capacity; return
        how many positions attention reads. Padding needs no room.
        """
        for row, (held, real) in enumerate(
            zip(self.lengths.tolist(), real_B.tolist(), strict=True)
        ):
            if held + real > self.capacity:
                raise GenerationError(
                    f"sequence {row} holds {held} of the {self.capacity} positions of its "
                    f"FullCache, which has no room for {real} more; allocate more, or use a "
                    "KVCache, which grows"
                )
        return min(int(self.lengths.max()) + tokens, self.capacity)

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Store T tokens of slots `rows_B` at their positions, in place; padding behind the last
        position goes nowhere.
        """
        inside_BT = positions_BT < self.capacity
        if bool(inside_BT.all()):
            super().write(layer, rows_B, positions_BT, key_BTKD, value_BTKD)
            return
        rows = rows_B[:, None].expand_as(positions_BT)[inside_BT]
        positions = positions_BT[inside_BT]
        for stored, new_BTKD in ((self.keys, key_BTKD), (self.values, value_BTKD)):
            stored[layer][rows, :, positions] = as_cached(new_BTKD[inside_BT], stored[layer].dtype)


class BatchingCache(KVCache):
    """A KVCache whose sequences join and leave: a batch has a row for each that is there.

    `sequences` are their numbers, in the order of the rows and of joining; `lengths` has an entry
    for each. A number is never given twice. Those that are there lie in the first slots, so that
    they are read without a copy.
    """

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], lengths: torch.Tensor
    ) -> None:
        super().__init__(keys, values, lengths)
        self.sequences: list[int] = []
        self.lengths = lengths[:0]
        self._joined = 0

    def join(self, filled: "Cache | DynamicCache | None" = None, row: int = 0) -> int:
        """Add a sequence as the last row: empty, or a copy of a row of any cache, this one too.

        Returns its number. Raises GenerationError when every slot is taken, when there is no such
        row, or when that cache is of another model.
        """
        slot = len(self.sequences)
        if slot == self.slots:
            raise GenerationError(
                f"all {self.slots} slots of the BatchingCache are taken; let a sequence leave first"
            )
        length = 0
        if filled is not None:
            source = as_cache(filled, 0, _heads_of(self.keys))
            if not 0 <= row < len(source.lengths):
                raise GenerationError(
                    f"row {row} is not in the cache, which holds {len(source.lengths)} sequences"
                )
            length = int(source.lengths[row])
            self._grow(length)
            for layer in range(len(self.keys)):
                keys, values = source.read(layer, torch.tensor([row]), length)
                self.keys[layer][slot, :, :length] = keys[0]
                self.values[layer][slot, :, :length] = values[0]
        self.lengths = torch.cat((self.lengths, torch.tensor([length])))
        self.sequences.append(self._joined)
        self._joined += 1
        return self.sequences[-1]

    def leave(self, sequence: int) -> None:
        """Take a sequence out; the rows behind it move up.

        Raises GenerationError when it is not there.
        """
        if sequence not in self.sequences:
            raise GenerationError(
                f"sequence {sequence} is not in the BatchingCache; there are {self.sequences}"
            )
        row = self.sequences.index(sequence)
        last = len(self.sequences)
        filled = int(self.lengths.max())
        for buffer in self.keys + self.values:
            buffer[row : last - 1, :, :filled] = buffer[row + 1 : last, :, :filled].clone()
        self.lengths = torch.cat((self.lengths[:row], self.lengths[row + 1 :]))
        del self.sequences[row]

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of the sequences that are there, without a copy, or of
        rows `rows_B`.
        """
        keys, values = super().read(layer, rows_B, filled)
        there = len(self.sequences)
        return (keys[:there], values[:there]) if rows_B is None else (keys, values)


class DynamicCacheView:
    """transformers' DynamicCache as a Cache: every layer of the object itself is updated.

    Its sequences have one length, padding included. An empty one is for `sequences` of them.
    Raises GenerationError when it holds anything but whole, equally long layers.
    """

    def __init__(self, cache: "DynamicCache", sequences: int) -> None:
        from transformers.cache_utils import DynamicLayer

        self.cache = cache
        others = {type(layer).__name__ for layer in self._layers if type(layer) is not DynamicLayer}
        if others or cache.offloading:
            found = f"layers of {min(others)}" if others else "layers that are offloaded"
            raise GenerationError(
                f"the {type(cache).__name__} has {found}; only DynamicLayer is supported, which "
                "keeps every position: make it without sliding windows and offloading"
            )
        lengths = {layer.get_seq_length() for layer in self._layers}
        if len(lengths) > 1:
            raise GenerationError(
                f"the layers of the {type(cache).__name__} hold {min(lengths)} to {max(lengths)} "
                "positions, as when a pass was interrupted; make the cache again"
            )
        self.sequences = len(self.keys[0]) if any(lengths) else sequences

    @property
    def _layers(self) -> list[Any]:
        return self.cache.layers

    @property
    def keys(self) -> list[torch.Tensor]:
        """[B,K,C,D] of every layer; none when nothing was written yet."""
        return [layer.keys for layer in self._layers if layer.get_seq_length()]

    @property
    def lengths(self) -> torch.Tensor:
        return torch.full((self.sequences,), self.cache.get_seq_length())

    @lengths.setter
    def lengths(self, lengths_B: torch.Tensor) -> None:
        """Cut what lies behind: all lengths are one, as `reserve` has seen."""
        length = int(lengths_B[0])
        for number, layer in enumerate(self._layers):
            surplus = layer.get_seq_length() - length
            if length == 0:
                self._layers[number] = type(layer)()  # a cut one would fit this batch alone
            elif surplus > 0:
                layer.crop(-surplus)

    def reserve(self, tokens: int, real_B: torch.Tensor) -> int:
        """Return how many positions attention reads. Raises GenerationError when the sequences are
        to have unequal lengths.
        """
        if len(real_B.unique()) > 1:
            raise GenerationError(
                f"lengths are {real_B.tolist()}, but the sequences of a DynamicCache have one "
                "length; use a KVCache, or pad on the left and hide the padding with a mask"
            )
        return self.cache.get_seq_length() + tokens

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Append T tokens to every sequence, which is where their positions are."""
        self.cache.update(key_BTKD.transpose(1, 2), value_BTKD.transpose(1, 2), layer)

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of sequences `rows_B`; of all (None) without a copy."""
        keys = self._layers[layer].keys[:, :, :filled]
        values = self._layers[layer].values[:, :, :filled]
        return (keys, values) if rows_B is None else (keys[rows_B], values[rows_B])


# Key/value heads, elements of one and dtype of each layer.
Heads = list[tuple[int, int, torch.dtype]]


def heads_of(config: ModelConfig, dtype: torch.dtype) -> Heads:
    """What a model whose cache is in `dtype` writes into its layers."""
    head = (config.num_key_value_heads, cached_width(config.head_dim, dtype), dtype)
    return [head] * config.num_hidden_layers


def as_cache(past: Any, sequences: int, expected: Heads) -> Cache:
    """The cache that was given, or a view of transformers' own; `sequences` is for an empty one.

    Raises GenerationError for anything else, and for a cache of another model.
    """
    cache = past if isinstance(past, Cache) else _view(past, sequences, len(expected))
    found = _heads_of(cache.keys)
    if found and found != expected:
        raise GenerationError(
            f"the cache holds {_words(found)}, but {_words(expected)} are expected; use one that "
            "this model has filled, in the dtype of its activations"
        )
    return cache


def _view(past: Any, sequences: int, layers: int) -> DynamicCacheView:
    # Here, because it loads in seconds, and only who has made one needs it.
    from transformers import DynamicCache

    if not isinstance(past, DynamicCache):
        raise GenerationError(
            f"past_key_values is a {type(past).__name__}; expected a KVCache, FullCache or "
            "BatchingCache, or a DynamicCache of transformers"
        )
    made_for = len(past.layers)
    if made_for > layers or (made_for < layers and past.layer_class_to_replicate is None):
        raise GenerationError(
            f"the {type(past).__name__} is made for {counted(made_for, 'layer')}, but the model "
            f"has {layers}; make it for this model"
        )
    return DynamicCacheView(past, sequences)


def _heads_of(keys: Sequence[torch.Tensor]) -> Heads:
    return [(each.shape[1], each.shape[3], each.dtype) for each in keys]


def _words(heads: Heads) -> str:
    count, size, dtype = heads[0]
    layers = counted(len(heads), "layer")
    of = f"{counted(count, 'head')} of {size} in {str(dtype).removeprefix('torch.')}"
    return f"{layers} of {of}"
