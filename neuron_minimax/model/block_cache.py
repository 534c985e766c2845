"""What attention asks of a cache in every layer, and the cache of blocks that a table assigns.

Shapes: N blocks, P positions of a block, M blocks of a sequence, B batch, T tokens, K key/value
heads, D head_dim.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class LayerCache(Protocol):
    """The part of `Cache` that a layer sees; the slots of cache.py are the other implementation."""

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


class BlockCache:
    """Keys and values [N,K,P,D] per layer, as vLLM has them; one batch's view of them.

    block_table_BM     the blocks of each sequence, in order; what a sequence does not need is 0
    slot_mapping_BT    the place of each token, block * P + offset; -1 for padding

    Block 0 belongs to no sequence: padding is written there.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        block_table_BM: torch.Tensor,
        slot_mapping_BT: torch.Tensor,
    ) -> None:
        self.keys = list(keys)
        self.values = list(values)
        self.block_table_BM = block_table_BM
        self.slot_mapping_BT = slot_mapping_BT

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Store T tokens at their slots, in place."""
        slots_BT = torch.where(self.slot_mapping_BT < 0, 0, self.slot_mapping_BT)
        positions = self.keys[layer].shape[2]
        blocks_BT = slots_BT // positions
        offsets_BT = slots_BT % positions
        self.keys[layer][blocks_BT, :, offsets_BT] = key_BTKD
        self.values[layer][blocks_BT, :, offsets_BT] = value_BTKD

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of the batch's sequences, gathered block by block."""
        table = self.block_table_BM if rows_B is None else self.block_table_BM[rows_B]
        keys, values = (
            blocks[layer][table].transpose(1, 2).flatten(2, 3)[:, :, :filled]
            for blocks in (self.keys, self.values)
        )
        return keys, values
