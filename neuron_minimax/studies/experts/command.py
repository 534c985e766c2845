"""What `neuron-minimax experts` and tools/test_minimax_m2.py do: prompts or traces in, analyses or
a placement out.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.cache import build_cache, open_cache
from neuron_minimax.convert.plan import FP8Range, Layout
from neuron_minimax.convert.write import MANIFEST_NAME as CONVERSION
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.planner.placement import as_numbered, place
from neuron_minimax.studies.experts import stats
from neuron_minimax.studies.experts.analysis import RECORD_FORMATS, Analysis
from neuron_minimax.studies.experts.batch import (
    BatchResult,
    Outputs,
    Progress,
    Prompt,
    Run,
    write_analysis,
)
from neuron_minimax.studies.experts.trace import Trace

DEMO = Path(__file__).parents[2] / "demo"


def read_prompts(texts_or_files: Sequence[str]) -> list[Prompt]:
    """Each is a text, a text file, or a directory of .txt files. Names are made unique.

    Raises GenerationError when one is empty or a file cannot be read.
    """
    prompts: list[Prompt] = []
    for number, given in enumerate(texts_or_files, start=1):
        path = Path(given) if len(given) < 256 and "\n" not in given else None
        if path is not None and path.is_dir():
            found = [(file.stem, _read_text(file)) for file in sorted(path.glob("*.txt"))]
        elif path is not None and path.is_file():
            found = [(path.stem, _read_text(path))]
        else:
            found = [(f"prompt-{number}", given)]
        if not found or not all(text.strip() for _, text in found):
            raise GenerationError(
                f"{given!r} holds no prompt; expected a text, a text file or a directory of .txt "
                "files"
            )
        prompts += [Prompt(name=_unique(name, prompts), text=text) for name, text in found]
    return prompts


def load_any(directory: str | Path, cache_dir: str | Path | None = None) -> tuple[Decoder, Path]:
    """The eager float32 model of a compiled, converted or checkpoint directory, and where its
    tokenizer is.

    Converted weights are mapped. A checkpoint (or its float32 cache, when a directory is given) is
    arranged in memory.
    """
    path = Path(directory)
    for candidate in (path / "model", path):
        if (candidate / CONVERSION).exists() or (
            candidate.name == "model" and (path / "manifest.json").exists()
        ):
            return Decoder.from_converted(candidate), candidate
    checkpoint = Checkpoint(path)
    weights = checkpoint if cache_dir is None else open_cache(cache_dir, checkpoint)
    weights.require_usable()
    return Decoder.from_checkpoint(weights, Layout(fp8_range=FP8Range.OCP)), path


def analyse_checkpoint(
    *,
    checkpoint: Path,
    prompt: Sequence[str],
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    no_sample: bool,
    cache_dir: Path | None,
    dump_cache: bool,
    dump_only: bool,
    output_dir: Path,
    disable_structured_output: bool,
    output_format: str,
    enable_expert_similarity: bool,
    n_jobs: int | None,
    progress: Progress,
) -> list[str]:
    """tools/test_minimax_m2.py, whose options these are; returns the lines to print."""
    lines = []
    if cache_dir is not None and (dump_cache or dump_only):
        lines.append(build_cache(checkpoint, cache_dir).render(cache_dir))
    if dump_only:
        return lines
    cache = find_cache(cache_dir, checkpoint)
    lines += [f"Loading from cache {cache}"] if cache else []
    outputs = Outputs(
        structured=not disable_structured_output,
        record_format=output_format,
        similarity_of=Checkpoint(checkpoint) if enable_expert_similarity else None,
        jobs=n_jobs,
    )
    request = ExpertsRequest(
        output=output_dir,
        model=checkpoint,
        prompts=prompt,
        max_new_tokens=max_tokens,
        sampling={"temperature": 0.0 if no_sample else temperature, "top_p": top_p},
        cache_dir=cache,
        outputs=outputs,
    )
    return [*lines, run_experts(request, progress)]


def find_cache(cache_dir: Path | None, checkpoint: Path) -> Path | None:
    """The cache directory when one was named and exists; None when there is none yet.

    Raises CheckpointError, with the command that rebuilds it, when it is unfinished or of something
    else.
    """
    if cache_dir is None or not cache_dir.exists():
        return None
    open_cache(cache_dir, Checkpoint(checkpoint))
    return cache_dir


def make_placement(
    traces: Sequence[Trace], ranks: int, path: Path, held_out: Sequence[Trace] = ()
) -> str:
    """Write the placement for the load of `traces`; says its maximum over mean load before and
    after, on `held_out`.
    """
    counts = _counts(traces)
    judged = _counts(held_out or traces)
    if counts.shape != judged.shape:
        raise GenerationError(
            f"the held-out traces are of another model: {judged.shape}, not {counts.shape} experts"
        )
    placement = place(counts, ranks)
    placement.save(path)
    before = as_numbered(counts.shape[0], counts.shape[1], ranks).max_to_mean(judged)
    after = placement.max_to_mean(judged)
    what = (
        "held-out tokens"
        if held_out
        else "the tokens it was made from (give --held-out for an honest number)"
    )
    return (
        f"{path}: {counts.shape[1]} experts on {ranks} ranks. Busiest rank over the mean, on "
        f"{what}: {before.mean():.3f} before, {after.mean():.3f} after (worst layer "
        f"{before.max():.3f}, {after.max():.3f})"
    )


@dataclass(frozen=True, kw_only=True)
class ExpertsRequest:
    """What `neuron-minimax experts` was asked for; `sampling` holds the options given (None: the
    checkpoint's).
    """

    output: Path
    model: Path | None = None
    prompts: Sequence[str] = ()
    traces: Sequence[Path] = ()
    held_out: Sequence[Path] = ()
    max_new_tokens: int = 64
    sampling: Mapping[str, Any] = field(default_factory=dict)
    placement: int | None = None
    cache_dir: Path | None = None
    outputs: Outputs = field(default_factory=Outputs)


def run_experts(
    request: ExpertsRequest, progress: Progress = lambda name, tokens, total: None
) -> str:
    """Record prompts or load traces, analyse them, write a placement when asked; returns what to
    print.

    Raises GenerationError when the request names nothing to do, or contradicts itself.
    """
    if bool(request.prompts) == bool(request.traces):
        raise GenerationError(
            "give either --prompt (and a model) or --trace; see `neuron-minimax experts --help`"
        )
    outputs = request.outputs
    if outputs.record_format not in RECORD_FORMATS:
        raise GenerationError(
            f"the output format is {outputs.record_format!r}; expected {', '.join(RECORD_FORMATS)}"
        )
    request.output.mkdir(parents=True, exist_ok=True)
    if request.traces:
        result = BatchResult(tuple(Analysis(trace=Trace.load(path)) for path in request.traces))
        if request.placement is None:
            for analysis in result.analyses:
                write_analysis(analysis, request.output / analysis.trace.name, outputs)
    else:
        if request.model is None:
            raise GenerationError(
                "--prompt needs a model: `neuron-minimax experts TRACED --prompt TEXT`"
            )
        model, directory = load_any(request.model, request.cache_dir)
        tokenizer = TextTokenizer.from_dir(directory)
        given = {name: value for name, value in request.sampling.items() if value is not None}
        run = Run(
            model=model,
            tokenizer=tokenizer,
            directory=request.output,
            outputs=outputs,
            sampling=replace(tokenizer.sampling, **given),
            max_new_tokens=request.max_new_tokens,
            progress=progress,
        )
        result = run(read_prompts(request.prompts))
    if request.placement is None:
        return result.render()
    traces = [analysis.trace for analysis in result.analyses]
    held_out = [Trace.load(path) for path in request.held_out]
    return make_placement(
        traces, request.placement, request.output / "expert_placement.json", held_out
    )


def _counts(traces: Sequence[Trace]) -> np.ndarray:
    return np.sum([stats.counts(trace.expert_index, trace.experts) for trace in traces], axis=0)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"the prompt file {path} cannot be read: {error}") from None


def _unique(name: str, prompts: Sequence[Prompt]) -> str:
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "prompt"
    taken = {prompt.name for prompt in prompts}
    return (
        name
        if name not in taken
        else next(f"{name}-{n}" for n in range(2, 10**6) if f"{name}-{n}" not in taken)
    )
