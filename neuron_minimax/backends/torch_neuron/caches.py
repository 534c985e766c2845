"""Caches of whole graphs: slots, and blocks that a table assigns; their tensors are a graph's own.

Shapes: S slots, C positions of a slot, N blocks, P positions of a block, M blocks of a sequence, B
batch, T tokens, K key/value heads, D head_dim.
"""

from collections.abc import Sequence

import torch


class SlotCache:
    """Keys and values [S,K,C,D] per layer."""

    def __init__(self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        self.keys = keys
        self.values = values

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Store T tokens of slots `rows_B` at their positions, in place."""
        rows_BT = rows_B[:, None].expand_as(positions_BT)
        _store(self.keys[layer], rows_BT, positions_BT, key_BTKD)
        _store(self.values[layer], rows_BT, positions_BT, value_BTKD)

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of slots `rows_B`, or of all without a copy (None)."""
        keys = self.keys[layer][:, :, :filled]
        values = self.values[layer][:, :, :filled]
        return (keys, values) if rows_B is None else (keys[rows_B], values[rows_B])


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
        self.keys = keys
        self.values = values
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
        block_size = self.keys[layer].shape[2]
        blocks_BT = slots_BT // block_size
        offsets_BT = slots_BT % block_size
        _store(self.keys[layer], blocks_BT, offsets_BT, key_BTKD)
        _store(self.values[layer], blocks_BT, offsets_BT, value_BTKD)

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of the batch's sequences, gathered block by block."""
        table_BM = self.block_table_BM if rows_B is None else self.block_table_BM[rows_B]
        keys, values = (
            blocks[layer][table_BM].transpose(1, 2).flatten(2, 3)[:, :, :filled]
            for blocks in (self.keys, self.values)
        )
        return keys, values


def _store(
    stored: torch.Tensor, rows_BT: torch.Tensor, columns_BT: torch.Tensor, new_BTKD: torch.Tensor
) -> None:
    """Write [B,T,K,D] into [rows,K,columns,D]; heads are indexed too, since an index with a gap
    between its dimensions has no StableHLO.
    """
    heads_K = torch.arange(stored.shape[1], device=stored.device)
    stored[rows_BT[..., None], heads_K, columns_BT[..., None]] = new_BTKD
