"""Reading checkpoints: the safetensors library is the oracle for contents, and every broken file is
named.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.index import INDEX_NAME
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import ceil_div
from tests.tiny import write_tiny

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", shards=3)


@pytest.fixture
def broken(made, tmp_path):
    """A copy to break."""
    return shutil.copytree(made, tmp_path / "broken")


def shard(directory, number=2):
    return directory / f"model-{number:05d}-of-00003.safetensors"


def rewrite_header(path, change):
    """Change the JSON header of a file, leaving its data alone."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def edit_index(directory, change):
    index = json.loads((directory / INDEX_NAME).read_text())
    change(index["weight_map"])
    (directory / INDEX_NAME).write_text(json.dumps(index))


def messages(directory):
    return [str(problem) for problem in Checkpoint(directory).problems]


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_reads_as_the_safetensors_library_reads_it(tmp_path, shards):
    directory = write_tiny(tmp_path / "c", shards=shards)
    checkpoint = Checkpoint(directory)
    checkpoint.require_usable()
    oracle = {
        name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()
    }
    assert (
        set(oracle)
        == set(checkpoint.entries)
        == {t.name for t in schema.expected(checkpoint.config)}
    )
    for name, expected in oracle.items():
        found = checkpoint.tensor(name)
        assert found.dtype == expected.dtype
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("rows", [1, 3, 64, 10**6])
def test_strips_are_the_rows_of_the_mapped_tensor(made, rows):
    checkpoint = Checkpoint(made)
    for name in checkpoint.entries:
        strips = [strip.copy() for strip in checkpoint.strips(name, rows)]
        assert all(len(strip) == rows for strip in strips[:-1])
        np.testing.assert_array_equal(np.concatenate(strips), checkpoint.array(name))


def test_there_are_no_strips_of_nothing(tmp_path):
    save_file({"one": torch.ones(()), "none": torch.ones(3, 0)}, tmp_path / "model.safetensors")
    tensors = TensorDirectory(tmp_path)
    assert not [*tensors.strips("one", 4), *tensors.strips("none", 4)]


def test_a_file_that_becomes_shorter_while_it_is_read_is_named(broken):
    checkpoint = Checkpoint(broken)
    entry = max(
        (one for one in checkpoint.entries.values() if one.shard == shard(broken).name),
        key=lambda one: one.end,
    )
    os.truncate(shard(broken), entry.end - 1)
    with pytest.raises(
        CheckpointError, match=rf"{entry.shard} ends within {entry.name}.*download it again"
    ):
        list(checkpoint.strips(entry.name, 64))
    with pytest.raises(CheckpointError, match=rf"{entry.shard} ends within {entry.name}"):
        checkpoint.fill(entry.name, [(np.empty(2, np.uint8), entry.nbytes - 2)])


def test_parts_of_a_tensor_are_filled_from_their_places(made):
    checkpoint = Checkpoint(made)
    whole = checkpoint.array(Q_PROJ)
    found = np.zeros((3, 8), np.uint8)
    checkpoint.fill(Q_PROJ, [(found[0], 0), (found[2, 1:], 5 * whole.shape[1] + 7)])
    assert found[0].tolist() == whole[0, :8].tolist()
    assert found[1].tolist() == [0] * 8
    assert found[2].tolist() == [0, *whole[5, 7:14]]


def test_reading_does_not_change_files_even_when_a_tensor_is_written_to(made):
    before = shard(made).read_bytes()
    Checkpoint(made).tensor(Q_PROJ).view(torch.uint8).zero_()
    assert shard(made).read_bytes() == before


def test_a_missing_shard_is_named(broken):
    shard(broken).unlink()
    assert any(
        shard(broken).name in message and "is missing" in message for message in messages(broken)
    )


@pytest.mark.parametrize("size", [0, 4, 100, -1, -1000])
def test_a_truncated_or_empty_shard_is_named(broken, size):
    data = shard(broken).read_bytes()
    shard(broken).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=shard(broken).name):
        Checkpoint(broken).require_usable()


