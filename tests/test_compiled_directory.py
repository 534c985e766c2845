"""A compiled directory is code: nothing of it is run that its manifest has no digest of, or that
somebody else may have written; and "up to date" is true.
"""

import copy
import fcntl
import hashlib
import json
import os
import pickle
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import neuron_minimax as nm
from neuron_minimax.backends import CompileMode, compile_model, load, verify_compiled
from neuron_minimax.backends.cpu import compiling
from neuron_minimax.backends.cpu.compiling import FinishedGraphs
from neuron_minimax.backends.directory import BACKENDS, read_manifest
from neuron_minimax.checkpoint.finished import locked
from neuron_minimax.cli import main
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, ConversionError, NeuronMiniMaxError
from tests.damaged import flip, message_of
from tests.heard import Heard
from tests.opened import convert
from tests.tiny import write_tiny
from tests.tiny_traced import edit_manifest, write_traced
from tests.waiting import wait_until

SMALL = {"num_hidden_layers": 1, "use_mtp": False}
PACKAGE = Path(nm.__file__).parent
EAGER = {"slots": 4, "buckets": (16, 32), "engine": "eager"}
EXPORTED = {"slots": 1, "seq_len": 24, "buckets": (8,), "engine": "exported"}


# Compiles as somebody who lets everybody write, loads, and says which files that opened.
COMPILE = """
import os, sys
from neuron_minimax.backends import compile_model, load
os.umask(0)
compile_model("converted", "traced", options=%r)
names = []
sys.addaudithook(lambda event, args: names.append(args[0]) if event == "open" else None)
load("traced")
print("\\n".join(map(str, names)))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A compiled directory with code in it, in the quickest way to make one; and the files that a
    load of it opens.
    """
    directory = tmp_path_factory.mktemp("exported")
    convert(write_tiny(directory / "checkpoint", **SMALL), directory / "converted")
    command = [sys.executable, "-c", COMPILE % EXPORTED]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent)}
    said = subprocess.check_output(command, cwd=directory, env=environment, text=True)
    return directory / "traced", said.splitlines()


@pytest.fixture(scope="module")
def exported(made: tuple[Path, list[str]]) -> Path:
    return made[0]


