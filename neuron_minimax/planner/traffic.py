"""Count what one step of token generation reads on a rank, and the collectives it waits for.

Collectives: those of the recorded graphs (`tests/data/neuron_traces.json`). Experts: NxD 0.18.0,
modules/moe/expert_mlps_v2.py, multiplies all of a rank's experts, or, where the tokens of a step
choose fewer than there are, the chosen ones.
"""

from dataclasses import dataclass

from neuron_minimax.config import ModelConfig
from neuron_minimax.families import Role
from neuron_minimax.families.family import QKNorm
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.memory import (
    Deployment,
    held_experts,
    local_shape,
    weight_bytes,
)

# Sums of the hidden state after attention and after the MLP; and of squares, where the norms of
# queries and keys run over the width that ranks share.
HIDDEN_SUMS = 2
NORM_SUMS = 2
GATHERS = 2  # of the embedding's columns and of the head's rows


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """One step, a token for every sequence: the most bytes that a rank reads, its key/value cache
    full.
    """

    weights: int
    key_value_cache: int
    collectives: int
    batch_size: int
    seconds: float  # the least that reading takes, by the chip's documented bandwidth

    @property
    def bytes_per_step(self) -> int:
        return self.weights + self.key_value_cache

    @property
    def bytes_per_token(self) -> int:
        """Each token's part of a step."""
        return self.bytes_per_step // self.batch_size

    def to_json(self) -> dict[str, float]:
        return {
            "bytes_per_step": self.bytes_per_step,
            "bytes_per_token": self.bytes_per_token,
            "collectives_per_step": self.collectives,
            "seconds_to_read_at_least": self.seconds,
        }


def traffic(case: Case) -> Traffic:
    """What a step of a case reads; of the embedding it reads a row for each sequence, which does
    not count.
    """
    config = case.config
    deployment = case.deployment
    memory = case.memory
    held = max(1, held_experts(config, deployment))
    unread_experts = memory.experts // held * (held - experts_read(config, deployment))
    embedding = config.family.weight_of(Role.EMBEDDING)
    shape = local_shape(embedding, config, deployment)[1]
    table = weight_bytes(embedding, shape, block=None)
    weights = memory.weights - table - unread_experts
    return Traffic(
        weights=weights,
        key_value_cache=memory.key_value_cache,
        collectives=collectives(config, deployment.tp_degree),
        batch_size=deployment.batch_size,
        seconds=(weights + memory.key_value_cache) / case.instance.bandwidth_per_core,
    )


def experts_read(config: ModelConfig, deployment: Deployment) -> int:
    """The most experts of a layer whose weights a rank reads in a step."""
    held = max(1, held_experts(config, deployment))
    if not config.family.architecture.has_experts:
        return held
    return min(held, deployment.batch_size * config.num_experts_per_tok)


def collectives(config: ModelConfig, tp_degree: int) -> int:
    """Collectives of a step, each over all ranks; none where there is one."""
    if tp_degree == 1:
        return 0
    shared_norm = config.family.architecture.qk_norm is QKNorm.FULL_WIDTH
    per_layer = HIDDEN_SUMS + (NORM_SUMS if shared_norm else 0)
    return config.num_hidden_layers * per_layer + GATHERS
