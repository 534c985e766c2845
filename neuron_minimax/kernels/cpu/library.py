"""Build the C++ kernels for this machine, and load them into this process.

Without a C++ compiler nothing is built, and the operators run as torch (operators.py).
"""

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.errors import BackendError
from neuron_minimax.files import user_cache
from neuron_minimax.processes import bound

HERE = Path(__file__).parent
SOURCE = HERE / "operators.cpp"
# The names of what the compiler reads leave no trace: equal sources become equal files.
FLAGS = (
    *("-std=c++20", "-O3", "-fopenmp", "-fPIC", "-shared", "-s"),
    *("-Wno-builtin-macro-redefined", '-D__FILE__="kernels"'),
)
THIS_PROCESSOR = "-march=native"
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_loaded: list[Path] = []  # of the first library, while this process lasts


def compiler() -> str:
    """The path of the C++ compiler, $CXX or g++; "" when there is none."""
    return shutil.which(os.environ.get("CXX", "g++")) or ""


def build(path: Path, processor: str = THIS_PROCESSOR) -> None:
    """Compile the kernels into a library; `processor` is the flag that says what for.

    Raises BackendError with the last line of what the compiler said.
    """
    import torch
    from torch.utils.cpp_extension import include_paths

    includes = [f"-isystem{each}" for each in include_paths()]
    libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = [*FLAGS, processor, *includes, str(SOURCE), "-o", str(path), *libraries]
    done = _compiler_with(command)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["no message"]
        raise BackendError(f"{compiler()} could not compile the kernels ({said[0]})")


def copy_built(path: Path) -> None:
    """Put the library for this machine at `path`: the one in the user's cache, which is made where
    it is missing. Raises BackendError.
    """
    try:
        kept = user_cache() / f"kernels-{_key()}.so"
        kept.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_own(kept):
            with tempfile.TemporaryDirectory(prefix=".kernels-", dir=kept.parent) as directory:
                made = Path(directory, kept.name)
                build(made)
                made.chmod(0o600)
                made.replace(kept)
    except OSError:  # there is no place to keep it
        build(path)
    else:
        shutil.copyfile(kept, path)


def load(data: bytes) -> None:
    """Load a library from its bytes: its kernels are the operators' own from here on. The first one
    stays, as long as the process does. Raises BackendError when it is none for this torch.
    """
    import torch

    if _loaded:
        return
    with tempfile.TemporaryDirectory(prefix="neuron-minimax-") as directory:
        path = Path(directory, "kernels.so")
        path.write_bytes(data)
        try:
            torch.ops.load_library(path)
        except OSError as error:
            raise BackendError(f"the kernels cannot be loaded ({error}); compile again") from None
    _loaded.append(path)


def load_built() -> bool:
    """Load the kernels of this machine, building them first where they are missing; say whether
    they are loaded, which without a compiler they are not. Raises BackendError.
    """
    if not _loaded and compiler():
        with tempfile.TemporaryDirectory(prefix="neuron-minimax-") as directory:
            path = Path(directory, "kernels.so")
            copy_built(path)
            load(path.read_bytes())
    return bool(_loaded)


def _compiler_with(arguments: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    """Run the compiler, which ends with this process, and return what it said."""
    command = bound([compiler(), *arguments])
    return subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)


def _key() -> str:
    """What a built library depends on, as a digest."""
    import torch

    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(errors="replace").splitlines() if cpu.exists() else []
    kinds = ("model name", "flags", "Features", "CPU part")
    version = _compiler_with(["--version"]).stdout
    digest = hashlib.sha256(f"{torch.__version__} {compiler()} {version} {FLAGS}".encode())
    digest.update("\n".join(sorted({line for line in lines if line.startswith(kinds)})).encode())
    for path in sorted(HERE.glob("*.[hc]*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _is_own(path: Path) -> bool:
    """Whether a file is there that this user alone may have written."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    mine = found.st_uid == os.geteuid() and not found.st_mode & OTHERS_WRITE
    return stat.S_ISREG(found.st_mode) and mine
