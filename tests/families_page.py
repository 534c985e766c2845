"""The tables of docs/families.md from the planner: `python -m tests.families_page` writes them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from neuron_minimax.config import ModelConfig
from neuron_minimax.planner import instances
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.instances import GIB
from neuron_minimax.planner.lint import lint, refusals
from neuron_minimax.planner.memory import (
    EXPANDED_SCALES,
    checkpoint_bytes,
    expert_scales,
    rank_memory,
)
from neuron_minimax.planner.search import cells
from neuron_minimax.planner.settings import Asked, DeploymentSettings, deployment_case
from tests.full_size import published_config
from tests.published import published

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SEQ_LEN = 4096
INSTANCES = (
    "inf2.xlarge",
    "inf2.24xlarge",
    "inf2.48xlarge",
    "trn1.2xlarge",
    "trn1.32xlarge",
    "trn2.3xlarge",
    "trn2.48xlarge",
)
# Model to how many sequences are planned: 1, and with experts the fewest for expert parallelism.
MODELS = {
    "Qwen3-0.6B": (1,),
    "Qwen3-1.7B": (1,),
    "Qwen3-4B-FP8": (1,),
    "Qwen3-8B-FP8": (1,),
    "Qwen3-8B": (1,),
    "Qwen3-14B-FP8": (1,),
    "Qwen3-32B-FP8": (1,),
    "Qwen3-32B": (1,),
    "Qwen2.5-7B": (1,),
    "Qwen2.5-14B": (1,),
    "Qwen2.5-32B": (1,),
    "Qwen2.5-72B": (1,),
    "Qwen3-30B-A3B-FP8": (1, 16),
    "Qwen3-30B-A3B": (1, 16),
    "Qwen3-235B-A22B-FP8": (1, 16),
    "Qwen3-Coder-480B-A35B-FP8": (1, 20),
    "MiniMax-M2": (1, 32),
}
DAGGER = "&dagger;"  # of degrees at which the scales of experts are expanded
SUMS = ("Qwen3-30B-A3B-FP8", 16, ("inf2.24xlarge", "trn1.32xlarge", "trn2.3xlarge"))


def case(name: str, batch: int) -> Case:
    raw = published_config() if name == "MiniMax-M2" else published(name)
    settings = DeploymentSettings(
        instance="trn2.48xlarge", tp_degree=1, batch_size=batch, seq_len=SEQ_LEN
    )
    return deployment_case(ModelConfig.from_dict(raw), settings)


def accepted_deployments(planned: Case, instance: str) -> Iterator[Case]:
    """The same batch and length on an instance, at each degree documented for it that fits, the
    lowest first: with whole blocks on every rank where that can be, and with the fewest ranks to
    spread experts over.
    """
    machine = instances.instance(instance)
    found: dict[int, Case] = {}
    for each in cells(Asked(case=planned), machine, frozenset(), documented=True):
        tp_degree = each.deployment.tp_degree
        if refusals(each):
            continue
        if tp_degree not in found or (is_expanded(found[tp_degree]) and not is_expanded(each)):
            found[tp_degree] = each
    yield from found.values()


def is_expanded(each: Case) -> bool:
    return expert_scales(each.config, each.deployment) == EXPANDED_SCALES


def needed(planned: Case) -> float:
    """GiB on a rank."""
    return rank_memory(planned.config, planned.deployment).total / GIB


def shares(accepted: Sequence[Case]) -> str:
    """How the ranks share out experts: the channels of each, and then their number."""
    if not accepted[0].config.family.architecture.has_experts:
        return ""
    if all(each.deployment.moe_ep_degree == 1 for each in accepted):
        return " (moe_ep 1)"
    (moe_tp,) = {each.deployment.moe_tp_degree for each in accepted if not is_expanded(each)}
    return f" (moe_tp {moe_tp})"


def cell(planned: Case, instance: str) -> str:
    accepted = list(accepted_deployments(planned, instance))
    if not accepted:
        return "-"
    host = any(finding.rule == "R11" for finding in lint(accepted[0]))
    listed = ", ".join(
        f"{each.deployment.tp_degree}{DAGGER if is_expanded(each) else ''}" for each in accepted
    )
    return f"{listed}{shares(accepted)}: {needed(accepted[0]):.1f}{' *' if host else ''}"


def fits_table() -> Iterator[str]:
    cores = (instances.instance(name) for name in INSTANCES)
    sizes = (f"{core.logical_cores} x {core.memory_per_core // GIB} GiB" for core in cores)
    heads = (f"{name}<br>{size}" for name, size in zip(INSTANCES, sizes, strict=True))
    yield f"| model | files, GB | sequences | {' | '.join(heads)} |"
    yield "|---" * (3 + len(INSTANCES)) + "|"
    for name, batches in MODELS.items():
        for batch in batches:
            planned = case(name, batch)
            size = checkpoint_bytes(planned.config) / 1e9
            cells = (cell(planned, instance) for instance in INSTANCES)
            yield f"| {name} | {size:.1f} | {batch} | {' | '.join(cells)} |"


def sums_table() -> Iterator[str]:
    name, batch, machines = SUMS
    planned = [
        each for machine in machines for each in accepted_deployments(case(name, batch), machine)
    ]
    memory = [rank_memory(each.config, each.deployment) for each in planned]
    heads = (
        f"{each.instance.name}<br>tp {each.deployment.tp_degree}, "
        f"moe_tp {each.deployment.moe_tp_degree}"
        for each in planned
    )
    yield f"| GiB on each rank | {' | '.join(heads)} |"
    yield "|---" * (1 + len(planned)) + "|"
    for title, part in (
        ("experts", "experts"),
        ("attention, heads repeated", "attention"),
        ("embedding and head", "embedding_and_head"),
        ("norms and router, whole on every rank", "replicated"),
        (f"key/value cache, {batch} x {SEQ_LEN} tokens", "key_value_cache"),
        ("left free for activations and graphs", "scratch"),
        ("needed", "total"),
    ):
        yield f"| {title} | {' | '.join(f'{getattr(m, part) / GIB:.3f}' for m in memory)} |"
    cores = (f"{each.instance.memory_per_core / GIB:.0f}" for each in planned)
    yield f"| a core has | {' | '.join(cores)} |"


TABLES = {"fits": fits_table, "sums": sums_table}


def renewed(text: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}: made by python -m tests.families_page -->", f"<!-- /{name} -->"
        made = "\n".join((begin, *table(), end))
        pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
        text, count = re.subn(pattern, lambda match, made=made: made, text, flags=re.DOTALL)
        assert count == 1, f"docs/families.md has {count} places for the table {name}"
    return text


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
