"""A compiled model's directory: made once, recognized when nothing changed, loaded from itself
alone.

TRACED/manifest.json  what it is (backends/directory.py), written last
TRACED/model/         config, tokenizer files, and hard links to the converted shards
TRACED/graphs/        what the backend compiled
"""

import fcntl
import gc
import hashlib
import importlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from neuron_minimax.checkpoint.output import comparable
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.writer import write_json
from neuron_minimax.convert.plan import CONVERSION_NAME, Converted
from neuron_minimax.errors import BackendError, CheckpointError, ConversionError
from neuron_minimax.inspection.document import Rendered

if TYPE_CHECKING:
    from neuron_minimax.backends.base import Backend

MANIFEST_NAME = "manifest.json"
FORMAT = 1
PACKAGE = "neuron-minimax"
# What generated code may depend on; other flags come and go with kernels and microcode.
CPU_FEATURES = """
avx2 fma f16c abm bmi1 bmi2 movbe adx sha_ni gfni vaes vpclmulqdq avx_vnni avx512f avx512bw avx512cd
avx512dq avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq
avx512_vp2intersect avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp bf16
i8mm sve sve2 svebf16 svei8mm
"""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that load needs to know. The first five fields are the request: equal request,
    equal result.

    checkpoint   fingerprint of the converted directory
    versions     of the packages that graphs depend on, and a digest of the code that makes them
    machine      what compiled code depends on
    weights      "hard links" beside the manifest, or the converted directory's absolute path
    graphs       file name to bytes, sha256, seconds
    notes        what did not go as asked, such as a missing C++ compiler
    made_by      the package that compiled it; recorded, never compared
    """

    backend: str
    options: Mapping[str, Any]
    checkpoint: str
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    weights: str = ""
    graphs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    made_by: str = ""

    def difference(self, request: "Manifest") -> str | None:
        """Say why this compile does not serve a request; None when it does."""
        if self.backend != request.backend:
            return f"it is for backend {self.backend}, not {request.backend}"
        for name in ("options", "versions", "machine"):
            have = getattr(self, name)
            want = getattr(request, name)
            for key in sorted(have.keys() | want.keys()):
                if have.get(key) != want.get(key):
                    return (
                        f"{name.removesuffix('s')} {key} was {have.get(key)!r} and is "
                        f"{want.get(key)!r}"
                    )
        # Last: another version may take the fingerprint of the same checkpoint another way.
        if self.checkpoint != request.checkpoint:
            return "the converted checkpoint is another one"
        return None

    def write(self, directory: Path) -> None:
        """Put the manifest in place, whole or not at all; it is the last file of a compile."""
        write_json(directory / MANIFEST_NAME, {"format": FORMAT, **asdict(self)})


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest. Raises BackendError when it is missing, broken or of another format."""
    path = directory / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        return Manifest(**{**fields, "notes": tuple(fields["notes"])})
    except FileNotFoundError:
        found = "is there, but is no finished compile" if directory.is_dir() else "does not exist"
        raise BackendError(
            f"{directory} {found} (no {MANIFEST_NAME}); run `neuron-minimax compile CONVERTED "
            f"{directory}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(
            f"{path} is no manifest of this version ({error}); compile again"
        ) from None


def fingerprint(converted: Path | TensorDirectory) -> str:
    """Identity of a converted directory: its headers, samples of its data, and its own record of
    all digests, without the version that wrote it.
    """
    tensors = converted if isinstance(converted, TensorDirectory) else TensorDirectory(converted)
    digest = hashlib.sha256(tensors.fingerprint.encode())
    record = tensors.directory / CONVERSION_NAME
    if record.exists():
        manifest = json.loads(record.read_bytes())
        same = comparable(manifest) | {"identity": comparable(manifest["identity"])}
        digest.update(json.dumps(same).encode())
    return digest.hexdigest()


