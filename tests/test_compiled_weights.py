"""Where a compiled directory has its weights: hard links, copies, or another directory; each says
what it needs, and nothing is copied twice.
"""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import neuron_minimax as nm
from neuron_minimax.backends import CompileMode, compile_model, load, verify_compiled
from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.cli import main
from neuron_minimax.errors import ConversionError
from neuron_minimax.studies.experts.command import converted_directory
from tests.damaged import flip, message_of
from tests.heard import Heard
from tests.opened import convert
from tests.tiny_traced import write_traced

MEMORY = Path("/dev/shm")
EAGER = {"slots": 4, "seq_len": 128, "buckets": [16, 32], "engine": "eager"}
PLAIN = CompileMode()
COPIED = CompileMode(copy_weights=True)
IDS = list(range(5))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, its conversion, and its compile with hard links."""
    directory = tmp_path_factory.mktemp("made")
    write_traced(directory, num_hidden_layers=1, use_mtp=False)
    return directory


@pytest.fixture(scope="module")
def expected(made: Path) -> torch.Tensor:
    return load(made / "traced").encode(0, IDS)


@pytest.fixture
def work(made: Path, tmp_path: Path) -> Path:
    """The conversion, to change, and a compile that has hard links to it."""
    shutil.copytree(made / "converted", tmp_path / "work" / "converted")
    compile_here(tmp_path / "work" / "converted", tmp_path / "work" / "traced")
    return tmp_path / "work"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A folder of another file system."""
    if not MEMORY.is_dir() or MEMORY.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs another file system")
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        yield Path(directory)


def compile_here(
    converted: Path, traced: Path, mode: CompileMode = PLAIN, **options: Any
) -> nm.CompileReport:
    progress = options.pop("progress", Heard())
    asked = {**EAGER, **options}
    return compile_model(converted, traced, options=asked, mode=mode, progress=progress)


def shards(traced: Path) -> dict[str, os.stat_result]:
    return {path.name: path.stat() for path in (traced / "model").glob("*.safetensors")}


def inodes(traced: Path) -> dict[str, int]:
    return {name: found.st_ino for name, found in shards(traced).items()}


def no_links(*paths: Any) -> None:
    raise OSError(errno.EPERM, "no links here")


