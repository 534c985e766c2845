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
from neuron_minimax.checkpoint.writer import (
    ShardWriter,
    copy_companions,
    copy_file,
    make_directory,
    replacing,
    sync_files,
    write_json,
)
from neuron_minimax.errors import CheckpointError


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


def test_a_run_that_was_ended_leaves_its_mode_to_nobody(tmp_path):
    (tmp_path / "b.json.partial").touch(0o600)
    mask = os.umask(0o022)
    try:
        write_json(tmp_path / "b.json", {})
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "b.json").stat().st_mode) == 0o644


@pytest.mark.parametrize("name", ["out/a", "out/a.partial"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    (tmp_path / "out").mkdir()
    (tmp_path / "treasure").write_text("kept")
    for write in (
        lambda path: write_json(path, {}),
        lambda path: copy_file(tmp_path / "original", path),
    ):
        (tmp_path / "original").write_text("copied")
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).symlink_to(tmp_path / "treasure")
        write(tmp_path / "out" / "a")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["a"]
        assert not (tmp_path / "out" / "a").is_symlink()
    (tmp_path / "out" / "a.partial").symlink_to(tmp_path / "treasure")
    with pytest.raises(OSError, match="symbolic links"):
        ShardWriter(tmp_path / "out" / "a", [TensorSpec("x", "U8", (1,))]).write(np.zeros(1, "u1"))
    assert (tmp_path / "treasure").read_text() == "kept"


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    write_json(tmp_path / "a", {"old": True})
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "a") as file:
        file.write(bytes(1 // 0))
    with pytest.raises(IsADirectoryError):
        copy_file(tmp_path, tmp_path / "a")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="no regular file"):
        copy_file(tmp_path / "pipe", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "pipe"]
    assert (tmp_path / "a").read_text() == '{\n  "old": true\n}\n'


def test_what_a_manifest_vouches_for_is_synced_by_bytes_and_by_name(tmp_path, monkeypatch):
    synced = []
    sync = os.fsync

    def note(descriptor):
        synced.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    make_directory(tmp_path / "a" / "b")
    assert synced == [".", "a"]
    make_directory(tmp_path / "a" / "b")
    assert synced == [".", "a"]
    synced.clear()
    (tmp_path / "original").write_text("x")
    copy_file(tmp_path / "original", tmp_path / "a" / "copy")
    assert synced == ["a/copy.partial", "a"]
    synced.clear()
    sync_files([tmp_path / "a" / "copy", tmp_path / "original", tmp_path / "a" / "copy"])
    assert synced == ["a/copy", "original", "a/copy", "a", "."]


def test_a_companion_is_a_file_of_the_checkpoint_or_of_the_hub_cache(tmp_path):
    hub = tmp_path / "models--org--name"
    snapshot = hub / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (hub / "blobs").mkdir()
    (hub / "blobs" / "ab12").write_text("template")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/ab12")
    (snapshot / "vocab.json").write_text("{}")
    (snapshot / "tokenizer.json").symlink_to("vocab.json")
    (tmp_path / "out").mkdir()
    copy_companions(snapshot, tmp_path / "out")
    found = {path.name: path.read_text() for path in (tmp_path / "out").iterdir()}
    assert found == {"chat_template.jinja": "template", "tokenizer.json": "{}", "vocab.json": "{}"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    "kind", ["outside", "blobs of no hub", "loop", "nowhere", "pipe", "folder"]
)
def test_another_companion_is_one_message(tmp_path, kind):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "secret").write_text("secret")
    path = source / "tokenizer.json"
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "folder":
            path.mkdir()
        case _:
            target = {"outside": "/etc/hostname", "loop": path, "nowhere": "none"}
            path.symlink_to(target.get(kind, "../blobs/secret"))
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"source/tokenizer\.json .*(;|:) .*") as refused:
        copy_companions(source, tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "out").iterdir())
