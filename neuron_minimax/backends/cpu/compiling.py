"""The processes that compile graphs: each makes one, in a directory that only this compile uses,
and ends with its parent, and its own children with it. Graphs that are finished outlive an
interrupted compile.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.backends.manifest import CodeFile, require_own, withhold
from neuron_minimax.backends.model_files import remove
from neuron_minimax.checkpoint.writer import sync_files, write_json
from neuron_minimax.errors import BackendError
from neuron_minimax.files import FileName, read_json
from neuron_minimax.kernels.cpu.library import compiler
from neuron_minimax.processes import bound
from neuron_minimax.progress import Advance, Progress

MODULE = "neuron_minimax.backends.cpu.graphs"
DOING = b"doing: "  # begins a line of its standard output that says what a process does
FINISHED = "finished.json"  # of graphs that are whole, while others are being made
# Calls the compiler so that equal graphs become equal files, wherever they are compiled: the names
# of what it reads, which are in the directory of this compile, leave no trace.
COMPILER = """#!/bin/sh
exec {compiler} "$@" -g0 -s -Wno-builtin-macro-redefined '-D__FILE__="graph"'
"""


class GraphCompilers:
    """Processes that compile graphs in `directory`, from where `finished` takes them; it is removed
    when the block is left, as are those that still run then.

    Whatever a compiler leaves or looks for, its caches and temporary files, is in there too, where
    nobody else can write. Call `run` from as many threads as there shall be processes; the kernel
    ends a process when its thread ends.
    """

    def __init__(self, finished: "FinishedGraphs") -> None:
        self.finished = finished
        made = tempfile.mkdtemp(prefix=".compiling-", dir=finished.graphs)
        self.directory = Path(made).resolve()
        self.environment = os.environ | {
            "TMPDIR": str(self.directory),
            "TORCHINDUCTOR_CACHE_DIR": str(self.directory / "cache"),
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # more would be processes for another compiler
        }
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._left = False

    def __enter__(self) -> "GraphCompilers":
        if compiler():
            path = self.directory / Path(compiler()).name
            path.write_text(COMPILER.format(compiler=shlex.quote(compiler())), encoding="utf-8")
            path.chmod(0o700)
            self.environment["CXX"] = str(path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._left = True
        for process in self._running:
            process.kill()
            process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)

    def run(self, model: Path, options: CPUOptions, name: str, progress: Progress) -> None:
        """Compile one graph.

        Raises BackendError with the last line of what a failing compile said.
        """
        with progress.stage(name) as advance:
            advance(doing="starting")
            self._run(model, options, name, advance)

    def _run(self, model: Path, options: CPUOptions, name: str, advance: Advance) -> None:
        arguments = [str(model), str(self.directory), json.dumps(asdict(options)), name]
        command = bound([sys.executable, "-m", MODULE, *arguments])
        started = time.monotonic()
        with tempfile.TemporaryFile(dir=self.directory) as said:
            with self._lock:
                if self._left:
                    raise BackendError(f"compiling {name} was stopped")
                process = subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=said,
                )
                self._running.append(process)
            assert process.stdout is not None, "it is a pipe"
            with process.stdout:  # until it ends, with all that it has started
                for line in process.stdout:
                    if line.startswith(DOING):
                        advance(doing=line.removeprefix(DOING).decode().strip())
            if process.wait():
                said.seek(0)
                lines = said.read().decode(errors="replace").strip().splitlines()
                last = lines[-1] if lines else f"exit code {process.returncode}"
                raise BackendError(f"compiling {name} failed: {last}")
        self.finished.add(name, self.directory, time.monotonic() - started)


class FinishedGraphs:
    """The graphs in a directory that are whole, with the seconds that each took.

    Those of an interrupted compile are kept, when their bytes are as recorded; whatever else is
    there is removed.
    """

    def __init__(self, graphs: Path, suffixes: Sequence[str]) -> None:
        self.graphs = graphs
        self.suffixes = suffixes
        self.journal = graphs / FINISHED
        self._files: dict[str, CodeFile] = {}
        self._lock = threading.Lock()
        try:
            recorded = read_json(self.journal, dict[FileName, CodeFile], BackendError, "")
        except (BackendError, OSError):
            recorded = {}
        for path in graphs.iterdir():
            file = recorded.get(path.name)
            wanted = path.name.endswith(tuple(suffixes))
            if wanted and file is not None and _is_as_recorded(path, file):
                self._files[path.name] = file
            elif path != self.journal:
                remove(path)

    def __contains__(self, name: str) -> bool:
        return all(name + suffix in self._files for suffix in self.suffixes)

    def add(self, name: str, made: Path, seconds: float) -> None:
        """Take a graph's files from the directory where they were made."""
        paths = [self.graphs / (name + suffix) for suffix in self.suffixes]
        for path in paths:
            os.rename(made / path.name, path)
            withhold(path)
        sync_files(paths)
        first, *others = paths
        files = {first.name: CodeFile.of(first, seconds)}
        files |= {path.name: CodeFile.of(path, 0.0) for path in others}
        with self._lock:
            self._files |= files
            write_json(self.journal, {name: asdict(file) for name, file in self._files.items()})

    def seconds(self) -> dict[str, float]:
        """File name to the seconds that it took; all graphs are there now."""
        self.journal.unlink(missing_ok=True)
        return {name: file.seconds for name, file in self._files.items()}


def _is_as_recorded(path: Path, recorded: CodeFile) -> bool:
    try:
        require_own(path, path.lstat())
        return CodeFile.of(path, recorded.seconds) == recorded
    except (BackendError, OSError):
        return False


def doing(what: str) -> None:
    """Say, in a process that compiles a graph, what it does from now on."""
    sys.stdout.buffer.write(DOING + what.encode() + b"\n")
    sys.stdout.flush()
