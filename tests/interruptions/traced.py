"""Counts with strace what calls of a command change files, to see that the library misses none."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.interruptions import runs, shim

OPENING = ("open", "openat", "openat2", "creat")
CHANGING = (
    "write", "pwrite64", "writev", "pwritev", "pwritev2", "sendfile", "copy_file_range", "splice",
    "ftruncate", "truncate", "fallocate", "fsync", "fdatasync", "sync_file_range", "msync",
    "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat",
    "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "mknod", "mknodat",
    "chmod", "fchmod", "fchmodat", "fchmodat2", "chown", "fchown", "fchownat", "lchown",
    "utime", "utimes", "utimensat", "futimesat", "setxattr", "fsetxattr", "ioctl",
)  # fmt: skip
WRITABLE = re.compile(r"O_WRONLY|O_RDWR|O_CREAT|O_TRUNC")
# Of a terminal, or of what kind a file is: nothing changes.
HARMLESS = re.compile(r"TCGETS|FIOCLEX|FIONCLEX|FIONBIO")
MAPPED = re.compile(r"PROT_WRITE.*MAP_SHARED\b")


def is_possible() -> bool:
    """Return whether strace is there and may trace."""
    found = shutil.which("strace")
    return (
        found is not None and subprocess.run([found, "-qq", "-e", "none", "true"]).returncode == 0
    )


def count(words: list[str], work: Path, folder: Path) -> tuple[Counter[str], int]:
    """Run a command under strace and the library; return what changing calls each has seen.

    The first are counted by name, the second all together.
    """
    library = shim.build(folder)
    control = folder / "control"
    variables = shim.environment(library, control)
    log = folder / "strace"
    names = ",".join(f"?{name}" for name in (*OPENING, *CHANGING, "mmap"))  # ?: where there are
    tracer = ["strace", "-f", "-y", "-qq", "-s", "0", "--signal=none", "-o", str(log)]
    command = [sys.executable, "-m", "tests.interruptions.traced", str(work), *words]
    tracer += ["-e", f"trace={names}"]
    tracer += [f"--env={name}={value}" for name, value in variables.items()]
    subprocess.run([*tracer, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    return changes_of(log.read_text(errors="replace"), work), _calls(control)


def changes_of(log: str, work: Path) -> Counter[str]:
    """Count the calls of a log of strace that change what is below a directory."""
    found: Counter[str] = Counter()
    for line in log.splitlines():
        call = re.match(r"\d+ +(\w+)\((.*)", line)
        if call is None:  # the end of a call that was interrupted by another's
            continue
        name, rest = call.groups()
        given = rest.rpartition(" = ")[0] or rest
        if f"{work}/" not in given and f"{work}>" not in given and f'{work}"' not in given:
            continue
        if name in OPENING:
            found["open"] += bool(WRITABLE.search(given))
        elif name == "mmap":
            found["mmap"] += bool(MAPPED.search(given))
        elif not (name == "ioctl" and HARMLESS.search(given)):
            found[name] += 1
    return +found


def _calls(control: Path) -> int:
    return int(shim.Control.from_buffer_copy(control.read_bytes()).calls)


if __name__ == "__main__":
    control = shim.map_control()
    shim.arm(control, Path(sys.argv[1]))
    sys.exit(runs.execute(sys.argv[2:]))
