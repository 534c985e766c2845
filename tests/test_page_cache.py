"""Streams larger than half of memory leave no pages behind, and smaller ones stay; mincore(2) is
the witness.
"""

import ctypes
import mmap
import os
from pathlib import Path

import pytest

from neuron_minimax.checkpoint import streaming
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.streaming import available_memory, too_large_to_keep
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.inspection.values import check_values
from tests.opened import build_cache, convert
from tests.opened import verify_conversion as verify
from tests.tiny import write_tiny

LIBC = ctypes.CDLL(None, use_errno=True)


def cached_share(directory: Path) -> float:
    """The share of a directory's weights that is in the page cache."""
    resident = pages = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
        states = (ctypes.c_ubyte * ceil_div(len(mapped), mmap.PAGESIZE))()
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        assert LIBC.mincore(ctypes.c_void_p(address), ctypes.c_size_t(len(mapped)), states) == 0
        resident += sum(state & 1 for state in states)
        pages += len(states)
    return resident / pages


def read_all(directory: Path) -> None:
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.read_bytes()


def require_kept(directory: Path, witness: Path) -> None:
    """Skips when somebody else drops pages meanwhile, as a host does that wants its memory back:
    the witness's too.
    """
    share = cached_share(directory)
    if share < 1 and cached_share(witness) < 1:
        pytest.skip("something else on this machine drops pages")
    assert share == 1


def test_more_than_half_of_memory_is_too_large_to_keep():
    assert not too_large_to_keep(8 << 30, 16 << 30)
    assert too_large_to_keep((8 << 30) + 1, 16 << 30)
    assert available_memory() > 1 << 20


COMMANDS = {
    "convert": lambda source, out: convert(source, out / "converted"),
    "cache": lambda source, out: build_cache(source, out / "cached"),
    "values": lambda source, out: check_values(Checkpoint(source)),
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A few megabytes, streamed by several processes and dropped every 64 KiB."""
    directory = write_tiny(tmp_path / "source", num_hidden_layers=3)
    read_all(directory)
    monkeypatch.setattr(streaming, "PARALLEL_FROM", 0)
    monkeypatch.setattr(streaming, "WINDOW", 1 << 16)
    return directory


@pytest.fixture
def witness(tmp_path):
    """Files that nothing here touches."""
    directory = write_tiny(tmp_path / "witness")
    read_all(directory)
    return directory


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stream_that_fits_stays_and_one_that_does_not_is_dropped(
    source, witness, tmp_path, monkeypatch, command
):
    if cached_share(source) < 1:
        pytest.skip("this file system keeps no pages")
    COMMANDS[command](source, tmp_path / "fits")
    require_kept(source, witness)
    monkeypatch.setattr(streaming, "available_memory", lambda: 1 << 20)
    COMMANDS[command](source, tmp_path / "larger")
    assert cached_share(source) < 0.2
    if command != "values":
        (small,) = (tmp_path / "fits").iterdir()
        (large,) = (tmp_path / "larger").iterdir()
        require_kept(small, witness)
        assert cached_share(large) < 0.2


def test_verifying_what_is_larger_than_memory_drops_both_sides(source, tmp_path, monkeypatch):
    convert(source, tmp_path / "out")
    if cached_share(source) < 1:
        pytest.skip("this file system keeps no pages")
    monkeypatch.setattr(streaming, "available_memory", lambda: 1 << 20)
    assert verify(source, tmp_path / "out").equal
    assert cached_share(source) < 0.2
    assert cached_share(tmp_path / "out") < 0.2
