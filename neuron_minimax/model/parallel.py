"""One rank's share of a model: the sizes of its modules, and the sums over its group.

A group of `tp_degree` ranks holds a model once. Attention heads, the channels of dense MLPs and the
vocabulary are divided over all ranks; experts over `moe_ep_degree` of them, and the channels of an
expert over the others. Norms and routers are on every rank. Collectives are torch's functional
ones, as operators: a graph holds them, and outside of one they are waited for at once.
"""

from dataclasses import dataclass, replace
from math import gcd

import torch

from neuron_minimax.config import ModelConfig, expert_share
from neuron_minimax.errors import ConfigError
from neuron_minimax.fp8 import ceil_div

COLLECTIVES = torch.ops._c10d_functional


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One rank of a group.

    group              the process group's name; empty for a group of one
    query_slots        the source head of each query head of this rank, None for zeros
    key_value_slots    the same of its key/value heads
    key_value_copies   how often each key/value head occurs over all ranks

    The defaults are a model on one rank. Raises ConfigError when the group cannot hold the model.
    """

    config: ModelConfig
    rank: int = 0
    tp_degree: int = 1
    moe_ep_degree: int = 1
    group: str = ""
    query_slots: tuple[int | None, ...] = ()
    key_value_slots: tuple[int | None, ...] = ()
    key_value_copies: int = 1

    def __post_init__(self) -> None:
        if self.tp_degree > 1:
            # What a graph has to know of the operators; here, because one rank does without.
            import torch.distributed._functional_collectives  # noqa: F401
        config = self.config
        experts = config.num_local_experts
        if not 0 <= self.rank < self.tp_degree:
            raise ConfigError(f"rank {self.rank}: expected 0 to {self.tp_degree - 1}")
        if self.tp_degree % self.moe_ep_degree:
            raise ConfigError(
                f"moe_ep_degree {self.moe_ep_degree} does not divide tp_degree {self.tp_degree}"
            )
        if self.moe_ep_degree > max(1, experts):
            raise ConfigError(
                f"moe_ep_degree {self.moe_ep_degree} is more than the {experts} experts; choose a "
                "smaller one, and a larger moe_tp_degree"
            )
        widths = {
            "shared_intermediate_size": (config.shared_intermediate_size, self.tp_degree),
            "dense_intermediate_size": (
                config.dense_intermediate_size if config.dense_layers else 0,
                self.tp_degree,
            ),
            "intermediate_size": (config.intermediate_size, self.mlp_ranks),
        }
        for name, (width, ranks) in widths.items():
            if width % ranks:
                raise ConfigError(
                    f"{name} {width} cannot be divided over {ranks} ranks; choose a smaller "
                    "tp_degree, or a larger moe_ep_degree"
                )

    @property
    def moe_tp_degree(self) -> int:
        """Ranks that share the channels of an expert."""
        return self.tp_degree // self.moe_ep_degree

    @property
    def mlp_ranks(self) -> int:
        """Ranks that share the channels of `config.intermediate_size`."""
        has_experts = self.config.family.architecture.has_experts
        return self.moe_tp_degree if has_experts else self.tp_degree

    @property
    def experts(self) -> range:
        """Numbers of the experts of this rank."""
        expert_rank = self.rank // self.moe_tp_degree
        return expert_share(self.config.num_local_experts, expert_rank, self.moe_ep_degree)

    @property
    def held_experts(self) -> int:
        """Experts that every rank has room for, as many on each: its own, and zeros after them."""
        return ceil_div(self.config.num_local_experts, self.moe_ep_degree)

    def first_expert(self, rank: torch.Tensor) -> torch.Tensor:
        """Number of the first expert of a rank that a graph is given, as `expert_share` has it; of
        the rank behind the last, how many experts there are.
        """
        fewest, fuller_ranks = divmod(self.config.num_local_experts, self.moe_ep_degree)
        expert_rank = rank // self.moe_tp_degree
        return expert_rank * fewest + expert_rank.clamp(max=fuller_ranks)

    @property
    def own_heads(self) -> ModelConfig:
        """The config with this rank's heads alone: what its cache is made for."""
        if self.tp_degree == 1:
            return self.config
        return replace(
            self.config,
            num_attention_heads=self.query_heads,
            num_key_value_heads=self.key_value_heads,
        )

    @property
    def query_heads(self) -> int:
        return len(self.query_slots) or self.config.num_attention_heads

    @property
    def key_value_heads(self) -> int:
        return len(self.key_value_slots) or self.config.num_key_value_heads

    @property
    def query_size(self) -> int:
        return self.query_heads * self.config.head_dim

    @property
    def key_value_size(self) -> int:
        return self.key_value_heads * self.config.head_dim

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding and of the head; the last rank's may end in zeros."""
        return ceil_div(self.config.vocab_size, self.tp_degree)

    def block(self, rows: int | None = None, columns: int | None = None) -> tuple[int, int]:
        """Size of the scale blocks of a weight whose rows or columns are divided into parts of so
        many: smaller than the published ones where a part ends within one.
        """
        published = self.config.weight_block_size
        if self.tp_degree == 1:
            return published
        parts = (rows or published[0], columns or published[1])
        return gcd(parts[0], published[0]), gcd(parts[1], published[1])

    @property
    def expert_block(self) -> tuple[int, int]:
        """The same of the stacked experts, which are transposed; one size for both products."""
        rows, columns = self.config.weight_block_size
        share = self.config.intermediate_size // self.moe_tp_degree
        if self.moe_tp_degree == 1 or (share % rows == 0 and share % columns == 0):
            return columns, rows
        finest = gcd(share, rows, columns)
        return finest, finest

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the group."""
        if self.tp_degree == 1:
            return values
        return COLLECTIVES.wait_tensor(COLLECTIVES.all_reduce(values, "sum", self.group))

    def concatenate(self, values: torch.Tensor) -> torch.Tensor:
        """All ranks' values, in order, along the last dimension."""
        if self.tp_degree == 1:
            return values
        gathering = COLLECTIVES.all_gather_into_tensor(values, self.tp_degree, self.group)
        gathered = COLLECTIVES.wait_tensor(gathering).unflatten(0, (self.tp_degree, -1))
        return gathered.movedim(0, -2).flatten(-2)
