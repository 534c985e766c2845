"""The settings of a deployment: what was asked for, and what a compile takes for the rest."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError
from neuron_minimax.planner import blockwise, instances
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.conversions import stored_as
from neuron_minimax.planner.memory import EXPERT_KERNELS, EXPERT_SCALES, Deployment, largest_code

DEFAULT_INSTANCE = "trn2.48xlarge"
DEFAULT_SEQ_LEN = 1024
SMALLEST_BUCKET = 128
LATENCY = "latency"
GOALS = (LATENCY, "throughput")
DEGREES = frozenset(("tp_degree", "moe_tp_degree", "moe_ep_degree"))


@dataclass(frozen=True, kw_only=True)
class DeploymentSettings:
    """The settings of a plan; lengths in tokens. What is left out, the planner chooses: where
    `instance` and `tp_degree` are given, as a compile does, else as the goal wants it.

    A compile takes `moe_tp_degree` 1 where the other is not given either (or all ranks without
    experts), what is left of tp_degree for the other, `batch_size` 1, `seq_len` 1024 or the model's
    positions, and as context-encoding lengths the powers of two from 128 up to `seq_len`.
    """

    instance: str | None = None
    tp_degree: int | None = None
    moe_tp_degree: int | None = None
    moe_ep_degree: int | None = None
    batch_size: int | None = None
    seq_len: int | None = None
    context_lengths: Sequence[int] = ()
    blockwise_matmul: str = blockwise.DEFAULT
    expert_kernel: str = EXPERT_KERNELS[0]
    expert_scales: str = EXPERT_SCALES[0]
    goal: str = LATENCY

    @property
    def given(self) -> frozenset[str]:
        """The names of those that were given."""
        named = {field.name: field.default for field in fields(self)}
        found = {name: getattr(self, name) for name in named}
        return frozenset(name for name in named if found[name] not in (named[name], []))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A case with the names of those of its settings that were asked for, and the goal of a
    search.
    """

    case: Case
    given: frozenset[str] = frozenset(field.name for field in fields(DeploymentSettings))
    goal: str = LATENCY

    @property
    def is_whole(self) -> bool:
        """Whether there is one deployment to judge, and none to search for."""
        return {"instance", "tp_degree"} <= self.given


def largest_sizes() -> dict[str, int]:
    """Sizes beyond which no plan is made: the degrees are ranks, and no instance has more cores;
    the others are far above what any has memory for.
    """
    ranks = max(instances.instance(name).logical_cores for name in instances.names())
    return {**dict.fromkeys(DEGREES, ranks), "batch_size": 1 << 20, "seq_len": 1 << 30}