def test_a_checkpoint_without_any_weight_misses_them_all(made, tmp_path):
    shutil.copy(made / "config.json", tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    wanted = {name for name in Checkpoint(made).entries if not name.endswith("_scale_inv")}
    found = Checkpoint(tmp_path)
    assert {problem.subject for problem in found.problems} == wanted
    with pytest.raises(CheckpointError, match="is missing"):
        found.require_usable()


def test_trailing_bytes_are_noticed(broken):
    with shard(broken).open("ab") as file:
        file.write(b"x")
    assert any("longer than its tensors" in message for message in messages(broken))


def test_a_header_that_lies_about_a_length_is_refused(broken):
    def stretch(header):
        header[Q_PROJ]["shape"][0] += 128

    rewrite_header(shard(broken, 1), stretch)
    assert any(
        Q_PROJ in message and "its header gives it" in message for message in messages(broken)
    )


def test_overlapping_tensors_are_refused(broken):
    def overlap(header):
        names = sorted(
            (n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"]
        )
        one = header[names[0]]["data_offsets"]
        two = header[names[1]]["data_offsets"]
        header[names[1]]["data_offsets"] = [one[1] - 2, one[1] - 2 + two[1] - two[0]]

    rewrite_header(shard(broken), overlap)
    assert any("overlaps the tensor before it" in message for message in messages(broken))


def test_an_unknown_dtype_and_a_broken_header_are_named(broken):
    rewrite_header(shard(broken, 1), lambda header: header[Q_PROJ].update(dtype="F4"))
    shard(broken, 2).write_bytes((20).to_bytes(8, "little") + b"{" * 20)
    found = messages(broken)
    assert any(Q_PROJ in message and "F4" in message for message in found)
    assert any(shard(broken).name in message and "Invalid JSON" in message for message in found)


def test_a_tensor_that_only_the_index_knows_is_named(broken):
    edit_index(
        broken, lambda weight_map: weight_map.update({"model.ghost.weight": shard(broken).name})
    )
    assert any("model.ghost.weight is listed" in message for message in messages(broken))


def test_a_tensor_that_the_index_does_not_know_is_named(broken):
    edit_index(broken, lambda weight_map: weight_map.pop(Q_PROJ))
    assert any(Q_PROJ in message and "does not list it" in message for message in messages(broken))


def test_a_tensor_in_two_shards_is_named(broken):
    tensors = load_file(shard(broken, 3)) | {Q_PROJ: load_file(shard(broken, 1))[Q_PROJ]}
    save_file(tensors, shard(broken, 3))
    assert any(f"{Q_PROJ} is in two shards" in message for message in messages(broken))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_refused(broken, text):
    (broken / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be used"):
        Checkpoint(broken)


def test_an_index_cannot_point_outside_of_its_directory(broken):
    edit_index(broken, lambda weight_map: weight_map.update({Q_PROJ: "../elsewhere.safetensors"}))
    with pytest.raises(CheckpointError, match=r"\.\./elsewhere\.safetensors"):
        Checkpoint(broken)


def test_a_directory_without_weights_is_refused(broken):
    for path in broken.glob("*.safetensors"):
        path.unlink()
    (broken / INDEX_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"a config\.json and no weights"):
        Checkpoint(broken)
    with pytest.raises(CheckpointError, match="not a directory"):
        TensorDirectory(broken / "absent")


def resave(directory, change):
    """Change the tensors of a single-file checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return messages(directory)


NORM = "model.layers.1.input_layernorm.weight"
BIAS = "model.layers.0.block_sparse_moe.e_score_correction_bias"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(NORM), [NORM, "is missing"]),
        (
            lambda t: t.pop(Q_PROJ + "_scale_inv"),
            [Q_PROJ + "_scale_inv", "is missing", "raw codes"],
        ),
        (lambda t: t.pop(Q_PROJ), [Q_PROJ, "is missing"]),
        (lambda t: t.update({NORM: t[NORM][:-1].clone()}), [NORM, "[255]", "[256]"]),
        (lambda t: t.update({NORM: t[NORM].double()}), [NORM, "F64", "BF16 or F32"]),
        (lambda t: t.update({BIAS: t[BIAS].int()}), [BIAS, "I32", "F32", "flips experts"]),
        (
            lambda t: t.update({Q_PROJ: t[Q_PROJ].bfloat16()}),
            [Q_PROJ + "_scale_inv", "BF16", "F8_E4M3"],
        ),
        (
            lambda t: t.update({Q_PROJ + "_scale_inv": t[Q_PROJ + "_scale_inv"].T.contiguous()}),
            [Q_PROJ + "_scale_inv", "[2, 4]", "[4, 2]"],
        ),
        (
            lambda t: t.update({Q_PROJ + "_scale_inv": torch.ones(1, 1)}),
            [Q_PROJ + "_scale_inv", "[1, 1]", "[4, 2]"],
        ),
        (
            lambda t: t.update({"model.surprise.weight": torch.ones(3)}),
            ["model.surprise.weight", "no weight of this"],
        ),
    ],
)
def test_a_tensor_that_config_does_not_imply_is_named(tmp_path, change, words):
    found = resave(write_tiny(tmp_path / "c"), change)
    assert any(all(word in message for word in words) for message in found), found


def test_mtp_tensors_are_tolerated_and_listed(tmp_path):
    directory = write_tiny(tmp_path / "c")
    names = ["model.mtp.0.weight", "model.layers.2.eh_proj.weight"]
    assert resave(directory, lambda t: t.update({name: torch.ones(3) for name in names})) == []
    assert sorted(Checkpoint(directory).mtp_names) == sorted(names)


def test_the_fingerprint_follows_contents_and_not_times(made, broken):
    first = Checkpoint(made).fingerprint
    assert Checkpoint(broken).fingerprint == first
    data = bytearray(shard(broken).read_bytes())
    data[-1] ^= 1
    shard(broken).write_bytes(data)
    assert Checkpoint(broken).fingerprint != first


def test_sampled_scales_belong_to_the_sampled_rows(made):
    checkpoint = Checkpoint(made)
    for name, codes, scales in checkpoint.sample_scales(most=10):
        assert scales.shape == (1, ceil_div(codes.shape[1], 128))
        np.testing.assert_array_equal(codes, checkpoint.array(name)[:128])
