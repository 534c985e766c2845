"""From a checkpoint to a compiled model, stage by stage; each recognizes what an earlier run left.

Whoever starts it is told how far it is through a Watcher, and where everything is kept.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from neuron_minimax.api import Checkpoint
from neuron_minimax.backends import CompileReport, compile_model
from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.backends.directory import open_model, read_manifest
from neuron_minimax.backends.made_demo import note_demo
from neuron_minimax.checkpoint.finished import changed_source
from neuron_minimax.checkpoint.header import size_text
from neuron_minimax.checkpoint.hub import HUB_ID
from neuron_minimax.checkpoint.kinds import is_compiled
from neuron_minimax.checkpoint.streaming import available_memory
from neuron_minimax.checkpoint.writer import COMPANION_FILES
from neuron_minimax.convert.layout import Layout
from neuron_minimax.convert.manifest import CONVERSION_NAME
from neuron_minimax.convert.manifest import read_manifest as read_conversion
from neuron_minimax.convert.plan import Converted, plan_conversion
from neuron_minimax.convert.verify import verify
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import BackendError, ConversionError, NeuronMiniMaxError
from neuron_minimax.files import sha256_of
from neuron_minimax.generation.template import Scalar
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.progress import SILENT, Progress

CONVERTED = "-converted"  # ends the name of the converted directory beside a compiled one
MOST_CONTEXT = 8192  # positions, unless more are asked for
LEAST_CONTEXT = 256
CACHE_OPTIONS = ("compute", "kv_cache_dtype")  # which say how much memory a position takes
# The options of a backend that the command line calls otherwise.
OPTION_NAMES = {"slots": "batch-size"}


class Watcher(Protocol):
    """Who is told of the stages: `stage` holds one, `progress` hears how far it is, `say` tells
    what it has found.
    """

    @property
    def progress(self) -> Progress: ...

    def stage(self, title: str) -> AbstractContextManager[None]: ...

    def say(self, text: str) -> None: ...


class Unwatched:
    """A watcher that says nothing."""

    progress = SILENT

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        yield

    def say(self, text: str) -> None:
        pass


UNWATCHED = Unwatched()


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where the stages keep what they make."""

    converted: Path
    traced: Path

    @classmethod
    def beside(cls, traced: Path, converted: Path | None = None) -> "Places":
        """Return the compiled directory, and the converted one beside it unless it is given."""
        return cls(converted=converted or traced.with_name(traced.name + CONVERTED), traced=traced)


def name_of(model: str | Path) -> str:
    """Return the name that what is made of a model gets: a directory's own, a hub id's last part.

    >>> name_of("MiniMaxAI/MiniMax-M2")
    'MiniMax-M2'
    """
    path = Path(model)
    match = HUB_ID.fullmatch(str(model))
    if match is not None and not path.exists():
        revision = match["revision"]
        name = match["name"].rpartition("/")[2]
        return f"{name}-{revision.replace('/', '-')}" if revision else name
    path = Path(os.path.realpath(path))  # which bears a link that leads to itself
    if path.parent.name == "snapshots":  # of a hub cache: models--ORG--NAME/snapshots/COMMIT
        path = path.parents[1]
    return path.name.rpartition("--")[2].removesuffix(CONVERTED) or "model"


def make_ready(
    model: str | Path,
    work_dir: str | Path = "traced_model",
    *,
    options: Mapping[str, Any] | None = None,
    chat_template_kwargs: Mapping[str, Scalar] | None = None,
    watcher: Watcher = UNWATCHED,
) -> Path:
    """Return the compiled directory of a model for the CPU, made where there is none yet.

    `model` is a checkpoint's directory or hub id, or a converted or a compiled directory, from
    which it goes on. What is made is kept in `work_dir`, NAME-converted and NAME. `options` are the
    CPU backend's (`slots`, `seq_len`, `compute`, ...); what is not given is as an earlier run has
    compiled it, and the context else what memory allows, at most 8192 positions. With
    `chat_template_kwargs` the model is for talking: its chat template has to take them, which is
    tried before anything is made. Raises a NeuronMiniMaxError naming what cannot be used.
    """
    given = {name: value for name, value in (options or {}).items() if value is not None}
    path = Path(model)
    if is_compiled(path):
        if given:
            option = OPTION_NAMES.get(min(given), min(given).replace("_", "-"))
            raise BackendError(
                f"{path} is compiled already, which --{option} cannot change; leave it out, or "
                "give the checkpoint or the converted directory"
            )
        return path
    places = Places.beside(Path(work_dir) / name_of(model))
    if (path / CONVERSION_NAME).is_file():
        _require_talking(path, chat_template_kwargs)
        converted = Converted.open(path, progress=watcher.progress)
    else:
        source = _open(model, watcher)
        _require_talking(source.directory, chat_template_kwargs)
        converted = _convert(source, places, Layout(), watcher)
    options = _settled(converted, places.traced, given, watcher)
    _compile(places, converted, watcher, options=options)
    return places.traced


