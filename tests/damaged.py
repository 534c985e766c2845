"""Files with other bytes, and what is said of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neuron_minimax.errors import BackendError


def flip(path: Path, silently: bool = False, position: int = -2) -> None:
    """Change a bit of a file, of no other hard link to it; `silently` as a disk does, which leaves
    the time stamp.
    """
    before = path.stat()
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.unlink()
    path.write_bytes(data)
    ns = before.st_mtime_ns if silently else before.st_mtime_ns + 1
    os.utime(path, ns=(ns, ns))


def message_of(run: Callable[[], Any]) -> str:
    """Return what the BackendError says that it ends with."""
    with pytest.raises(BackendError) as raised:
        run()
    return str(raised.value)
