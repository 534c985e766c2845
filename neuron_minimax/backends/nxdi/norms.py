"""RMS norms on NxDI: over a width that every rank holds whole, and over heads that the ranks share.

Shapes: B batch, T tokens, W a rank's width of the query or key projection.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from neuron_minimax.backends.nxdi import imports
from neuron_minimax.backends.nxdi.heads import rearrange


class WholeRMSNorm(imports.CustomRMSNorm):
    """The compiler's RmsNorm call over the last dimension, which every rank holds whole: the hidden
    size, or one head; plain torch in CPU mode.
    """

    def __init__(self, width: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__(width, eps=eps)
        self.weight: nn.Parameter = nn.Parameter(
            torch.ones(width, dtype=dtype), requires_grad=False
        )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not imports.cpu_mode():
            return super().forward(values)
        wide = values.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(values.dtype)


class FullWidthRMSNorm(imports.BaseParallelLinear):
    """RMSNorm over a projection's full width while each rank holds its own heads only.

    The sum of squares is reduced over the tensor-parallel group in float32 and divided by the
    unpadded width and by the copies of each head. A parallel layer, so that NxD shards its weight;
    float32 torch operations, because the compiler's RmsNorm call works per rank.
    """

    def __init__(
        self,
        *,
        heads: int,
        slots: Sequence[int | None],
        copies: int,
        head_dim: int,
        eps: float,
        group: Any,
        dtype: Any,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.slots = slots
        self.eps = eps
        self.group = group
        self.ranks = group.size()
        self.divisor = float(heads * head_dim * copies)
        self.weight = nn.Parameter(
            torch.ones(len(slots) * head_dim // self.ranks, dtype=dtype), requires_grad=False
        )
        imports.set_tensor_model_parallel_attributes(
            self.weight, is_parallel=True, dim=0, stride=1, num_partitions=self.ranks
        )

    def forward(self, projected_BTW: torch.Tensor) -> torch.Tensor:
        wide_BTW = projected_BTW.to(torch.float32)
        squares_BT1 = wide_BTW.pow(2).sum(-1, keepdim=True)
        if self.ranks > 1:
            squares_BT1 = imports.reduce_from_tensor_model_parallel_region(
                squares_BT1, process_group=self.group
            )
        normed_BTW = wide_BTW * torch.rsqrt(squares_BT1 / self.divisor + self.eps)
        return self.weight * normed_BTW.to(projected_BTW.dtype)

    def preshard_hook(self, model_state_dict: dict, prefix: str) -> bool:
        module = prefix.removesuffix(".weight")
        rearrange(model_state_dict, module, 0, self.heads, self.slots)
        return True