def prepare(
    model: str | Path,
    places: Places,
    *,
    layout: Layout | None = None,
    chat_template_kwargs: Mapping[str, Scalar] | None = None,
    watcher: Watcher = UNWATCHED,
    **compiling: Any,
) -> CompileReport:
    """Inspect, convert, verify and compile a checkpoint into the `places`.

    `chat_template_kwargs` are tried first, as `make_ready` does. `compiling` is what
    `compile_model` takes: `backend`, `options`, `mode`. Raises a NeuronMiniMaxError naming what
    cannot be used.
    """
    source = _open(model, watcher)
    _require_talking(source.directory, chat_template_kwargs)
    converted = _convert(source, places, layout or Layout(), watcher)
    return _compile(places, converted, watcher, **compiling)


def _open(model: str | Path, watcher: Watcher) -> Checkpoint:
    """Open and inspect a checkpoint. Raises CheckpointError or a report of why it is unusable."""
    with watcher.stage(f"inspect {model}"):
        source = Checkpoint.open(model, progress=watcher.progress)
        report = source.inspect()
        watcher.say(report.summary())
        if not report.usable:
            raise NeuronMiniMaxError(f"{report.render()}\n{model} cannot be used as it is")
    return source


def _require_talking(directory: Path, arguments: Mapping[str, Scalar] | None) -> None:
    """Raise GenerationError when arguments are given and the chat template does not take them."""
    if arguments is not None:
        empty = [{"role": "user", "content": ""}]
        TextTokenizer.from_dir(directory).render_chat(empty, arguments=arguments)


def _convert(source: Checkpoint, places: Places, layout: Layout, watcher: Watcher) -> Converted:
    """Convert a checkpoint and compare the output with it; both at most once.

    Raises CheckpointError or ConversionError.
    """
    out = places.converted
    _require_same(source, places)
    converted = _kept_model(source, places, layout)
    if converted is not None:
        watcher.say(f"{out} was removed; {places.traced} holds the same files")
    else:
        with watcher.stage(f"convert into {out}"):
            plan = plan_conversion(source, layout)
            with watcher.progress.stage("converting", plan.nbytes) as advance:
                converted = plan.write(out, advance=advance)
        watcher.say(converted.render())
    if converted.manifest.verified:
        watcher.say("verify: done by an earlier run")
        return converted
    with (
        watcher.stage("verify"),
        watcher.progress.stage("verifying", 2 * converted.nbytes) as advance,
    ):
        verification = verify(source, converted, advance)
    watcher.say(verification.render())
    if not verification.equal:
        raise ConversionError(
            f"{out} does not equal its source; run `neuron-minimax convert {source.directory} "
            f"{out} --attention {layout.attention} --check`"
        )
    return converted


def _require_same(source: Checkpoint, places: Places) -> None:
    """Raise ConversionError when the converted directory was made of something else."""
    if not (places.converted / CONVERSION_NAME).exists():
        return
    made_of = read_conversion(places.converted).identity.source_fingerprint
    if made_of != source.fingerprint:
        raise ConversionError(
            f"{places.converted} was made of another checkpoint than {source.directory}, or before "
            f"that was changed; choose another directory, or remove this one and {places.traced}"
        )


def _kept_model(source: Checkpoint, places: Places, layout: Layout) -> Converted | None:
    """Return the files that a compile keeps, where their converted directory was removed and
    converting would make them again.

    Raises ConversionError when they were made of something else, BackendError when they are not
    there.
    """
    if places.converted.exists() or not is_compiled(places.traced):
        return None
    kept = open_model(places.traced, read_manifest(places.traced))
    if kept.manifest.identity.source_fingerprint != source.fingerprint:
        raise ConversionError(
            f"{places.traced} holds a compiled model that was made of another checkpoint than "
            f"{source.directory}, or before that was changed; use it as it is (`neuron-minimax "
            f"chat {places.traced}`), or choose another directory"
        )
    small = {
        name: sha256_of(source.directory / name)
        for name in COMPANION_FILES
        if (source.directory / name).is_file()
    }
    copied = {name: record.sha256 for name, record in kept.files.items() if name in COMPANION_FILES}
    is_same = (kept.layout, kept.convention, copied) == (
        layout,
        source.convention,
        small,
    ) and not changed_source(kept.manifest, source, written_ns=0)
    return kept if is_same else None


