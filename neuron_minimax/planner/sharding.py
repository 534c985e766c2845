"""How tensor-parallel ranks share a model's heads and experts; the rules are NxDI's, written once
for every user.

Source of the head rules: neuronx-distributed-inference 0.9.0, modules/attention/gqa.py; of the
expert groups: neuronx-distributed 0.18.0, parallel_layers/parallel_state.py. `tests/data` holds
what these build.
"""

from dataclasses import dataclass

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError
from neuron_minimax.fp8 import ceil_div


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Heads after padding and replication; each slot names the source head it holds, or None for
    zeros.
    """

    tp_degree: int
    query_slots: tuple[int | None, ...]
    key_value_slots: tuple[int | None, ...]
    key_value_copies: int  # how often each key/value head occurs over all ranks

    @property
    def query_heads_per_rank(self) -> int:
        return len(self.query_slots) // self.tp_degree

    @property
    def key_value_heads_per_rank(self) -> int:
        return len(self.key_value_slots) // self.tp_degree

    def query_slots_of(self, rank: int) -> tuple[int | None, ...]:
        return self.query_slots[
            rank * self.query_heads_per_rank : (rank + 1) * self.query_heads_per_rank
        ]

    def key_value_slots_of(self, rank: int) -> tuple[int | None, ...]:
        return self.key_value_slots[
            rank * self.key_value_heads_per_rank : (rank + 1) * self.key_value_heads_per_rank
        ]


def head_layout(query_heads: int, key_value_heads: int, tp_degree: int) -> HeadLayout:
    """Place the heads on `tp_degree` ranks.

    Where tp_degree is a multiple of the key/value heads these are repeated to one per rank, and
    query heads are padded at the end of each key/value group, so that a query head always meets its
    own key. Elsewhere, unless the key/value heads divide evenly, they are repeated to one per query
    head and both are padded at the end.
    """
    padded = ceil_div(query_heads, tp_degree) * tp_degree
    group = query_heads // key_value_heads
    by_group = tp_degree % key_value_heads == 0
    if by_group:
        padded_group = padded // key_value_heads
        queries = tuple(
            slot // padded_group * group + slot % padded_group
            if slot % padded_group < group
            else None
            for slot in range(padded)
        )
    else:
        queries = tuple(slot if slot < query_heads else None for slot in range(padded))
    keys, copies = _key_value_slots(query_heads, key_value_heads, tp_degree, padded, by_group)
    return HeadLayout(
        tp_degree=tp_degree, query_slots=queries, key_value_slots=keys, key_value_copies=copies
    )


def _key_value_slots(
    query_heads: int, key_value_heads: int, tp_degree: int, padded: int, by_group: bool
) -> tuple[tuple[int | None, ...], int]:
    if query_heads == key_value_heads:
        target = padded
    elif key_value_heads % tp_degree == 0:
        target = key_value_heads
    else:
        target = tp_degree if by_group else padded
    if target == key_value_heads:
        return tuple(range(key_value_heads)), 1
    copies = tp_degree // key_value_heads if by_group else query_heads // key_value_heads
    filled = copies * key_value_heads
    return tuple(slot // copies if slot < filled else None for slot in range(target)), copies


@dataclass(frozen=True, kw_only=True)
class ExpertShard:
    """One rank's share of every layer's experts: a range of experts, and a range of their
    intermediate channels.
    """

    experts: range
    intermediate: range


def expert_shard(
    config: ModelConfig, *, moe_tp_degree: int, moe_ep_degree: int, rank: int
) -> ExpertShard:
    """Which experts and channels `rank` holds: consecutive ranks share an expert group.

    Raises ConfigError when the experts or channels do not divide.
    """
    for name, size, degree in (
        ("num_local_experts", config.num_local_experts, moe_ep_degree),
        ("intermediate_size", config.intermediate_size, moe_tp_degree),
    ):
        if size % degree:
            raise ConfigError(
                f"{name} {size} cannot be shared by {degree} ranks; choose a divisor of {size}"
            )
    experts = config.num_local_experts // moe_ep_degree
    channels = config.intermediate_size // moe_tp_degree
    group, member = divmod(rank, moe_tp_degree)
    return ExpertShard(
        experts=range(group * experts, (group + 1) * experts),
        intermediate=range(member * channels, (member + 1) * channels),
    )
