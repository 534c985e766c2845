"""What NxDI's CPU mode really calls in the closed packages, as plain torch; everything else stays a
loud stand-in.

In a graph that is recorded (`OPAQUE`), torch_neuronx's operators are the custom calls that they are
on a device.
"""

import os
from enum import Enum
from typing import Any, NamedTuple

import torch

from tests.neuron.standins.kernels import custom_call, xla_hlo_call

# Set where graphs are recorded; where their values are compared, the operators are torch's
OPAQUE = False


def opaque(tensor: torch.Tensor) -> bool:
    return OPAQUE and tensor.device.type == "xla"


class RmsNorm:
    """torch_neuronx's custom call: RMSNorm over the last dimension in float32, as its operator
    computes it.
    """

    @staticmethod
    def apply(
        hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, dimension: int
    ) -> torch.Tensor:
        if opaque(hidden):
            return custom_call(
                "AwsNeuronRmsNorm", [hidden, weight], [(tuple(hidden.shape), hidden.dtype)]
            )
        wide = hidden.to(torch.float32)
        normed = wide * torch.rsqrt(wide.pow(2).mean(dimension, keepdim=True) + epsilon)
        return (normed * weight.to(torch.float32)).to(hidden.dtype)


class TopK:
    """torch_neuronx's custom call for the k largest values."""

    @staticmethod
    def apply(scores: torch.Tensor, k: int, dim: int = -1) -> Any:
        if opaque(scores):
            shape = (*scores.shape[:-1], k)
            return custom_call(
                "AwsNeuronTopK", [scores], [(shape, scores.dtype), (shape, torch.int32)]
            )
        return torch.topk(scores, k, dim=dim)


class Argmax:
    @staticmethod
    def apply(scores: torch.Tensor, dim: int = -1, keepdim: bool = False) -> torch.Tensor:
        if opaque(scores):
            kept = (*scores.shape[:-1], 1) if keepdim else tuple(scores.shape[:-1])
            return custom_call("AwsNeuronArgMax", [scores], [(kept, torch.int32)])
        return torch.argmax(scores, dim=dim, keepdim=keepdim)


class Softmax:
    @staticmethod
    def apply(scores: torch.Tensor, dim: int = -1) -> torch.Tensor:
        if opaque(scores):
            return custom_call("AwsNeuronSoftmax", [scores], [(tuple(scores.shape), scores.dtype)])
        return torch.softmax(scores, dim=dim)


def get_platform_target() -> str:
    """The chip to act for, from the real package's own variable; a trn1 unless told otherwise."""
    return os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE", "trn1")


class SkipMode(NamedTuple):
    """nkilib's two flags of the blockwise kernels; made once as a default value at import."""

    skip_token: bool = False
    skip_weight: bool = False


class BlockShardStrategy(Enum):
    """nkilib's two ways to share blocks out over two cores."""

    HI_LO = 0
    PING_PONG = 1


class CollectivesConfig:
    """What NxD notes about groups of ranks for context parallelism, which CPU mode here never
    runs.
    """

    def __init__(self, replica_groups: list[list[int]]) -> None:
        self.replica_groups = replica_groups
        self.rank_src_tgt_pairs: dict[int, None] = {
            rank: None for group in replica_groups for rank in group
        }


OPERATORS = {"RmsNorm": RmsNorm, "TopK": TopK, "Argmax": Argmax, "Softmax": Softmax}
PROVIDED: dict[str, dict[str, Any]] = {
    "torch_neuronx.xla_impl.ops": OPERATORS,
    "torch_neuronx.xla_impl.base": {"xla_hlo_call": xla_hlo_call},
    "nkilib.core.moe.moe_cte.moe_cte_utils": {
        "SkipMode": SkipMode,
        "BlockShardStrategy": BlockShardStrategy,
    },
    "neuronxcc.nki._pre_prod_kernels.blockwise_mm": {"SkipMode": SkipMode},  # its place in NxD 0.17
    "neuronxcc.nki._pre_prod_kernels.collectives": {"CollectivesConfig": CollectivesConfig},
    "torch_neuronx.utils": {"get_platform_target": get_platform_target},
    "torch_neuronx.utils.utils": {"get_platform_target": get_platform_target},
}
