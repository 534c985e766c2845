"""What the requirements on a deployment judge and find: a case, and numbered objections to it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from neuron_minimax.config import ModelConfig
from neuron_minimax.planner.instances import Instance
from neuron_minimax.planner.memory import NEURON_E4M3_MAX, Deployment, RankMemory, rank_memory

REFUSE = "refuse"
WARN = "warn"


@dataclass(frozen=True)
class Objection:
    """One numbered finding; `refuse` means the compile cannot lead to a working model. `fix` says
    what this requirement takes; whether all of them take it is the search's to say.
    """

    rule: str
    severity: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.rule} {self.severity}: {self.message}; {self.fix}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model in a deployment on an instance; `fp8_max` is the largest code stored, `buckets` the
    context-encoding lengths where they are not those that a compile takes by itself.
    """

    config: ModelConfig
    deployment: Deployment
    instance: Instance
    fp8_max: int = NEURON_E4M3_MAX
    buckets: tuple[int, ...] = ()
    # The memory of one token, by degrees; `dataclasses.replace` hands it on, so that a search
    # counts the weights once for all instances, batches and lengths.
    counted: dict[tuple[int, Deployment], tuple[ModelConfig, RankMemory]] = field(
        default_factory=dict, compare=False, repr=False
    )

    @cached_property
    def memory(self) -> RankMemory:
        sizes = ("batch_size", "seq_len", "context_length", "smallest_context")
        one_token: dict[str, Any] = dict.fromkeys(sizes, 1)
        single = replace(self.deployment, **one_token)
        key = (id(self.config), single)
        if key not in self.counted:  # which keeps the config, and so its id
            self.counted[key] = (self.config, rank_memory(self.config, single))
        one = self.counted[key][1]
        tokens = self.deployment.batch_size * self.deployment.seq_len
        return replace(one, key_value_cache=tokens * one.key_value_cache)


Requirement = Callable[[Case], Iterator[Objection]]
