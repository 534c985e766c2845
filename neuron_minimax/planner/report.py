"""The `plan` command's answer: one verdict on a deployment, the reasons of a refusal, what fits,
and what to expect of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.checkpoint.kinds import CONFIG_NAME, Wanted, require
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.planner import blockwise, lint, search
from neuron_minimax.planner.cases import REFUSE, Case, Objection
from neuron_minimax.planner.memory import (
    Deployment,
    RankMemory,
    checkpoint_bytes,
    expert_scales,
    padding_experts,
)
from neuron_minimax.planner.settings import Asked, DeploymentSettings, deployment_case
from neuron_minimax.planner.text import render
from neuron_minimax.planner.traffic import Traffic, traffic
from neuron_minimax.progress import SILENT, Progress

FITS = "fits"
REFUSED = "refused"


@dataclass(frozen=True, kw_only=True)
class DeploymentPlan(Rendered):
    """The verdict on a case: the one asked for, or, of a search, the best that fits, else the one
    that comes closest. `proposals` all fit: a search's best, or what is nearest to a refused case.
    """

    asked: Asked
    case: Case
    findings: tuple[Objection, ...]
    traffic: Traffic
    proposals: tuple[search.Proposal, ...]
    # Way of context encoding's expert products to how many of them its graph holds.
    unrolled: Mapping[str, int]

    @property
    def deployment(self) -> Deployment:
        return self.case.deployment

    @property
    def memory(self) -> RankMemory:
        return self.case.memory

    @property
    def verdict(self) -> str:
        return REFUSED if self.reasons else FITS

    @property
    def fits(self) -> bool:
        return self.verdict == FITS

    @property
    def refused(self) -> bool:
        return self.verdict == REFUSED

    @property
    def reasons(self) -> tuple[Objection, ...]:
        return tuple(finding for finding in self.findings if finding.severity == REFUSE)

    @property
    def warnings(self) -> tuple[Objection, ...]:
        return tuple(finding for finding in self.findings if finding.severity != REFUSE)

    @property
    def largest_batch(self) -> int:
        """The most sequences at this length, of a case that fits."""
        return search.most_batch(self.case)

    @property
    def longest_sequence(self) -> int:
        """The most positions at this batch, of a case that fits."""
        each = search.room(self.case) // self.case.deployment.batch_size
        return min(each, self.case.config.max_position_embeddings)

    @property
    def converted_bytes(self) -> int:
        return checkpoint_bytes(self.case.config)

    @property
    def sharded_bytes(self) -> int:
        """All ranks' saved weights."""
        return self.case.memory.weights * self.case.deployment.tp_degree

    def to_json(self) -> dict[str, Any]:
        limits = {"largest_batch": self.largest_batch, "longest_sequence": self.longest_sequence}
        return {
            "verdict": self.verdict,
            "goal": self.asked.goal,
            "given": sorted(self.asked.given),
            "instance": self.case.instance.name,
            "deployment": asdict(self.case.deployment),
            "buckets": list(self.case.buckets),
            "expert_scales": expert_scales(self.case.config, self.case.deployment),
            "padding_experts": padding_experts(self.case.config, self.case.deployment),
            "reasons": [asdict(finding) for finding in self.reasons],
            "warnings": [asdict(finding) for finding in self.warnings],
            "bytes_per_rank": self.case.memory.to_json(),
            "bytes_per_core": self.case.instance.memory_per_core,
            **self.traffic.to_json(),
            **(limits if self.fits else {}),
            "proposals": [proposal.to_json() for proposal in self.proposals],
            "unrolled_expert_products": dict(self.unrolled),
            "disk_bytes": {"converted": self.converted_bytes, "sharded": self.sharded_bytes},
        }

    def render(self) -> str:
        return render(self)


def plan(asked: Asked, tell: search.Tell = lambda line: None) -> DeploymentPlan:
    """Judge a whole case, or search for the settings that were not given; find what is nearest to
    what is refused. `tell` gets a line for each instance that is searched.
    """
    found = [] if asked.is_whole else search.as_asked(asked, tell)
    case = asked.case
    if not asked.is_whole:
        case = found[0] if found else search.closest_refused(asked)
    proposals = search.proposals(asked, found)
    findings = tuple(lint.lint(case))
    if any(finding.severity == REFUSE for finding in findings):
        proposals = tuple(search.nearest(asked, tell))
    config = case.config
    return DeploymentPlan(
        asked=asked,
        case=case,
        findings=findings,
        traffic=traffic(case),
        proposals=proposals,
        unrolled={
            way.name: blockwise.unrolled_products(way, config, case.deployment)
            for way in blockwise.BLOCKWISE_MATMULS.values()
            if config.family.architecture.has_experts
            and (case.instance.nki_kernels or not way.is_kernel)
        },
    )


def plan_case(case: Case) -> DeploymentPlan:
    """The plan of a case whose settings are all asked for, but for a compile's own buckets."""
    asked = Asked(case=case)
    if not case.buckets:
        asked = replace(asked, given=asked.given - {"context_lengths"})
    return plan(asked)


def plan_deployment(
    directory: str | Path, progress: Progress = SILENT, **settings: Any
) -> DeploymentPlan:
    """The plan for a checkpoint or converted directory, from its config.json alone; `settings` are
    those of DeploymentSettings. Without `instance` or `tp_degree` it searches for what is best for
    the `goal`, "latency" or "throughput". `progress` hears which instance is searched.
    """
    chosen = DeploymentSettings(**settings)
    found = local_directory(directory, [CONFIG_NAME], progress)
    require(found, Wanted.CONFIG, ConfigError)
    case = deployment_case(ModelConfig.from_dir(found), chosen)
    with progress.stage("planning") as advance:
        return plan(
            Asked(case=case, given=chosen.given, goal=chosen.goal),
            lambda line: advance(doing=line),
        )