def test_a_compile_on_another_file_system_says_where_its_weights_are(
    work: Path, elsewhere: Path, expected: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    converted = work / "converted"
    options = ["--engine", "eager", "--seq-len", "128", "--buckets", "16"]
    line = f"  its weights stay in {converted}, which hard links do not reach: do not move or"
    for _ in ("made", "up to date"):
        assert main(["compile", str(converted), str(elsewhere / "traced"), *options]) == 0
        assert line in capsys.readouterr().out
    assert read_manifest(elsewhere / "traced").weights == str(converted)
    assert torch.equal(load(elsewhere / "traced").encode(0, IDS), expected)
    assert converted_directory(elsewhere / "traced") == converted


@pytest.mark.parametrize("lost", ["moved", "emptied", "another"])
def test_weights_that_are_gone_are_named_with_their_fingerprint_and_the_next_step(
    work: Path, elsewhere: Path, made: Path, lost: str
) -> None:
    converted = work / "converted"
    traced = elsewhere / "traced"
    wanted = compile_here(converted, traced).manifest.checkpoint[:12]
    converted.rename(work / "moved")
    if lost == "emptied":
        converted.mkdir()
    elif lost == "another":
        source = nm.Checkpoint.open(made / "checkpoint")
        layout = nm.Layout(attention=nm.AttentionPrecision.BF16)
        nm.plan_conversion(source, layout).write(converted)
    for run in (load, verify_compiled):
        said = message_of(lambda run=run: run(traced))
        assert said.startswith(f"{traced} takes its weights from {converted}, wh")
        assert f"expected the converted checkpoint of fingerprint {wanted}" in said
        assert f"or run `neuron-minimax compile CONVERTED {traced}` again (with --copy-" in said
        assert "\n" not in said
    assert ("which is another one (" in said) == (lost == "another")
    # The next step helps, and compiles nothing.
    report = compile_here(work / "moved", traced)
    assert not report.reason
    assert report.refreshed
    load(traced)


def test_weights_are_taken_from_where_the_last_compile_was_told(
    work: Path, elsewhere: Path
) -> None:
    traced = elsewhere / "traced"
    compile_here(work / "converted", traced)
    again = Path(shutil.copytree(work / "converted", work / "again"))
    report = compile_here(again, traced)
    assert (report.reason, report.refreshed) == (
        "",
        f"its weights were those of {work / 'converted'}",
    )
    shutil.rmtree(work / "converted")
    assert load(traced).model_directory == again


def test_a_pair_without_links_can_be_moved_and_copied_together(
    work: Path, expected: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(work / "traced")
    with monkeypatch.context() as file_system:
        file_system.setattr(os, "link", no_links)
        report = compile_here(work / "converted", work / "traced")
    assert report.manifest.weights == "../converted"
    assert f"its weights stay in {work / 'converted'}, " in report.render()
    moved = work.rename(work.with_name("moved"))
    subprocess.run(["cp", "-r", moved, work.with_name("copied")], check=True)
    for place in (moved, work.with_name("copied")):
        assert torch.equal(load(place / "traced").encode(0, IDS), expected)
        (place / "traced").rename(place / "renamed")
        link = place / "link"
        link.symlink_to("renamed")
        assert load(link).model_directory == place / "converted"


@pytest.mark.parametrize("how", ["mv", "cp -r"])
@pytest.mark.parametrize("mode", [PLAIN, COPIED], ids=["links", "copies"])
def test_a_directory_with_its_weights_works_wherever_it_is_put(
    work: Path, elsewhere: Path, expected: torch.Tensor, how: str, mode: CompileMode
) -> None:
    compile_here(work / "converted", work / "traced", mode)
    subprocess.run([*how.split(), work / "traced", elsewhere], check=True)
    shutil.rmtree(work)
    verify_compiled(elsewhere / "traced")
    assert torch.equal(load(elsewhere / "traced").encode(0, IDS), expected)


def test_copied_weights_are_made_once_and_recognized(work: Path) -> None:
    traced = work / "traced"
    converted = work / "converted"
    report = compile_here(converted, traced, COPIED)
    assert (report.reason, report.refreshed) == ("", "its weights are to be copies")
    assert f"its weights are copies, in {traced / 'model'}: it needs no other" in report.render()
    assert {found.st_nlink for found in shards(traced).values()} == {1}
    first = inodes(traced)
    for mode in (COPIED, PLAIN):
        report = compile_here(converted, traced, mode)
        assert report.render().startswith(f"{traced} is up to date")
        assert "its weights are copies" in report.render()
    assert compile_here(converted, traced, seq_len=64).reason.startswith("option seq_len")
    assert inodes(traced) == first
    shutil.rmtree(converted)
    verify_compiled(traced)


def test_another_template_beside_copies_copies_no_weights(made: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(made / "checkpoint", tmp_path / "checkpoint"))
    converted = tmp_path / "converted"
    traced = tmp_path / "traced"
    convert(checkpoint, converted)
    compile_here(converted, traced, COPIED)
    first = inodes(traced)
    (checkpoint / "chat_template.jinja").write_text("{{ messages }}")
    convert(checkpoint, converted)
    heard = Heard()
    report = compile_here(converted, traced, progress=heard)
    assert report.refreshed == "chat_template.jinja is another one"
    assert report.manifest.weights == "copies"
    assert heard.named("copying weights").total == 0
    assert inodes(traced) == first
    verify_compiled(traced)


def test_a_copy_of_a_linked_directory_holds_copies_already(work: Path) -> None:
    copied = work / "copied"
    shutil.copytree(work / "traced", copied, copy_function=shutil.copy2)
    first = inodes(copied)
    assert compile_here(work / "converted", copied, COPIED).manifest.weights == "copies"
    assert inodes(copied) == first


def test_a_flipped_bit_of_a_copy_is_found_and_mended_by_a_copy(work: Path) -> None:
    traced = work / "traced"
    compile_here(work / "converted", traced, COPIED)
    shard = min((traced / "model").glob("*.safetensors"))
    flip(shard, silently=True)
    assert f"{shard.name} has other bytes" in message_of(lambda: verify_compiled(traced))
    report = compile_here(work / "converted", traced, CompileMode(check=True))
    assert f"{shard.name} has other bytes" in report.refreshed
    assert shard.stat().st_nlink == 1
    verify_compiled(traced)


def test_a_damaged_shard_is_not_copied(work: Path) -> None:
    converted = work / "converted"
    shard = min(converted.glob("*.safetensors"))
    flip(shard, silently=True)
    shutil.rmtree(work / "traced")
    with pytest.raises(ConversionError, match=rf"{shard.name} has other bytes .*--check`"):
        compile_here(converted, work / "traced", COPIED)
    assert not (work / "traced" / "manifest.json").exists()
    assert not list(work.glob("traced/*/" + shard.name))


def test_an_interrupted_copy_leaves_whole_files_and_the_next_one_goes_on(
    work: Path, expected: torch.Tensor
) -> None:
    traced = work / "traced"
    sizes = {name: found.st_size for name, found in shards(traced).items()}
    assert len(sizes) > 1
    copied = 0

    def interrupt(count: int, doing: str) -> None:
        nonlocal copied
        copied += count
        if copied > min(sizes.values()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as stopped:
        compile_here(work / "converted", traced, COPIED, progress=Heard(interrupt))
    assert stopped.value.__notes__ == [
        "weights that are copied are kept",
        f"what {traced} held can be used as before",
        "run the same command again to go on",
    ]
    left = {path.name: path.stat().st_size for path in (traced / ".model-new").iterdir()}
    assert left.items() < sizes.items()
    assert left
    assert torch.equal(load(traced).encode(0, IDS), expected)
    heard = Heard()
    compile_here(work / "converted", traced, COPIED, progress=heard)
    copying = heard.named("copying weights")
    assert copying.total == sum(copying.counts) == sum(sizes.values()) - sum(left.values())
    assert {path.name for path in traced.iterdir()} == {"manifest.json", "graphs", "model"}
    verify_compiled(traced)


def test_what_an_interrupted_copy_left_is_not_trusted_by_its_name(work: Path) -> None:
    traced = work / "traced"
    new = traced / ".model-new"
    new.mkdir()
    converted = {path.name: path for path in (work / "converted").glob("*.safetensors")}
    first, second, *_ = sorted(converted)
    shutil.copy(converted[first], new / first)  # its time stamp is another one
    os.link(converted[second], new / second)
    (new / (first + ".partial")).touch()
    (new / "folder").mkdir()
    heard = Heard()
    compile_here(work / "converted", traced, COPIED, progress=heard)
    assert heard.named("copying weights").total == sum(
        path.stat().st_size for path in converted.values()
    )
    assert {found.st_nlink for found in shards(traced).values()} == {1}


def test_a_disk_that_is_too_small_is_said_before_the_first_byte(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    traced = work / "traced"
    heard = Heard()
    said = message_of(lambda: compile_here(work / "converted", traced, COPIED, progress=heard))
    nbytes = sum(shard.stat().st_size for shard in (work / "converted").glob("*.safetensors"))
    needed = 1.01 * nbytes + 2**24  # beside the weights for journals and the file system
    assert said.startswith(
        f"{traced} needs {needed / 1e6:.2f} MB more and its disk has 1.05 MB free; nothing was "
    )
    assert said.endswith("choose another disk, or compile without --copy-weights")
    assert not any(stage.what == "copying weights" for stage in heard.stages)
    load(traced)


def test_the_time_of_a_compile_is_one_value_everywhere(work: Path) -> None:

    report = compile_here(work / "converted", work / "traced", CompileMode(force=True))
    seconds = report.manifest.compile_seconds
    assert report.seconds == seconds == read_manifest(work / "traced").compile_seconds
    assert report.render().startswith(f"compiled into {work / 'traced'} in {seconds:.1f} s (forced")
    assert compile_here(work / "converted", work / "traced").manifest.compile_seconds == seconds
