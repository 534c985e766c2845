"""Many prompts through one loaded model: a folder of results for each, and their comparison.

Shapes: L layers, P prompts, E experts.
"""

import json
import os
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.writer import make_directory, replacing
from neuron_minimax.errors import GenerationError, counted, is_installed, require_package
from neuron_minimax.generation.conversation import Turn
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.processes import Noted, first_signal_noted
from neuron_minimax.progress import SILENT, Advance, Progress
from neuron_minimax.studies.experts.report import render_report, write_plots
from neuron_minimax.studies.experts.similarity import (
    expert_layer_similarity,
    expert_similarity,
    router_similarity,
)
from neuron_minimax.studies.experts.statistics import (
    Analysis,
    LayerSimilarity,
    layer_similarity,
    total_variation,
)
from neuron_minimax.studies.experts.trace import Recorder, Trace, check_fits, record

COMPARISON_NAME = "comparison.json"
TRACE_NAME = "trace.safetensors"
INTERRUPTED = "interrupted"
RECORD_FORMATS = ("json", "jsonl", "parquet")


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """The files that are written for each prompt.

    `structured` stands for the summary and the routing, in `record_format`; `plots` for the figures
    as files, which need matplotlib (the report does not); `expert_similarity` compares the experts'
    weights, which must be those of a checkpoint, `jobs` strips at a time. Raises GenerationError
    for parquet without pyarrow.
    """

    structured: bool = True
    record_format: str = RECORD_FORMATS[0]
    plots: bool = True
    expert_similarity: bool = False
    jobs: int | None = None

    def __post_init__(self) -> None:
        if self.record_format == "parquet":
            require_package("pyarrow", "parquet", GenerationError)

    @property
    def figures(self) -> bool:
        """Whether figures are written: they are asked for, and matplotlib is there."""
        return self.plots and is_installed("matplotlib")

    @property
    def note(self) -> str:
        """What will be left out for want of a package, to be said before a long run; or nothing."""
        if self.plots and not self.figures:
            return (
                "matplotlib is not installed: the figures (*.png, *.svg) are left out, and "
                "report.html is written all the same; `pip install matplotlib`, and then --trace "
                "draws them without running the model again"
            )
        return ""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A user's message and the name of its folder."""

    name: str
    text: str