def versions_of(packages: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """The versions that a compiled graph depends on: of packages, and "code", a digest of the
    source files (patterns below the package) that graphs are made from.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in sources:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    versions = {name: metadata.version(name) for name in packages}
    return {**versions, "code": digest.hexdigest()[:16]}


def cpu_here() -> dict[str, Any]:
    """The architecture and instruction sets that compiled CPU code depends on."""
    features: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        features = set(flags.partition(":")[2].split())
    return {
        "architecture": platform.machine(),
        "features": [name for name in CPU_FEATURES.split() if name in features],
    }


class BackendModules(NamedTuple):
    """The modules of one backend.

    `options` has `check_options(config, options, force) -> options` and `environment() ->
    (versions, machine)`, without torch or NxDI. `engine` has `build(model, graphs, options,
    progress) -> (file name to seconds, notes)` and `load(model, graphs, manifest) -> Backend`.
    """

    options: str
    engine: str


BACKENDS = {
    "cpu": BackendModules(
        "neuron_minimax.backends.cpu.options", "neuron_minimax.backends.cpu.backend"
    ),
    "neuron": BackendModules(
        "neuron_minimax.backends.nxdi.backend", "neuron_minimax.backends.nxdi.backend"
    ),
}
LOCK_NAME = ".lock"
HARD_LINKS = "hard links"
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CompileReport(Rendered):
    """The outcome of a compile; `reason` says why graphs were made, "" when all was up to date."""

    directory: Path
    manifest: Manifest
    reason: str
    seconds: float

    def render(self) -> str:
        if not self.reason:
            return f"{self.directory} is up to date ({self.seconds:.1f} s)"
        lines = [f"compiled into {self.directory} in {self.seconds:.1f} s ({self.reason})"]
        lines += [
            f"  {name}: {graph['seconds']:.1f} s" for name, graph in self.manifest.graphs.items()
        ]
        lines += [f"  {note}" for note in self.manifest.notes]
        return "\n".join(lines)


def compile_model(
    converted: str | Path | Converted,
    traced: str | Path,
    *,
    backend: str = "cpu",
    options: Mapping[str, Any] | None = None,
    force: bool = False,
    progress: Progress = lambda message: None,
) -> CompileReport:
    """Compile a converted directory into `traced`, or recognize that this was done.

    `options` are the backend's own (cpu: see CPUOptions); `force` compiles in any case; `progress`
    gets one line per stage. Raises BackendError on bad options, when another compile is writing to
    `traced`, or when it holds something else.
    """
    started = time.monotonic()
    opened = converted if isinstance(converted, Converted) else Converted.open(converted)
    traced = Path(traced)
    request = _request(opened, backend, options or {}, force)
    with _locked(traced):
        reason = "forced" if force else _why_compile(traced, request)
        manifest = (
            _build(opened.directory, traced, request, progress) if reason else read_manifest(traced)
        )
    return CompileReport(
        directory=traced, manifest=manifest, reason=reason, seconds=time.monotonic() - started
    )


def load(traced: str | Path) -> "Backend":
    """The backend of a compiled directory.

    Raises BackendError when the directory is unfinished, from another version or machine, or its
    weights changed or are damaged.
    """
    traced = Path(traced)
    manifest = read_manifest(traced)
    versions, machine = options_module(manifest.backend).environment()
    opened, found = _open_model(traced, manifest)
    here = replace(manifest, versions=versions, machine=machine, checkpoint=found)
    different = manifest.difference(here) or _damaged_graph(traced, manifest)
    if different:
        raise _unusable(traced, different)
    with _not_collecting():
        return _engine_module(manifest.backend).load(opened, traced / "graphs", manifest)


def place_model(converted: Path, destination: Path) -> str:
    """Make `destination` a copy of a converted directory whose shards are hard links, which take no
    space.

    Returns "hard links", or, where the file system has none, the absolute path of the converted
    directory: then `destination` holds the small files only.
    """
    shutil.rmtree(destination, ignore_errors=True)
    destination.mkdir(parents=True)
    linked = True
    for path in sorted(converted.iterdir()):
        if path.suffix == ".safetensors":
            linked = linked and _hard_link(path, destination / path.name)
        elif path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, destination / path.name)
    if linked:
        return HARD_LINKS
    for shard in destination.glob("*.safetensors"):
        shard.unlink()
    return str(converted.resolve())


def options_module(backend: str) -> Any:
    """The module that checks a backend's options. Raises BackendError for an unknown backend."""
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} does not exist; expected {' or '.join(BACKENDS)}")
    return importlib.import_module(BACKENDS[backend].options)


