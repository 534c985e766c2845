"""The key/value cache: per layer one buffer of keys and one of values, written in place.

Shapes: S slots (sequences), C capacity in positions, K key/value heads, D head_dim, B rows of a
batch, T tokens.
"""

from collections.abc import Sequence

import torch

from neuron_minimax.config import ModelConfig


class KVCache:
    """Keys and values [S,K,C,D] per layer; `lengths` [S] says how many positions are filled.

    What lies behind a slot's length is never read, so setting a smaller one shortens the sequence.
    """

    def __init__(
        self, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor], lengths: torch.Tensor
    ) -> None:
        self.keys = list(keys)
        self.values = list(values)
        self.lengths = lengths

    @classmethod
    def allocate(
        cls, config: ModelConfig, slots: int, capacity: int, dtype: torch.dtype
    ) -> "KVCache":
        shape = (slots, config.num_key_value_heads, capacity, config.head_dim)
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

    def reserve(self, positions: int) -> None:
        """Make room for at least `positions` per slot, at least doubling, so that decoding does not
        copy each time.
        """
        if positions <= self.capacity:
            return
        extra = max(positions, 2 * self.capacity) - self.capacity
        self.keys = [torch.nn.functional.pad(keys, (0, 0, 0, extra)) for keys in self.keys]
        self.values = [torch.nn.functional.pad(values, (0, 0, 0, extra)) for values in self.values]

    def write(
        self,
        layer: int,
        rows_B: torch.Tensor,
        positions_BT: torch.Tensor,
        key_BTKD: torch.Tensor,
        value_BTKD: torch.Tensor,
    ) -> None:
        """Store T tokens of slots `rows_B` at their positions, in place."""
        self.keys[layer][rows_B[:, None], :, positions_BT] = key_BTKD
        self.values[layer][rows_B[:, None], :, positions_BT] = value_BTKD

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B,K,filled,D] of slots `rows_B`, or of all slots in order, without a
        copy (None).
        """
        keys = self.keys[layer][:, :, :filled]
        values = self.values[layer][:, :, :filled]
        return (keys, values) if rows_B is None else (keys[rows_B], values[rows_B])
