"""The compile of a converted directory: made once, recognized when nothing changed.

Graphs and model are made apart: another chat template is taken over without compiling, and weights
are not copied again for other graphs. Both are made beside those that are there, which stay until
all is made: a compile that fails loses nothing.
"""

import fcntl
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from neuron_minimax.backends.directory import (
    BACKENDS,
    GRAPHS,
    RANK_WEIGHTS,
    damaged_ranks,
    engine_module,
    open_model,
    options_module,
    without_advice,
)
from neuron_minimax.backends.manifest import (
    COPIES,
    HARD_LINKS,
    MANIFEST_NAME,
    OTHERS_WRITE,
    CodeFile,
    Manifest,
    Request,
    read_manifest,
    require_own,
    withhold,
)
from neuron_minimax.backends.model_files import (
    MODEL,
    NEW_MODEL,
    OLD_MODEL,
    changed,
    copy_model,
    damaged_model,
    fingerprint,
    put_model,
    remove,
    require_whole,
    small_files,
    take_model,
)
from neuron_minimax.backends.report import PLAIN, CompileMode, CompileReport
from neuron_minimax.checkpoint.finished import locked, record_of
from neuron_minimax.checkpoint.kinds import UNFINISHED
from neuron_minimax.checkpoint.writer import (
    PARTIAL_SUFFIX,
    make_directory,
    sync_directory,
    sync_files,
    write_json,
)
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, ConversionError
from neuron_minimax.files import read_json
from neuron_minimax.progress import SILENT, Progress

PACKAGE = "neuron-minimax"
WARNING = "warning: "  # begins a backend's line that is to stay
NEW_GRAPHS = ".graphs-new"
JOURNALS = (UNFINISHED, UNFINISHED + PARTIAL_SUFFIX)
LEFTOVERS = (NEW_MODEL, OLD_MODEL, NEW_GRAPHS)  # of a compile that did not finish
OURS = {MODEL, GRAPHS, *LEFTOVERS, *JOURNALS, MANIFEST_NAME, MANIFEST_NAME + PARTIAL_SUFFIX}
IGNORED = {".gitignore", ".lock"}


def compile_model(
    converted: str | Path | Converted,
    traced: str | Path,
    *,
    backend: str = "cpu",
    options: Mapping[str, Any] | None = None,
    mode: CompileMode = PLAIN,
    progress: Progress = SILENT,
) -> CompileReport:
    """Compile a converted directory into `traced`, or recognize that this was done.

    `options` are the backend's own (cpu: see CPUOptions).

    Raises BackendError on bad options, when another compile is writing to `traced`, when it holds
    something else, or when its disk is too small; ConversionError when the converted directory is
    damaged. An interruption gets a note that says what is kept.
    """
    started = time.monotonic()
    traced = Path(traced)
    source = converted.directory if isinstance(converted, Converted) else Path(converted)
    for path in (source, traced):
        _require_text(path)
    if not isinstance(converted, Converted):
        converted = Converted.open(converted, progress=progress)
    request = _request(converted, backend, options or {}, mode.force)
    with _locked(traced):
        why = _why_compile(traced, request, mode.check)
        _take(traced)
        reason = "forced" if mode.force else why
        job = _Job(converted, traced, request, mode, progress)
        # Hard links cost nothing; what is there is looked at where copies may be kept.
        refreshed = "other graphs" if reason and not job.copies else job.why_refresh()
        if not reason and not refreshed:
            remove(*(traced / name for name in (*JOURNALS, *LEFTOVERS)))
            assert job.before is not None, "graphs that are up to date have a manifest"
            manifest = job.before
        else:
            if refreshed and mode.check:
                require_whole(converted, progress)
            manifest = job.run(started, reason, refreshed)
    return CompileReport(
        directory=traced,
        manifest=manifest,
        reason=reason,
        refreshed="" if reason else refreshed,
        seconds=manifest.compile_seconds if reason else time.monotonic() - started,
    )


def _request(
    converted: Converted, backend: str, options: Mapping[str, Any], force: bool
) -> Request:
    module = options_module(backend)
    checked = module.check_options(converted.config, options, force)
    versions, machine = module.environment(checked)
    return Request(
        backend=backend,
        options=checked,
        checkpoint=fingerprint(converted),
        versions=versions,
        machine=machine,
    )


def _require_text(path: Path) -> None:
    """Raise BackendError unless a path is valid UTF-8, as a manifest and messages hold it."""
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise BackendError(
            f"{path} is no valid UTF-8; rename the directory, or choose another one"
        ) from None


