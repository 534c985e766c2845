"""The wrong kind of directory is named in one line, by every command that opens one."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from neuron_minimax.backends.manifest import MANIFEST_NAME, Request, read_manifest
from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.checkpoint.kinds import LFS_MARK, is_compiled
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.convert.cache import build_cache
from neuron_minimax.convert.manifest import read_manifest as read_conversion
from neuron_minimax.convert.torch_files import import_torch
from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.planner.report import plan_deployment
from neuron_minimax.studies.experts.command import converted_directory
from tests.tiny import write_tiny

COMMIT = "0123456789abcdef0123456789abcdef01234567"
POINTER = LFS_MARK + b"v1\noid sha256:" + b"0" * 64 + b"\nsize 5000000000\n"


def files(**contents: bytes) -> Callable[[Path, Path], object]:
    """A directory of these files; dots in names are written as two underscores."""

    def write(path: Path, model: Path) -> None:
        path.mkdir()
        for name, content in contents.items():
            (path / name.replace("__", ".")).write_bytes(content)

    return write


def pointers(path: Path, model: Path) -> None:
    shutil.copytree(model / "checkpoint", path)
    (path / "model.safetensors").write_bytes(POINTER)


def unfinished(path: Path, model: Path) -> None:
    shutil.copytree(model / "converted", path)
    (path / "conversion.json").unlink()
    (path / ".unfinished").mkdir()


def hub(path: Path, model: Path) -> None:
    snapshots = path / "models--org--tiny" / "snapshots"
    shutil.copytree(model / "checkpoint", snapshots / COMMIT)


def copied(name: str) -> Callable[[Path, Path], object]:
    return lambda path, model: path.symlink_to(model / name)


# How it is made, what is said of it, and the command that is the next step.
KINDS: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "absent": (lambda path, model: None, "does not exist", ""),
    "empty": (files(), "is empty", ""),
    "torch": (files(pytorch_model__bin=b""), "PyTorch's own files", "neuron-minimax import"),
    "gguf": (files(model__gguf=b"GGUF"), "GGUF", "hf download"),
    "pointers": (pointers, "Git LFS", "git lfs pull"),
    "pth pointer": (files(model__pth=POINTER), "Git LFS", "git lfs pull"),
    "adapter": (files(adapter_config__json=b"{}"), "adapter", "merge"),
    "training run": (files(training_state__pt=b""), "training run", "neuron-minimax train"),
    "experts": (files(trace__safetensors=b""), "neuron-minimax experts", "--trace"),
    "config alone": (files(config__json=b"{}"), "no weights", "hf download"),
    "unfinished": (unfinished, "not finished", "again"),
    "hub": (hub, "cache of the Hugging Face hub", "org/tiny"),
    "checkpoint": (copied("checkpoint"), "is a checkpoint", "neuron-minimax convert"),
    "converted": (copied("converted"), "is a converted directory", "compile"),
    "a compile": (copied("traced"), "is a compiled directory", "generate"),
    "parent": (lambda path, model: path.symlink_to(model), "has no ", "such as "),
}
OPENERS: dict[str, tuple[Callable[[Path], object], set[str]]] = {
    "checkpoint": (Checkpoint.open, {"checkpoint"}),
    "converted": (read_conversion, {"converted"}),
    "a compile": (read_manifest, {"a compile"}),
    "torch": (lambda path: import_torch(path, path.parent / "new"), {"torch", "checkpoint"}),
    "plan": (
        lambda path: plan_deployment(path, instance="trn2.48xlarge", tp_degree=4),
        {"config alone", "checkpoint", "converted", "unfinished", "pointers"},
    ),
}


NOT_FITTING = [
    (opener, kind) for opener, (_, fitting) in OPENERS.items() for kind in KINDS.keys() - fitting
]


@pytest.mark.parametrize(("opener", "kind"), sorted(NOT_FITTING))
def test_another_kind_of_directory_is_named_with_the_next_step(opener, kind, traced, tmp_path):
    make, what, step = KINDS[kind]
    path = tmp_path / "given"
    make(path, traced.parent)
    with pytest.raises(NeuronMiniMaxError) as refused:
        OPENERS[opener][0](path)
    message = str(refused.value)
    assert message.startswith(f"{path} ")
    assert what in message
    assert step in message
    assert len(message.splitlines()) == 1


def test_what_fits_is_opened(traced):
    model = traced.parent
    assert Checkpoint.open(model / "checkpoint").entries
    assert read_conversion(model / "converted").tensors
    assert read_manifest(traced).backend == "cpu"


def test_a_dense_cache_is_a_checkpoint_and_no_conversion(traced, tmp_path):
    build_cache(Checkpoint.open(traced.parent / "checkpoint"), tmp_path / "cache")
    assert Checkpoint.open(tmp_path / "cache").problems == []
    with pytest.raises(NeuronMiniMaxError, match=r"is a dense cache.*neuron-minimax convert"):
        read_conversion(tmp_path / "cache")


def test_a_manifest_of_somebody_else_does_not_make_a_checkpoint_a_compile(traced, tmp_path):
    copy = shutil.copytree(traced.parent / "checkpoint", tmp_path / "copy")
    (copy / MANIFEST_NAME).write_text("{}")
    assert Checkpoint.open(copy).problems == []


def test_only_a_manifest_without_a_checkpoint_makes_a_compile(traced, tmp_path):
    assert is_compiled(traced)
    (tmp_path / MANIFEST_NAME).write_text("{}")
    assert is_compiled(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_compiled(tmp_path)
    assert converted_directory(tmp_path) is None


@pytest.mark.parametrize("place", ["", "snapshots"])
def test_a_repository_in_the_hub_s_cache_is_its_main_snapshot(place, traced, tmp_path):
    hub(tmp_path / "hub", traced.parent)
    repository = tmp_path / "hub" / "models--org--tiny"
    assert local_directory(repository / place) == repository / "snapshots" / COMMIT  # the only one
    (repository / "snapshots" / "0").mkdir()
    assert local_directory(repository / place) == repository / place
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    assert local_directory(repository / place) == repository / "snapshots" / COMMIT
    assert Checkpoint.open(repository / place).problems == []


def test_a_compile_of_another_model_says_so_before_any_option():
    one = Request(
        backend="cpu", options={"slots": 1}, checkpoint="a", versions={"code": "1"}, machine={}
    )
    other = replace(one, options={"slots": 2}, checkpoint="b")
    assert one.difference(other) == "the converted checkpoint is another one"
    newer = replace(other, versions={"code": "2"})  # which may take the fingerprint another way
    assert "slots" in str(one.difference(newer))
    assert one.difference(one) is None


def test_a_shard_that_is_missing_is_one_line_and_not_one_for_each_tensor(tmp_path, capsys):
    write_tiny(tmp_path / "c", shards=2)
    os.unlink(tmp_path / "c" / "model-00002-of-00002.safetensors")
    assert main(["convert", str(tmp_path / "c"), str(tmp_path / "out")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "model-00002-of-00002.safetensors" in line
    assert not (tmp_path / "out").exists()
