"""Checkpoints from anywhere: `inspect` and `convert` refuse the same with the same words, wait for
nothing, and outlive a source that shrinks while it is read.
"""

import json
import os
import re
import shutil
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import neuron_minimax as nm
from neuron_minimax.checkpoint import index as index_module
from neuron_minimax.checkpoint import reader
from neuron_minimax.checkpoint.header import read_header
from neuron_minimax.checkpoint.index import INDEX_NAME
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.streaming import PARALLEL_FROM, in_processes
from neuron_minimax.cli import main
from neuron_minimax.config import CONVERTED_SECTION
from neuron_minimax.convert.verify import verify
from neuron_minimax.errors import CheckpointError, NeuronMiniMaxError
from neuron_minimax.inspection.compare import compare
from neuron_minimax.inspection.values import check_values
from tests.opened import convert, inspect
from tests.test_reader import rewrite_header
from tests.tiny import write_tiny

SHARD = "model-00002-of-00002.safetensors"
W1 = "model.layers.1.block_sparse_moe.experts.5.w1.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("checkpoint") / "tiny", shards=2)


@pytest.fixture
def hostile(made, tmp_path):
    """A copy to change."""
    return shutil.copytree(made, tmp_path / "hostile")


def config(**changes):
    def apply(directory: Path) -> None:
        raw = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(raw | changes))

    return apply


def header(change):
    return lambda directory: rewrite_header(directory / SHARD, change)


def index(change):
    def apply(directory: Path) -> None:
        contents = json.loads((directory / INDEX_NAME).read_text())
        change(contents["weight_map"])
        (directory / INDEX_NAME).write_text(json.dumps(contents))

    return apply


def text(name, contents):
    return lambda directory: (directory / name).write_text(contents)


def pipe(name):
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        os.mkfifo(directory / name)

    return apply


def endless(name):
    def apply(directory: Path) -> None:
        (directory / name).unlink()
        (directory / name).symlink_to("/dev/zero")

    return apply


def mixed(directory: Path) -> None:
    """One expert in BF16, the others of its tensor in FP8."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if W1 in tensors:
            tensors[W1] = tensors[W1].bfloat16()
        tensors.pop(f"{W1}_scale_inv", None)
        save_file(tensors, path)
    index(lambda weight_map: weight_map.pop(f"{W1}_scale_inv"))(directory)


def last(change):
    """A change of the last tensor's entry in a header."""
    return header(
        lambda entries: change(
            entries[max(set(entries) - {"__metadata__"}, key=lambda k: entries[k]["data_offsets"])]
        )
    )


REFUSED: dict[str, Callable[[Path], object]] = {
    "a section of a conversion": config(**{CONVERTED_SECTION: {}}),
    "weights of two dtypes that go into one tensor": mixed,
    "a billion layers": config(num_hidden_layers=10**9),
    "a quantization that is a text": config(quantization_config="fp8"),
    "a list of kinds that is a number": config(attn_type_list=7),
    "a lone surrogate": text("config.json", '{"model_type": "\\ud800"}'),
    "a deep config": text("config.json", "[" * 100_000 + "]" * 100_000),
    "a deep index": text(INDEX_NAME, "[" * 100_000 + "]" * 100_000),
    "an index with a key twice": text(INDEX_NAME, '{"weight_map": {"a": "b", "a": "b"}}'),
    "an index with numbers for names": index(lambda weight_map: weight_map.update({W1: 1})),
    "a shard elsewhere": index(lambda weight_map: weight_map.update({W1: f"../tiny/{SHARD}"})),
    "a shard named by a control character": index(lambda names: names.update({W1: "\x1b[2J"})),
    "an index of a tensor with a control character": index(
        lambda weight_map: weight_map.update({"\x1b[2J": SHARD})
    ),
    "more shards than any checkpoint has": index(
        lambda names: names.update({f"x.{n}": f"{n}.safetensors" for n in range(20_000)})
    ),
    "offsets that are no integers": last(
        lambda fields: fields.update(data_offsets=[float(x) for x in fields["data_offsets"]])
    ),
    "a size that is true": last(lambda fields: fields["shape"].append(True)),
    "a name with a control character": header(
        lambda entries: entries.update({"\x1b[2Jx": entries.pop(max(entries))})
    ),
    "a layer of digits that are no ASCII": header(
        lambda entries: entries.update({"model.layers.²2.x.weight": entries.pop(max(entries))})
    ),
    **{f"a pipe as {name}": pipe(name) for name in ("config.json", INDEX_NAME, SHARD)},
    **{f"/dev/zero as {name}": endless(name) for name in ("config.json", INDEX_NAME, SHARD)},
}