def _take(traced: Path) -> None:
    """Take the permission to write into a compiled directory from all but its owner.

    Raises BackendError when it is not the user's own.
    """
    for path in (traced, traced / GRAPHS, traced / MODEL):
        with suppress(PermissionError, FileNotFoundError):  # of another's, which is refused
            if path.stat().st_mode & OTHERS_WRITE:
                withhold(path)
    require_own(traced, traced.stat())


class _Job:
    """A compile that has the directory to itself; `before` is the manifest of what is there, and
    `placed` its model, when that is whole.
    """

    def __init__(
        self,
        converted: Converted,
        traced: Path,
        request: Request,
        mode: CompileMode,
        progress: Progress,
    ) -> None:
        self.converted = converted
        self.traced = traced
        self.request = request
        self.mode = mode
        self.progress = progress
        self.before: Manifest | None = None
        self.placed: Converted | None = None
        with suppress(BackendError):
            self.before = read_manifest(traced)
        # A directory that has copies of these weights keeps them.
        has_copies = (
            self.before is not None
            and self.before.weights == COPIES
            and self.before.checkpoint == request.checkpoint
        )
        self.copies = mode.copy_weights or has_copies

    def why_refresh(self) -> str:
        """Say why the model's files are not those of the converted directory; "" when they are.
        With `check`, every byte of them is read.
        """
        before = self.before
        here = self.converted
        if before is None:
            return "new"
        try:
            placed = open_model(self.traced, before, self.progress)
        except BackendError as error:
            return without_advice(error)
        damaged = damaged_model(placed, self.progress) if self.mode.check else ""
        if not damaged:
            self.placed = placed
        if self.copies and before.weights != COPIES:
            return "its weights are to be copies"
        if not before.holds_weights and placed.directory.resolve() != here.directory.resolve():
            return f"its weights were those of {placed.directory}"
        return (
            changed(small_files(placed), small_files(here))
            or changed(before.files, small_files(here))
            or damaged
            or ("" if placed.records == here.records else "the weights are other ones")
        )

    def run(self, started: float, reason: str, refreshed: str) -> Manifest:
        """Make what is asked for: graphs where there is a `reason`, and the model's files where
        they are to be `refreshed`.
        """
        try:
            return self._build(started, refreshed) if reason else self._refresh()
        except KeyboardInterrupt as stop:
            if (self.traced / NEW_MODEL).is_dir() and self.copies:
                stop.add_note("weights that are copied are kept")
            if self.before is not None and (self.traced / MANIFEST_NAME).exists():
                stop.add_note(f"what {self.traced} held can be used as before")
            stop.add_note("run the same command again to go on")
            raise

    def _build(self, started: float, refreshed: str) -> Manifest:
        traced = self.traced
        (traced / UNFINISHED).touch()  # what is there besides may be replaced
        sync_directory(traced)
        remove(traced / OLD_MODEL)
        with self.converted.reading():
            weights = self._take_weights() if refreshed else COPIES
            model = traced / (NEW_MODEL if refreshed else MODEL)
            if weights not in (HARD_LINKS, COPIES):
                model = self.converted.directory
            made = self._make_graphs(model)
        manifest = Manifest(
            **{field.name: getattr(self.request, field.name) for field in fields(Request)},
            weights=weights,
            files=small_files(self.converted),
            **made,
            made_by=f"{PACKAGE} {metadata.version(PACKAGE)}",
            compile_seconds=round(time.monotonic() - started, 1),
        )
        # From here on what was there is replaced, and nothing is made any more.
        remove(traced / MANIFEST_NAME)
        sync_directory(traced)
        remove(traced / GRAPHS)
        (traced / NEW_GRAPHS).rename(traced / GRAPHS)
        if refreshed:
            put_model(traced)
        manifest.write(traced)
        remove(*(traced / name for name in JOURNALS))
        sync_directory(traced)
        return manifest

    def _make_graphs(self, model: Path) -> dict[str, Any]:
        """Make graphs beside those that are there, and go on where an interrupted compile of the
        same request has stopped; return a manifest's fields of them.
        """
        graphs = self.traced / NEW_GRAPHS
        journal = self.traced / UNFINISHED
        if self.mode.force or not self._can_go_on(graphs, journal):
            remove(graphs)
            graphs.mkdir()
            withhold(graphs)
        write_json(journal, {"request": self.request.digest_of_request})
        seconds, notes = self._build_graphs(model, graphs)
        paths = {name: graphs / name for name in seconds}
        of_ranks = sorted((graphs / RANK_WEIGHTS).glob("*"))
        for path in (*paths.values(), *of_ranks):
            withhold(path)
        sync_files([*paths.values(), *of_ranks])
        return {
            "graphs": {name: CodeFile.of(path, seconds[name]) for name, path in paths.items()},
            "rank_weights": {path.name: record_of(path) for path in of_ranks},
            "notes": tuple(notes),
        }

    def _build_graphs(self, model: Path, graphs: Path) -> tuple[dict[str, float], list[str]]:
        """File name to seconds, and notes."""
        with self.progress.stage(f"importing the {self.request.backend} backend"):
            build = engine_module(self.request.backend).build
        options = self.request.options
        if BACKENDS[self.request.backend].by_graph:
            return build(model, graphs, options, self.progress)
        with self.progress.stage(f"compiling for {self.request.backend}") as advance:

            def tell(line: str) -> None:
                if line.startswith(WARNING):
                    self.progress(line)
                else:
                    advance(doing=line)

            return build(model, graphs, options, tell)

    def _can_go_on(self, graphs: Path, journal: Path) -> bool:
        """Whether an interrupted compile of this request has left graphs here, and nobody else."""
        if not BACKENDS[self.request.backend].by_graph:
            return False
        try:
            require_own(graphs, graphs.lstat())
            found = read_json(journal, dict[str, str], BackendError, "")
        except (BackendError, OSError):
            return False
        return graphs.is_dir() and found == {"request": self.request.digest_of_request}

    def _refresh(self) -> Manifest:
        """Take over the model's files again, beside graphs that serve them."""
        assert self.before is not None, "graphs that are up to date have a manifest"
        remove(self.traced / OLD_MODEL, self.traced / NEW_GRAPHS)
        with self.converted.reading():
            weights = self._take_weights()
        put_model(self.traced)
        manifest = replace(self.before, weights=weights, files=small_files(self.converted))
        manifest.write(self.traced)
        remove(*(self.traced / name for name in JOURNALS))
        return manifest

    def _take_weights(self) -> str:
        if not self.copies:
            return take_model(self.converted, self.traced, self.progress)
        return copy_model(self.converted, self.traced, self._own_copies(), self.progress)

    def _own_copies(self) -> Converted | None:
        """The model that is here, if its weights are not another directory's too."""
        if self.before is None or self.placed is None or not self.before.holds_weights:
            return None
        shards = self.placed.directory.glob("*.safetensors")
        copied = self.before.weights == COPIES or all(path.stat().st_nlink == 1 for path in shards)
        return self.placed if copied else None


