"""The `plan` command's answer: does a deployment fit an instance, why, what would, and what to
expect of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.errors import ConfigError
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.planner import blockwise, instances, lint
from neuron_minimax.planner.instances import GIB, Instance
from neuron_minimax.planner.lint import REFUSE, Case, Objection
from neuron_minimax.planner.memory import (
    EXPERT_KERNELS,
    Deployment,
    RankMemory,
    cache_bytes_per_token,
    checkpoint_bytes,
    largest_code,
    rank_memory,
)

DEFAULT_SEQ_LEN = 1024
# First compiles of this model were reported to take 25 to 90 minutes; the limit leaves room.
COMPILE_MINUTES = (25, 90)


def fits(per_rank: float, capacity: float, scratch: float = 0.0) -> bool:
    """Return whether a rank's need, with scratch left free, is within its core's memory; all in the
    same unit.
    """
    return per_rank + scratch <= capacity


@dataclass(frozen=True, kw_only=True)
class DeploymentPlan(Rendered):
    """Memory of one rank against its core, findings, and which instances would fit instead where
    this one does not.
    """

    instance: Instance
    deployment: Deployment
    memory: RankMemory
    findings: tuple[Objection, ...]
    largest_batch: int
    longest_sequence: int
    fitting_instances: tuple[str, ...]
    converted_bytes: int
    unrolled: Mapping[
        str, int
    ]  # way of context encoding's expert products to how many of them its graph holds

    @property
    def fits(self) -> bool:
        return fits(self.memory.total, self.instance.memory_per_core)

    @property
    def refused(self) -> bool:
        return not self.fits or any(finding.severity == REFUSE for finding in self.findings)

    @property
    def sharded_bytes(self) -> int:
        """All ranks' saved weights."""
        return self.memory.weights * self.deployment.tp_degree

    def to_json(self) -> dict[str, Any]:
        return {
            "instance": self.instance.name,
            "deployment": asdict(self.deployment),
            "fits": self.fits,
            "refused": self.refused,
            "bytes_per_rank": self.memory.to_json(),
            "bytes_per_core": self.instance.memory_per_core,
            "findings": [asdict(finding) for finding in self.findings],
            "largest_batch": self.largest_batch,
            "longest_sequence": self.longest_sequence,
            "fitting_instances": list(self.fitting_instances),
            "unrolled_expert_products": dict(self.unrolled),
            "disk_bytes": {"converted": self.converted_bytes, "sharded": self.sharded_bytes},
        }

    def render(self) -> str:
        deployment = self.deployment
        memory = self.memory
        core = self.instance.memory_per_core
        rows = (
            ("experts", memory.experts),
            ("attention, padded heads included", memory.attention),
            ("embedding and head", memory.embedding_and_head),
            ("on every rank (norms, router)", memory.replicated),
            (
                f"KV cache, {deployment.batch_size} x {deployment.seq_len} tokens",
                memory.key_value_cache,
            ),
            ("scratch to leave free", memory.scratch),
            ("needed", memory.total),
            (f"a core of {self.instance.name} has", core),
        )
        lines = [
            f"{self.instance.name}: tp_degree {deployment.tp_degree} (moe_tp "
            f"{deployment.moe_tp_degree}, moe_ep {deployment.moe_ep_degree}), "
            f"{'fits' if self.fits else 'does NOT fit'}",
            *(f"  {name:<42}{size / GIB:8.2f} GiB" for name, size in rows),
        ]
        lines.append(
            f"  largest batch at this length {self.largest_batch}, longest sequence at this batch "
            f"{self.longest_sequence}"
        )
        ways = ", ".join(
            f"{name} {count}{' (chosen)' if name == deployment.blockwise_matmul else ''}"
            for name, count in self.unrolled.items()
        )
        lines.append(
            f"  expert products in the graph of {deployment.context_length} tokens: {ways}"
        )
        if not self.fits:
            lines.append(
                f"  would fit: {', '.join(self.fitting_instances) or 'none of the known instances'}"
            )
        lines.append(
            f"  disk: {self.converted_bytes / 1e9:.0f} GB converted + "
            f"{self.sharded_bytes / 1e9:.0f} GB sharded; first compile reported as "
            f"{COMPILE_MINUTES[0]} to {COMPILE_MINUTES[1]} minutes on trn2"
        )
        lines += [f"  {finding}" for finding in self.findings]
        lines.append("refused" if self.refused else "accepted")
        return "\n".join(lines)


