"""The graphs of one rank: whole, with static shapes, the cache written in place.

Shapes: S slots, T tokens of a bucket, B sequences, M blocks of a sequence, V vocabulary, H hidden.
"""

from collections.abc import Sequence

import torch
from torch import nn

from neuron_minimax.backends.torch_neuron.caches import BlockCache, SlotCache
from neuron_minimax.backends.torch_neuron.kernels import decoded_codes, static_kernels
from neuron_minimax.model.cache import KVCache, LayerCache
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.layers import Step
from neuron_minimax.model.rope import frequencies


class RankGraph(nn.Module):
    """A rank's model, and as buffers what a graph needs beside it: the cache of every layer, the
    angles of RoPE, the values of FP8 codes. A cache that others allocate is bound later.
    """

    code_values: torch.Tensor
    rope_frequencies: torch.Tensor

    def __init__(self, model: Decoder, cache: KVCache | None = None) -> None:
        super().__init__()
        self.model = model
        if cache is not None:
            self.bind(cache.keys, cache.values)
        per_pair, self.rope_magnitude = frequencies(model.config)
        device = model.embed_tokens.weight.device
        self.register_buffer("rope_frequencies", per_pair.to(device))
        self.register_buffer("code_values", decoded_codes().to(device))

    def bind(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        """Take the keys and values of every layer, without a copy."""
        for layer, pair in enumerate(zip(keys, values, strict=True)):
            self.register_buffer(f"keys_{layer}", pair[0])
            self.register_buffer(f"values_{layer}", pair[1])

    def cached(self, kind: str) -> list[torch.Tensor]:
        """The "keys" or "values" of every layer."""
        layers = self.model.config.num_hidden_layers
        return [self.get_buffer(f"{kind}_{layer}") for layer in range(layers)]

    def hidden_states(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        real_BT: torch.Tensor | None,
        cache: LayerCache,
        filled: int,
        rows_B: torch.Tensor | None = None,
        *,
        rank: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[B,T,H] after the last norm; the other arguments are those of `Step`."""
        step = Step(
            positions_BT=positions_BT,
            rope=self._rope(positions_BT),
            cache=cache,
            rows_B=rows_B,
            filled=filled,
            real_BT=real_BT,
            rank=rank,
            kernels=static_kernels(self.code_values),
        )
        return self.model.through_layers(ids_BT, step)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[...,V] float32, on every rank."""
        return self.model.logits(hidden, static_kernels(self.code_values)).float()

    def _rope(self, positions_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What model/rope.py computes, of frequencies that are on the device."""
        angles = (positions_BT[..., None].float() * self.rope_frequencies).repeat(1, 1, 2)
        cosine = angles.cos() * self.rope_magnitude
        sine = angles.sin() * self.rope_magnitude
        dtype = self.model.compute
        return cosine[:, :, None].to(dtype), sine[:, :, None].to(dtype)


class SlotGraph(RankGraph):
    """A graph over slots, whose last cache position takes what padding writes."""

    @property
    def seq_len(self) -> int:
        return self.get_buffer("keys_0").shape[2] - 1

    def slots(self) -> SlotCache:
        return SlotCache(self.cached("keys"), self.cached("values"))


class TokenGeneration(SlotGraph):
    """One token for every slot."""

    def forward(
        self, tokens_S: torch.Tensor, positions_S: torch.Tensor, active_S: torch.Tensor
    ) -> torch.Tensor:
        """Logits [S,V] float32; slots that are not active write to the spare position and reach no
        expert.
        """
        positions_S1 = torch.where(active_S, positions_S, self.seq_len)[:, None]
        hidden_S1H = self.hidden_states(
            tokens_S[:, None], positions_S1, active_S[:, None], self.slots(), self.seq_len
        )
        return self.logits(hidden_S1H[:, 0])


class ContextEncoding(SlotGraph):
    """Up to T tokens of one slot."""

    def forward(
        self,
        ids_T: torch.Tensor,
        slot_1: torch.Tensor,
        start_1: torch.Tensor,
        count_1: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [V] float32 of token count - 1, and the final hidden states [T,H]; tokens from
        `count` are padding.
        """
        offset_T = torch.arange(ids_T.shape[0], device=ids_T.device)
        real_T = offset_T < count_1
        positions_T = torch.where(real_T, start_1 + offset_T, self.seq_len)
        hidden_1TH = self.hidden_states(
            ids_T[None], positions_T[None], real_T[None], self.slots(), self.seq_len, slot_1
        )
        last_1H = hidden_1TH[0].index_select(0, count_1 - 1)
        return self.logits(last_1H)[0], hidden_1TH[0]


class Logits(SlotGraph):
    """The head alone, for positions of a prompt that are asked for."""

    def forward(self, hidden_RH: torch.Tensor) -> torch.Tensor:
        """Logits [R,V] float32 of final hidden states."""
        return self.logits(hidden_RH)


class CopySlot(SlotGraph):
    """One slot's keys and values at some positions, in all layers, copied to another slot."""

    def forward(
        self,
        source_1: torch.Tensor,
        target_1: torch.Tensor,
        start_1: torch.Tensor,
        end_1: torch.Tensor,
    ) -> torch.Tensor:
        """Copy positions start to end - 1; returns their number [1]."""
        places_C = torch.arange(self.seq_len + 1, device=start_1.device)
        copied_C1 = ((places_C >= start_1) & (places_C < end_1))[:, None]
        for stored in (*self.cached("keys"), *self.cached("values")):
            both = torch.where(copied_C1, stored[source_1], stored[target_1])
            stored[target_1] = both
        return end_1 - start_1


class BlockStep(RankGraph):
    """T tokens of each of B sequences over a cache of blocks; B and T are those of the inputs."""

    def forward(
        self,
        ids_BT: torch.Tensor,
        positions_BT: torch.Tensor,
        block_table_BM: torch.Tensor,
        slot_mapping_BT: torch.Tensor,
        last_B: torch.Tensor,
    ) -> torch.Tensor:
        """Logits [B,V] float32 of each sequence's token `last`; a slot of -1 is padding."""
        keys = self.cached("keys")
        cache = BlockCache(keys, self.cached("values"), block_table_BM, slot_mapping_BT)
        filled = block_table_BM.shape[1] * keys[0].shape[2]
        real_BT = slot_mapping_BT >= 0
        hidden_BTH = self.hidden_states(ids_BT, positions_BT, real_BT, cache, filled)
        rows_B = torch.arange(ids_BT.shape[0], device=ids_BT.device)
        return self.logits(hidden_BTH[rows_B, last_B])


def slot_cache(model: Decoder, slots: int, seq_len: int) -> KVCache:
    """An empty cache of a rank's heads for SlotGraph, on the model's device."""
    with torch.device(model.embed_tokens.weight.device):
        return KVCache.allocate(model.shard.own_heads, slots, seq_len + 1, model.compute)


def block_cache(model: Decoder, blocks: int, block_size: int) -> KVCache:
    """The same for BlockStep: blocks are its rows, and their positions its columns."""
    return KVCache.allocate(model.shard.own_heads, blocks, block_size, model.compute)


def graphs_of(
    model: Decoder, slots: int, seq_len: int, buckets: Sequence[int]
) -> list[tuple[str, SlotGraph, tuple[torch.Tensor, ...]]]:
    """(name, module, example inputs) of token generation and of context encoding per bucket, over
    one cache.
    """
    cache = slot_cache(model, slots, seq_len)
    everything = torch.ones(slots, dtype=torch.bool)
    step = (torch.zeros(slots, dtype=torch.int64), torch.arange(slots), everything)
    graphs: list[tuple[str, SlotGraph, tuple[torch.Tensor, ...]]] = [
        ("token_generation", TokenGeneration(model, cache), step)
    ]
    encoding = ContextEncoding(model, cache)
    for bucket in buckets:
        # A tensor given twice would be one input of the graph, and its next call another graph.
        ids = torch.zeros(bucket, dtype=torch.int64)
        inputs = (ids, torch.tensor([0]), torch.tensor([0]), torch.tensor([bucket]))
        graphs.append((f"context_encoding_{bucket}", encoding, inputs))
    return graphs
