"""What a compiled directory says of itself: the request that it answers, and every file that a load
opens, with what tells whether it is still the same.
"""

import hashlib
import json
import os
import platform
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import metadata
from pathlib import Path
from typing import Annotated, Final, Literal, NoReturn

from pydantic import ConfigDict, Field

from neuron_minimax.checkpoint.finished import Files
from neuron_minimax.checkpoint.kinds import COMPILED_NAME as MANIFEST_NAME
from neuron_minimax.checkpoint.kinds import Wanted, require
from neuron_minimax.checkpoint.records import Count
from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import BackendError
from neuron_minimax.files import FileName, is_plain_name, open_regular, read_json, sha256_of

FORMAT: Final = 3
# Where the weights are, when they are beside the manifest.
HARD_LINKS = "hard links"
COPIES = "copies"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
# What generated code may depend on; other flags come and go with kernels and microcode.
CPU_FEATURES = """
avx2 fma f16c abm bmi1 bmi2 movbe adx sha_ni gfni vaes vpclmulqdq avx_vnni avx512f avx512bw avx512cd
avx512dq avx512vl avx512ifma avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg avx512_vpopcntdq
avx512_vp2intersect avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8 asimd asimdhp asimddp bf16
i8mm sve sve2 svebf16 svei8mm
"""


Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Option = bool | int | str | list[int] | None


