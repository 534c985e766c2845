"""The experts study as a command: prompts or traces in, analyses or a placement out."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.backends.model_files import model_directory
from neuron_minimax.checkpoint.finished import held
from neuron_minimax.checkpoint.kinds import CONVERSION_NAME, is_compiled
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.cache import build_cache, cache_bytes, open_cache
from neuron_minimax.convert.layout import FP8Range, Layout
from neuron_minimax.convert.state_dict import mapped_state_dict
from neuron_minimax.errors import GenerationError, counted
from neuron_minimax.files import read_bytes
from neuron_minimax.generation.sampling import SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.planner.placement import as_numbered, place
from neuron_minimax.progress import SILENT, Progress
from neuron_minimax.studies.experts.batch import (
    COMPARISON_NAME,
    RECORD_FORMATS,
    BatchRunner,
    ExpertsResult,
    Prompt,
    ReportOptions,
    free_name,
    write_analysis,
    writing,
)
from neuron_minimax.studies.experts.statistics import Analysis, counts
from neuron_minimax.studies.experts.trace import Trace

PLACEMENT_NAME = "expert_placement.json"
PROMPT_BYTES = 16 << 20
NAME_LENGTH = 100
TEXT_SUFFIXES = (".txt", ".text", ".md", ".json", ".jsonl", ".prompt")


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
        # An empty text is no path: Path makes "." of it.
        path = Path(given) if 0 < len(given) < 256 and "\n" not in given else None
        if path is not None and path.is_dir():
            found = [(file.stem, _read_text(file)) for file in sorted(path.glob("*.txt"))]
        elif path is not None and path.is_file():
            found = [(path.stem, _read_text(path))]
        elif path is not None and _names_a_file(given):
            raise GenerationError(
                f"the prompt file {given} does not exist; put a text that reads like a file's name "
                "into a file"
            )
        else:
            found = [(f"prompt-{number}", given)]
        if any(text.encode(errors="replace").decode() != text for _, text in found):
            raise GenerationError(f"{given!r} is no valid UTF-8; expected a text")
        if not found or not all(text.strip() for _, text in found):
            raise GenerationError(
                f"{given!r} holds no prompt; expected a text, a text file or a directory of .txt "
                "files"
            )
        for name, text in found:
            taken = [prompt.name for prompt in prompts]
            prompts.append(Prompt(name=_unique(name, taken), text=text))
    return prompts


def _names_a_file(text: str) -> bool:
    """Return whether a prompt is one word that looks like a path, and hardly a text."""
    one_word = len(text.split()) == 1
    return one_word and (Path(text).suffix.lower() in TEXT_SUFFIXES or text[0] in "./~")


def load_any(model: Path | Checkpoint, cache: Checkpoint | None = None) -> tuple[Decoder, Path]:
    """Load the eager float32 model of a directory, or of an opened checkpoint.

    A directory is a compiled, a converted or a checkpoint directory. The second value is the
    directory of its tokenizer. Converted weights are mapped, and so is the float32 cache of a
    checkpoint; the checkpoint itself is arranged in memory.
    """
    if isinstance(model, Path):
        converted = converted_directory(model)
        if converted is not None:
            _require_experts(ModelConfig.from_dir(converted), converted)
            return Decoder.from_converted(converted), converted
        model = Checkpoint.open(model)
    _require_experts(model.config, model.directory)
    if cache is not None:
        cache.require_usable()
        return Decoder(cache.config, mapped_state_dict(cache)), model.directory
    model.require_usable()
    return Decoder.from_checkpoint(model, Layout(fp8_range=FP8Range.OCP)), model.directory


def _require_experts(config: ModelConfig, directory: Path) -> None:
    """Raise GenerationError unless every layer has experts: layers of a trace are the model's."""
    if not config.family.architecture.has_experts:
        raise GenerationError(
            f"{directory} is {config.family.title}, which has no experts to choose; take a mixture "
            "of experts"
        )
    if config.dense_layers:
        raise GenerationError(
            f"{directory} has {counted(len(config.dense_layers), 'layer')} without experts, the "
            f"first {config.dense_layers[0]}; only models whose layers all have experts are "
            "analysed"
        )


def converted_directory(path: Path) -> Path | None:
    """The converted directory that a compiled or a converted one is, holds or names."""
    if is_compiled(path):
        return model_directory(path, read_manifest(path))
    if (path / "model" / CONVERSION_NAME).exists():
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
        source = Checkpoint.open(checkpoint, progress=progress)
        model = source
    if cache_dir is not None and source is not None:
        if dump_cache or dump_only:
            with progress.stage("dequantizing", cache_bytes(source)) as advance:
                lines.append(build_cache(source, cache_dir, advance=advance).render())
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
    with writing(path.parent):
        placement.save(path)
    before = as_numbered(layers, experts, ranks).max_to_mean(judged)
    after = placement.max_to_mean(judged)
    what = (
        "held-out tokens"
        if held_out
        else "the tokens it was made from (give --held-out for an honest number)"
    )
    return (
        f"{path}: {counted(experts, 'expert')} on {counted(ranks, 'rank')}. Busiest rank over the "
        f"mean, on {what}: {before.mean():.3f} before, {after.mean():.3f} after (worst layer "
        f"{before.max():.3f}, {after.max():.3f})"
    )