@pytest.mark.parametrize("title", REFUSED)
def test_convert_refuses_what_inspect_refuses_in_the_same_words(title, hostile, tmp_path, capsys):
    REFUSED[title](hostile)
    assert main(["inspect", str(hostile)]) == 1
    inspected = capsys.readouterr()
    assert main(["convert", str(hostile), str(tmp_path / "out")]) == 1
    converted = capsys.readouterr()
    message = converted.err.removeprefix("error: ").splitlines()[0]
    assert "".join(message.split()) in "".join((inspected.out + inspected.err).split())
    for shown in (inspected.out, inspected.err, converted.out, converted.err):
        assert "Traceback" not in shown
        assert shown.replace("\n", "").isprintable() or not shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "entry", ["(a+)+$", "(self_attn|self_attn)*x", r"(\w+\.)*\w+!", "(?=model)", "(", "\\w{100}"]
)
def test_an_entry_of_modules_to_not_convert_is_never_run_without_end(entry, hostile, tmp_path):
    raw = json.loads((hostile / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] = [entry, "gate", "lm_head"]
    (hostile / "config.json").write_text(json.dumps(raw))
    assert inspect(hostile).usable
    convert(hostile, tmp_path / "out")


def test_every_tensor_that_only_the_index_has_is_named_however_many(hostile):
    extra = {f"model.x.{number}.weight": SHARD for number in range(30_000)}
    index(lambda weight_map: weight_map.update(extra))(hostile)
    assert {problem.subject for problem in Checkpoint(hostile).problems} == extra.keys()


def test_more_tensors_than_any_checkpoint_has_are_refused(hostile, monkeypatch):
    for module in (index_module, reader):
        monkeypatch.setattr(module, "MOST_TENSORS", 60)
    with pytest.raises(CheckpointError, match="has 127 tensors, expected 1 to 60"):
        Checkpoint(hostile)
    (hostile / INDEX_NAME).unlink()
    shards = sorted(path.name for path in hostile.glob("*.safetensors"))
    with pytest.raises(CheckpointError, match="has at least 63 tensors; at most 60 are read"):
        TensorDirectory(hostile, shards)


def test_tensors_that_are_left_out_may_be_many(hostile):
    """Each is looked up, none is looked for."""
    config(num_mtp_modules=1)(hostile)
    count = 20_000
    names = [f"model.mtp.{number}.weight" for number in range(count)]
    entries = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [number, number + 1]}
        for number, name in enumerate(names)
    }
    head = json.dumps(entries).encode()
    (hostile / "mtp.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + bytes(count))
    index(lambda weight_map: weight_map.update(dict.fromkeys(names, "mtp.safetensors")))(hostile)
    assert len(nm.plan_conversion(Checkpoint(hostile)).left_out) == count


def test_a_hub_snapshot_of_links_is_a_checkpoint(made, tmp_path):
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert inspect(tmp_path).usable


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json"])
def test_a_small_file_that_cannot_be_read_is_one_error_and_not_converted(name, hostile, tmp_path):
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(hostile / name))
        report = inspect(hostile)
        with pytest.raises(CheckpointError, match=f"{name} cannot be used"):
            convert(hostile, tmp_path / "out")
    assert not report.usable
    (finding,) = [each for each in report.findings if f"{name} cannot be" in each.message]
    assert (finding.severity, finding.subject) == ("error", name)


def said_by(run: Callable[[], object]) -> str:
    """The message of a process of its own, which no signal may end."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            run()
        except NeuronMiniMaxError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as said:
        message = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status != -signal.SIGBUS, "a page behind the end of a mapped file was touched"
    assert status == 0
    return message


def truncating(directory: Path) -> Callable[[int], None]:
    """A progress function that cuts every shard off behind its header."""
    ends = {
        path: min(entry.start for entry in read_header(path))
        for path in directory.glob("*.safetensors")
    }

    def cut(nbytes: int) -> None:
        for path, end in ends.items():
            os.truncate(path, end)

    return cut


STREAMS: dict[str, Callable[[Path, Path, Callable[[int], None]], object]] = {
    "convert": lambda source, out, cut: convert(source, out / "new", advance=cut),
    "cache": lambda source, out, cut: nm.Checkpoint.open(source).cache(out / "new", advance=cut),
    "verify": lambda source, out, cut: verify(
        Checkpoint(source), nm.Converted.open(out / "made"), cut
    ),
    "values": lambda source, out, cut: check_values(Checkpoint(source), cut),
    "compare": lambda source, out, cut: compare(Checkpoint(source), Checkpoint(source), True, cut),
}


@pytest.mark.parametrize("stream", STREAMS)
def test_a_source_that_is_truncated_while_it_is_read_is_named(stream, hostile, tmp_path):
    convert(hostile, tmp_path / "made")
    message = said_by(partial(STREAMS[stream], hostile, tmp_path, truncating(hostile)))
    assert re.search(
        r"\.safetensors ends within model\..*; it has changed: download it again$"
        r"|\.safetensors has \d+ bytes, not \d+; run again",
        message,
    ), message


def test_a_worker_that_reads_a_truncated_source_says_so(hostile):
    checkpoint = Checkpoint(hostile)
    cut = truncating(hostile)
    tasks = [partial(checkpoint.rows, name) for name in checkpoint.entries]

    def read() -> None:
        for _ in in_processes(tasks, PARALLEL_FROM):
            pass

    list(in_processes(tasks, PARALLEL_FROM))
    cut(0)
    assert ".safetensors ends within " in said_by(read)


def test_a_tensor_is_not_mapped_behind_the_end_of_its_file(hostile):
    checkpoint = Checkpoint(hostile)
    name = next(iter(checkpoint.entries))
    checkpoint.array(name)
    truncating(hostile)(0)
    assert f"ends within {name}" in said_by(partial(checkpoint.array, name))