def _compile(
    places: Places,
    converted: Converted,
    watcher: Watcher,
    *,
    backend: str = "cpu",
    **compiling: Any,
) -> CompileReport:
    """Compile a converted directory, or recognize that this was done. Raises BackendError."""
    with watcher.stage(f"compile for {backend} into {places.traced}"):
        report = compile_model(
            converted, places.traced, backend=backend, progress=watcher.progress, **compiling
        )
        watcher.say(report.render())
    if report.reason and _is_of_demo(converted):
        why_not = note_demo(places.traced)
        if why_not:
            watcher.say(f"`serve` will compile a demo of its own: {why_not}")
    return report


def _is_of_demo(converted: Converted) -> bool:
    made_of = converted.manifest.identity.source_fingerprint
    return made_of == Checkpoint.open(DEMO).fingerprint


def _settled(
    converted: Converted, traced: Path, given: Mapping[str, Any], watcher: Watcher
) -> dict[str, Any]:
    """Return the options of a compile: those given, else an earlier compile's, else what fits.

    Raises BackendError when the compiled directory is another backend's, or nothing fits.
    """
    before = _compiled_before(traced)
    if "seq_len" in given:
        before.pop("buckets", None)
    options = before | dict(given)
    wanted = options.get("seq_len")
    if before and wanted == before["seq_len"] and not given.keys() & {"slots", *CACHE_OPTIONS}:
        return options  # it fitted
    return options | {"seq_len": _context(converted, options, wanted, watcher)}


def _compiled_before(traced: Path) -> dict[str, Any]:
    """Return the options of the compile that is there; none without a readable one.

    Raises BackendError when it is another backend's.
    """
    try:
        manifest = read_manifest(traced)
    except BackendError:  # compiling says what it does about it
        return {}
    if manifest.backend != "cpu":
        raise BackendError(
            f"{traced} holds a model compiled for {manifest.backend}; use it as it is "
            f"(`neuron-minimax chat {traced}`), or choose another directory with --work-dir"
        )
    return dict(manifest.options)


def _context(
    converted: Converted, options: Mapping[str, Any], wanted: int | None, watcher: Watcher
) -> int:
    """Return the positions per sequence that memory allows, and say what bounds them.

    Half of the memory that weights leave, or an eighth of all where they leave less, is for the
    keys and values. Raises BackendError when that holds fewer than wanted.
    """
    limit = converted.config.max_position_embeddings
    slots = options.get("slots") or 1
    of_cache = {name: options[name] for name in CACHE_OPTIONS if name in options}
    any_length = CPUOptions.parse({"seq_len": 2, "buckets": (1,)} | of_cache)
    per_position = any_length.cache_bytes_per_token(converted.config) * slots
    memory = available_memory()
    fitting = max((memory - converted.nbytes) // 2, memory // 8) // per_position
    least = wanted or min(LEAST_CONTEXT, limit)
    if fitting < least:
        raise BackendError(
            f"a context of {least} positions needs {size_text(least * per_position)} (batch size "
            f"{slots}) beside the weights ({size_text(converted.nbytes)}), but {size_text(memory)} "
            f"of memory are free: at most {fitting} positions fit; ask for fewer with --seq-len"
        )
    if converted.nbytes > memory:
        watcher.say(
            f"the weights ({size_text(converted.nbytes)}) do not fit into the free memory "
            f"({size_text(memory)}): they are read from the disk again and again, which is slow"
        )
    if wanted:
        return wanted
    bounds = {
        f"as much as memory allows of the model's {limit:,}": fitting,
        "all that the model has": limit,
        f"--seq-len asks for more of the model's {limit:,}": MOST_CONTEXT,
    }
    bound = min(bounds, key=lambda name: bounds[name])
    watcher.say(f"context: {bounds[bound]:,} tokens, prompt and answer together ({bound})")
    return bounds[bound]
