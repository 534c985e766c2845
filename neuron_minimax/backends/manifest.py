"""The manifest of a compiled directory: what it was compiled from, for what, and whether it can be used here.

Imports no torch: recognizing an unchanged compile must take less time than importing it.
"""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.errors import BackendError

MANIFEST_NAME = "manifest.json"
FORMAT = 1
# What generated code may depend on; other flags come and go with kernels and microcode.
CPU_FEATURES = """
avx2 fma f16c abm bmi1 bmi2 movbe adx sha_ni gfni vaes vpclmulqdq avx_vnni avx512f avx512bw avx512cd avx512dq avx512vl
avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq avx512_vp2intersect avx512_bf16
avx512_fp16 amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp bf16 i8mm sve sve2 svebf16 svei8mm
"""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything that load needs to know. The first five fields are the request: equal request, equal result."""

    backend: str
    options: Mapping[str, Any]
    checkpoint: str  # fingerprint of the converted directory
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    weights: str = ""  # "hard links" beside the manifest, or the absolute path of the converted directory
    graphs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # file name to bytes, sha256, seconds
    notes: tuple[str, ...] = ()  # what did not go as asked, such as a missing C++ compiler

    def difference(self, request: "Manifest") -> str | None:
        """Why this compile does not serve a request, in words; None when it does."""
        if self.backend != request.backend:
            return f"it is for backend {self.backend}, not {request.backend}"
        if self.checkpoint != request.checkpoint:
            return "the converted checkpoint is another one"
        for name in ("options", "versions", "machine"):
            have, want = getattr(self, name), getattr(request, name)
            for key in sorted(have.keys() | want.keys()):
                if have.get(key) != want.get(key):
                    return f"{name.removesuffix('s')} {key} was {have.get(key)!r} and is {want.get(key)!r}"
        return None

    def write(self, directory: Path) -> None:
        """Put the manifest in place, whole or not at all; it is the last file of a compile."""
        temporary = directory / f".{MANIFEST_NAME}.partial"
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({"format": FORMAT, **asdict(self)}, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(directory / MANIFEST_NAME)


def read_manifest(directory: Path) -> Manifest:
    """Raises BackendError when there is no readable manifest of this format."""
    path = directory / MANIFEST_NAME
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError(f"expected format {FORMAT}")
        return Manifest(**{**fields, "notes": tuple(fields["notes"])})
    except FileNotFoundError:
        found = "is there, but is no finished compile" if directory.is_dir() else "does not exist"
        raise BackendError(
            f"{directory} {found} (no {MANIFEST_NAME}); run `neuron-minimax compile CONVERTED {directory}`"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{path} is no manifest of this version ({error}); compile again") from None


def fingerprint(converted: Path) -> str:
    """Identity of a converted directory: its headers, samples of its data, and its own record of all digests."""
    digest = hashlib.sha256(TensorDirectory(converted).fingerprint.encode())
    record = converted / "conversion.json"
    digest.update(record.read_bytes() if record.exists() else b"")
    return digest.hexdigest()


def versions_of(packages: Sequence[str], sources: Sequence[str]) -> dict[str, str]:
    """Versions that a compiled graph depends on: of this package, of others, and a digest of the source files (patterns
    below the package) that graphs are made from.
    """
    package = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for pattern in sources:
        for path in sorted(package.glob(pattern)):
            digest.update(path.read_bytes())
    versions = {name: metadata.version(name) for name in ("neuron-minimax", *packages)}
    return {**versions, "code": digest.hexdigest()[:16]}


def cpu_here() -> dict[str, Any]:
    """What compiled CPU code depends on: architecture and instruction sets."""
    features: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
        features = set(flags.partition(":")[2].split())
    return {"architecture": platform.machine(), "features": [name for name in CPU_FEATURES.split() if name in features]}
