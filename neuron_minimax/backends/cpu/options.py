"""The CPU backend: its options, and which engine builds and loads it. Torch is imported only when
it is needed.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_minimax.backends.directory import Manifest, cpu_here, versions_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError

if TYPE_CHECKING:
    from neuron_minimax.backends.base import Backend

COMPUTE = ("float32", "bf16")
ENGINES = ("compiled", "exported", "eager")
DEFAULT_SEQ_LEN = 2048
DEFAULT_BUCKETS = (64, 512)
TESTED_TORCH = (2, 13)
EAGER_AS_ASKED = "eager engine, as asked: nothing was compiled"
EXPORTED_AS_ASKED = "exported graphs, as asked: they run uncompiled"
NO_COMPILER = (
    "no C++ compiler (g++, or $CXX) was found: the exported graphs run instead of compiled ones"
)
SOURCES = (
    "backends/cpu/graphs.py",
    "kernels/cpu/*.py",
    "kernels/reference.py",
    "model/*.py",
)
# of malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


@dataclass(frozen=True, kw_only=True)
class CPUOptions:
    """What a CPU compile can be asked for; lengths in tokens."""

    slots: int = 1
    seq_len: int
    buckets: tuple[int, ...]
    compute: str = "float32"
    engine: str = "compiled"

    def __post_init__(self) -> None:
        if self.slots < 1 or self.seq_len < 2:
            raise BackendError(
                f"batch size {self.slots}, seq_len {self.seq_len}: expected at least 1 and at "
                "least 2"
            )
        ascending = tuple(sorted(set(self.buckets)))
        if (
            not self.buckets
            or self.buckets != ascending
            or self.buckets[0] < 1
            or self.buckets[-1] > self.seq_len
        ):
            raise BackendError(
                f"buckets {list(self.buckets)}: expected ascending lengths from 1 to seq_len "
                f"{self.seq_len}"
            )
        for name, allowed in (("compute", COMPUTE), ("engine", ENGINES)):
            if getattr(self, name) not in allowed:
                raise BackendError(
                    f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}"
                )


def check_options(
    config: ModelConfig, options: Mapping[str, Any], force: bool = False
) -> dict[str, Any]:
    """Fill in defaults (None counts as absent) and check. Raises BackendError naming the option.

    `force` is for backends that advise against what they could compile; here there is no such
    thing.
    """
    given = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(given.keys() - {field.name for field in fields(CPUOptions)})
    if foreign:
        raise BackendError(
            f"the cpu backend does not take --{foreign[0].replace('_', '-')}; it belongs to "
            "another one"
        )
    seq_len = given.setdefault("seq_len", min(DEFAULT_SEQ_LEN, config.max_position_embeddings))
    default = tuple(size for size in DEFAULT_BUCKETS if size <= seq_len) or (seq_len,)
    given["buckets"] = tuple(given.get("buckets", default))
    if given.get("engine", "compiled") == "compiled" and not _compiler_is_there():
        given["engine"] = "exported"
    if seq_len > config.max_position_embeddings:
        raise BackendError(
            f"seq_len {seq_len} is beyond max_position_embeddings {config.max_position_embeddings} "
            "of config.json"
        )
    return {**asdict(CPUOptions(**given)), "buckets": list(given["buckets"])}


def environment() -> tuple[dict[str, str], dict[str, Any]]:
    """Versions and machine features that compiled graphs depend on."""
    python = {"python": "{}.{}".format(*sys.version_info)}  # whose pickles hold the loops
    return python | versions_of(["torch", "numba"], SOURCES), cpu_here()


def build(
    model: Path, graphs: Path, options: Mapping[str, Any], progress: Callable[[str], None]
) -> tuple[dict[str, float], list[str]]:
    """Compile graphs into `graphs`; returns file name to seconds, and notes for the manifest.

    Without a C++ compiler, or where a torch older than the tested one fails to compile, the
    exported graphs run instead, and a note says so. Raises BackendError when the tested torch
    fails.
    """
    parsed = _parse(options)
    if parsed.engine == "eager":
        return {}, [EAGER_AS_ASKED]
    from neuron_minimax.backends.cpu.graphs import build_graphs

    notes = []
    try:
        if parsed.engine == "exported":
            notes = [EXPORTED_AS_ASKED if _compiler_is_there() else NO_COMPILER]
        return build_graphs(model, graphs, parsed, progress), notes
    except Exception as error:  # whatever an export or a compiler may raise
        problem = (
            f"{type(error).__name__}: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        )
        version = metadata.version("torch")
        if (
            parsed.engine == "exported"
            or tuple(int(part) for part in version.split(".")[:2]) >= TESTED_TORCH
        ):
            raise BackendError(
                f"compiling for the CPU failed ({problem}); check that $CXX or g++ works, or use "
                "--engine eager"
            ) from error
        note = (
            f"torch {version} could not compile this model ({problem}): the exported graphs run "
            "instead"
        )
        return build_graphs(model, graphs, replace(parsed, engine="exported"), progress), [note]


def load(model: Path, graphs: Path, manifest: Manifest) -> "Backend":
    """The backend over the weights in `model`."""
    options = _parse(manifest.options)
    _keep_freed_memory()
    if not manifest.graphs:
        from neuron_minimax.backends.cpu.eager import EagerBackend

        return EagerBackend(model, options)
    from neuron_minimax.backends.cpu.graphs import CompiledBackend

    return CompiledBackend(model, graphs, options)


def _keep_freed_memory() -> None:
    """Of the scratch of a pass, some 30 MB, glibc returns much to the system, and each next pass
    faults it in again.

    Encoding 512 tokens made 5,000 to 25,000 page faults, and makes 100 to 1,000. Other C libraries
    stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)


def _compiler_is_there() -> bool:
    return shutil.which(os.environ.get("CXX", "g++")) is not None


def _parse(options: Mapping[str, Any]) -> CPUOptions:
    return CPUOptions(**{**options, "buckets": tuple(options["buckets"])})
