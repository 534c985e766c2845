"""Outputs that somebody else has prepared, runs that end at any step, and a loss of power: nothing
is written outside, every message is one line, and the next run ends like an undisturbed one.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.convert.cache import open_cache
from neuron_minimax.convert.plan import Converted, plan_conversion
from neuron_minimax.errors import ConversionError, NeuronMiniMaxError
from tests.opened import build_cache, contents, convert, journal_of
from tests.tiny import write_tiny

MANIFESTS = {"convert": "conversion.json", "cache": "cache.json"}
RUNS = {"convert": convert, "cache": build_cache}
COMMANDS = pytest.mark.parametrize("command", RUNS)


def make_source(directory: Path, seed: int = 0) -> Path:
    sizes = {"num_hidden_layers": 1, "num_local_experts": 2, "hidden_size": 128, "vocab_size": 64}
    write_tiny(directory, seed, num_attention_heads=2, **sizes)
    (directory / "generation_config.json").write_text('{"eos_token_id": 1}')
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("made")
    for seed, name in enumerate(("source", "other")):
        source = make_source(directory / name, seed)
        for command, run in RUNS.items():
            run(source, directory / f"{name} {command}")
    return directory


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def read(command: str, source: Path, out: Path) -> None:
    if command == "convert":
        Converted.open(out)
    else:
        open_cache(out, Checkpoint(source))


def attempts(command: str, source: Path, out: Path) -> list[Callable[[], object]]:
    """Every way to use a finished output but --overwrite."""
    found: list[Callable[[], object]] = [
        lambda: read(command, source, out),
        lambda: RUNS[command](source, out),
    ]
    if command == "cache":
        found.append(lambda: build_cache(source, out, check=True))
    return found


PLACES = ["../../outside/planted", "../planted", "/tmp/planted", "a/b", "..", ".", "", "a\0b"]


@COMMANDS
@pytest.mark.parametrize("where", ["tensors", "files", "source_files"])
def test_a_manifest_that_names_a_path_is_refused_and_nothing_is_written_outside(
    made, tmp_path, command, where
):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "planted").write_text("kept")
    for place in PLACES:
        out = shutil.copytree(
            made / f"source {command}", tmp_path / "deep" / "out", dirs_exist_ok=True
        )
        manifest = json.loads((out / MANIFESTS[command]).read_text())
        if where == "tensors":
            next(iter(manifest["tensors"].values()))["shard"] = place
        else:
            manifest[where][place] = next(iter(manifest[where].values()))
        (out / MANIFESTS[command]).write_text(json.dumps(manifest))
        before = tree(tmp_path)
        for attempt in attempts(command, made / "source", out):
            with pytest.raises(NeuronMiniMaxError, match="is no plain file name") as refused:
                attempt()
            assert "\n" not in str(refused.value)
        assert tree(tmp_path) == before
    RUNS[command](made / "source", out, overwrite=True)
    assert contents(out) == contents(made / f"source {command}")
    assert set(tree(tmp_path)) == set(before)


CHANGES = [({}, True), ({"shard": "../outside"}, False), ({"rounded_codes": 3}, False)]


@COMMANDS
@pytest.mark.parametrize(("change", "trusted"), CHANGES)
def test_a_journal_is_trusted_as_it_was_written_alone(made, tmp_path, command, change, trusted):
    out = shutil.copytree(made / f"source {command}", tmp_path / "out")
    manifest = json.loads((out / MANIFESTS[command]).read_text())
    (out / MANIFESTS[command]).unlink()
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "identity.json").write_text(json.dumps(manifest["identity"]))
    for shard in {record["shard"] for record in manifest["tensors"].values()}:
        records = {
            name: record for name, record in manifest["tensors"].items() if record["shard"] == shard
        }
        journal = json.loads(journal_of(records))
        for record in journal["tensors"].values():
            record.update(change)
        (out / ".unfinished" / f"{shard}.json").write_text(json.dumps(journal))
    shards = len(list(out.glob("*.safetensors")))
    assert RUNS[command](made / "source", out).reused_shards == (shards if trusted else 0)
    assert contents(out) == contents(made / f"source {command}")


ODD = [
    b"",
    b"\xff",
    b"null",
    b"[]",
    b"3",
    b"[" * 100_000,
    b"{}",
    b'{"identity": 3, "tensors": {}}',
    b'{"identity": null, "tensors": []}',
    b'{"identity": {"options": 3}, "tensors": {}}',
]
ODD_FIELDS = [
    ("identity", {"options": "fp8"}),
    ("identity", {"format_version": "1"}),
    ("identity", {"source_fingerprint": None}),
    ("identity", {"source_fingerprint": ["x"]}),
    ("tensors", {"norm.weight": None}),
    ("tensors", {"norm.weight": {"shard": 3}}),
    ("files", {"config.json": 5}),
    ("files", {"config.json": {"nbytes": -1, "modified_ns": 0}}),
    ("files", {"config.json": {"nbytes": 1, "modified_ns": 10**30}}),
    ("files", {"config.json": {"nbytes": 1, "modified_ns": 0, "sha256": "x"}}),
    ("source_files", {"config.json": []}),
]
ODD_RECORDS = [
    {"dtype": "F17"},
    {"dtype": ["F32"]},
    {"shape": 3},
    {"shape": [True]},
    {"shape": [-1]},
    {"shape": [1e300]},
    {"crc32": 7},
    {"crc32": "zzzzzzzz"},
    {"rounded_codes": "0"},
    {"extra": 1},
]


def odd_manifests(whole: dict) -> list[bytes]:
    found = list(ODD)
    for key, value in ODD_FIELDS:
        found.append(json.dumps(whole | {key: whole[key] | value}).encode())
    for change in ODD_RECORDS:
        name, record = next(iter(whole["tensors"].items()))
        tensors = whole["tensors"] | {name: record | change}
        found.append(json.dumps(whole | {"tensors": tensors}).encode())
    return found


@COMMANDS
def test_a_manifest_of_another_shape_is_one_message(made, tmp_path, command):
    out = shutil.copytree(made / f"source {command}", tmp_path / "out")
    path = out / MANIFESTS[command]
    for data in odd_manifests(json.loads(path.read_text())):
        path.write_bytes(data)
        for attempt in attempts(command, made / "source", out):
            with pytest.raises(NeuronMiniMaxError) as refused:
                attempt()
            assert "\n" not in str(refused.value), data
            assert ";" in str(refused.value), data
        assert path.read_bytes() == data
    RUNS[command](made / "source", out, overwrite=True)
    assert contents(out) == contents(made / f"source {command}")


@pytest.mark.parametrize(
    "name", ["identity.json", "source.json", "model-00001-of-00002.safetensors.json"]
)
def test_an_unfinished_record_of_another_shape_is_one_message_or_not_trusted(made, tmp_path, name):
    out = shutil.copytree(made / "source convert", tmp_path / "out")
    manifest = json.loads((out / "conversion.json").read_text())
    for data in ODD:
        (out / "conversion.json").unlink(missing_ok=True)
        (out / ".unfinished").mkdir(exist_ok=True)
        (out / ".unfinished" / "identity.json").write_text(json.dumps(manifest["identity"]))
        (out / ".unfinished" / name).write_bytes(data)
        if name == "identity.json":
            with pytest.raises(
                ConversionError, match=r"(cannot be used|differs in).*--overwrite to replace it$"
            ):
                convert(made / "source", out)
        convert(made / "source", out, overwrite=name == "identity.json")
        assert contents(out) == contents(made / "source convert")


@COMMANDS
def test_links_in_an_output_are_replaced_and_never_written_through(made, tmp_path, command):
    out = shutil.copytree(made / f"source {command}", tmp_path / "out")
    outside = tmp_path / "outside"
    outside.mkdir()
    for path in sorted(out.iterdir()):
        shutil.copy(path, outside / path.name)
        path.unlink()
        path.symlink_to(outside / path.name)
        (out / f"{path.name}.partial").symlink_to(outside / path.name)
    (out / ".unfinished").symlink_to(outside)
    kept = tree(outside)
    RUNS[command](made / "other", out, overwrite=True)
    assert tree(outside) == kept
    assert contents(out) == contents(made / f"other {command}")
    assert not [path for path in out.iterdir() if path.is_symlink()]


# Every step by which a run changes what a directory holds.
STEPS = ("mkdir", "unlink", "rmdir", "replace", "fsync")


class Stopped(BaseException):
    """Raised in place of a process's end."""


