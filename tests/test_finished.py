"""A finished output is what its manifest says, of the source that is there: what differs is named,
and made again or refused.
"""

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.convert.cache import open_cache
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import CheckpointError, ConversionError, NeuronMiniMaxError
from tests.damaged import flip
from tests.opened import build_cache, contents, convert, verify_conversion
from tests.tiny import write_tiny

COMPANIONS = {"generation_config.json": '{"eos_token_id": 1}', "chat_template.jinja": "{{ x }}"}
MANIFESTS = {"convert": "conversion.json", "cache": "cache.json"}
RUNS = {"convert": convert, "cache": build_cache}
COMMANDS = pytest.mark.parametrize("command", RUNS)


def read(command: str, source: Path, out: Path) -> Any:
    """Open a finished output as its readers do."""
    return Converted.open(out) if command == "convert" else open_cache(out, Checkpoint(source))


class Place(NamedTuple):
    """A source and a finished output of it, with the time stamps that they were made with."""

    source: Path
    out: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("finished")
    source = write_tiny(directory / "source", shards=2, intermediate_size=256)
    for name, text in COMPANIONS.items():
        (source / name).write_text(text)
    for command, run in RUNS.items():
        run(source, directory / command)
    return directory


@pytest.fixture
def place(made, tmp_path, command) -> Place:
    for name in ("source", command):
        shutil.copytree(made / name, tmp_path / name)  # with their time stamps
    return Place(tmp_path / "source", tmp_path / command)


def states(directory: Path) -> dict[str, tuple[int, int]]:
    """What no run may touch: which file it is, and its time stamp."""
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()
    }


def touch(path: Path) -> None:
    ns = path.stat().st_mtime_ns + 1_000_000_000
    os.utime(path, ns=(ns, ns))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@COMMANDS
def test_a_finished_output_is_not_written_again(place, command):
    before = states(place.out)
    assert RUNS[command](*place).was_finished
    read(command, *place)
    assert states(place.out) == before


@COMMANDS
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (Path.unlink, "is missing"),
        (truncate, "bytes, not"),
        (flip, "other bytes"),
        (replace_by_a_folder, "cannot be used"),
    ],
    ids=["deleted", "truncated", "changed", "folder"],
)
def test_every_file_that_is_not_as_written_is_refused_by_readers_and_made_again(
    place, made, command, spoil, words
):
    names = sorted(path.name for path in place.out.iterdir() if path.name != MANIFESTS[command])
    assert len(names) == {"convert": 7, "cache": 4}[command]
    for name in names:
        kept = states(place.out)
        spoil(place.out / name)
        with pytest.raises(NeuronMiniMaxError, match=rf"{name} .*{words}.*; run `.*{command} "):
            read(command, *place)
        if spoil is replace_by_a_folder:
            (place.out / name).rmdir()
        result = RUNS[command](*place)
        assert f"{name} " in result.render()
        assert "made again" in result.render()
        is_shard = name.endswith(".safetensors")
        assert result.was_finished != is_shard
        assert contents(place.out) == contents(made / command)
        read(command, *place)
        shards = {shard for shard in names if shard.endswith(".safetensors")} - {name}
        assert {shard: states(place.out)[shard] for shard in shards} == {
            shard: kept[shard] for shard in shards
        }


@COMMANDS
def test_a_copy_is_read_once_and_then_known(place, command):
    copy = place.out.with_name("copy")
    shutil.copytree(place.out, copy, copy_function=shutil.copy)  # with other time stamps
    assert states(copy) != states(place.out)
    read(command, place.source, copy)
    recorded = json.loads((copy / MANIFESTS[command]).read_text())["files"]
    assert {name: record["modified_ns"] for name, record in recorded.items()} == {
        name: (copy / name).stat().st_mtime_ns for name in recorded
    }
    assert contents(copy) == contents(place.out)
    before = states(copy)
    assert RUNS[command](place.source, copy).was_finished
    assert states(copy) == before
    # Known by its stamps: no byte is read again.
    flip(copy / sorted(path.name for path in copy.glob("*.safetensors"))[0], silently=True)
    read(command, place.source, copy)