def _why_compile(traced: Path, request: Request, check: bool) -> str:
    """Say why the graphs in `traced` do not serve the request; "" when they do. `check` reads all
    that they are made of.

    Raises BackendError when it holds something else.
    """
    names = {path.name for path in traced.iterdir()} - IGNORED
    if MANIFEST_NAME not in names:
        if names and UNFINISHED not in names:
            raise BackendError(
                f"{traced} holds {min(names)} and no {MANIFEST_NAME}: it is no compiled model; "
                "choose an empty or new directory"
            )
        return "an earlier compile did not finish" if names else "new"
    try:
        manifest = read_manifest(traced)
    except BackendError as error:
        others = names - OURS
        if others:
            raise BackendError(
                f"{error}; but it holds {min(others)} too, and may be no compiled model: choose an "
                "empty or new directory"
            ) from None
        return without_advice(error)
    different = manifest.difference(request)
    if different:
        return different
    try:
        for name in manifest.graphs:
            manifest.read_graph(traced / GRAPHS, name)
    except BackendError as error:
        return without_advice(error)
    return damaged_ranks(traced, manifest, check)


@contextmanager
def _locked(traced: Path) -> Iterator[None]:
    """Hold the directory against other compiles; the lock goes away with the process. What the file
    system refuses in the block is one message.
    """
    with _named_errors(traced), ExitStack() as held:
        make_directory(traced)
        try:
            held.enter_context(locked(traced, fcntl.LOCK_EX))
        except ConversionError:
            raise BackendError(
                f"another compile is writing to {traced}; wait for it or choose another directory"
            ) from None
        yield


@contextmanager
def _named_errors(traced: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename or traced
        raise BackendError(
            f"compiling into {traced} failed ({place}: {error.strerror}); mend it, or choose "
            "another directory"
        ) from None