@pytest.fixture(scope="module")
def eager(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_traced(tmp_path_factory.mktemp("eager"), **SMALL)


@pytest.fixture
def work(eager: Path, tmp_path: Path) -> Path:
    """The eager model's directories, to change; hard links, as a compile makes them."""
    shutil.copytree(eager.parent, tmp_path / "work", copy_function=os.link)
    return tmp_path / "work" / "traced"


@pytest.fixture
def code(exported: Path, tmp_path: Path) -> Path:
    """The exported model's directory, to change."""
    return Path(shutil.copytree(exported, tmp_path / "traced"))


def again(traced: Path, **mode: bool) -> nm.CompileReport:
    asked = read_manifest(traced).options if (traced / "manifest.json").exists() else {}
    converted = traced.parent / "converted"
    return compile_model(converted, traced, options=asked, mode=CompileMode(**mode))


def rewrite(path: Path, content: bytes) -> None:
    """Give a file other bytes, and leave those that it is a hard link to."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def outcome(run: Callable[[], Any]) -> str:
    """The message of the BackendError that it ends with, or nothing."""
    try:
        run()
    except BackendError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", ["context_encoding.exported.pt2", "token_generation.exported.pt2"])
def test_a_graph_that_the_manifest_does_not_list_is_not_run(code: Path, name: str) -> None:
    edit_manifest(code, lambda fields: fields["graphs"].pop(name))
    said = message_of(lambda: load(code))
    assert f"cannot be used: manifest.json lists no graph {name}; run `neuron-minimax" in said


@pytest.mark.parametrize("name", ["kernels.so", "context_encoding.exported.pt2"])
def test_a_graph_with_other_bytes_is_not_run_and_is_made_again(
    code: Path, exported: Path, name: str
) -> None:
    path = code / "graphs" / name
    flip(path, silently=True, position=path.stat().st_size // 2)
    for run in (load, verify_compiled):
        said = message_of(lambda run=run: run(code))
        assert f"graph {name} is not the file that was compiled; run " in said
    path.unlink()
    assert f"graph {name} is missing" in message_of(lambda: load(code))
    os.mkfifo(path)
    assert f"graph {name}: it is no regular file" in message_of(lambda: load(code))


class Planted:
    """Makes a directory when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_nothing_is_unpickled_but_what_has_its_digest(code: Path, tmp_path: Path) -> None:
    data = pickle.dumps(Planted(tmp_path / "planted"))
    for path in (code / "graphs").iterdir():
        path.write_bytes(data)
    (code / "graphs" / "kernels.pickle").write_bytes(data)
    assert "is not the file that was compiled" in message_of(lambda: load(code))
    edit_manifest(code, lambda fields: fields["graphs"].clear())
    assert "lists no graph token_generation" in message_of(lambda: load(code))
    assert not (tmp_path / "planted").exists()


def test_a_load_runs_by_the_manifest_that_it_has_checked(work: Path) -> None:
    class Replacing(Heard):
        def stage(self, what: str, *given: Any) -> Any:
            (work / "manifest.json").unlink(missing_ok=True)  # by whoever compiles it again
            return super().stage(what, *given)

    assert load(work, Replacing()).model_directory == work / "model"
    assert not (work / "manifest.json").exists()


ODD_VALUES = (None, True, -1, 2.5, 10**30, "../x", [1], {"x": 1}, float("nan"), ...)
# A change of these is a manifest of another kind, as good as the first.
FREE = ("notes", "made_by", "options", "rank_weights", "compile_seconds")


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of a JSON value."""
    if path:
        yield path
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            yield from places(inner, (*path, key))


def put(fields: Any, path: tuple[Any, ...], odd: Any) -> None:
    """Put another value into a place, or take the place away."""
    *parents, last = path
    for key in parents:
        fields = fields[key]
    if odd is ...:
        del fields[last]
    else:
        fields[last] = odd


@pytest.mark.parametrize("engine", ["eager", "exported"])
def test_a_manifest_of_any_other_shape_is_one_message(
    request: pytest.FixtureRequest, work: Path, engine: str
) -> None:
    whole = json.loads((request.getfixturevalue(engine) / "manifest.json").read_text())
    run = {"eager": load, "exported": read_manifest}[engine]
    refused = 0
    for path in places({name: value for name, value in whole.items() if name != "digest"}):
        for odd in ODD_VALUES:
            fields = copy.deepcopy(whole)
            put(fields, path, odd)
            edit_manifest(work, partial(dict.update, **fields))
            said = outcome(partial(run, work))
            refused += bool(said)
            assert said or path[0] in FREE or run is read_manifest, (path, odd)
            assert "\n" not in said
            assert not said or path[0] == "options" or "compile" in said, (path, odd)
    assert refused > 200


def test_a_manifest_whose_digest_is_not_its_own_is_refused(work: Path) -> None:
    path = work / "manifest.json"
    rewrite(path, path.read_bytes().replace(b'"seq_len": 128', b'"seq_len": 129'))
    assert "manifest.json is not as it was written; run " in message_of(lambda: load(work))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"null"])
def test_a_manifest_that_is_none_is_one_message(work: Path, content: bytes) -> None:
    rewrite(work / "manifest.json", content)
    said = message_of(lambda: load(work))
    assert "manifest.json cannot be used (" in said
    assert "compile again" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"slots": "2"}, "slots: Input should be a valid integer"),
        ({"buckets": 8}, "buckets: Input should be a valid"),
        ({"buckets": [8.5]}, "buckets.0: Input should be"),
        ({"seq_len": [1]}, "seq_len: Input should be a valid integer"),
        ({"engine": 3}, "engine: Input should be a valid string"),
        ({"seq_len": object()}, "seq_len: Input should be a valid integer"),
    ],
)
def test_an_option_of_another_type_is_named(eager: Path, options: dict, problem: str) -> None:
    said = message_of(
        lambda: compile_model(eager.parent / "converted", eager.parent / "other", options=options)
    )
    assert problem in said


@pytest.mark.parametrize("changed", [{"slots": 0}, {"buckets": [64, 32]}, {"engine": "fast"}])
def test_an_option_in_a_manifest_is_no_fault_of_the_command(work: Path, changed: dict) -> None:
    edit_manifest(work, lambda fields: fields["options"].update(changed))
    with pytest.raises(NeuronMiniMaxError) as refusal:
        load(work)
    assert not refusal.value.usage


FOREIGN = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")


@FOREIGN
@pytest.mark.parametrize("name", ["manifest.json", "graphs/kernels.so"])
def test_the_code_of_another_user_is_not_run(code: Path, name: str) -> None:
    os.chown(code / name, 12345, -1)
    said = message_of(lambda: load(code))
    assert (
        f"{name} belongs to user 12345, not to user 0: a compiled directory holds machine" in said
    )
    assert "compile the converted directory yourself, or take over" in said


@pytest.mark.parametrize("name", ["manifest.json", "graphs/kernels.so"])
@pytest.mark.parametrize("mode", [0o664, 0o646])
def test_code_that_others_may_write_is_not_run(code: Path, name: str, mode: int) -> None:
    (code / name).chmod(mode)
    assert f"{name} may be written by others than its owner" in message_of(lambda: load(code))


DIRECTORIES = ("", "graphs", "model")


@pytest.mark.parametrize("name", DIRECTORIES)
@pytest.mark.parametrize("run", [load, verify_compiled])
def test_a_directory_that_others_may_write_to_is_refused_until_it_is_compiled_again(
    work: Path, name: str, run: Callable[[Path], Any]
) -> None:
    (work / name).chmod(0o775)
    said = message_of(lambda: run(work))
    assert said.startswith(f"{work / name} may be written by others than its owner: a compiled ")
    assert not again(work).reason
    run(work)


@FOREIGN
@pytest.mark.parametrize("name", DIRECTORIES)
def test_the_directory_of_another_user_is_refused(work: Path, name: str) -> None:
    os.chown(work / name, 12345, -1)
    for run in (load, verify_compiled):
        said = message_of(lambda run=run: run(work))
        assert said.startswith(f"{work / name} belongs to user 12345, not to user 0: a compiled ")


@FOREIGN
def test_nothing_is_compiled_into_the_directory_of_another_user(work: Path) -> None:
    os.chown(work, 12345, -1)
    assert f"{work} belongs to user 12345" in message_of(lambda: again(work, force=True))


def test_every_graph_that_a_load_opens_is_in_the_manifest(made: tuple[Path, list[str]]) -> None:
    traced, names = made
    opened = {Path(name).name for name in names if Path(name).parent == Path("traced/graphs")}
    assert opened == set(read_manifest(traced).graphs)
    assert opened == {path.name for path in (traced / "graphs").iterdir()}


def test_whatever_the_umask_nobody_else_can_write_what_is_run(exported: Path) -> None:
    graphs = exported / "graphs"
    directories = (exported, exported / "model", graphs)
    for path in (*directories, exported / "manifest.json", *graphs.iterdir()):
        assert not path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH), path


def test_another_chat_template_is_taken_over_without_compiling(work: Path) -> None:
    checkpoint = work.parent / "checkpoint"
    graphs = (work / "graphs").stat().st_mtime_ns

    def change(name: str, text: str) -> nm.CompileReport:
        rewrite(checkpoint / name, text.encode())
        convert(checkpoint, work.parent / "converted")
        return again(work)

    for name in ("chat_template.jinja", "tokenizer_config.json"):
        text = (checkpoint / name).read_text() + " "
        report = change(name, text)
        assert (report.reason, report.refreshed) == ("", f"{name} is another one")
        assert f"took over the model's files ({name} is another one); its gr" in report.render()
        assert (work / "model" / name).read_text() == text
        assert again(work).render().startswith(f"{work} is up to date")
    report = change("generation_config.json", '{"temperature": 0.5}')
    assert report.refreshed == "generation_config.json is new"
    assert load(work).model_directory == work / "model"
    assert (work / "graphs").stat().st_mtime_ns == graphs


def test_a_file_that_changed_behind_a_compile_is_named_and_mended(work: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "config.json"):
        path = work / "model" / name
        rewrite(path, path.read_bytes() + b" ")
        said = message_of(lambda: load(work))
        assert f"{name} has " in said
        assert "download" not in said
        report = again(work)
        assert not report.reason
        assert name in report.refreshed
        load(work)


def test_a_flipped_bit_of_a_weight_is_found_by_all_that_read_every_byte(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verify_compiled(work)
    assert not again(work, check=True).refreshed
    shard = work / "model" / "model.safetensors"
    shard = shard if shard.exists() else min((work / "model").glob("*.safetensors"))
    flip(shard, silently=True)
    assert not again(work).refreshed  # stamps are equal: only reading tells
    assert f"{shard.name} has other bytes" in message_of(lambda: verify_compiled(work))
    assert main(["serve", str(work), "--verify", "--port", "0"]) == 1
    said = capsys.readouterr().err
    assert f"{shard.name} has other bytes" in said
    assert "listening" not in said
    report = again(work, check=True)
    assert not report.reason
    assert f"{shard.name} has other bytes" in report.refreshed
    verify_compiled(work)


def test_the_weights_of_ranks_are_known_by_stamp_and_else_by_their_bytes(work: Path) -> None:
    path = work / "graphs" / "weights" / "tp0_sharded_checkpoint.safetensors"
    path.parent.mkdir()
    path.write_bytes(b"weights")
    stamp = path.stat()
    record = {
        "nbytes": stamp.st_size,
        "modified_ns": stamp.st_mtime_ns,
        "sha256": hashlib.sha256(b"weights").hexdigest(),
    }
    without = {key: record[key] for key in ("nbytes", "modified_ns")}
    edit_manifest(work, lambda fields: fields["rank_weights"].update({path.name: without}))
    assert "expected a digest of each file" in message_of(lambda: load(work))
    edit_manifest(work, lambda fields: fields["rank_weights"].update({path.name: record}))
    verify_compiled(work)
    path.touch()  # a copy has another time stamp
    load(work)
    path.write_bytes(b"Weights")
    assert f"{path.name} has other bytes; run " in message_of(lambda: load(work))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    load(work)
    assert f"{path.name} has other bytes; run " in message_of(lambda: verify_compiled(work))
    path.unlink()
    assert f"{path.name} is missing" in message_of(lambda: load(work))
    assert f"{path.name} is missing" in again(work).reason
    assert not path.parent.exists()


@pytest.mark.parametrize("compiled", ["whole", "no model", "other graphs", "none"])
def test_a_flipped_bit_in_the_converted_directory_itself_is_an_error_that_says_so(
    work: Path, compiled: str
) -> None:
    converted = work.parent / "converted"
    shard = min(converted.glob("*.safetensors"))
    flip(shard, silently=True)
    (work / "model" / shard.name).unlink()
    os.link(shard, work / "model" / shard.name)
    if compiled == "no model":
        shutil.rmtree(work / "model")
    elif compiled == "other graphs":
        edit_manifest(work, lambda fields: fields["options"].update(seq_len=64))
    elif compiled == "none":
        shutil.rmtree(work)
    options = {**EAGER, "seq_len": 128}
    with pytest.raises(
        ConversionError, match=rf"{shard.name} has other bytes.*convert CKPT.* --check`"
    ):
        compile_model(converted, work, options=options, mode=CompileMode(check=True))


def kept(traced: Path) -> dict[str, bytes]:
    """Every file that a load reads, by its path below the compiled directory."""
    named = [traced / "manifest.json", *traced.glob("graphs/*"), *traced.glob("model/*")]
    return {str(path.relative_to(traced)): path.read_bytes() for path in named}


def test_a_compile_that_fails_leaves_the_one_that_is_there(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = work.parent / "converted"
    before = kept(work)
    with Converted.open(converted).reading(), locked(work.parent / "converted", fcntl.LOCK_SH):
        again(work)  # readers do not keep each other out
    with locked(converted, fcntl.LOCK_EX), pytest.raises(ConversionError, match="being written"):
        again(work, force=True)
    assert kept(work) == before

    def fail(model: Path, graphs: Path, *arguments: Any) -> None:
        assert (model / "config.json").is_file()
        (graphs / "half").write_bytes(b"half of a graph")
        raise BackendError("the compiler failed; look")

    with monkeypatch.context() as broken:
        broken.setattr("neuron_minimax.backends.cpu.backend.build", fail)
        assert message_of(lambda: again(work, force=True)) == "the compiler failed; look"
    assert kept(work) == before
    load(work)
    assert again(work).render().startswith(f"{work} is up to date")
    assert {path.name for path in work.iterdir()} == {"manifest.json", "graphs", "model"}
    assert again(work, force=True).reason == "forced"
    assert {path.name for path in work.iterdir()} == {"manifest.json", "graphs", "model"}


@pytest.mark.parametrize("odd", ["converted", "traced"])
def test_a_path_that_is_no_utf8_is_refused_before_anything_is_made(work: Path, odd: str) -> None:
    paths = {name: work.parent / name for name in ("converted", "traced")}
    paths[odd] = paths[odd].rename(os.fsdecode(os.fsencode(work.parent) + b"/odd\xff"))
    before = kept(paths["traced"])
    said = message_of(lambda: compile_model(paths["converted"], paths["traced"], options=EAGER))
    assert "\\udcff is no valid UTF-8; rename the directory" in said
    assert kept(paths["traced"]) == before


def test_a_reason_has_no_advice_and_is_never_empty(work: Path) -> None:
    rewrite(work / "model" / "conversion.json", b"{")
    assert "; run" not in again(work).refreshed
    (work / "model" / "conversion.json").unlink()
    os.mkfifo(work / "model" / "conversion.json")
    said = message_of(lambda: load(work))
    assert said.count("; run ") == 1
    assert "conversion.json" in said.partition("; run ")[0]
    rewrite(work / "manifest.json", b"{")
    report = compile_model(work.parent / "converted", work, options=EAGER)
    assert "manifest.json cannot be used (" in report.reason
    assert "compile again" not in report.render()


def test_a_directory_that_cannot_be_written_to_is_one_message(work: Path) -> None:
    (work / ".unfinished").symlink_to(".unfinished")  # which nobody can open, not even root
    said = message_of(lambda: again(work, force=True))
    assert said.startswith(f"compiling into {work} failed (")
    assert said.endswith("; mend it, or choose another directory")


def test_a_copy_of_a_compiled_directory_is_as_good(work: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(work, tmp_path / "copied", copy_function=shutil.copyfile))
    (copied / "manifest.json").chmod(0o644)
    ids = list(range(5))
    assert torch.equal(load(copied).encode(0, ids), load(work).encode(0, ids))


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_compiled_directory_is_never_cleared(
    eager: Path, tmp_path: Path, force: bool
) -> None:
    for name in ("graphs", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "index.html").touch()
    mode = CompileMode(force=force)
    said = message_of(lambda: compile_model(eager.parent / "converted", tmp_path, mode=mode))
    assert "it holds index.html too, and may be no compiled model" in said
    (tmp_path / "manifest.json").unlink()
    said = message_of(lambda: compile_model(eager.parent / "converted", tmp_path, mode=mode))
    assert "no manifest.json: it is no compiled model" in said
    assert (tmp_path / "graphs" / "mine").exists()


def descendants(process: int) -> set[int]:
    parents = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                parents[int(path.name)] = int(fields[1])
    found = {process}
    while True:
        more = {child for child, parent in parents.items() if parent in found} - found
        if not more:
            return found - {process}
        found |= more


def is_running(process: int) -> bool:
    try:
        text = (Path("/proc") / str(process) / "stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


# A compiler that never ends: its process is what an interrupted compile has to take with it.
SLEEPING = '#!/bin/sh\necho $$ >> "{seen}"\nexec sleep 1000\n'
# In the place of the module that makes a graph: it goes straight to the compiler. How a compile
# ends is the same; SIGKILL, of which nobody is told, is tried on the module itself.
CALLS_COMPILER = 'import os, subprocess; subprocess.run([os.environ["CXX"]])'
COMMAND = """
import sys
from neuron_minimax.backends.cpu import compiling
from neuron_minimax.cli import main
compiling.MODULE = {module!r}
sys.exit(main())
"""


@pytest.mark.parametrize(
    ("number", "module"),
    [
        (signal.SIGKILL, compiling.MODULE),
        (signal.SIGINT, "calls_compiler"),
        (signal.SIGTERM, "calls_compiler"),
    ],
)
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks Linux for processes")
def test_the_compilers_of_a_compile_end_with_it_and_the_next_one_makes_the_same(
    exported: Path, tmp_path: Path, number: signal.Signals, module: str
) -> None:
    compiler = tmp_path / "g++"
    seen = tmp_path / "seen"
    seen.touch()
    compiler.write_text(SLEEPING.format(seen=seen))
    compiler.chmod(0o755)
    (tmp_path / "calls_compiler.py").write_text(CALLS_COMPILER)
    converted = exported.parent / "converted"
    traced = tmp_path / "traced"
    arguments = ["compile", str(converted), str(traced), "--seq-len", "24", "--buckets", "8"]
    paths = os.pathsep.join([str(PACKAGE.parent), str(tmp_path)])
    said = tmp_path / "said"
    with said.open("wb") as file:
        running = subprocess.Popen(
            [sys.executable, "-c", COMMAND.format(module=module), *arguments],
            env=os.environ | {"CXX": str(compiler), "PYTHONPATH": paths},
            stderr=file,
        )
    try:
        # A shell opens the file, and writes to it later.
        wait_until(lambda: "\n" in seen.read_text() or running.poll() is not None, seconds=600)
        assert running.poll() is None, said.read_text()
        processes = descendants(running.pid)
        assert int(seen.read_text().split()[0]) in processes
        running.send_signal(number)
        running.wait(timeout=120)
        wait_until(lambda: not any(map(is_running, processes)))
    finally:
        running.kill()
        running.wait()
    assert running.returncode in (-number, 128 + number, 1)
    assert "Traceback" not in said.read_text()
    if number != signal.SIGKILL:
        stopped = f"stopped by {number.name}; 0 of 2 graphs are finished and kept; run the same "
        assert stopped in said.read_text()
    # The lock is free, and the next compile begins anew.
    options = EXPORTED if number == signal.SIGKILL else {**EXPORTED, "engine": "eager"}
    report = compile_model(converted, traced, options=options)
    assert report.reason == "an earlier compile did not finish"
    assert {path.name for path in traced.iterdir()} == {"manifest.json", "graphs", "model"}
    if number == signal.SIGKILL:
        assert all_but_times(traced) == all_but_times(exported)


def test_lines_of_a_backend_that_compiles_all_at_once_say_what_its_one_stage_does(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(model: Path, graphs: Path, options: Any, progress: Callable[[str], None]) -> Any:
        progress("warning: 3 weights are rounded")
        progress("1 min: tiling context_encoding_model")
        return {}, []

    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["cpu"]._replace(by_graph=False))
    monkeypatch.setattr("neuron_minimax.backends.cpu.backend.build", build)
    heard = Heard()
    asked = {**EAGER, "seq_len": 64}
    compile_model(work.parent / "converted", work, options=asked, progress=heard)
    assert heard.lines == ["warning: 3 weights are rounded"]
    assert heard.named("compiling for cpu").doing == ["1 min: tiling context_encoding_model"]


GRAPHS = ("token_generation", "context_encoding")
SUFFIX = ".exported.pt2"


def interrupted(exported: Path, traced: Path) -> FinishedGraphs:
    """Make `traced` what a compile leaves that is killed behind its graphs."""
    graphs = traced / ".graphs-new"
    graphs.mkdir(parents=True)
    finished = FinishedGraphs(graphs, [SUFFIX])
    made = Path(shutil.copytree(exported / "graphs", traced.with_name("made")))
    for name in GRAPHS:
        finished.add(name, made, 12.34)
    request = {"request": read_manifest(exported).digest_of_request}
    (traced / ".unfinished").write_text(json.dumps(request))
    return finished


def test_graphs_that_an_interrupted_compile_has_finished_are_not_made_again(
    exported: Path, tmp_path: Path
) -> None:
    traced = tmp_path / "traced"
    interrupted(exported, traced)
    (traced / ".graphs-new" / ".compiling-x").mkdir()
    heard = Heard()
    report = compile_model(exported.parent / "converted", traced, options=EXPORTED, progress=heard)
    assert report.reason == "an earlier compile did not finish"
    assert heard.lines == [f"kept of an interrupted compile: {', '.join(GRAPHS)}"]
    assert not {stage.what for stage in heard.stages} & set(GRAPHS)
    assert report.manifest.graphs[GRAPHS[0] + SUFFIX].seconds == 12.3
    assert {path.name for path in traced.iterdir()} == {"manifest.json", "graphs", "model"}
    assert {path.name for path in (traced / "graphs").iterdir()} == set(report.manifest.graphs)
    assert all_but_times(traced) == all_but_times(exported)


def test_graphs_of_an_interrupted_compile_of_something_else_are_removed(
    exported: Path, tmp_path: Path
) -> None:
    traced = tmp_path / "traced"
    interrupted(exported, traced)
    options = {**EXPORTED, "engine": "eager"}
    compile_model(exported.parent / "converted", traced, options=options)
    assert list((traced / "graphs").iterdir()) == []


@pytest.mark.parametrize("change", ["bytes", "mode", "link", "none"])
def test_a_graph_that_somebody_may_have_changed_is_made_again(
    exported: Path, tmp_path: Path, change: str
) -> None:
    finished = interrupted(exported, tmp_path / "traced")
    path = finished.graphs / (GRAPHS[0] + SUFFIX)
    if change == "bytes":
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    elif change == "mode":
        path.chmod(0o664)
    elif change == "link":
        path.unlink()
        path.symlink_to(exported / "graphs" / path.name)
    found = FinishedGraphs(finished.graphs, [SUFFIX])
    assert [name for name in GRAPHS if name in found] == list(GRAPHS[change != "none" :])
    assert path.exists() == (change == "none")


def test_graphs_of_another_engine_are_not_kept(exported: Path, tmp_path: Path) -> None:
    graphs = interrupted(exported, tmp_path / "traced").graphs
    found = FinishedGraphs(graphs, [".so", ".json"])
    assert not any(name in found for name in GRAPHS)
    assert list(graphs.glob("*.pt2")) == []


def all_but_times(traced: Path) -> dict[str, Any]:
    """What a manifest says, the digests of all graphs among it."""
    fields: dict[str, Any] = json.loads((traced / "manifest.json").read_text())
    fields.pop("digest")
    fields.pop("compile_seconds")
    for graph in fields["graphs"].values():
        graph.pop("seconds")
    return fields