@COMMANDS
def test_a_damaged_copy_is_not_taken(place, command):
    copy = place.out.with_name("copy")
    shutil.copytree(place.out, copy, copy_function=shutil.copy)
    flip(copy / "config.json")
    with pytest.raises(NeuronMiniMaxError, match=r"config\.json has other bytes"):
        read(command, place.source, copy)
    assert "config.json has other bytes: made again" in RUNS[command](place.source, copy).render()


# A byte that the fingerprint does not sample.
def unsampled(source: Path) -> Path:
    path = source / "model-00002-of-00002.safetensors"
    before = Checkpoint(source).fingerprint
    flip(path, position=path.stat().st_size // 4)
    assert Checkpoint(source).fingerprint == before
    return path


@COMMANDS
def test_weights_that_changed_in_place_are_refused_until_all_is_compared(
    place, command, tmp_path, capsys
):
    path = unsampled(place.source)
    kept = contents(place.out)
    for attempt in (RUNS[command], *([lambda *p: read(command, *p)] * (command == "cache"))):
        with pytest.raises(
            NeuronMiniMaxError, match=rf"{path.name} of .* was modified since"
        ) as no:
            attempt(*place)
        assert f"`neuron-minimax {'verify' if command == 'convert' else 'cache'} " in str(no.value)
        assert "\n" not in str(no.value)
    RUNS[command](place.source, tmp_path / "fresh")
    if command == "convert":
        found = verify_conversion(*place)
        assert len(found.differences) == 1
        assert contents(place.out) == kept
        with pytest.raises(ConversionError, match="was modified since"):
            convert(*place)
        assert not convert(*place, overwrite=True).was_finished
    else:
        assert main(["cache", *map(str, place), "--check"]) == 0
        assert "has not what the source gives" in capsys.readouterr().out
    assert contents(place.out) == contents(tmp_path / "fresh")
    assert RUNS[command](*place).was_finished


@pytest.mark.parametrize("command", ["cache"])
def test_a_check_finds_every_changed_expert_weight_and_writes_nothing_else(place, command):
    source = Checkpoint(place.source)
    fingerprint = source.fingerprint
    shard = "model-00002-of-00002.safetensors"
    size = (place.source / shard).stat().st_size
    changed = [
        entry
        for name, entry in source.entries.items()
        if entry.shard == shard
        and ".experts." in name
        and entry.dtype == "F8_E4M3"
        # between the samples of the fingerprint
        and (100_000 < entry.end < size // 2 or size // 2 + 100_000 < entry.end < size - 100_000)
    ]
    data = bytearray((place.source / shard).read_bytes())
    for entry in changed:
        data[entry.end - 7] ^= 1
    (place.source / shard).write_bytes(data)
    assert Checkpoint(place.source).fingerprint == fingerprint
    assert len(changed) >= 5
    damaged = build_cache(*place, check=True).damaged
    assert set(damaged) == {entry.name for entry in changed}


@COMMANDS
def test_a_source_that_was_only_touched_costs_one_comparison(place, command, capsys):
    for path in place.source.iterdir():
        touch(path)
    kept = states(place.out)
    with pytest.raises(ConversionError, match="was modified since"):
        RUNS[command](*place)
    words = ["verify"] if command == "convert" else ["cache", "--check"]
    assert main([*words, *map(str, place)]) == 0
    assert "made again" not in capsys.readouterr().out
    assert RUNS[command](*place).was_finished
    shards = [path.name for path in place.out.glob("*.safetensors")]
    assert all(states(place.out)[name] == kept[name] for name in shards)


def test_a_comparison_of_something_that_changes_meanwhile_is_not_recorded(made, tmp_path):
    from neuron_minimax.convert.verify import verify

    source = shutil.copytree(made / "source", tmp_path / "source")
    out = shutil.copytree(made / "convert", tmp_path / "out")
    (shard,) = source.glob("model-00001*")
    touch(shard)
    manifest = (out / "conversion.json").read_bytes()

    def touch_again(nbytes):
        touch(shard)

    found = verify(Checkpoint(source), Converted.open(out), touch_again)
    assert found.equal
    assert "could not be recorded" in found.render()
    assert (out / "conversion.json").read_bytes() == manifest


@COMMANDS
def test_a_source_that_changes_during_a_run_is_refused_and_nothing_is_called_finished(
    made, tmp_path, command
):
    source = shutil.copytree(made / "source", tmp_path / "source")
    out = tmp_path / "out"
    done = []

    def change_at_the_end(nbytes):
        done.append(nbytes)
        if sum(done) == Checkpoint(source).nbytes or len(done) == 40:
            unsampled(source)

    with pytest.raises(ConversionError, match=r"changed while it was read: model-00002.*run again"):
        RUNS[command](source, out, advance=change_at_the_end)
    assert len(done) >= 40
    assert not (out / MANIFESTS[command]).exists()
    # What was finished of the other state is not kept.
    assert RUNS[command](source, out).reused_shards == 0
    RUNS[command](source, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_shards_of_an_interrupted_run_are_not_kept_for_another_state_of_the_source(made, tmp_path):
    source = shutil.copytree(made / "source", tmp_path / "source")
    nbytes = Converted.open(made / "convert").nbytes
    seen = []

    def stop(done):
        seen.append(done)
        if sum(seen) > 0.9 * nbytes:
            raise KeyboardInterrupt

    for change in (False, True):
        seen.clear()
        with pytest.raises(KeyboardInterrupt):
            convert(source, tmp_path / "out", advance=stop)
        assert list((tmp_path / "out" / ".unfinished").glob("*.safetensors.json"))
        if change:
            unsampled(source)
    assert convert(source, tmp_path / "out").reused_shards == 0
    convert(source, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@COMMANDS
def test_small_files_of_the_source_are_taken_again_without_the_weights(place, command):
    kept = states(place.out)
    (place.source / "chat_template.jinja").write_text("another one")
    (place.source / "vocab.json").write_text("{}")
    (place.source / "generation_config.json").unlink()
    result = RUNS[command](*place)
    assert result.was_finished
    lines = result.render().splitlines()
    for name in ("chat_template.jinja", "vocab.json"):
        assert f"{name}: taken from the checkpoint again" in lines
    assert "generation_config.json: removed" in lines
    assert (place.out / "chat_template.jinja").read_text() == "another one"
    assert (place.out / "vocab.json").read_text() == "{}"
    assert not (place.out / "generation_config.json").exists()
    shards = [path.name for path in place.out.glob("*.safetensors")]
    assert all(states(place.out)[name] == kept[name] for name in shards)
    assert RUNS[command](*place).render().count("\n") == len(result.render().splitlines()) - 4
    read(command, *place)


@COMMANDS
def test_another_config_is_another_checkpoint(place, command):
    path = place.source / "config.json"
    path.write_text(path.read_text().replace("1e-06", "1e-05"))
    with pytest.raises(
        ConversionError, match=r"finished output of another run \(differs in source_"
    ):
        RUNS[command](*place)


@COMMANDS
def test_a_file_that_somebody_has_added_is_named_and_kept(place, command):
    (place.out / "tokenizer.json").write_text("mine")
    with pytest.raises(ConversionError, match=r"tokenizer\.json, which is no part .* checkpoint"):
        RUNS[command](*place)
    with pytest.raises(
        NeuronMiniMaxError,
        match=r"tokenizer\.json is no part of it; .*\(a change of tokenizer\.json belongs into the",
    ):
        read(command, *place)
    assert (place.out / "tokenizer.json").read_text() == "mine"


def forget(path: Path) -> None:
    """Make a manifest one of a version that did not record files."""
    before = path.stat().st_mtime_ns
    fields = json.loads(path.read_text())
    del fields["files"]
    del fields["source_files"]
    path.write_text(json.dumps(fields))
    os.utime(path, ns=(before, before))


@COMMANDS
@pytest.mark.parametrize("reader_first", [False, True])
def test_an_output_of_an_earlier_version_is_read_once_and_gains_its_records(
    place, made, command, reader_first
):
    forget(place.out / MANIFESTS[command])
    if reader_first:  # who has no source at hand leaves the manifest's time, which speaks for it
        read(command, *place)
        fields = json.loads((place.out / MANIFESTS[command]).read_text())
        assert "files" in fields
        assert "source_files" not in fields
    assert RUNS[command](*place).was_finished
    assert contents(place.out) == contents(made / command)


def test_a_conversion_without_fp8_weights_of_an_earlier_version_is_read(tmp_path):
    source = write_tiny(tmp_path / "source", dense=True)
    convert(source, tmp_path / "out")
    path = tmp_path / "out" / "conversion.json"
    forget(path)
    before = path.stat().st_mtime_ns
    text = path.read_text()
    assert text.count(": null") == 2
    path.write_text(text.replace(": null", ": NaN"))
    os.utime(path, ns=(before, before))
    assert convert(source, tmp_path / "out").was_finished
    assert ": null" in path.read_text()
    Converted.open(tmp_path / "out")


@COMMANDS
def test_a_file_added_to_an_output_of_an_earlier_version_is_named_and_kept(place, command):
    forget(place.out / MANIFESTS[command])
    (place.out / "tokenizer.json").write_text("mine")
    with pytest.raises(ConversionError, match=r"tokenizer\.json, which is no part"):
        RUNS[command](*place)
    assert (place.out / "tokenizer.json").read_text() == "mine"


@COMMANDS
def test_a_damaged_output_of_an_earlier_version_is_seen(place, made, command):
    forget(place.out / MANIFESTS[command])
    shard = sorted(place.out.glob("*.safetensors"))[0]
    flip(shard, silently=True)
    with pytest.raises(NeuronMiniMaxError, match=rf"{shard.name} has other bytes"):
        read(command, *place)
    assert f"{shard.name} has other bytes" in RUNS[command](*place).render()
    assert contents(place.out) == contents(made / command)


@COMMANDS
def test_an_output_of_an_earlier_version_is_not_taken_for_a_newer_source(place, command):
    forget(place.out / MANIFESTS[command])
    shard = place.source / "model-00001-of-00002.safetensors"
    later = (place.out / MANIFESTS[command]).stat().st_mtime_ns + 1
    os.utime(shard, ns=(later, later))
    with pytest.raises(ConversionError, match=rf"{shard.name} of .* is newer than this output"):
        RUNS[command](*place)


@pytest.mark.parametrize("command", ["convert"])
def test_verifying_reads_the_small_files_too(place, command):
    flip(place.out / "generation_config.json", silently=True)
    digest, original = verify_conversion(*place).differences
    assert digest == "generation_config.json does not match the digest in its manifest"
    assert original.startswith("generation_config.json differs from the checkpoint's")


@pytest.mark.parametrize("command", ["convert"])
def test_an_output_counts_as_verified_until_something_of_it_is_made_again(place, command):
    assert not convert(*place).manifest.verified
    assert verify_conversion(*place).equal
    assert convert(*place).manifest.verified
    (place.out / "config.json").unlink()
    assert not convert(*place).manifest.verified


@pytest.mark.parametrize("command", ["convert"])
def test_who_reads_and_who_writes_exclude_each_other(place, command):
    converted = Converted.open(place.out)
    with converted.reading(), Converted.open(place.out).reading():
        (place.source / "chat_template.jinja").write_text("another")
        with pytest.raises(ConversionError, match="is being written or read by another run"):
            convert(*place)
    sorted(place.out.glob("*.safetensors"))[0].unlink()
    refused = []

    def try_to_read(nbytes):
        if not refused:
            with pytest.raises(ConversionError, match="is being written by another run") as error:
                converted.reading().__enter__()
            refused.append(error)

    convert(*place, advance=try_to_read)
    assert refused


@pytest.mark.parametrize("command", ["convert"])
def test_the_fingerprint_is_of_all_content_and_of_nothing_else(place, command):
    fingerprint = Converted.open(place.out).fingerprint
    copy = place.out.with_name("copy")
    shutil.copytree(place.out, copy, copy_function=shutil.copy)
    assert Converted.open(copy).fingerprint == fingerprint
    forget(copy / "conversion.json")
    assert Converted.open(copy).fingerprint == fingerprint
    (place.source / "chat_template.jinja").write_text("another")
    assert convert(*place).fingerprint != fingerprint
    found = {Converted.open(place.out).fingerprint, fingerprint}
    path = unsampled(place.source)
    found.add(convert(*place, overwrite=True).fingerprint)
    assert len(found) == 3, path


@COMMANDS
@pytest.mark.parametrize(("mask", "mode"), [(0o027, 0o2775), (0o022, 0o700)])
def test_files_have_the_umask_of_who_finishes_and_the_directory_keeps_its_mode(
    made, tmp_path, command, mask, mode
):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(mode)
    before = os.umask(0o077)
    try:
        with pytest.raises(ZeroDivisionError):
            RUNS[command](made / "source", out, advance=lambda nbytes: 1 // 0)
        assert list(out.glob("*.partial"))
        os.umask(mask)
        RUNS[command](made / "source", out)
        RUNS[command](made / "source", tmp_path / "new" / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE(out.stat().st_mode) == mode
    assert stat.S_IMODE((tmp_path / "new" / "out").stat().st_mode) & 0o777 == 0o777 & ~mask
    modes = {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()}
    assert modes == {0o666 & ~mask}


def test_messages_of_commands_are_single_lines(made, tmp_path, capsys):
    out = shutil.copytree(made / "convert", tmp_path / "out")
    (out / "model-00001-of-00003.safetensors").unlink()
    assert main(["compile", str(out), str(tmp_path / "traced"), "--engine", "eager"]) == 1
    assert main(["verify", str(made / "source"), str(out)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "model-00001-of-00003.safetensors is missing; run `neuron-minimax convert" in line
        assert "download" not in line


def test_an_unreadable_cache_is_a_checkpoint_error(made, tmp_path):
    out = shutil.copytree(made / "cache", tmp_path / "cache")
    (out / "cache.json").write_text('{"identity": {}, "tensors": {}}')
    with pytest.raises(CheckpointError, match=r"cache\.json cannot be used \(identity"):
        open_cache(out, Checkpoint(made / "source"))


def test_damage_that_left_no_time_stamp_is_mended_by_the_command_that_verify_names(
    made, tmp_path, capsys
):
    source = shutil.copytree(made / "source", tmp_path / "source")
    out = shutil.copytree(made / "convert", tmp_path / "out")
    shard = out / "model-00002-of-00003.safetensors"
    kept = states(out)
    flip(shard, silently=True)
    assert main(["convert", str(source), str(out)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["verify", str(source), str(out)]) == 1
    (named,) = re.findall("`neuron-minimax (.*)`", capsys.readouterr().out)
    assert main(named.split()) == 0
    assert f"{shard.name} has other bytes" in capsys.readouterr().out
    assert contents(out) == contents(made / "convert")
    assert main(["verify", str(source), str(out)]) == 0
    others = {path.name for path in out.glob("*.safetensors")} - {shard.name}
    assert len(others) == 2
    assert all(states(out)[name] == kept[name] for name in others)
    before = states(out)
    assert main(["convert", str(source), str(out), "--check"]) == 0
    assert states(out) == before


@pytest.mark.parametrize("command", ["convert"])
@pytest.mark.parametrize(
    ("name", "old", "new", "words"),
    [
        ("config.json", "1e-06", "1e-05", "differs from the checkpoint's in rms_norm_eps"),
        ("chat_template.jinja", "x", "y", "differs from the checkpoint's"),
    ],
)
def test_verify_compares_small_files_with_the_source_though_their_digests_agree(
    place, command, name, old, new, words
):
    path = place.out / name
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    manifest = json.loads((place.out / "conversion.json").read_text())
    manifest["files"][name] |= {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "modified_ns": path.stat().st_mtime_ns,
    }
    (place.out / "conversion.json").write_text(json.dumps(manifest))
    (difference,) = verify_conversion(*place).differences
    assert difference.startswith(f"{name} {words}")
    path.unlink()  # as the message says
    assert f"{name} is missing: made again" in convert(*place).render()
    assert verify_conversion(*place).equal
    assert path.read_text() == text
