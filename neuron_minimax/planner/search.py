"""Search instances, degrees, batches and lengths for deployments that fit: as asked first, then the
nearest. Arithmetic proposes, and the requirements of planner/lint.py judge every proposal.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from math import log2
from typing import Any

from neuron_minimax.planner import blockwise, instances, lint
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.conversions import conversions
from neuron_minimax.planner.expert_lint import least_batch, least_context
from neuron_minimax.planner.instances import Instance
from neuron_minimax.planner.memory import (
    EXPERT_KERNELS,
    EXPERT_SCALES,
    KERNEL_TOKENS,
    cache_bytes_per_token,
    expert_scales,
    padding_experts,
)
from neuron_minimax.planner.settings import (
    DEGREES,
    LATENCY,
    Asked,
    default_buckets,
    largest_sizes,
    with_buckets,
)
from neuron_minimax.planner.traffic import Traffic, traffic

# Requirements that another batch, length or list of buckets can meet.
ELASTIC = frozenset(("R3", "R4", "R14", "R15", "R18"))
MOST_PROPOSALS = 4
# A length that was shortened is a multiple of this where it can be.
WHOLE_LENGTH = 128
# So many times as slow a deployment is as good, if its ranks hold no experts of zeros.
PADDED_GAIN = 1.1

# Takes a line about what is searched.
Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Proposal:
    """A deployment that fits, and what of the settings asked for it changes; `alike` are other
    instances of the same cores and memory. `conversion` is what to do first where it is of another
    conversion than the model given.
    """

    case: Case
    traffic: Traffic
    alike: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()
    conversion: str = ""

    def to_json(self) -> dict[str, Any]:
        case = self.case
        return {
            "instance": case.instance.name,
            "alike": list(self.alike),
            "deployment": asdict(case.deployment),
            "buckets": list(case.buckets),
            "expert_scales": expert_scales(case.config, case.deployment),
            "padding_experts": padding_experts(case.config, case.deployment),
            "changes": list(self.changes),
            "bytes_per_rank": case.memory.to_json(),
            "bytes_per_core": case.instance.memory_per_core,
            **self.traffic.to_json(),
            "warnings": [finding.rule for finding in lint.lint(case)],
        }


def as_asked(asked: Asked, tell: Tell) -> list[Case]:
    """The deployments that fit and keep every setting that was given, the best for the goal first;
    of several instances the best of each. Where no documented degree fits, those at others, and
    then what is nearest at documented ones.
    """
    machines = _machines(asked)
    kept = DEGREES & asked.given
    found = _as_asked(asked, machines, kept, tell, documented=True)
    if found:
        return found
    found = _as_asked(asked, machines, kept, tell, documented=False)[: MOST_PROPOSALS // 2]
    return found and found + _relaxed(asked, machines, tell, documented=True)


def nearest(asked: Asked, tell: Tell) -> list[Proposal]:
    """What fits and is nearest to settings that do not, of which none is kept at any price: other
    degrees; else another batch or length on the same instance, and other instances; else other
    kernels; at last another conversion.
    """
    for conversion, case in conversions(asked.case):
        for variant in _kernels(replace(asked, case=case)):
            found = _nearest(variant, tell)
            if found:
                return [_proposal(asked, each, conversion) for each in found]
    return []


def proposals(asked: Asked, found: Sequence[Case]) -> tuple[Proposal, ...]:
    """The best few of deployments in their order, the one on the smallest instance among them."""
    if not found:
        return ()
    smallest = min(found, key=lambda case: case.instance.device_memory)
    few = list(found[:MOST_PROPOSALS])
    if smallest not in few:
        few[-1] = smallest
    return tuple(_proposal(asked, case) for case in few)


def closest_refused(asked: Asked) -> Case:
    """Of the deployments that were searched in vain one that another batch or length might do for,
    with the fewest refusals, and of those the one that needs the smallest part of its core.
    """
    kept = DEGREES & asked.given
    tried = [
        _sized(cell, asked)
        for machine in _machines(asked)
        for cell in cells(asked, machine, kept, documented=True)
    ]

    def distance(case: Case) -> tuple[float, ...]:
        rules = {finding.rule for finding in lint.refusals(case)}
        part = case.memory.total / case.instance.memory_per_core
        return (not rules <= ELASTIC, len(rules), part)

    return min(tried, default=asked.case, key=distance)


def goal_key(goal: str, case: Case) -> tuple[float, ...]:
    """What a goal wants least of: the time to read a step's bytes, or the time of all cores for a
    token; then collectives, expert products of context encoding, and ranks.
    """
    step = traffic(case)
    ranks = case.deployment.tp_degree
    seconds = step.seconds
    if goal != LATENCY:
        seconds *= ranks / case.deployment.batch_size
    products = 0
    if case.config.family.architecture.has_experts:
        way = blockwise.blockwise_matmul(case.deployment.blockwise_matmul)
        products = blockwise.unrolled_products(way, case.config, case.deployment)
    return (seconds, step.collectives, products, ranks)


def _preference(goal: str, case: Case) -> tuple[float, ...]:
    """A goal's key, by which experts of zeros have to be clearly worth their memory."""
    seconds, *others = goal_key(goal, case)
    padding = padding_experts(case.config, case.deployment)
    return (seconds * PADDED_GAIN if padding else seconds, *others)