def _engine_module(backend: str) -> Any:
    return importlib.import_module(BACKENDS[backend].engine)


def _request(
    converted: Converted, backend: str, options: Mapping[str, Any], force: bool
) -> Manifest:
    module = options_module(backend)
    checked = module.check_options(converted.config, options, force)
    versions, machine = module.environment()
    return Manifest(
        backend=backend,
        options=checked,
        checkpoint=fingerprint(converted.tensors),
        versions=versions,
        machine=machine,
        made_by=f"{PACKAGE} {metadata.version(PACKAGE)}",
    )


def _build(converted: Path, traced: Path, request: Manifest, progress: Progress) -> Manifest:
    (traced / MANIFEST_NAME).unlink(missing_ok=True)
    graphs = traced / "graphs"
    shutil.rmtree(graphs, ignore_errors=True)
    graphs.mkdir()
    weights = place_model(converted, traced / "model")
    model = traced / "model" if weights == HARD_LINKS else converted
    seconds, notes = _engine_module(request.backend).build(model, graphs, request.options, progress)
    built = {
        name: {**_identity(graphs / name), "seconds": round(seconds[name], 1)} for name in seconds
    }
    manifest = replace(request, weights=weights, graphs=built, notes=tuple(notes))
    manifest.write(traced)
    return manifest


def _why_compile(traced: Path, request: Manifest) -> str:
    """Say why `traced` does not serve the request; "" when it does.

    Raises BackendError when it holds something else.
    """
    if not (traced / MANIFEST_NAME).exists():
        others = sorted(
            path.name for path in traced.iterdir() if path.name not in (LOCK_NAME, ".gitignore")
        )
        if others and not (traced / "graphs").is_dir():
            raise BackendError(
                f"{traced} holds {others[0]} and no {MANIFEST_NAME}: it is no compiled model; "
                "choose an empty or new directory"
            )
        return "an earlier compile did not finish" if others else "new"
    try:
        manifest = read_manifest(traced)
        _, found = _open_model(traced, manifest)
    except BackendError as error:
        return str(error)
    different = manifest.difference(replace(request, checkpoint=found))
    return manifest.difference(request) or different or _damaged_graph(traced, manifest) or ""


def _identity(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }


def _open_model(traced: Path, manifest: Manifest) -> tuple[Converted, str]:
    """The converted directory that a compile takes its weights from, and its fingerprint.

    Raises BackendError when it is gone or damaged.
    """
    model = traced / "model" if manifest.weights == HARD_LINKS else Path(manifest.weights)
    if not model.is_dir():
        raise BackendError(
            f"{traced} takes its weights from {model}, which is gone; put it back or compile again"
        )
    try:
        opened = Converted.open(model)
        return opened, fingerprint(opened.tensors)
    except (CheckpointError, ConversionError) as error:
        # What is wrong, without the advice after it, which is for a checkpoint.
        problem = str(error).splitlines()[0].partition(";")[0]
        raise _unusable(traced, problem) from None


def _unusable(traced: Path, problem: str) -> BackendError:
    return BackendError(
        f"{traced} cannot be used: {problem}; run `neuron-minimax compile CONVERTED {traced}` again"
    )


def _damaged_graph(traced: Path, manifest: Manifest) -> str | None:
    for name, graph in manifest.graphs.items():
        path = traced / "graphs" / name
        if not path.exists():
            return f"graph {name} is missing"
        if _identity(path) != {key: graph[key] for key in ("bytes", "sha256")}:
            return f"graph {name} is not the file that was compiled"
    return None


def _hard_link(source: Path, destination: Path) -> bool:
    try:
        os.link(source.resolve(), destination)
    except OSError:
        return False
    return True


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


@contextmanager
def _locked(traced: Path) -> Iterator[None]:
    """Hold the directory against other compiles; the lock goes away with the process."""
    try:
        traced.mkdir(parents=True, exist_ok=True)
        lock = (traced / LOCK_NAME).open("w")
    except OSError as error:
        raise BackendError(
            f"cannot write to {traced} ({error.strerror}); choose another directory"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BackendError(
                f"another compile is writing to {traced}; wait for it or choose another directory"
            ) from None
        yield
