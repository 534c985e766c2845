"""The small layers, over dense or FP8 weights, and what one pass hands to every layer.

Shapes: B batch, T tokens.
"""

from collections.abc import Callable, Sequence
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
from neuron_minimax.model.cache import LayerCache

DENSE_DTYPES = (torch.float32, torch.bfloat16)

LinearKernel = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[int, int]], torch.Tensor
]


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The functions that run products and attention; kernels/reference.py says what they compute.

    The defaults are eager and differentiable.
    """

    linear: LinearKernel = linear
    attend: AttentionKernel = attend
    expert_mlp: ExpertMLP = expert_mlp


@dataclass(frozen=True, kw_only=True)
class Step:
    """The arguments that one pass of the decoder hands to every layer.

    positions_BT   the position of each token
    rope           cosine and sine at these positions (rope.py)
    cache          where keys and values are written and read, if anywhere
    rows_B         the cache slots of the batch rows; None: the batch is all slots, in order
    filled         how many cache positions attention reads
    real_BT        which tokens are not padding; None: all
    rank           this rank's number as a tensor, where one graph serves every rank of the group;
                   None: the shard's own
    """

    positions_BT: torch.Tensor
    rope: tuple[torch.Tensor, torch.Tensor]
    cache: LayerCache | None = None
    rows_B: torch.Tensor | None = None
    filled: int = 0
    real_BT: torch.Tensor | None = None
    rank: torch.Tensor | None = None
    kernels: Kernels = Kernels()


class StoredWeight(nn.Module):
    """A weight in float32, bfloat16 or FP8 codes, and the block scales that FP8 needs (else None).

    Made without storage; `assign` gives it tensors. `scale_shape` None means that FP8 is not
    expected here; `biased` that a bias [first dimension] belongs to it; `float32_only` that it is
    never rounded.
    """

    scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        *shape: int,
        scale_shape: tuple[int, ...] | None = None,
        biased: bool = False,
        float32_only: bool = False,
    ) -> None:
        super().__init__()
        dense = (torch.float32,) if float32_only else DENSE_DTYPES
        self.dtypes = dense if scale_shape is None else (*dense, *FP8_DTYPES)
        self.scale_shape = scale_shape
        self.weight = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
        self.register_parameter("scale", None)
        bias = torch.empty(shape[0], device="meta")
        self.register_parameter("bias", nn.Parameter(bias, requires_grad=False) if biased else None)

    def assign(self, name: str, state: dict[str, torch.Tensor]) -> None:
        """Take this module's tensors out of `state`, without a copy.

        Raises CheckpointError when one is missing, does not fit or is in another dtype, or FP8
        lacks its scale.
        """
        weight = take(state, f"{name}.weight", tuple(self.weight.shape), self.dtypes)
        scale = state.pop(f"{name}.scale", None)
        if self.bias is not None:
            bias = take(state, f"{name}.bias", tuple(self.bias.shape), DENSE_DTYPES)
            self.bias = nn.Parameter(bias, requires_grad=False)
        if weight.dtype in FP8_DTYPES:
            assert self.scale_shape is not None, "FP8 is among the dtypes where scales are"
            if scale is None:
                raise CheckpointError(
                    f"{name}.weight is FP8, but there is no scale; convert the checkpoint again"
                )
            require(f"{name}.scale", scale, self.scale_shape, (torch.float32,))
            self.scale = nn.Parameter(scale, requires_grad=False)
        elif scale is not None:
            raise CheckpointError(
                f"{name}.scale belongs to a weight in {weight.dtype}; expected FP8: convert again"
            )
        self.weight = nn.Parameter(weight, requires_grad=False)


class Linear(StoredWeight):
    """`x @ weight.T`, and a bias where there is one, with a weight [out, in]."""

    def __init__(
        self, inputs: int, outputs: int, block: tuple[int, int], biased: bool = False
    ) -> None:
        grid = block_grid((outputs, inputs), block)
        super().__init__(outputs, inputs, scale_shape=grid, biased=biased)
        self.block = block

    def forward(self, hidden: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        product = kernels.linear(hidden, self.weight, self.scale, self.block)
        return product if self.bias is None else product + self.bias.to(product.dtype)


class RMSNorm(StoredWeight):
    """Root-mean-square norm over the last dimension, in float32, rounded before the weight."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size)
        self.epsilon = epsilon

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = hidden.float()
        return self.scaled(wide, wide.pow(2).mean(-1, keepdim=True), hidden.dtype)

    def scaled(
        self, wide: torch.Tensor, mean_square: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """The norm in `dtype` of float32 values whose mean square is known."""
        normed = wide * torch.rsqrt(mean_square + self.epsilon)
        return self.weight.to(dtype) * normed.to(dtype)


def take(
    state: dict[str, torch.Tensor],
    name: str,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
) -> torch.Tensor:
    """Take a tensor out of a state dict. Raises CheckpointError when it is missing, or has another
    shape, or none of the dtypes.
    """
    tensor = state.pop(name, None)
    if tensor is None:
        raise CheckpointError(
            f"{name} is missing from the state dict; convert the checkpoint again"
        )
    require(name, tensor, shape, dtypes)
    return tensor


def require(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype]
) -> None:
    """Raise CheckpointError when a tensor has another shape than the config implies, or none of the
    dtypes: nothing is cast.
    """
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{name} has shape {list(tensor.shape)}, but config.json implies {list(shape)}; check "
            "that both come from the same conversion"
        )
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise CheckpointError(
            f"{name} is in {str(tensor.dtype).removeprefix('torch.')}; expected {expected}: "
            "convert the checkpoint again"
        )