def plan_case(case: Case) -> DeploymentPlan:
    """Memory, findings and alternatives of one case."""
    config = case.config
    deployment = case.deployment
    instance = case.instance
    findings = tuple(lint.lint(case))
    memory = rank_memory(config, deployment)
    per_token = cache_bytes_per_token(config, deployment.tp_degree)
    room = max(0, instance.memory_per_core - memory.weights - memory.scratch) // per_token
    return DeploymentPlan(
        instance=instance,
        deployment=deployment,
        memory=memory,
        findings=findings,
        largest_batch=room // deployment.seq_len,
        longest_sequence=min(room // deployment.batch_size, config.max_position_embeddings),
        fitting_instances=()
        if fits(memory.total, instance.memory_per_core)
        else tuple(_fitting(case)),
        converted_bytes=checkpoint_bytes(config),
        unrolled={
            way.name: blockwise.unrolled_products(way, config, deployment)
            for way in blockwise.BLOCKWISE_MATMULS.values()
            if instance.nki_kernels or not way.is_kernel
        },
    )


def _fitting(case: Case) -> list[str]:
    """Instances on which the same batch and length work, with all their cores and experts spread
    one way that does.
    """
    found = []
    for name in instances.names():
        other = instances.instance(name)
        tp_degree = max(other.tp_degrees, default=other.logical_cores)
        if tp_degree > other.logical_cores:
            continue
        for moe_tp_degree in lint.divisors(tp_degree):
            deployment = replace(
                case.deployment,
                tp_degree=tp_degree,
                moe_tp_degree=moe_tp_degree,
                moe_ep_degree=tp_degree // moe_tp_degree,
            )
            candidate = replace(case, deployment=deployment, instance=other)
            if any(finding.severity == REFUSE for finding in lint.lint(candidate)):
                continue
            if fits(rank_memory(case.config, deployment).total, other.memory_per_core):
                found.append(name)
                break
    return found


def check_buckets(buckets: Sequence[int], seq_len: int) -> None:
    """Raise ConfigError unless context-encoding lengths ascend between 2 and `seq_len`."""
    ascending = sorted(set(buckets))
    if not buckets or list(buckets) != ascending or not 1 < buckets[0] <= buckets[-1] <= seq_len:
        raise ConfigError(
            f"buckets {list(buckets)}: expected ascending lengths from 2 to {seq_len}"
        )


@dataclass(frozen=True, kw_only=True)
class DeploymentSettings:
    """The settings of a plan; lengths in tokens.

    `moe_ep_degree` defaults to what is left of tp_degree, `seq_len` to 1024 or the model's
    positions, the context-encoding buckets to one of `seq_len`.
    """

    instance: str
    tp_degree: int
    moe_tp_degree: int = 1
    moe_ep_degree: int | None = None
    batch_size: int = 1
    seq_len: int | None = None
    context_lengths: Sequence[int] = ()
    blockwise_matmul: str = blockwise.DEFAULT
    expert_kernel: str = EXPERT_KERNELS[0]


def deployment_case(config: ModelConfig, settings: DeploymentSettings) -> Case:
    """A case for a model whose config.json says how its weights are stored, converted or as
    published.

    Raises ConfigError for an unknown name, a size below 1, or buckets that do not lie between 2 and
    `seq_len` in ascending order.
    """
    seq_len = settings.seq_len or min(DEFAULT_SEQ_LEN, config.max_position_embeddings)
    sizes = {
        "tp_degree": settings.tp_degree,
        "moe_tp_degree": settings.moe_tp_degree,
        "batch_size": settings.batch_size,
        "seq_len": seq_len,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ConfigError(f"{name} is {size}; expected at least 1")
    if settings.expert_kernel not in EXPERT_KERNELS:
        raise ConfigError(
            f"expert_kernel is {settings.expert_kernel!r}; expected one of "
            f"{', '.join(EXPERT_KERNELS)}"
        )
    converted = config.raw.get(CONVERTED_SECTION) or {}
    fp8 = config.declares_fp8
    buckets = tuple(settings.context_lengths) or (seq_len,)
    check_buckets(buckets, seq_len)
    deployment = Deployment(
        **sizes,
        moe_ep_degree=settings.moe_ep_degree
        or max(1, settings.tp_degree // settings.moe_tp_degree),
        context_length=max(buckets),
        smallest_context=min(buckets),
        fp8_attention=fp8 and converted.get("attention", "fp8") == "fp8",
        fp8_experts=fp8,
        blockwise_matmul=blockwise.blockwise_matmul(settings.blockwise_matmul).name,
        expert_kernel=settings.expert_kernel,
    )
    machine = instances.instance(settings.instance)
    return Case(
        config=config, deployment=deployment, instance=machine, fp8_max=largest_code(config)
    )


def plan_deployment(directory: str | Path, **settings: Any) -> DeploymentPlan:
    """The plan for a checkpoint or converted directory, from its config.json alone; `settings` are
    those of DeploymentSettings.
    """
    asked = DeploymentSettings(**settings)
    config = ModelConfig.from_dir(local_directory(directory, files=["config.json"]))
    return plan_case(deployment_case(config, asked))
