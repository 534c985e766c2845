"""The three ways in which NxD multiplies blocks of tokens with their experts in context encoding.

Sources: neuronx-distributed 0.18.0, modules/moe/blockwise.py and expert_mlps_v2.py; nki-library of
SDK 2.29, core/moe/moe_cte. Reports from devices are others', all of trn2, none repeated here: of
neuronx-distributed-inference 4bcdc54b, contrib/models/MiniMax-M3/HISTORY.md and
Qwen3.5-35B-A3B/README.md, and its pull requests 119, 131, 138, 150.
"""

from dataclasses import dataclass
from typing import Any

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError
from neuron_minimax.families.family import LayerKind
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.planner.memory import Deployment, held_experts

# NxD's tokens per block of the blockwise expert matmul (modules/moe/model_utils.py).
TOKEN_BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class BlockwiseMatmul:
    """One way: NxDI's `blockwise_matmul_config`, and whether a kernel loops over the blocks or the
    graph holds each.
    """

    name: str
    settings: dict[str, Any]
    is_kernel: bool
    known: str  # what is known of it from devices
    channel_multiple: int = (
        1  # what a rank's share of the intermediate size has to be a multiple of
    )


BLOCKWISE_MATMULS = {
    way.name: way
    for way in (
        BlockwiseMatmul(
            name="torch",
            settings={"use_torch_block_wise": True},
            is_kernel=False,
            known="in the MiniMax-M3 port logits did not depend on the place in the batch, and "
            "the first token took "
            "10.8 s where shard_on_block took 6.4 s; a model of 70 layers and 384 experts failed "
            "to load for memory",
        ),
        BlockwiseMatmul(
            name="shard_on_intermediate",
            settings={"use_shard_on_intermediate_dynamic_while": True},
            is_kernel=True,
            known="AWS uses it for Qwen3-MoE; in a Qwen3.5-35B-A3B port at moe_ep_degree 1 the "
            "first token after 16, "
            "64 and 256 took 480, 576 and 667 ms where torch took 554",
            channel_multiple=256,
        ),
        BlockwiseMatmul(
            name="shard_on_block",
            # The kernel of SDK 2.29 asserts this strategy; NxD's default is the other one.
            settings={
                "use_shard_on_block_dynamic_while": True,
                "block_sharding_strategy": "PING_PONG",
            },
            is_kernel=True,
            known="another MiniMax-M2 class generated fluent text with it at moe_ep_degree 64; "
            "in the MiniMax-M3 port "
            "logits depended on the place in the batch",
            channel_multiple=16,
        ),
    )
}
DEFAULT = "torch"


def blockwise_matmul(name: str) -> BlockwiseMatmul:
    """The way of that name. Raises ConfigError listing the known ones."""
    if name not in BLOCKWISE_MATMULS:
        raise ConfigError(
            f"blockwise_matmul is {name!r}; expected one of {', '.join(BLOCKWISE_MATMULS)}",
            usage=True,
        )
    return BLOCKWISE_MATMULS[name]


def token_blocks(config: ModelConfig, deployment: Deployment) -> int:
    """Blocks of a rank's tokens in the worst case, for the longest bucket (NxD,
    ExpertMLPsV2.forward_blockwise).
    """
    experts = held_experts(config, deployment)
    choices = deployment.context_length * config.num_experts_per_tok
    return min(ceil_div(choices - (experts - 1), TOKEN_BLOCK) + experts - 1, choices)


def sparse_layers(config: ModelConfig) -> int:
    """Layers with experts."""
    return len(config.layers_of(LayerKind.SPARSE))


def unrolled_products(way: BlockwiseMatmul, config: ModelConfig, deployment: Deployment) -> int:
    """Expert products that the context-encoding graph holds one after another: every block of every
    layer with experts, or one kernel call for each.
    """
    per_layer = 1 if way.is_kernel else token_blocks(config, deployment)
    return per_layer * sparse_layers(config)