@dataclass(frozen=True, kw_only=True)
class CodeFile:
    """A file that is run; a load digests the bytes that it takes. `seconds` it took to make."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    bytes: Count
    sha256: Digest
    seconds: Annotated[float, Field(ge=0)]

    @classmethod
    def of(cls, path: Path, seconds: float) -> "CodeFile":
        """Raises OSError."""
        return cls(bytes=path.stat().st_size, sha256=sha256_of(path), seconds=round(seconds, 1))


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a compile: equal request, equal graphs.

    checkpoint   fingerprint of the converted directory
    versions     of the packages that graphs depend on, and a digest of the code that makes them
    machine      what compiled code depends on
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    backend: str
    options: Mapping[str, Option]
    checkpoint: str
    versions: Mapping[str, str]
    machine: Mapping[str, str | list[str]]

    @property
    def digest_of_request(self) -> str:
        """SHA-256 of what is asked, whatever else a manifest says."""
        asked = {field.name: getattr(self, field.name) for field in fields(Request)}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def difference(self, other: "Request") -> str | None:
        """Say why what was compiled for this request does not serve another; None when it does."""
        another = "the converted checkpoint is another one"
        # Another version may take the fingerprint of the same checkpoint another way.
        if self.versions == other.versions and self.checkpoint != other.checkpoint:
            return another
        if self.backend != other.backend:
            return f"it is for backend {self.backend}, not {other.backend}"
        for name in ("options", "versions", "machine"):
            have = getattr(self, name)
            want = getattr(other, name)
            for key in sorted(have.keys() | want.keys()):
                if have.get(key) != want.get(key):
                    return (
                        f"{name.removesuffix('s')} {key} was {have.get(key)!r} and is "
                        f"{want.get(key)!r}"
                    )
        return None if self.checkpoint == other.checkpoint else another


@dataclass(frozen=True, kw_only=True)
class Manifest(Request):
    """Everything that a load needs to know.

    weights          "hard links" or "copies" beside the manifest, or the converted directory: its
                     absolute path, or "../NAME" where it lies beside the compiled one
    files            SHA-256 of the model's small files; conversion.json has a digest of each tensor
    graphs           what the backend compiled and runs
    rank_weights     the weights that the Neuron backend has laid out for each rank
    notes            what did not go as asked, such as a missing C++ compiler
    made_by          the package that compiled it; recorded, never compared
    compile_seconds  what the whole compile took, by the clock on the wall
    """

    weights: str
    files: Mapping[FileName, Digest]
    graphs: Mapping[FileName, CodeFile]
    rank_weights: Files
    notes: tuple[str, ...]
    made_by: str
    compile_seconds: Annotated[float, Field(ge=0)]
    format: Literal[3] = FORMAT
    digest: str = ""  # of all of it, filled in when it is written

    def __post_init__(self) -> None:
        where = Path(self.weights)
        beside = where.parts[:1] == ("..",) and is_plain_name(self.weights[3:])
        if not (self.holds_weights or where.is_absolute() or beside):
            raise ValueError(f"weights: expected {HARD_LINKS!r}, {COPIES!r} or a path")
        if not all(record.sha256 for record in self.rank_weights.values()):
            raise ValueError("rank_weights: expected a digest of each file")

    @property
    def holds_weights(self) -> bool:
        """Whether the weights are beside the manifest."""
        return self.weights in (HARD_LINKS, COPIES)

    def write(self, directory: Path) -> None:
        """Put the manifest in place, whole or not at all, for its owner to change alone; it is the
        last file of a compile.
        """
        values = asdict(self) | {"digest": self.digest_of_all()}
        with replacing(directory / MANIFEST_NAME) as file:
            file.write((json.dumps(values, indent=2) + "\n").encode())
            withhold(file.fileno())

    def digest_of_all(self) -> str:
        """SHA-256 of everything else that the manifest says: options are not in the graphs."""
        values = asdict(self)
        values.pop("digest")
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def read_graph(self, graphs: Path, name: str) -> bytes:
        """The bytes of a compiled file, which are what the manifest says and their owner's alone to
        change.

        Raises BackendError when they are not, or the manifest does not list the file.
        """
        if name not in self.graphs:
            raise unusable(graphs.parent, f"{MANIFEST_NAME} lists no graph {name}")
        recorded = self.graphs[name]
        try:
            with open(open_regular(graphs / name), "rb") as file:
                require_own(graphs / name, os.fstat(file.fileno()))
                data = file.read(recorded.bytes + 1)
        except FileNotFoundError:
            raise unusable(graphs.parent, f"graph {name} is missing") from None
        except OSError as error:
            raise unusable(graphs.parent, f"graph {name}: {error.strerror}") from None
        if len(data) != recorded.bytes or hashlib.sha256(data).hexdigest() != recorded.sha256:
            raise unusable(graphs.parent, f"graph {name} is not the file that was compiled")
        return data


def read_manifest(directory: Path) -> Manifest:
    """Read a manifest. Raises BackendError when it is missing, broken, of another format, or not
    its user's own.
    """
    require(directory, Wanted.COMPILED, BackendError)
    path = directory / MANIFEST_NAME
    try:
        require_own(path, path.stat())
        manifest = read_json(path, Manifest, BackendError, f"compile again: {command(directory)}")
    except OSError as error:
        raise BackendError(f"{path} cannot be read ({error.strerror})") from None
    if manifest.digest != manifest.digest_of_all():
        raise unusable(directory, f"{MANIFEST_NAME} is not as it was written")
    return manifest


def unusable(traced: Path, problem: str) -> BackendError:
    """The error of a compiled directory that cannot be loaded as it is."""
    return BackendError(f"{traced} cannot be used: {problem}; run {command(traced)} again")


def command(traced: Path) -> str:
    return f"`neuron-minimax compile CONVERTED {traced}`"


def require_own(path: Path, found: os.stat_result) -> None:
    """Raise BackendError unless the user who runs this, or root, owns a file, and nobody else may
    write to it: it decides which machine code is run.
    """
    user = os.geteuid()
    if found.st_uid not in (user, 0):
        _refuse(path, f"belongs to user {found.st_uid}, not to user {user}")
    if found.st_mode & OTHERS_WRITE:
        _refuse(path, "may be written by others than its owner")


def _refuse(path: Path, problem: str) -> NoReturn:
    raise BackendError(
        f"{path} {problem}: a compiled directory holds machine code, which runs for the user who "
        "made it alone; compile the converted directory yourself, or take over the compiled one "
        "with chown and chmod if you trust whoever made it"
    )


def withhold(file: int | Path) -> None:
    """Take the permission to write from all but the owner of a file or directory."""
    os.chmod(file, stat.S_IMODE(os.stat(file).st_mode) & ~OTHERS_WRITE)


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


def cpu_here() -> dict[str, str | list[str]]:
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
