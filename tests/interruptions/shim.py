"""The library that is preloaded into commands under test, and the page of memory that controls
it.
"""

import ctypes
import errno
import mmap
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

PATH_MAX = 4096
VARIABLE = "INTERRUPTIONS_CONTROL"
SOURCE = Path(__file__).with_name("shim.c")
# The source compares with NULL what a header declares to be none.
FLAGS = ("-x", "c", "-shared", "-fPIC", "-O1", "-w", "-fno-delete-null-pointer-checks")


class Action(IntEnum):
    """What happens at a call, as shim.c numbers it."""

    NONE = 0
    FAIL = 1
    FULL = 2
    SHORT = 3
    KILL_BEFORE = 4
    KILL_AFTER = 5
    SIGNAL = 6


@dataclass(frozen=True)
class Fault:
    """An action and the error or the signal that it has."""

    title: str
    action: Action
    detail: int = 0


EIO = Fault("EIO", Action.FAIL, errno.EIO)
ENOSPC = Fault("ENOSPC", Action.FAIL, errno.ENOSPC)
EINTR = Fault("EINTR", Action.FAIL, errno.EINTR)
FULL = Fault("disk full from there on", Action.FULL)
SHORT = Fault("short write", Action.SHORT)
KILL_BEFORE = Fault("kill before", Action.KILL_BEFORE)
KILL_AFTER = Fault("kill after", Action.KILL_AFTER)
# And the run that goes on is killed too, at another call.
KILL_TWICE = Fault("kill twice", Action.KILL_AFTER)
# Of the first process alone; those that it has started are left to themselves.
KILL_PARENT = Fault("kill the parent alone", Action.SIGNAL, signal.SIGKILL)
CTRL_C = Fault("Ctrl-C", Action.SIGNAL, signal.SIGINT)
TERM = Fault("SIGTERM", Action.SIGNAL, signal.SIGTERM)


class Control(ctypes.Structure):
    """The page that the library reads; shim.c declares the same fields."""

    _fields_ = (
        ("armed", ctypes.c_int64),
        ("recording", ctypes.c_int64),
        ("fault", ctypes.c_int64),
        ("detail", ctypes.c_int64),
        ("target", ctypes.c_int64),
        ("calls", ctypes.c_int64),
        ("first_process", ctypes.c_int64),
        ("lock", ctypes.c_int64),
        ("below", ctypes.c_char * PATH_MAX),
        ("log", ctypes.c_char * PATH_MAX),
        ("contents", ctypes.c_char * PATH_MAX),
        ("struck", ctypes.c_char * (PATH_MAX + 64)),
    )


def compiler() -> list[str] | None:
    """Return the C++ compiler that torch would take, or None where there is none."""
    given = shlex.split(os.environ.get("CXX", "g++"))
    return given if given and shutil.which(given[0]) else None


def build(directory: Path) -> Path:
    """Compile the library into a directory. Raises CalledProcessError."""
    found = compiler()
    assert found is not None, "needs a C++ compiler"
    library = directory / "shim.so"
    subprocess.run([*found, *FLAGS, "-o", str(library), str(SOURCE), "-ldl"], check=True)
    return library


def environment(library: Path, control: Path) -> dict[str, str]:
    """Write an empty control page; return the variables that put a process under it."""
    control.write_bytes(bytes(ctypes.sizeof(Control)))
    return {"LD_PRELOAD": str(library), VARIABLE: str(control)}


def map_control() -> Control:
    """Return the page that this process was started under."""
    with open(os.environ[VARIABLE], "r+b") as file:
        return Control.from_buffer(mmap.mmap(file.fileno(), 0))


def arm(control: Control, below: Path, fault: Fault | None = None, target: int = 0) -> None:
    """Number calls below a directory from 1 on, and disturb the one of number `target`."""
    control.calls = 0
    control.lock = 0
    control.struck = b""
    control.recording = 0
    control.fault = Action.NONE if fault is None else fault.action
    control.detail = 0 if fault is None else fault.detail
    control.target = target
    control.below = os.fsencode(below)
    control.armed = 1


def record(control: Control, below: Path, log: Path) -> None:
    """Number calls below a directory, and write down each; what files hold when they are synced
    goes into `log` with the ending .contents.
    """
    arm(control, below)
    contents = log.with_suffix(".contents")
    for path in (log, contents):
        path.write_bytes(b"")
    control.log = os.fsencode(log)
    control.contents = os.fsencode(contents)
    control.recording = 1


@dataclass(frozen=True)
class Call:
    """A recorded call, with what the file system said of its file afterwards.

    `contents` is the stretch of the contents' file that a synced file had.
    """

    number: int
    name: str
    size: int
    modified_ns: int
    mode: int
    flags: int
    path: Path
    origin: Path
    contents: bytes | None = None

    @property
    def takes_space(self) -> bool:
        return self.name not in ("unlink", "rmdir", "attributes")

    @property
    def is_write(self) -> bool:
        return self.name == "write"


def read_record(log: Path) -> list[Call]:
    """Return the calls of a record, in order."""
    calls = []
    contents = log.with_suffix(".contents").read_bytes()
    position = 0
    for line in log.read_text().splitlines():
        number, name, size, modified, mode, flags, path, origin = line.split("\t")
        held = None
        if name == "fsync" and (int(mode) & 0o170000) == 0o100000:
            held = contents[position : position + int(size)]
            position += int(size)
        calls.append(
            Call(
                int(number),
                name,
                int(size),
                int(modified),
                int(mode),
                int(flags),
                Path(path),
                Path(origin),
                held,
            )
        )
    assert position == len(contents), "a synced file changed while it was read"
    return calls