def stop_at(monkeypatch, number: int, error: type[BaseException], after: bool) -> list[str]:
    """Let one call of all the STEPS fail, or the process end there; the calls as they come."""
    calls: list[str] = []

    def wrap(name):
        step = getattr(os, name) if name != "fsync" else lambda descriptor: None  # which takes long

        def run(*arguments, **options):
            calls.append(name)
            stops = len(calls) == number
            if stops and not after:
                raise error(5, "Input/output error") if error is OSError else error
            result = step(*arguments, **options)
            if stops:
                raise error
            return result

        monkeypatch.setattr(os, name, run)

    for name in STEPS:
        wrap(name)
    return calls


def message_of(run, *arguments, **options) -> str | None:
    """What a run is refused with; None when it ends, in whichever way."""
    try:
        run(*arguments, **options)
    except Stopped:
        return None
    except ConversionError as problem:
        return str(problem)
    return None


@pytest.mark.parametrize(
    ("command", "kind", "error", "after"),
    [
        ("cache", "new", OSError, False),
        ("convert", "overwrite", Stopped, True),
        ("cache", "repair", Stopped, False),
        ("convert", "refresh", OSError, False),
    ],
)
def test_after_any_step_the_next_run_ends_like_an_undisturbed_one(
    made, tmp_path, monkeypatch, command, kind, error, after
):
    source = shutil.copytree(made / "source", tmp_path / "source")
    if kind == "refresh":
        (source / "generation_config.json").write_text("{}")
        (source / "chat_template.jinja").write_text("x")
    RUNS[command](source, tmp_path / "fresh")
    wanted = contents(tmp_path / "fresh")
    out = tmp_path / "out"
    number = 0
    calls: list[str] = []
    while number <= len(calls):
        number += 1
        shutil.rmtree(out, ignore_errors=True)
        if kind == "overwrite":
            shutil.copytree(made / f"other {command}", out)
        elif kind != "new":
            shutil.copytree(made / f"source {command}", out)
        if kind == "repair":
            (out / "config.json").unlink()
            next(out.glob("*.safetensors")).unlink()
        with monkeypatch.context() as patched:
            calls = stop_at(patched, number, error, after)
            refused = message_of(RUNS[command], source, out, overwrite=kind == "overwrite")
        assert refused is None or re.search(r"^[^\n]*\(Input/output error\)[^\n]*$", refused)
        RUNS[command](source, out, overwrite=kind == "overwrite")
        assert contents(out) == wanted, (number, calls[-1])
    assert number > 8