def changes(asked: Asked, case: Case) -> tuple[str, ...]:
    """What a case has in place of the settings asked for."""
    was = asked.case.deployment
    found = []
    if "instance" in asked.given and case.instance.name != asked.case.instance.name:
        found.append(f"instance {case.instance.name}")
    judged = asked.given | {"seq_len"} | ({"batch_size"} if asked.is_whole else set())
    for name in ("tp_degree", "moe_tp_degree", "moe_ep_degree", "batch_size", "seq_len"):
        value = getattr(case.deployment, name)
        if name in judged and value != getattr(was, name):
            found.append(f"{name} {value} in place of {getattr(was, name)}")
    if case.buckets and case.buckets != asked.case.buckets:
        found.append(f"buckets {','.join(map(str, case.buckets))}")
    choices = ("blockwise_matmul", "expert_kernel", "expert_scales")
    chosen = {name: getattr(case.deployment, name) for name in choices}
    found += [f"{name} {now}" for name, now in chosen.items() if now != getattr(was, name)]
    return tuple(found)


def _proposal(asked: Asked, case: Case, conversion: str = "") -> Proposal:
    return Proposal(
        case=case,
        traffic=traffic(case),
        alike=_alike(case),
        changes=changes(asked, case) + ((conversion,) if conversion else ()),
        conversion=conversion,
    )


def _alike(case: Case) -> tuple[str, ...]:
    """Other instances that a plan cannot tell from a case's own."""
    others = (name for name in instances.names() if name != case.instance.name)
    return tuple(name for name in others if _kind(instances.instance(name)) == _kind(case.instance))


def _kind(machine: Instance) -> Instance:
    """An instance but for its name."""
    return replace(machine, name="")


def _kinds() -> dict[Instance, Instance]:
    """The first instance of each kind."""
    kinds: dict[Instance, Instance] = {}
    for machine in map(instances.instance, instances.names()):
        kinds.setdefault(_kind(machine), machine)
    return kinds


def _machines(asked: Asked) -> list[Instance]:
    """The instance asked for, or one of each kind."""
    return [asked.case.instance] if "instance" in asked.given else list(_kinds().values())


def _kernels(asked: Asked) -> Iterator[Asked]:
    """The kernels and the layout of scales asked for, then those that every instance and split
    takes.
    """
    yield asked
    plain = replace(
        asked.case.deployment,
        blockwise_matmul=blockwise.DEFAULT,
        expert_kernel=EXPERT_KERNELS[0],
        expert_scales=EXPERT_SCALES[0],
    )
    if plain != asked.case.deployment:
        yield replace(asked, case=replace(asked.case, deployment=plain))


