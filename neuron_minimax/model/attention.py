"""Grouped-query attention with norms over the full query and key width, in the Neuron layout.

Shapes: B batch, T tokens, H hidden, Q query width, N query heads, K key/value heads, D head_dim, C
positions.
"""

import torch
from torch import nn

from neuron_minimax.config import ModelConfig
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.layers import Kernels, Linear, RMSNorm
from neuron_minimax.model.rope import rotate


class QKVProjection(nn.Module):
    """Three projections under the names that NxDI gives them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        block = config.weight_block_size
        self.q_proj = Linear(config.hidden_size, config.query_size, block)
        self.k_proj = Linear(config.hidden_size, config.key_value_size, block)
        self.v_proj = Linear(config.hidden_size, config.key_value_size, block)


class OutputProjection(nn.Module):
    """NxDI nests the output projection in a module of the same name."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.o_proj = Linear(config.query_size, config.hidden_size, config.weight_block_size)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.qkv_proj = QKVProjection(config)
        self.o_proj = OutputProjection(config)
        self.q_norm = RMSNorm(config.query_size, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.key_value_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BTH: torch.Tensor,
        positions_BT: torch.Tensor,
        rope: tuple[torch.Tensor, torch.Tensor],
        cache: KVCache | None,
        rows_B: torch.Tensor | None,
        filled: int,
        kernels: Kernels,
    ) -> torch.Tensor:
        """[B,T,H] to [B,T,H]. With a cache, this call's keys and values are written first, then
        positions below `filled` are read; each query sees the keys at positions up to its own.
        """
        project = self.qkv_proj
        query_BTND = self._heads(self.q_norm(project.q_proj(hidden_BTH, kernels)))
        key_BTKD = self._heads(self.k_norm(project.k_proj(hidden_BTH, kernels)))
        value_BTKD = self._heads(project.v_proj(hidden_BTH, kernels))
        query_BTND = rotate(query_BTND, rope)
        key_BTKD = rotate(key_BTKD, rope)
        if cache is None:
            key_BKCD = key_BTKD.transpose(1, 2)
            value_BKCD = value_BTKD.transpose(1, 2)
        else:
            rows = torch.arange(hidden_BTH.shape[0]) if rows_B is None else rows_B
            cache.write(self.layer, rows, positions_BT, key_BTKD, value_BTKD)
            key_BKCD, value_BKCD = cache.read(self.layer, rows_B, filled)
        attended_BTQ = kernels.attend(query_BTND, key_BKCD, value_BKCD, positions_BT)
        return self.o_proj.o_proj(attended_BTQ, kernels)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(-1, (-1, self.head_dim))