@COMMANDS
def test_all_that_a_manifest_vouches_for_is_on_the_disk_before_it(
    made, tmp_path, monkeypatch, command
):
    out = tmp_path / "a" / "out"
    written: dict[int, str] = {}  # inode to whether its bytes are on the disk
    named: dict[str, tuple[int, bool]] = {}  # file to its inode, and whether its name is
    at_manifest = {}
    fsync, replace = os.fsync, os.replace

    def note_sync(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir():
            for name in [name for name in named if Path(name).parent == path]:
                named[name] = (named[name][0], True)
        else:
            written[path.stat().st_ino] = (path.read_bytes(), path.stat().st_mtime_ns)

    def note_replace(source, target):
        if Path(target).name == MANIFESTS[command]:
            at_manifest.update(named)
            assert os.stat(source).st_ino in written
        named[str(target)] = (os.stat(source).st_ino, False)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    RUNS[command](made / "source", out)
    manifest = json.loads((out / MANIFESTS[command]).read_text())
    assert named[str(out / MANIFESTS[command])][1]
    for name in manifest["files"]:
        inode, is_named = at_manifest[str(out / name)]
        assert is_named, name
        assert inode == (out / name).stat().st_ino
        assert written[inode] == ((out / name).read_bytes(), (out / name).stat().st_mtime_ns), name


MINE = {"adapter.safetensors": b"mine", "notes.partial": b"mine too"}


@pytest.mark.parametrize("state", ["finished", "unfinished", "another", "another unfinished"])
def test_a_users_own_files_stay_beside_a_conversion(made, tmp_path, state):
    out = tmp_path / "out"
    before = made / ("other convert" if "another" in state else "source convert")
    if "unfinished" in state:
        made_of = made / ("other" if "another" in state else "source")
        done: list[int] = []

        def stop(nbytes):
            done.append(nbytes)
            if sum(done) > 0.7 * Converted.open(before).nbytes:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            convert(made_of, out, advance=stop)
        assert list((out / ".unfinished").glob("*.safetensors.json"))
    else:
        shutil.copytree(before, out)
    for name, data in MINE.items():
        (out / name).write_bytes(data)
    convert(made / "source", out, overwrite="another" in state)
    assert contents(out) == contents(made / "source convert") | MINE
    Converted.open(out).tensors.require_usable()


def test_shards_of_another_output_go_although_the_new_one_has_none_of_their_names(made, tmp_path):
    larger = write_tiny(tmp_path / "larger")
    convert(larger, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    convert(made / "source", tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") == contents(made / "source convert")


def test_a_file_that_would_make_an_output_of_one_file_unreadable_is_refused(made, tmp_path):
    out = shutil.copytree(made / "other cache", tmp_path / "out")
    (out / "adapter.safetensors").write_bytes(b"mine")
    before = tree(out)
    with pytest.raises(ConversionError, match=r"holds adapter\.safetensors, which is no part"):
        build_cache(made / "source", out, overwrite=True)
    assert tree(out) == before
    (out / "adapter.safetensors").unlink()
    build_cache(made / "source", out, overwrite=True)
    assert contents(out) == contents(made / "source cache")


@COMMANDS
@pytest.mark.parametrize("kind", ["pipe", "outside", "folder"])
def test_a_companion_that_cannot_be_copied_is_refused_before_the_first_byte(
    made, tmp_path, command, kind
):
    source = shutil.copytree(made / "source", tmp_path / "source")
    path = source / "tokenizer.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/etc/hostname")
    done: list[int] = []
    with pytest.raises(NeuronMiniMaxError, match=r"source/tokenizer\.json "):
        RUNS[command](source, tmp_path / "out", advance=done.append)
    assert not done
    if command == "convert":
        assert main(["convert", str(source), str(tmp_path / "dry"), "--dry-run"]) == 1
    planned = shutil.copytree(made / f"other {command}", tmp_path / "another")
    before = tree(planned)
    with pytest.raises(NeuronMiniMaxError, match=r"source/tokenizer\.json "):
        RUNS[command](source, planned, overwrite=True)
    assert tree(planned) == before


def test_a_companion_that_appears_after_the_plan_is_refused_before_the_first_byte(made, tmp_path):
    source = shutil.copytree(made / "source", tmp_path / "source")
    plan = plan_conversion(Checkpoint(source))
    os.mkfifo(source / "tokenizer.json")
    done: list[int] = []
    with pytest.raises(NeuronMiniMaxError, match=r"source/tokenizer\.json "):
        plan.write(tmp_path / "out", advance=done.append)
    assert not done