def _nearest(asked: Asked, tell: Tell) -> list[Case]:
    here = _machines(asked)
    searched = set(map(_kind, here))
    elsewhere = [machine for kind, machine in _kinds().items() if kind not in searched]
    free: frozenset[str] = frozenset()
    found = _as_asked(asked, here, free, tell, documented=True)
    if found:
        return found[:MOST_PROPOSALS]
    near = _relaxed(asked, here, tell, documented=True)[: MOST_PROPOSALS // 2]
    other = _as_asked(asked, elsewhere, free, tell, documented=True)
    other = _first_of_each(other, lambda case: case.instance)
    found = (near + other)[: MOST_PROPOSALS - 1]
    found += _as_asked(asked, here, free, tell, documented=False)[:1]
    for documented in (True, False):
        for machines in (elsewhere, here):
            found = found or _relaxed(asked, machines, tell, documented=documented)
    return found[:MOST_PROPOSALS]


def _as_asked(
    asked: Asked,
    machines: Sequence[Instance],
    kept: frozenset[str],
    tell: Tell,
    *,
    documented: bool,
) -> list[Case]:
    """With the batch and the length asked for, the best first."""
    found = []
    for machine in machines:
        tell(f"searching {machine.name}")
        sized = (_sized(cell, asked) for cell in cells(asked, machine, kept, documented))
        found += [cell for cell in sized if not lint.refusals(cell)]
    return _best(found, lambda case: _preference(asked.goal, case))


def _relaxed(
    asked: Asked, machines: Sequence[Instance], tell: Tell, *, documented: bool
) -> list[Case]:
    """With another batch or length, the nearest first."""
    found = []
    for machine in machines:
        tell(f"searching {machine.name} for another batch or length")
        for cell in cells(asked, machine, frozenset(), documented):
            found += [each for each in _other_sizes(cell) if not lint.refusals(each)]
    was = asked.case.deployment

    def distance(case: Case) -> tuple[float, ...]:
        batch = abs(log2(case.deployment.batch_size / was.batch_size))
        length = abs(log2(case.deployment.seq_len / was.seq_len))
        return (batch + length, *_preference(asked.goal, case))

    return _best(found, distance)


def _best(found: Sequence[Case], key: Callable[[Case], tuple[float, ...]]) -> list[Case]:
    """Cases in order, and of several instances the best of each kind; of one instance all that
    differ in tp_degree, batch or length.
    """
    several = len({case.instance.name for case in found}) > 1

    def alike(case: Case) -> Any:
        deployment = case.deployment
        sizes = (deployment.tp_degree, deployment.batch_size, deployment.seq_len)
        return case.instance if several else sizes

    return _first_of_each(sorted(found, key=key), alike)


def _first_of_each(cases: Iterable[Case], alike: Callable[[Case], Any]) -> list[Case]:
    first: dict[Any, Case] = {}
    for case in cases:
        first.setdefault(alike(case), case)
    return list(first.values())


def cells(
    asked: Asked, machine: Instance, kept: frozenset[str], documented: bool
) -> Iterator[Case]:
    """A case of the same batch and length for each way to share the model out on an instance, but
    those that arithmetic rules out.
    """
    config = asked.case.config
    experts = config.num_local_experts
    has_experts = config.family.architecture.has_experts
    probe = replace(asked.case, instance=machine)
    if any(True for requirement in lint.OF_MODEL_AND_CHIP for _ in requirement(probe)):
        return
    for tp_degree in machine.tp_degrees if documented else range(1, machine.logical_cores + 1):
        if config.hidden_size % tp_degree:
            continue
        for moe_ep_degree in lint.divisors(tp_degree) if has_experts else [1]:
            sharing: dict[str, Any] = {
                "tp_degree": tp_degree,
                "moe_tp_degree": tp_degree // moe_ep_degree,
                "moe_ep_degree": moe_ep_degree,
            }
            other = any(sharing[name] != getattr(asked.case.deployment, name) for name in kept)
            if not other and moe_ep_degree <= max(1, experts):
                yield replace(probe, deployment=replace(probe.deployment, **sharing))


def _sized(case: Case, asked: Asked) -> Case:
    """The batch and the buckets that were not asked for, as the goal and the degrees want them."""
    batch = case.deployment.batch_size
    if "batch_size" not in asked.given:
        batch = least_batch(case)
        while asked.goal != LATENCY and 2 * batch <= min(
            most_batch(case), instances.most_reported_batch()
        ):
            batch *= 2
    sized = replace(case, deployment=replace(case.deployment, batch_size=batch))
    return sized if "context_lengths" in asked.given else _with_usual_buckets(sized)


def room(case: Case) -> int:
    """Positions over all sequences that a rank has memory for."""
    memory = case.memory
    left = case.instance.memory_per_core - memory.weights - memory.scratch
    return max(0, left) // cache_bytes_per_token(case.config, case.deployment.tp_degree)


def most_batch(case: Case) -> int:
    """The most sequences of this length that a rank has memory for and its kernel takes."""
    most = min(room(case) // case.deployment.seq_len, largest_sizes()["batch_size"])
    return min(most, KERNEL_TOKENS) if case.deployment.expert_kernel == "nki" else most


def _with_usual_buckets(case: Case) -> Case:
    """The lengths that a compile takes by itself, without those that are too short for it."""
    usual = default_buckets(case.deployment.seq_len)
    long_enough = tuple(length for length in usual if length >= least_context(case))
    return with_buckets(case, long_enough or usual)


def _other_sizes(case: Case) -> Iterator[Case]:
    """Batches and lengths near those of a case that its ranks may have memory for: another batch,
    another length, and both.
    """
    if not {finding.rule for finding in lint.refusals(case)} <= ELASTIC:
        return
    positions = room(case)
    fewest = least_batch(case)
    shortest = least_context(case)
    longest = case.config.max_position_embeddings
    length = min(max(case.deployment.seq_len, shortest), longest)
    batch = max(case.deployment.batch_size, fewest)
    if case.deployment.expert_kernel == "nki":
        batch = min(batch, KERNEL_TOKENS)
    for sequences, tokens in (
        (min(batch, positions // length), length),
        (batch, min(length, positions // batch)),
        (fewest, min(length, positions // fewest)),
    ):
        if sequences < fewest or tokens < shortest:
            continue
        whole = tokens // WHOLE_LENGTH * WHOLE_LENGTH
        shortened = whole if tokens != length and whole >= shortest else tokens
        sized = replace(case.deployment, batch_size=sequences, seq_len=shortened)
        kept = tuple(each for each in case.buckets if shortest <= each <= shortened)
        resized = replace(case, deployment=sized)
        yield with_buckets(resized, kept) if kept else _with_usual_buckets(resized)