@dataclass(frozen=True, eq=False)
class ExpertsResult(Rendered):
    """The analyses, and tokens per second of each."""

    analyses: tuple[Analysis, ...]
    tokens_per_second: tuple[float, ...] = ()

    def comparison(self) -> dict[str, Any]:
        """Return one row per prompt, and how far apart their routings are."""
        rows = [
            {
                "name": analysis.trace.name,
                "prompt": analysis.trace.prompt,
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
        return [[float(total_variation(a, b).mean()) for b in frequencies] for a in frequencies]

    def render(self) -> str:
        lines = [analysis.render() for analysis in self.analyses]
        if len(self.analyses) > 1:
            lines.append("distance of routings, 0 the same, 1 no expert in common:")
            for analysis, distances in zip(self.analyses, self.distances, strict=True):
                lines.append(
                    f"  {analysis.trace.name:24}" + "".join(f"{value:8.3f}" for value in distances)
                )
        return "\n".join(lines)


@dataclass
class BatchRunner:
    """Runs prompts through `model` and writes the results under `directory`.

    `similarity_of` is the checkpoint whose expert weights are compared, if any.
    """

    model: Decoder
    tokenizer: TextTokenizer
    directory: Path
    options: ReportOptions = field(default_factory=ReportOptions)
    similarity_of: Checkpoint | None = None
    sampling: SamplingParams = GREEDY
    max_new_tokens: int = 64
    progress: Progress = SILENT
    chunk: int = 128  # prompt tokens per pass

    def run(self, prompts: Sequence[Prompt]) -> ExpertsResult:
        """Record, analyse and write every prompt.

        An interruption (SIGINT, SIGTERM or KeyboardInterrupt) ends the batch with it, after what
        was recorded is written. Raises GenerationError, before all else, when a prompt does not fit
        the model.
        """
        analyses = []
        speeds = []
        stop: KeyboardInterrupt | None = None
        encoded = [self.encode(prompt) for prompt in prompts]
        for ids in encoded:
            check_fits(self.model, ids, self.max_new_tokens)
        names = [prompt.name for prompt in prompts]
        prompts = [
            replace(prompt, name=free_name(self.directory, prompt.name, ids, names, prompt.text))
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]
        # Before there is anything to keep: a signal ends the reading of all weights at once.
        _ = self.expert_similarity, self.expert_layers
        total = sum(map(len, encoded)) + len(prompts) * self.max_new_tokens
        with (
            first_signal_noted() as noted,
            self.progress.stage("experts", total, "tokens") as advance,
        ):
            for prompt, ids in zip(prompts, encoded, strict=True):
                start = time.perf_counter()
                trace, stop = self.trace(prompt, ids, advance, noted)
                if trace is not None:
                    speeds.append(len(trace.tokens) / (time.perf_counter() - start))
                    advance(doing=f"analysing {prompt.name}")
                    analyses.append(self.analyse(trace))
                if noted.number is not None:
                    stop = noted.interruption()
                if stop is not None:
                    break
            result = ExpertsResult(analyses=tuple(analyses), tokens_per_second=tuple(speeds))
            if analyses:
                with writing(self.directory):
                    _write_json(self.directory / COMPARISON_NAME, result.comparison())
            if stop is not None:
                stop.add_note(
                    f"{len(analyses)} of {counted(len(prompts), 'prompt')} kept in "
                    f"{self.directory}; give the others again"
                )
                raise stop
        return result

    def encode(self, prompt: Prompt) -> list[int]:
        return Turn.after([{"role": "user", "content": prompt.text}], self.tokenizer).prompt_ids

    def trace(
        self, prompt: Prompt, ids: list[int], advance: Advance, noted: Noted
    ) -> tuple[Trace | None, KeyboardInterrupt | None]:
        """Trace one prompt and its answer, as far as no interruption ends it; None when one came
        before the first pass.
        """

        def on_pass(tokens: int) -> None:
            advance(tokens, prompt.name)
            if noted.number is not None:
                raise noted.interruption()

        recorder = Recorder.of(self.model, on_pass)
        answer = []
        reason = "length"
        stop = None
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
        except KeyboardInterrupt as error:
            stop = error
            reason = INTERRUPTED
        if not recorder.passes:
            return None, stop
        trace = recorder.trace(
            texts=tuple(self.tokenizer.token_text(token) for token in recorder.tokens),
            prompt=prompt.text,
            answer=self.tokenizer.decode(answer),
            finish_reason=reason,
            name=prompt.name,
        )
        return trace, stop

    def analyse(self, trace: Trace) -> Analysis:
        """Analyse and write one trace into its folder."""
        analysis = Analysis(
            trace=trace,
            router_similarity=self.router_similarity,
            layer_similarity=self.layer_similarity,
            expert_similarity=self.expert_similarity,
            expert_layers=self.expert_layers,
        )
        write_analysis(analysis, self.directory / trace.name, self.options)
        return analysis

    @cached_property
    def router_similarity(self) -> np.ndarray:
        """[L,E,E], the same for every prompt."""
        weights = [router.linear_router.weight for router in self.model.routers]
        return np.stack([router_similarity(weight.float().numpy()) for weight in weights])

    @cached_property
    def layer_similarity(self) -> np.ndarray:
        """[L,L], the same for every prompt."""
        weights = [router.linear_router.weight for router in self.model.routers]
        return layer_similarity([weight.float().numpy() for weight in weights])

    @cached_property
    def expert_similarity(self) -> dict[int, np.ndarray]:
        """[E,E] of the first, the middle and the last layer; each reads the layer's weights."""
        if self.similarity_of is None:
            return {}
        last = self.similarity_of.config.num_hidden_layers - 1
        found = {}
        layers = sorted({0, last // 2, last})
        with self.progress.stage("comparing experts", len(layers), "layers") as advance:
            for layer in layers:
                advance(doing=f"layer {layer}")
                found[layer] = expert_similarity(self.similarity_of, layer, self.options.jobs)
                advance(1)
        return found

    @cached_property
    def expert_layers(self) -> LayerSimilarity | None:
        """Of the experts of every two layers; reads all their weights."""
        if self.similarity_of is None:
            return None
        layers = self.similarity_of.config.num_hidden_layers
        with self.progress.stage("comparing experts of all layers", layers, "layers") as advance:
            return expert_layer_similarity(self.similarity_of, self.options.jobs, advance=advance)


def free_name(
    directory: Path,
    name: str,
    tokens: Sequence[int],
    others: Collection[str] = (),
    text: str = "",
) -> str:
    """Return the name of a folder for the results of these tokens: the given one, or one with a
    number where those of other tokens are, or will be. The results of the same are replaced, those
    too of a run that was interrupted amid these tokens, of the prompt `text`.
    """
    wanted = list(tokens)
    numbered = (f"{name}-{number}" for number in range(2, 10**6))
    for each in (name, *(free for free in numbered if free not in others)):
        path = directory / each / TRACE_NAME
        if not os.path.lexists(path):
            return each
        with suppress(GenerationError):
            trace = Trace.load(path)
            found = trace.tokens[: len(wanted)].tolist()
            amid = trace.finish_reason == INTERRUPTED and trace.prompt == text
            if found == (wanted[: len(found)] if amid else wanted):
                return each
    raise GenerationError(f"{directory} holds too many results; choose another --output")


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Make a directory for results. Raises GenerationError when they cannot be written."""
    try:
        make_directory(directory)
        yield
    except OSError as error:
        raise GenerationError(
            f"{directory}: the results cannot be written ({error.strerror}); mend it and run the "
            "same command again"
        ) from None


def write_analysis(analysis: Analysis, directory: Path, options: ReportOptions) -> None:
    """Write trace.safetensors and report.html, and what `options` ask for, each file whole or not
    at all.
    """
    with writing(directory):
        analysis.trace.save(directory / TRACE_NAME)
        if options.structured:
            _write_json(directory / "summary.json", analysis.summary())
            write_records(analysis.trace, directory, options.record_format)
        if options.figures:
            write_plots(analysis, directory)
        with replacing(directory / "report.html") as file:
            file.write(render_report(analysis).encode())


def records(trace: Trace) -> Iterator[dict[str, Any]]:
    """Yield one row per layer and token.

    It has position, token, text, phase, the chosen experts, their weights and unbiased scores.
    """
    for layer in range(trace.layers):
        chosen = np.take_along_axis(
            trace.scores[layer], trace.expert_index[layer].astype(np.int64), axis=1
        )
        for position, token in enumerate(trace.tokens.tolist()):
            yield {
                "layer": layer,
                "position": position,
                "token": token,
                "text": trace.texts[position] if trace.texts else None,
                "phase": "decode" if trace.is_decode[position] else "prefill",
                "experts": trace.expert_index[layer, position].tolist(),
                "weights": [
                    round(weight, 6) for weight in trace.affinity[layer, position].tolist()
                ],
                "scores": [
                    round(score, 4) for score in chosen[position].astype(np.float32).tolist()
                ],
            }


def write_records(trace: Trace, directory: Path, form: str) -> Path:
    """Write `routing.json`, `.jsonl` or `.parquet`.

    Raises GenerationError for another format, or for parquet without pyarrow.
    """
    path = directory / f"routing.{form}"
    if form == "json":
        with replacing(path) as file:
            file.write((json.dumps(list(records(trace)), ensure_ascii=False) + "\n").encode())
    elif form == "jsonl":
        with replacing(path) as file:
            for row in records(trace):
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    elif form == "parquet":
        require_package("pyarrow", "parquet", GenerationError)
        from pyarrow import Table, parquet

        with replacing(path) as file:
            parquet.write_table(Table.from_pylist(list(records(trace))), file)
    else:
        raise GenerationError(
            f"the output format is {form!r}; expected one of {', '.join(RECORD_FORMATS)}"
        )
    return path


def _write_json(path: Path, value: Any) -> None:
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
