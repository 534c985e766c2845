"""Many prompts through one loaded model: a folder of results for each, and a comparison of all of
them.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.generation.conversation import Turn
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.model.decoder import MiniMaxM2
from neuron_minimax.studies.experts import stats
from neuron_minimax.studies.experts.analysis import RECORD_FORMATS, Analysis, write_records
from neuron_minimax.studies.experts.plots import write_plots
from neuron_minimax.studies.experts.report import render_report
from neuron_minimax.studies.experts.similarity import expert_similarity, router_similarity
from neuron_minimax.studies.experts.trace import Recorder, Trace, record

INTERRUPTED = "interrupted"
# Gets a prompt's name, the tokens of a pass, and how many tokens all prompts may take together.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What is written for each prompt. `similarity_of` is the checkpoint whose expert weights are
    compared, if any.
    """

    structured: bool = True
    record_format: str = RECORD_FORMATS[0]
    plots: bool = True
    similarity_of: Checkpoint | None = None
    jobs: int | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A user's message and the name of its folder."""

    name: str
    text: str


@dataclass(frozen=True, eq=False)
class BatchResult:
    """The analyses, tokens per second of each, and whether the batch was interrupted."""

    analyses: tuple[Analysis, ...]
    tokens_per_second: tuple[float, ...] = ()
    interrupted: bool = False

    def comparison(self) -> dict[str, Any]:
        """One row per prompt, and how far apart their routings are."""
        rows = [
            {
                "name": analysis.trace.name,
                "tokens": len(analysis.trace.tokens),
                "tokens_per_second": round(speed, 2),
                "entropy": round(float(analysis.balance.entropy.mean()), 5),
                "gini": round(float(analysis.balance.gini.mean()), 5),
                "never_chosen": sum(map(len, analysis.balance.dead)),
                "changed_by_bias": round(float(analysis.bias_effect.mean()), 5),
                "finish_reason": analysis.trace.finish_reason,
            }
            for analysis, speed in zip(self.analyses, self.tokens_per_second, strict=True)
        ]
        return {
            "prompts": rows,
            "distance": [[round(value, 5) for value in row] for row in self.distances],
        }

    @property
    def distances(self) -> list[list[float]]:
        """Mean total variation of two prompts' routings over the layers, [P,P]."""
        frequencies = [analysis.frequency for analysis in self.analyses]
        return [
            [float(stats.total_variation(a, b).mean()) for b in frequencies] for a in frequencies
        ]

    def render(self) -> str:
        lines = [analysis.render() for analysis in self.analyses]
        if len(self.analyses) > 1:
            lines.append("distance of routings, 0 the same, 1 no expert in common:")
            for analysis, distances in zip(self.analyses, self.distances, strict=True):
                lines.append(
                    f"  {analysis.trace.name:24}" + "".join(f"{value:8.3f}" for value in distances)
                )
        return "\n".join(
            [*lines, "interrupted: what was done is kept"] if self.interrupted else lines
        )


@dataclass
class Run:
    """One batch through `model`, results under `directory`; errors: GenerationError."""

    model: MiniMaxM2
    tokenizer: TextTokenizer
    directory: Path
    outputs: Outputs = field(default_factory=Outputs)
    sampling: SamplingParams = GREEDY
    max_new_tokens: int = 64
    progress: Progress = lambda name, tokens, total: None
    chunk: int = 128  # prompt tokens per pass, and between two calls of `progress`

    def __call__(self, prompts: Sequence[Prompt]) -> BatchResult:
        """An interruption (KeyboardInterrupt) ends the batch, after what was recorded is
        written.
        """
        analyses = []
        speeds = []
        interrupted = False
        encoded = [self.encode(prompt) for prompt in prompts]
        total = sum(map(len, encoded)) + len(prompts) * self.max_new_tokens
        for prompt, ids in zip(prompts, encoded, strict=True):
            start = time.perf_counter()
            trace = self.trace(prompt, ids, total)
            if trace is not None:
                speeds.append(len(trace.tokens) / (time.perf_counter() - start))
                analyses.append(self.analyse(trace))
            if trace is None or trace.finish_reason == INTERRUPTED:
                interrupted = True
                break
        result = BatchResult(
            analyses=tuple(analyses), tokens_per_second=tuple(speeds), interrupted=interrupted
        )
        self.directory.mkdir(parents=True, exist_ok=True)
        _write_json(self.directory / "comparison.json", result.comparison())
        return result

    def encode(self, prompt: Prompt) -> list[int]:
        return Turn.after([{"role": "user", "content": prompt.text}], self.tokenizer).prompt_ids

    def trace(self, prompt: Prompt, ids: list[int], total: int) -> Trace | None:
        """Trace one prompt and its answer; return None when interrupted before the first pass."""
        recorder = Recorder.of(
            self.model, on_pass=lambda tokens: self.progress(prompt.name, tokens, total)
        )
        answer = []
        reason = "length"
        try:
            steps = record(
                self.model,
                ids,
                recorder,
                params=self.sampling,
                stop_token_ids=self.tokenizer.stop_token_ids,
                max_new_tokens=self.max_new_tokens,
                chunk=self.chunk,
            )
            for token, finish_reason in steps:
                answer.append(token)
                reason = finish_reason or reason
        except KeyboardInterrupt:
            reason = INTERRUPTED
        if not recorder.passes:
            return None
        return recorder.trace(
            texts=tuple(self.tokenizer.token_text(token) for token in recorder.tokens),
            answer=self.tokenizer.decode(answer),
            finish_reason=reason,
            name=prompt.name,
        )

    def analyse(self, trace: Trace) -> Analysis:
        """Analyse and write one trace into its folder."""
        analysis = Analysis(
            trace=trace,
            router_similarity=self.router_similarity,
            expert_similarity=self.expert_similarity,
        )
        write_analysis(analysis, self.directory / trace.name, self.outputs)
        return analysis

    @cached_property
    def router_similarity(self) -> np.ndarray:
        """[L,E,E], the same for every prompt."""
        routers = [
            layer.block_sparse_moe.router.linear_router.weight  # type: ignore[union-attr]
            for layer in self.model.layers
        ]
        return np.stack([router_similarity(weight.float().numpy()) for weight in routers])  # type: ignore[operator, union-attr]

    @cached_property
    def expert_similarity(self) -> dict[int, np.ndarray]:
        """[E,E] of the first, the middle and the last layer, when asked for; each reads all weights
        of its layer.
        """
        checkpoint = self.outputs.similarity_of
        if checkpoint is None:
            return {}
        last = checkpoint.config.num_hidden_layers - 1
        return {
            layer: expert_similarity(checkpoint, layer, self.outputs.jobs)
            for layer in sorted({0, last // 2, last})
        }


def write_analysis(analysis: Analysis, directory: Path, outputs: Outputs) -> None:
    """trace.safetensors and report.html; summary.json and the routing unless turned off; plots."""
    directory.mkdir(parents=True, exist_ok=True)
    analysis.trace.save(directory / "trace.safetensors")
    if outputs.structured:
        _write_json(directory / "summary.json", analysis.summary())
        write_records(analysis.trace, directory, outputs.record_format)
    if outputs.plots:
        write_plots(analysis, directory)
    (directory / "report.html").write_text(render_report(analysis), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