def run_experts(request: ExpertsRequest, progress: Progress = SILENT) -> str:
    """Record prompts or load traces, analyse them, or write a placement; return what to print.

    Raises GenerationError when the request names nothing to do, or contradicts itself, and when
    results cannot be written; ConversionError when another run holds the output.
    """
    if bool(request.prompts) == bool(request.traces):
        raise GenerationError(
            "give either --prompt (and a model) or --trace; see `neuron-minimax experts --help`",
            usage=True,
        )
    options = request.options
    if options.record_format not in RECORD_FORMATS:
        raise GenerationError(
            f"the output format is {options.record_format!r}; expected {', '.join(RECORD_FORMATS)}",
            usage=True,
        )
    if request.prompts and request.model is None:
        raise GenerationError(
            "--prompt needs a model: `neuron-minimax experts TRACED --prompt TEXT`", usage=True
        )
    # What cannot be used is found before the model is loaded and the output made.
    SamplingParams(**_given(request.sampling))
    prompts = read_prompts(request.prompts)
    traces = load_traces(request.traces)
    held_out = load_traces(request.held_out)
    if options.note and request.placement is None:
        progress(options.note)
    runner = None if request.model is None or traces else _runner(request, request.model, progress)
    with held(request.output, GenerationError):
        result = runner.run(prompts) if runner else _analysed(request, traces, progress)
        if request.placement is None:
            folders = [str(request.output / analysis.trace.name) for analysis in result.analyses]
            return "\n".join([result.render(), f"written to {', '.join(folders)}"])
        load = [analysis.trace for analysis in result.analyses]
        return make_placement(load, request.placement, request.output / PLACEMENT_NAME, held_out)


def _analysed(
    request: ExpertsRequest, traces: Sequence[Trace], progress: Progress
) -> ExpertsResult:
    names = [trace.name for trace in traces]
    free = []
    for trace in traces:
        tokens = trace.tokens.tolist()
        name = free_name(request.output, trace.name, tokens, names, trace.prompt)
        free.append(replace(trace, name=name))
    result = ExpertsResult(tuple(Analysis(trace=trace) for trace in free))
    if request.placement is None:
        with progress.stage("analysing", len(traces), "traces") as advance:
            for analysis in result.analyses:
                advance(doing=analysis.trace.name)
                write_analysis(analysis, request.output / analysis.trace.name, request.options)
                advance(1)
    return result


def _runner(request: ExpertsRequest, model: Path | Checkpoint, progress: Progress) -> BatchRunner:
    with progress.stage(f"loading {model.directory if isinstance(model, Checkpoint) else model}"):
        decoder, directory = load_any(model, request.cache)
    tokenizer = TextTokenizer.from_dir(directory)
    return BatchRunner(
        model=decoder,
        tokenizer=tokenizer,
        directory=request.output,
        options=request.options,
        similarity_of=_source_of(model) if request.options.expert_similarity else None,
        sampling=replace(tokenizer.sampling, **_given(request.sampling)),
        max_new_tokens=request.max_new_tokens,
        progress=progress,
    )


def _given(sampling: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sampling.items() if value is not None}


def load_traces(paths: Sequence[Path]) -> list[Trace]:
    """Load saved traces, and name each uniquely. Raises GenerationError."""
    traces: list[Trace] = []
    for path in paths:
        trace = Trace.load(path)
        taken = [each.name for each in traces]
        traces.append(replace(trace, name=_unique(trace.name, taken)))
    return traces


def _source_of(model: Path | Checkpoint) -> Checkpoint:
    return model if isinstance(model, Checkpoint) else Checkpoint.open(model)


def _counts(traces: Sequence[Trace]) -> np.ndarray:
    found = [counts(trace.expert_index, trace.experts) for trace in traces]
    for other in found:
        if other.shape != found[0].shape:
            raise GenerationError(
                f"the traces are of different models: {found[0].shape} and {other.shape} experts; "
                "give those of one"
            )
    return np.sum(found, axis=0)


def _read_text(path: Path) -> str:
    try:
        return read_bytes(path, PROMPT_BYTES).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise GenerationError(f"the prompt file {path} cannot be read: {error}") from None


def _unique(name: str, taken: Collection[str]) -> str:
    """Return a name for a folder of the output, like the one that is given: nothing else of the
    output has it, and it leads nowhere else.
    """
    name = re.sub(r"[^\w.-]+", "-", name)[:NAME_LENGTH].strip(".-") or "prompt"
    taken = {*taken, COMPARISON_NAME, PLACEMENT_NAME}
    if name not in taken:
        return name
    return next(f"{name}-{n}" for n in range(2, 10**6) if f"{name}-{n}" not in taken)
