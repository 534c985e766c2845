"""The experts study as a command: prompts or traces in, analyses or a placement out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.backends.directory import MANIFEST_NAME
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.cache import build_cache, open_cache
from neuron_minimax.convert.layout import FP8Range, Layout
from neuron_minimax.convert.plan import CONVERSION_NAME
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.planner.placement import as_numbered, place
from neuron_minimax.studies.experts.batch import (
    RECORD_FORMATS,
    BatchRunner,
    ExpertsResult,
    Progress,
    Prompt,
    ReportOptions,
    write_analysis,
)
from neuron_minimax.studies.experts.statistics import Analysis, counts
from neuron_minimax.studies.experts.trace import Trace


@dataclass(frozen=True, kw_only=True)
class ExpertsRequest:
    """A study: prompts of a model, or saved traces, and what is made of them.

    `sampling` holds the options given (None: the checkpoint's); `placement` is a number of ranks.
    """

    output: Path
    model: Path | Checkpoint | None = None
    prompts: Sequence[str] = ()
    traces: Sequence[Path] = ()
    held_out: Sequence[Path] = ()
    max_new_tokens: int = 64
    sampling: Mapping[str, Any] = field(default_factory=dict)
    placement: int | None = None
    cache: Checkpoint | None = None
    options: ReportOptions = field(default_factory=ReportOptions)


def read_prompts(texts_or_files: Sequence[str]) -> list[Prompt]:
    """Read prompts that are texts, text files, or directories of .txt files; name each uniquely.

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


def load_any(model: Path | Checkpoint, cache: Checkpoint | None = None) -> tuple[Decoder, Path]:
    """Load the eager float32 model of a directory, or of an opened checkpoint.

    A directory is a compiled, a converted or a checkpoint directory. The second value is the
    directory of its tokenizer. Converted weights are mapped. A checkpoint (or its float32 cache,
    when that is given) is arranged in memory.
    """
    if isinstance(model, Path):
        converted = converted_directory(model)
        if converted is not None:
            return Decoder.from_converted(converted), converted
        model = Checkpoint.open(model)
    weights = model if cache is None else cache
    weights.require_usable()
    return Decoder.from_checkpoint(weights, Layout(fp8_range=FP8Range.OCP)), model.directory


def converted_directory(path: Path) -> Path | None:
    """The converted directory that a compiled or a converted one is or holds."""
    if (path / "model" / CONVERSION_NAME).exists() or (path / MANIFEST_NAME).exists():
        return path / "model"
    return path if (path / CONVERSION_NAME).exists() else None


def analyse_checkpoint(
    request: ExpertsRequest,
    checkpoint: Path,
    progress: Progress,
    *,
    cache_dir: Path | None = None,
    dump_cache: bool = False,
    dump_only: bool = False,
) -> list[str]:
    """Run a request on a checkpoint, by its dequantized cache where there is one.

    `dump_cache` builds the cache first, `dump_only` does nothing else. Returns the lines to print.
    """
    lines: list[str] = []
    similarity = request.options.expert_similarity
    model: Path | Checkpoint = checkpoint
    source = None
    cache = None
    if cache_dir is not None or similarity or converted_directory(checkpoint) is None:
        source = Checkpoint.open(checkpoint)
        model = source
    if cache_dir is not None and source is not None:
        if dump_cache or dump_only:
            lines.append(build_cache(source, cache_dir).render())
        if dump_only:
            return lines
        cache = find_cache(cache_dir, source)
        lines += [f"Loading from cache {cache_dir}"] if cache else []
    return [*lines, run_experts(replace(request, model=model, cache=cache), progress)]


def find_cache(cache_dir: Path, checkpoint: Checkpoint) -> Checkpoint | None:
    """Return the cache, opened, or None when there is none yet.

    Raises CheckpointError, with the command that rebuilds it, when it is unfinished or of another
    checkpoint.
    """
    if not cache_dir.exists():
        return None
    return open_cache(cache_dir, checkpoint)


def make_placement(
    traces: Sequence[Trace], ranks: int, path: Path, held_out: Sequence[Trace] = ()
) -> str:
    """Write the placement for the load of `traces`; say what it brings on `held_out`."""
    load = _counts(traces)
    judged = _counts(held_out or traces)
    if load.shape != judged.shape:
        raise GenerationError(
            f"the held-out traces are of another model: {judged.shape}, not {load.shape} experts"
        )
    layers, experts = load.shape
    placement = place(load, ranks)
    placement.save(path)
    before = as_numbered(layers, experts, ranks).max_to_mean(judged)
    after = placement.max_to_mean(judged)
    what = (
        "held-out tokens"
        if held_out
        else "the tokens it was made from (give --held-out for an honest number)"
    )
    return (
        f"{path}: {experts} experts on {ranks} ranks. Busiest rank over the mean, on "
        f"{what}: {before.mean():.3f} before, {after.mean():.3f} after (worst layer "
        f"{before.max():.3f}, {after.max():.3f})"
    )


def run_experts(
    request: ExpertsRequest, progress: Progress = lambda name, tokens, total: None
) -> str:
    """Record prompts or load traces, analyse them, or write a placement; return what to print.

    Raises GenerationError when the request names nothing to do, or contradicts itself.
    """
    if bool(request.prompts) == bool(request.traces):
        raise GenerationError(
            "give either --prompt (and a model) or --trace; see `neuron-minimax experts --help`"
        )
    options = request.options
    if options.record_format not in RECORD_FORMATS:
        raise GenerationError(
            f"the output format is {options.record_format!r}; expected {', '.join(RECORD_FORMATS)}"
        )
    request.output.mkdir(parents=True, exist_ok=True)
    if request.traces:
        result = ExpertsResult(tuple(Analysis(trace=Trace.load(path)) for path in request.traces))
        if request.placement is None:
            for analysis in result.analyses:
                write_analysis(analysis, request.output / analysis.trace.name, options)
    else:
        if request.model is None:
            raise GenerationError(
                "--prompt needs a model: `neuron-minimax experts TRACED --prompt TEXT`"
            )
        model, directory = load_any(request.model, request.cache)
        tokenizer = TextTokenizer.from_dir(directory)
        given = {name: value for name, value in request.sampling.items() if value is not None}
        runner = BatchRunner(
            model=model,
            tokenizer=tokenizer,
            directory=request.output,
            options=options,
            similarity_of=_source_of(request.model) if options.expert_similarity else None,
            sampling=replace(tokenizer.sampling, **given),
            max_new_tokens=request.max_new_tokens,
            progress=progress,
        )
        result = runner.run(read_prompts(request.prompts))
    if request.placement is None:
        return result.render()
    traces = [analysis.trace for analysis in result.analyses]
    held_out = [Trace.load(path) for path in request.held_out]
    return make_placement(
        traces, request.placement, request.output / "expert_placement.json", held_out
    )


def _source_of(model: Path | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model)


def _counts(traces: Sequence[Trace]) -> np.ndarray:
    return np.sum([counts(trace.expert_index, trace.experts) for trace in traces], axis=0)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"the prompt file {path} cannot be read: {error}") from None


def _unique(name: str, prompts: Sequence[Prompt]) -> str:
    name = re.sub(r"[^\w.-]+", "-", name).strip(".-") or "prompt"
    taken = {prompt.name for prompt in prompts}
    if name not in taken:
        return name
    return next(f"{name}-{n}" for n in range(2, 10**6) if f"{name}-{n}" not in taken)
