"""A deployment plan as text of 100 columns: the verdict, its reasons, what fits, the sums."""

import shlex
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.inspection.document import table
from neuron_minimax.planner import blockwise, lint
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.instances import GIB
from neuron_minimax.planner.lint import memory_text
from neuron_minimax.planner.memory import (
    EXPANDED_SCALES,
    EXPERT_KERNELS,
    EXPERT_SCALES,
    expert_scales,
    padding_experts,
)
from neuron_minimax.planner.search import Proposal, goal_key
from neuron_minimax.planner.settings import LATENCY

if TYPE_CHECKING:
    from neuron_minimax.planner.report import DeploymentPlan

COLUMNS = 100
# Warnings that can speak against one proposal and for another: degrees, and host memory.
OF_THE_MACHINE = ("R6", "R11")
# What a goal counts when the time to read is the same.
COUNTED = ("collectives", "expert products in context encoding", "ranks")
# Minutes that first compiles of MiniMax-M2 were reported to take.
COMPILE_MINUTES = (25, 90)


def render(plan: "DeploymentPlan") -> str:
    """The verdict in the first line, and what follows from it."""
    return "\n".join(
        [
            *wrapped(f"{plan.verdict}: {setting(plan.case)}"),
            *_search(plan),
            *(line for reason in plan.reasons for line in wrapped(str(reason), "  ")),
            *_proposals(plan),
            *_sums(plan),
            *(line for warning in plan.warnings for line in wrapped(str(warning), "  ")),
        ]
    )


