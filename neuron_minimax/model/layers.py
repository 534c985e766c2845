"""The small layers: a linear layer over dense or FP8 weights, RMS norm, and how a model computes
them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import block_grid
from neuron_minimax.kernels.reference import (
    FP8_DTYPES,
    AttentionKernel,
    ExpertMLP,
    attend,
    expert_mlp,
    linear,
)

LinearKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, int]], torch.Tensor
]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """How products and attention run; what they compute is the same for all. The defaults are
    eager, differentiable.
    """

    linear: LinearKernel = linear
    attend: AttentionKernel = attend
    expert_mlp: ExpertMLP = expert_mlp


class Weight(nn.Module):
    """A weight in float32, bfloat16 or FP8 codes, and the block scales that FP8 needs (else None).

    Made without storage; `assign` gives it tensors. `scale_shape` None means that FP8 is not
    expected here.
    """

    scale: nn.Parameter | None

    def __init__(self, *shape: int, scale_shape: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.scale_shape = scale_shape
        self.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        self.register_parameter("scale", None)

    def assign(self, name: str, weight: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Use these tensors, without a copy. Raises CheckpointError when they do not fit or FP8
        lacks its scale.
        """
        require_shape(f"{name}.weight", weight, tuple(self.weight.shape))
        if weight.dtype in FP8_DTYPES:
            if scale is None or self.scale_shape is None:
                problem = "no scale" if scale is None else "no place for a scale in this model"
                raise CheckpointError(
                    f"{name}.weight is FP8, but there is {problem}; convert the checkpoint again"
                )
            require_shape(f"{name}.scale", scale, self.scale_shape)
            self.scale = nn.Parameter(scale, requires_grad=False)
        elif scale is not None:
            raise CheckpointError(
                f"{name}.scale belongs to a weight in {weight.dtype}; expected FP8: convert again"
            )
        self.weight = nn.Parameter(weight, requires_grad=False)


class Linear(Weight):
    """`x @ weight.T` with a weight [out, in]."""

    def __init__(self, inputs: int, outputs: int, block: tuple[int, int]) -> None:
        super().__init__(outputs, inputs, scale_shape=block_grid((outputs, inputs), block))
        self.block = block

    def forward(self, hidden: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return kernels.linear(hidden, self.weight, self.scale, self.block)


class RMSNorm(Weight):
    """Root-mean-square norm over the last dimension, in float32, rounded to the input's dtype
    before the weight.
    """

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size)
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.epsilon)
        return self.weight.to(hidden.dtype) * normed.to(hidden.dtype)


def require_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    """Raises CheckpointError when a tensor of the state dict has another shape than the config
    implies.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, but config.json implies {list(shape)}; check "
            "that both come from the same conversion"
        )
