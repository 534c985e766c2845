"""Writing safetensors files: the safetensors library reads them back, and no file has its name
before it is whole.
"""

import fcntl
import os
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open

from neuron_minimax.checkpoint.header import TensorSpec
from neuron_minimax.checkpoint.writer import ShardWriter, write_json


def test_the_safetensors_library_reads_what_was_streamed_in_pieces(tmp_path):
    codes = np.random.default_rng(0).integers(0, 256, (7, 13), dtype=np.uint8)
    values = np.random.default_rng(1).normal(size=(3, 5)).astype(np.float32)
    layout = [
        TensorSpec("codes", "F8_E4M3", codes.shape),
        TensorSpec("values", "F32", values.shape),
        TensorSpec("none", "BF16", (0, 4)),
    ]
    with ShardWriter(tmp_path / "a.safetensors", layout) as writer:
        for row in codes:
            writer.write(row)
        writer.write(values)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("codes").view(torch.uint8), torch.from_numpy(codes))
        assert torch.equal(file.get_tensor("values"), torch.from_numpy(values))
        assert file.get_tensor("none").shape == (0, 4)


@pytest.mark.parametrize("length", range(1, 70, 3))
def test_data_starts_with_a_cache_line_whatever_the_header(tmp_path, length):
    path = tmp_path / "a.safetensors"
    with ShardWriter(path, [TensorSpec("x" * length, "U8", (2,))]) as writer:
        writer.write(np.array([7, 9], np.uint8))
    assert (path.stat().st_size - 2) % 64 == 0
    with safe_open(path, "pt") as file:
        assert file.get_tensor("x" * length).tolist() == [7, 9]


def test_another_process_can_write_once_a_piece_is_written_or_failed(tmp_path):
    writer = ShardWriter(tmp_path / "a.safetensors", [TensorSpec("x", "U8", (4,))])
    writer.write_at(0, np.zeros(2, np.uint8))
    with writer.partial.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(other, fcntl.LOCK_UN)
        with pytest.raises(OSError, match="Invalid argument"):
            writer.write_at(-1000, np.zeros(2, np.uint8))
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    writer.close()


def test_an_interrupted_file_has_no_final_name(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        ShardWriter(tmp_path / "a.safetensors", [TensorSpec("x", "U8", (4,))]) as writer,
    ):
        writer.write(np.zeros(4 // 0, np.uint8))
    assert not (tmp_path / "a.safetensors").exists()


def test_too_few_or_too_many_bytes_are_our_own_bug(tmp_path):
    with (
        pytest.raises(AssertionError, match="lacks 2"),
        ShardWriter(tmp_path / "a", [TensorSpec("x", "U8", (4,))]) as writer,
    ):
        writer.write(np.zeros(2, np.uint8))
    with (
        pytest.raises(AssertionError, match="more bytes"),
        ShardWriter(tmp_path / "a", [TensorSpec("x", "U8", (4,))]) as writer,
    ):
        writer.write(np.zeros(5, np.uint8))


def test_files_have_the_modes_that_the_umask_allows(tmp_path):
    mask = os.umask(0o022)
    try:
        with ShardWriter(tmp_path / "a.safetensors", []):
            pass
        write_json(tmp_path / "b.json", {})
    finally:
        os.umask(mask)
    assert {
        stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("a.safetensors", "b.json")
    } == {0o644}