def wrapped(text: str, indent: str = "") -> list[str]:
    """Lines of at most 100 columns; those after the first are indented further."""
    return textwrap.wrap(
        text,
        COLUMNS,
        initial_indent=indent,
        subsequent_indent=f"{indent}    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def setting(case: Case) -> str:
    """Instance, degrees, batch and length."""
    deployment = case.deployment
    experts = (
        f" (moe_tp {deployment.moe_tp_degree}, moe_ep {deployment.moe_ep_degree})"
        if case.config.family.architecture.has_experts
        else ""
    )
    return (
        f"{case.config.family.title} on {case.instance.name}, tp_degree "
        f"{deployment.tp_degree}{experts}, {deployment.batch_size} x {deployment.seq_len} tokens"
    )


def options(case: Case) -> str:
    """The options of `plan` and `compile` that name a case."""
    deployment = case.deployment
    given = {"instance": case.instance.name, "tp-degree": deployment.tp_degree}
    if case.config.family.architecture.has_experts:
        given["moe-tp-degree"] = deployment.moe_tp_degree
        given["moe-ep-degree"] = deployment.moe_ep_degree
    given |= {"batch-size": deployment.batch_size, "seq-len": deployment.seq_len}
    if case.buckets:
        given["buckets"] = ",".join(map(str, case.buckets))
    usual_choices = {
        "blockwise-matmul": blockwise.DEFAULT,
        "expert-kernel": EXPERT_KERNELS[0],
        "expert-scales": EXPERT_SCALES[0],
    }
    for name, usual in usual_choices.items():
        chosen = getattr(deployment, name.replace("-", "_"))
        if chosen != usual:
            given[name] = chosen
    return " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in given.items())


def _search(plan: "DeploymentPlan") -> Iterator[str]:
    if plan.asked.is_whole:
        return
    if plan.fits:
        yield from wrapped(f"the best found for {plan.asked.goal}", "  ")
    else:
        yield from wrapped("nothing fits as asked; this comes closest:", "  ")


def _proposals(plan: "DeploymentPlan") -> Iterator[str]:
    found = plan.proposals
    if plan.refused and not found:
        yield "nothing that the planner knows fits: no instance, degrees, batch or length"
    if not found:
        return
    yield "what fits, the nearest first:" if plan.refused else "what fits, the best first:"
    yield _table(found)
    sizes = [proposal.case.instance.device_memory for proposal in found]
    for number, (proposal, size) in enumerate(zip(found, sizes, strict=True), start=1):
        notes = list(proposal.changes)
        if plan.fits and number > 1:
            notes.append(worse(found[0], proposal, plan.asked.goal))
        if expert_scales(proposal.case.config, proposal.case.deployment) == EXPANDED_SCALES:
            notes.append("the scales of experts expanded")
        padding = padding_experts(proposal.case.config, proposal.case.deployment)
        if padding:
            degree = proposal.case.deployment.moe_ep_degree
            notes.append(f"{padding} of moe_ep {degree} with an expert of zeros")
        if min(sizes) == size < sizes[0]:
            notes.append("the smallest instance")
        if proposal.alike and "instance" not in plan.asked.given:
            notes.append(f"the same on {', '.join(proposal.alike)}")
        findings = [each for each in lint.lint(proposal.case) if each.rule in OF_THE_MACHINE]
        notes += [f"{each.rule}: {each.message}" for each in findings if each not in plan.warnings]
        if notes:
            yield from wrapped(f"{number}: {'; '.join(notes)}", "  ")
    before = f"{found[0].conversion}; then " if found[0].conversion else ""
    yield from wrapped(f"{before}the first as options: {options(found[0].case)}", "  ")


def _table(found: Sequence[Proposal]) -> str:
    """One row each; `experts` are moe_tp x moe_ep, bytes and collectives those of a rank's step."""
    head = ["", "instance", "tp", "batch x len", "of a core"]
    head += ["step reads", "per token", "collectives"]
    has_experts = found[0].case.config.family.architecture.has_experts
    if has_experts:
        head.insert(3, "experts")
    rows = []
    for number, proposal in enumerate(found, start=1):
        case = proposal.case
        deployment = case.deployment
        row = [
            str(number),
            case.instance.name.partition(" server")[0],
            str(deployment.tp_degree),
            f"{deployment.batch_size} x {deployment.seq_len}",
            f"{case.memory.total / GIB:.2f} of {case.instance.memory_per_core / GIB:.0f} GiB",
            size_text(proposal.traffic.bytes_per_step, 2),
            size_text(proposal.traffic.bytes_per_token, 2),
            str(proposal.traffic.collectives),
        ]
        if has_experts:
            row.insert(3, f"{deployment.moe_tp_degree} x {deployment.moe_ep_degree}")
        rows.append(row)
    return table("", head, rows)


def worse(best: Proposal, other: Proposal, goal: str) -> str:
    """How a proposal compares with the best one, which may change less of what was asked for."""
    first = goal_key(goal, best.case)
    second = goal_key(goal, other.case)
    time = "time to read a step" if goal == LATENCY else "time of all its cores to read a token"
    ratio = second[0] / first[0]
    if round(ratio, 2) != 1:
        times = f"{ratio:.2f} times the {time}"
        rate = other.case.instance.bandwidth_per_core / best.case.instance.bandwidth_per_core
        return times if rate >= 1 else f"{times}, at {rate:.2f} of the cores' bandwidth"
    for what, one, another in zip(COUNTED, first[1:], second[1:], strict=True):
        if one != another:
            return f"reads as fast, but {another:.0f} {what} in place of {one:.0f}"
    return "reads as fast, on another instance"


def _sums(plan: "DeploymentPlan") -> Iterator[str]:
    memory = plan.case.memory
    deployment = plan.case.deployment
    instance = plan.case.instance
    expanded = expert_scales(plan.case.config, deployment) == EXPANDED_SCALES
    zeros = padding_experts(plan.case.config, deployment)
    experts = f"experts{', their scales expanded' if expanded else ''}"
    experts += ", zeros included" if zeros else ""
    mlps = ((experts, memory.experts), ("dense and shared MLPs", memory.mlp))
    copied = " (a copy of it)" if plan.case.config.tie_word_embeddings else ""
    rows = (
        *((name, size) for name, size in mlps if size),
        ("attention, padded heads included", memory.attention),
        (f"embedding and head{copied}", memory.embedding_and_head),
        (f"on every rank (norms{', router' if memory.experts else ''})", memory.replicated),
        (
            f"KV cache, {deployment.batch_size} x {deployment.seq_len} tokens",
            memory.key_value_cache,
        ),
        ("scratch to leave free", memory.scratch),
        ("needed", memory.total),
        (f"a core of {instance.name} has", instance.memory_per_core),
    )
    yield "memory of a rank:"
    yield from (f"  {name:<46}{memory_text(size):>12}" for name, size in rows)
    if plan.fits:
        yield (
            f"  largest batch at this length {plan.largest_batch}, longest sequence at this batch "
            f"{plan.longest_sequence}"
        )
    step = plan.traffic
    yield from wrapped(
        f"token generation: a rank reads up to {size_text(step.bytes_per_step, 2)} a step, "
        f"{size_text(step.bytes_per_token, 2)} for each token, which takes "
        f"{1000 * step.seconds:.2f} ms or more by the documented bandwidth, and waits for "
        f"{step.collectives} collectives"
    )
    ways = ", ".join(
        f"{name} {count}{' (chosen)' if name == deployment.blockwise_matmul else ''}"
        for name, count in plan.unrolled.items()
    )
    if ways:
        yield from wrapped(
            f"expert products in the graph of {deployment.context_length} tokens: {ways}"
        )
    yield from wrapped(
        f"disk: {size_text(plan.converted_bytes)} converted and {size_text(plan.sharded_bytes)} "
        "sharded; first compiles of MiniMax-M2 were reported as "
        f"{COMPILE_MINUTES[0]} to {COMPILE_MINUTES[1]} minutes on trn2"
    )
    if plan.warnings:
        yield "to know:"
