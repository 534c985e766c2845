"""A compiled model's directory, and how it is loaded from itself alone.

TRACED/manifest.json  what it is (backends/manifest.py), written last
TRACED/model/         config, tokenizer files, and the weights as hard links or copies; none where
                      the manifest names the converted directory instead
TRACED/graphs/        what the backend compiled

backends/compilation.py makes it.
"""

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neuron_minimax.backends.manifest import (
    MANIFEST_NAME,
    Manifest,
    command,
    read_manifest,
    require_own,
    unusable,
    versions_of,
)
from neuron_minimax.backends.model_files import (
    MODEL,
    changed,
    damaged_model,
    fingerprint,
    model_directory,
    small_files,
)
from neuron_minimax.checkpoint.finished import compare_files
from neuron_minimax.checkpoint.kinds import CONVERSION_NAME
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, NeuronMiniMaxError
from neuron_minimax.progress import SILENT, Progress

if TYPE_CHECKING:
    from neuron_minimax.backends.base import Backend

__all__ = ["MANIFEST_NAME", "Manifest", "load", "read_manifest", "verify_compiled", "versions_of"]

GRAPHS = "graphs"
RANK_WEIGHTS = "weights"  # below the graphs
SHOWN_DIGITS = 12  # of a fingerprint


class BackendModules(NamedTuple):
    """The modules of one backend.

    `options` has `check_options(config, options, force) -> options` and `environment(options) ->
    (versions, machine)`, without torch or NxDI. `engine` has `build(model, graphs, options,
    progress) -> (file name to seconds, notes)` and `load(model, graphs, manifest) -> Backend`.
    `opened` are graphs that the engine opens by their names; it gets others' bytes by
    `manifest.read_graph`. One that compiles `by_graph` opens a stage for each, and goes on from
    those that it finds in `graphs`; another's progress is lines about the one stage that it is.
    """

    options: str
    engine: str
    opened: tuple[str, ...] = ()
    by_graph: bool = False


BACKENDS = {
    "cpu": BackendModules(
        "neuron_minimax.backends.cpu.options",
        "neuron_minimax.backends.cpu.backend",
        by_graph=True,
    ),
    "neuron": BackendModules(
        "neuron_minimax.backends.nxdi.backend",
        "neuron_minimax.backends.nxdi.backend",
        ("model.pt", "parameters.json"),
    ),
    "torch-neuron": BackendModules(
        "neuron_minimax.backends.torch_neuron.options",
        "neuron_minimax.backends.torch_neuron.backend",
    ),
}


def load(traced: str | Path, progress: Progress = SILENT) -> "Backend":
    """The backend of a compiled directory.

    It runs machine code that is there: only the user's own or root's, and only files that the
    manifest has digests of. Raises BackendError when the directory is somebody else's, unfinished,
    from another version or machine, or a file of it changed or is damaged.
    """
    traced = Path(traced)
    manifest = read_manifest(traced)
    with progress.stage(f"loading {traced}"):
        opened = _checked(traced, manifest, progress)
        try:
            with _not_collecting():
                return engine_module(manifest.backend).load(opened, traced / GRAPHS, manifest)
        except NeuronMiniMaxError as error:
            error.usage = False  # the options at fault are the manifest's, not the command's
            raise


def check_compiled(traced: Path, progress: Progress = SILENT) -> Converted:
    """Return the model of a compiled directory that could be loaded, as far as can be told without
    running anything of it. Raises BackendError as `load` does.
    """
    return _checked(traced, read_manifest(traced), progress)


def verify_compiled(traced: str | Path, progress: Progress = SILENT) -> None:
    """Read every byte of a compiled directory, weights too, and compare it with its digest.

    Raises BackendError naming what is damaged, or what `load` would raise.
    """
    traced = Path(traced)
    manifest = read_manifest(traced)
    opened = _usable(traced, manifest, progress)
    for name in manifest.graphs:
        manifest.read_graph(traced / GRAPHS, name)
    damaged = damaged_ranks(traced, manifest, check=True) or damaged_model(opened, progress)
    if damaged:
        raise unusable(traced, damaged)