def moe_degrees(
    config: ModelConfig, tp_degree: int, moe_tp_degree: int | None, moe_ep_degree: int | None
) -> tuple[int, int]:
    """The degrees of the experts; of a family without experts, all ranks and 1.

    Raises ConfigError for degrees below 1, and for others than 1 and its ranks in such a family.
    """
    for name, degree in (
        ("tp_degree", tp_degree),
        ("moe_tp_degree", moe_tp_degree),
        ("moe_ep_degree", moe_ep_degree),
    ):
        if degree is not None and degree < 1:
            raise ConfigError(f"{name} is {degree}; expected at least 1", usage=True)
    if config.family.architecture.has_experts:
        if moe_tp_degree is None:
            moe_tp_degree = 1 if moe_ep_degree is None else max(1, tp_degree // moe_ep_degree)
        if moe_ep_degree is None:
            moe_ep_degree = max(1, tp_degree // moe_tp_degree)
        return moe_tp_degree, moe_ep_degree
    for name, degree, own in (
        ("moe_tp_degree", moe_tp_degree, tp_degree),
        ("moe_ep_degree", moe_ep_degree, 1),
    ):
        if degree not in (None, 1, own):
            raise ConfigError(
                f"{name} is {degree}, but {config.family.title} has no experts to share out; leave "
                "it out: all ranks share its MLPs",
                usage=True,
            )
    return tp_degree, 1


def check_buckets(buckets: Sequence[int], seq_len: int) -> None:
    """Raise ConfigError unless context-encoding lengths ascend between 2 and `seq_len`."""
    ascending = sorted(set(buckets))
    if not buckets or list(buckets) != ascending or not 1 < buckets[0] <= buckets[-1] <= seq_len:
        raise ConfigError(
            f"buckets {list(buckets)}: expected ascending lengths from 2 to {seq_len}", usage=True
        )


def default_buckets(seq_len: int) -> tuple[int, ...]:
    """The context-encoding lengths of a compile that is given none."""
    sizes = [SMALLEST_BUCKET]
    while 2 * sizes[-1] < seq_len:
        sizes.append(2 * sizes[-1])
    return (*(size for size in sizes if size < seq_len), seq_len)


def with_buckets(case: Case, buckets: Sequence[int]) -> Case:
    """The case with these context-encoding lengths, or with those of a compile that is given
    none.
    """
    usual = default_buckets(case.deployment.seq_len)
    lengths = tuple(buckets) or usual
    deployment = replace(case.deployment, context_length=lengths[-1], smallest_context=lengths[0])
    return replace(case, deployment=deployment, buckets=() if lengths == usual else lengths)


def _check(settings: DeploymentSettings) -> None:
    """Raise ConfigError for a setting that was given and that no model or instance has."""
    for name, most in largest_sizes().items():
        size = getattr(settings, name)
        least = 2 if name == "seq_len" else 1
        if size is not None and not least <= size <= most:
            raise ConfigError(f"{name} is {size}; expected {least} to {most}", usage=True)
    for name, chosen, known in (
        ("blockwise_matmul", settings.blockwise_matmul, blockwise.BLOCKWISE_MATMULS),
        ("expert_kernel", settings.expert_kernel, EXPERT_KERNELS),
        ("expert_scales", settings.expert_scales, EXPERT_SCALES),
        ("goal", settings.goal, GOALS),
    ):
        if chosen not in known:
            raise ConfigError(
                f"{name} is {chosen!r}; expected one of {', '.join(known)}", usage=True
            )


def deployment_case(config: ModelConfig, settings: DeploymentSettings) -> Case:
    """A case for a model whose config.json says how its weights are stored, converted or as
    published; what is not given as a compile takes it.

    Raises ConfigError for an unknown name, a size below 1 or above `largest_sizes`, or buckets that
    do not lie between 2 and `seq_len` in ascending order.
    """
    _check(settings)
    machine = instances.instance(
        DEFAULT_INSTANCE if settings.instance is None else settings.instance
    )
    tp_degree = settings.tp_degree
    if tp_degree is None:
        tp_degree = max(machine.tp_degrees, default=machine.logical_cores)
    positions = config.max_position_embeddings
    seq_len = settings.seq_len
    if seq_len is None:
        seq_len = max(2, min(DEFAULT_SEQ_LEN, positions))
    moe_tp_degree, moe_ep_degree = moe_degrees(
        config, tp_degree, settings.moe_tp_degree, settings.moe_ep_degree
    )
    sizes: dict[str, Any] = {
        "tp_degree": tp_degree,
        "moe_tp_degree": moe_tp_degree,
        "moe_ep_degree": moe_ep_degree,
        "batch_size": 1 if settings.batch_size is None else settings.batch_size,
        "seq_len": seq_len,
    }
    buckets = tuple(settings.context_lengths)
    check_buckets(buckets or default_buckets(seq_len), seq_len)
    deployment = Deployment(
        **sizes,
        **stored_as(config),
        context_length=seq_len,
        smallest_context=seq_len,
        blockwise_matmul=settings.blockwise_matmul,
        expert_kernel=settings.expert_kernel,
        expert_scales=settings.expert_scales,
    )
    case = Case(
        config=config, deployment=deployment, instance=machine, fp8_max=largest_code(config)
    )
    return with_buckets(case, buckets)
