"""Grouped-query attention in the Neuron layout, with the query and key norms that a family has.

Shapes: B batch, T tokens, H hidden, Q width of a projection, N query heads, K key/value heads, D
head_dim, C positions.
"""

import torch
from torch import nn

from neuron_minimax.families.family import QKNorm
from neuron_minimax.model.layers import Linear, RMSNorm, Step
from neuron_minimax.model.parallel import Shard
from neuron_minimax.model.rope import rotate


class QKVProjection(nn.Module):
    """Three projections under the names that NxDI gives them."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        config = shard.config
        hidden = config.hidden_size
        block = shard.block(rows=config.head_dim)
        biased = config.family.architecture.qkv_bias
        self.q_proj = Linear(hidden, shard.query_size, block, biased)
        self.k_proj = Linear(hidden, shard.key_value_size, block, biased)
        self.v_proj = Linear(hidden, shard.key_value_size, block, biased)


class OutputProjection(nn.Module):
    """NxDI nests the output projection in a module of the same name."""

    def __init__(self, shard: Shard) -> None:
        super().__init__()
        block = shard.block(columns=shard.config.head_dim)
        self.o_proj = Linear(shard.query_size, shard.config.hidden_size, block)


class Attention(nn.Module):
    """Projections, the norms that `Architecture.qk_norm` names, RoPE, and causal attention; of the
    heads of one rank, summed over the group.
    """

    def __init__(self, shard: Shard, layer: int) -> None:
        super().__init__()
        config = shard.config
        self.shard = shard
        self.layer = layer
        self.head_dim = config.head_dim
        self.qk_norm = config.family.architecture.qk_norm
        self.qkv_proj = QKVProjection(shard)
        self.o_proj = OutputProjection(shard)
        if self.qk_norm is not QKNorm.NONE:
            per_head = self.qk_norm is QKNorm.PER_HEAD
            query_size = config.head_dim if per_head else shard.query_size
            key_size = config.head_dim if per_head else shard.key_value_size
            self.q_norm = RMSNorm(query_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(key_size, config.rms_norm_eps)

    def forward(self, hidden_BTH: torch.Tensor, step: Step) -> torch.Tensor:
        """[B,T,H] to [B,T,H]. With a cache, this call's keys and values are written first, then
        positions below `step.filled` are read; each query sees the keys at positions up to its own.
        """
        project = self.qkv_proj
        query_BTND, key_BTKD = self._normed_heads(
            project.q_proj(hidden_BTH, step.kernels), project.k_proj(hidden_BTH, step.kernels)
        )
        value_BTKD = self._heads(project.v_proj(hidden_BTH, step.kernels))
        query_BTND = rotate(query_BTND, step.rope)
        key_BTKD = rotate(key_BTKD, step.rope)
        if step.cache is None:
            key_BKCD = key_BTKD.transpose(1, 2)
            value_BKCD = value_BTKD.transpose(1, 2)
        else:
            rows_B = step.rows_B
            if rows_B is None:
                rows_B = torch.arange(hidden_BTH.shape[0], device=hidden_BTH.device)
            step.cache.write(self.layer, rows_B, step.positions_BT, key_BTKD, value_BTKD)
            key_BKCD, value_BKCD = step.cache.read(self.layer, step.rows_B, step.filled)
        attended_BTQ = step.kernels.attend(query_BTND, key_BKCD, value_BKCD, step.positions_BT)
        return self.shard.sum(self.o_proj.o_proj(attended_BTQ, step.kernels))

    def _normed_heads(
        self, query_BTQ: torch.Tensor, key_BTQ: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [B,T,N,D] and keys [B,T,K,D], normed over the full width or over each head."""
        if self.qk_norm is QKNorm.FULL_WIDTH:
            if self.shard.tp_degree > 1:
                return self._normed_over_the_group(query_BTQ, key_BTQ)
            return self._heads(self.q_norm(query_BTQ)), self._heads(self.k_norm(key_BTQ))
        query_BTND = self._heads(query_BTQ)
        key_BTKD = self._heads(key_BTQ)
        if self.qk_norm is QKNorm.PER_HEAD:
            return self.q_norm(query_BTND), self.k_norm(key_BTKD)
        return query_BTND, key_BTKD

    def _normed_over_the_group(
        self, query_BTQ: torch.Tensor, key_BTQ: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same normed over the width that all ranks hold together: one collective for both
        sums of squares. Heads that are zeros add nothing, copies of one are counted once.
        """
        config = self.shard.config
        dtype = query_BTQ.dtype
        query_BTQ = query_BTQ.float()
        key_BTQ = key_BTQ.float()
        sums = [each.pow(2).sum(-1, keepdim=True) for each in (query_BTQ, key_BTQ)]
        query_sum, key_sum = self.shard.sum(torch.cat(sums, dim=-1)).chunk(2, dim=-1)
        copied_width = config.key_value_size * self.shard.key_value_copies
        return (
            self._heads(self.q_norm.scaled(query_BTQ, query_sum / config.query_size, dtype)),
            self._heads(self.k_norm.scaled(key_BTQ, key_sum / copied_width, dtype)),
        )

    def _heads(self, projected_BTQ: torch.Tensor) -> torch.Tensor:
        return projected_BTQ.unflatten(-1, (-1, self.head_dim))