def _checked(traced: Path, manifest: Manifest, progress: Progress) -> Converted:
    """The model of a compiled directory whose graphs that are opened by their names are those that
    were compiled, and the user's own. Raises BackendError as `load` does.
    """
    opened = _usable(traced, manifest, progress)
    for name in BACKENDS[manifest.backend].opened:
        manifest.read_graph(traced / GRAPHS, name)
    return opened


def options_module(backend: str) -> Any:
    """The module that checks a backend's options. Raises BackendError for an unknown backend."""
    if backend not in BACKENDS:
        raise BackendError(
            f"backend {backend!r} does not exist; expected {' or '.join(BACKENDS)}", usage=True
        )
    return importlib.import_module(BACKENDS[backend].options)


def engine_module(backend: str) -> Any:
    """The module that builds and loads a backend's graphs."""
    return importlib.import_module(BACKENDS[backend].engine)


def _require_own_directories(traced: Path, manifest: Manifest) -> None:
    """Raise BackendError unless the directories of a compile are the user's own."""
    model = [traced / MODEL] if manifest.holds_weights else []
    for path in (traced, traced / GRAPHS, *model):
        with suppress(FileNotFoundError):  # which is said where its files are opened
            require_own(path, path.stat())


def _usable(traced: Path, manifest: Manifest, progress: Progress) -> Converted:
    """The model of a compiled directory that answers a request of here and now.

    Raises BackendError when it does not.
    """
    _require_own_directories(traced, manifest)
    if manifest.backend not in BACKENDS:
        raise unusable(traced, f"it is for backend {manifest.backend}, which does not exist")
    versions, machine = options_module(manifest.backend).environment(manifest.options)
    here = replace(manifest, versions=versions, machine=machine)
    different = manifest.difference(here)
    if different:
        raise unusable(traced, different)
    opened = open_model(traced, manifest, progress)
    found = fingerprint(opened)
    if found != manifest.checkpoint:
        if manifest.holds_weights:
            raise unusable(traced, "the converted checkpoint is another one")
        raise _weights_gone(traced, manifest, f"which is another one ({found[:SHOWN_DIGITS]})")
    different = changed(manifest.files, small_files(opened)) or damaged_ranks(
        traced, manifest, check=False
    )
    if different:
        raise unusable(traced, different)
    return opened


def open_model(traced: Path, manifest: Manifest, progress: Progress = SILENT) -> Converted:
    """The converted directory that a compile takes its weights from.

    Raises BackendError when it is gone or damaged.
    """
    model = model_directory(traced, manifest)
    if not model.is_dir():
        raise _weights_gone(traced, manifest, "which is gone")
    try:
        return Converted.open(model, progress=progress)
    except NeuronMiniMaxError as error:
        # What is wrong, without the advice after it, which is for a conversion.
        is_there = (model / CONVERSION_NAME).exists()
        problem = without_advice(error) if is_there else f"{model} has no {CONVERSION_NAME}"
        if manifest.holds_weights:
            raise unusable(traced, problem) from None
        raise _weights_gone(traced, manifest, f"where {problem}") from None


def _weights_gone(traced: Path, manifest: Manifest, problem: str) -> BackendError:
    """The error of weights that are not where the manifest says."""
    model = model_directory(traced, manifest)
    return BackendError(
        f"{traced} takes its weights from {model}, {problem}; expected the converted checkpoint of "
        f"fingerprint {manifest.checkpoint[:SHOWN_DIGITS]}: put it back there, or run "
        f"{command(traced)} again (with --copy-weights, to keep the weights in {traced})"
    )


def without_advice(error: Exception) -> str:
    """What is wrong, without the next step, which is another one where this is a reason."""
    text = str(error)
    return text.rpartition("; ")[0] or text


def damaged_ranks(traced: Path, manifest: Manifest, check: bool) -> str:
    """Say which rank's weights are not those that were laid out; only files with another time stamp
    are read, unless `check`.
    """
    directory = traced / GRAPHS / RANK_WEIGHTS
    _, faults = compare_files(directory, manifest.rank_weights, everything=check)
    return next((f"{name} {fault}" for name, fault in faults.items()), "")


@contextmanager
def _not_collecting() -> Iterator[None]:
    """Pause the garbage collector, which looks through all that torch has imported, repeatedly."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
