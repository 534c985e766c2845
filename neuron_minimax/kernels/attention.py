"""Attention over a key/value cache, in torch: what every other way of computing it must equal.

Shapes: B batch, T tokens, N query heads, K key/value heads, G = N/K, D head_dim, C positions.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

AttentionKernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend(
    query_BTND: torch.Tensor, key_BKCD: torch.Tensor, value_BKCD: torch.Tensor, positions_BT: torch.Tensor
) -> torch.Tensor:
    """Causal attention to [B,T,N*D]; the key at index c is at position c, or below the query's position if c is.

    The G query heads that share a key head become G times as many query rows, so that keys are never repeated.
    """
    batch, tokens, heads, head_dim = query_BTND.shape
    key_heads = key_BKCD.shape[1]
    group = heads // key_heads
    query = query_BTND.unflatten(2, (key_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    visible_BTC = torch.arange(key_BKCD.shape[2], device=positions_BT.device) <= positions_BT[:, :, None]
    mask = visible_BTC[:, None].repeat(1, 1, group, 1)
    attended = F.scaled_dot_product_attention(query, key_BKCD, value_BKCD, attn_mask=mask)
    return attended.unflatten(2, (group, tokens)).permute(0, 3, 1, 2, 4).reshape(batch, tokens, heads * head_dim)
