"""How a run of the trainer ends otherwise than well, and what the next one finds: signals, a full
disk, losses that are no numbers, damaged states, changed inputs, results that are not all there.
"""

import fcntl
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_minimax.checkpoint.writer import PARTIAL_SUFFIX
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.training import command
from neuron_minimax.training.data.corpus import CorpusSource
from neuron_minimax.training.data.encoding import Encoder
from neuron_minimax.training.data.sequences import DataOptions, Sequences, encode_rows
from neuron_minimax.training.data.sources import LINE_BYTES, JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.options import TrainingOptions
from neuron_minimax.training.request import TrainingRequest
from neuron_minimax.training.state import STATE_NAME
from neuron_minimax.training.trainer import Trainer
from tests.full_disk import files_of_at_most
from tests.heard import Heard
from tests.tiny import tiny_config
from tests.tiny_tokenizer import write_tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 128,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "num_local_experts": 2,
    "num_hidden_layers": 1,
}
STEPS = 5
EXPORTED = ("model.safetensors", "config.json", "loss.png", "tokenizer.json")


def write_inputs(directory: Path) -> Path:
    write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps(tiny_config(**SMALL)))
    rows = [{"text": f"row {number}: {'one two three ' * number}"} for number in range(9)]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


def run(inputs: Path, output: Path, *more: str) -> int:
    arguments = ["train", str(output), "--steps", str(STEPS), "--batch-size", "2"]
    arguments += ["--config", str(inputs), "--tokenizer", str(inputs), "--max-tokens", "64"]
    return main([*arguments, "--data", str(inputs / "rows.jsonl"), *more])


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs")


@pytest.fixture
def train(inputs: Path, tmp_path: Path) -> Callable[..., int]:
    return lambda name, *more: run(inputs, tmp_path / name, *more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has disturbed."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert run(write_inputs(directory / "inputs"), directory / "out") == 0
    return directory / "out"


@pytest.fixture
def whole(finished: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(finished, tmp_path / "whole")


def test_what_comes_before_the_first_step_is_told_with_counts(
    inputs: Path, finished: Path, tmp_path: Path
) -> None:
    heard = Heard()
    data = inputs / "rows.jsonl"
    request = TrainingRequest(
        output=tmp_path / "out",
        options=TrainingOptions(steps=1, batch_size=2, max_tokens=64),
        data=data,
        read=DataOptions(held_out=0.3),
        initial=finished,
    )
    command.train(request, heard)
    stages = [(stage.what, stage.total, stage.unit, sum(stage.counts)) for stage in heard.stages]
    assert (f"reading {data}", None, "rows", 9) in stages
    assert (f"encoding {data}", 9, "rows", 9) in stages
    assert heard.named(f"opening {finished}").ended
    assert all(stage.ended for stage in heard.stages)


def files(directory: Path) -> dict[str, bytes]:
    """What a run leaves, time stamps and the command left out."""
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    summary = json.loads(found.pop("training.json"))
    del summary["files"], summary["command"]
    return {**found, "training.json": json.dumps(summary).encode()}


def only_line_but_progress(said: str) -> str:
    """The line that a command ends with; before it a slow machine has lines of stages alone."""
    *stages, last = said.splitlines()
    assert all(re.match(r"(training|writing|reading|encoding|preparing) .*: ", s) for s in stages)
    return last


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_after_its_step_and_the_next_goes_on_to_the_bit(
    train, whole, tmp_path, monkeypatch, capsys, number
) -> None:
    example = Sequences.example

    def interrupting(self: Sequences, index: int) -> Any:
        if index == 5:  # of the third step
            signal.raise_signal(number)
        return example(self, index)

    monkeypatch.setattr(Sequences, "example", interrupting)
    assert train("parts") == 128 + number
    monkeypatch.undo()
    out, said = capsys.readouterr()
    assert said.splitlines()[-1].startswith(
        f"stopped by {number.name}; the state of step 3 of {STEPS} is saved; to go on: "
    )
    assert "up to date" not in out
    assert torch.load(tmp_path / "parts" / STATE_NAME, weights_only=True)["step"] == 3
    assert train("parts") == 0
    assert files(tmp_path / "parts") == files(whole)


def test_ctrl_c_while_the_data_is_read_leaves_nothing_and_says_so(
    train, tmp_path, monkeypatch, capsys
) -> None:
    encode = Encoder.encode

    def interrupting(self: Encoder, row: Any) -> Any:
        if row["text"].startswith("row 4"):
            signal.raise_signal(signal.SIGINT)
        return encode(self, row)

    monkeypatch.setattr(Encoder, "encode", interrupting)
    assert train("out") == 130
    out = tmp_path / "out"
    assert only_line_but_progress(capsys.readouterr().err).startswith(
        f"stopped by SIGINT; no step was taken, what {out} held is kept; to go on: "
    )
    assert not out.exists()


@pytest.mark.parametrize("command", ["tokenizer", "corpus"])
def test_ctrl_c_ends_what_writes_files_with_one_line(
    tmp_path, monkeypatch, capsys, command
) -> None:
    """Of the tokenizer between two texts that the tokenizers library takes."""
    row = CorpusSource.row

    def interrupting(self: CorpusSource, index: int) -> Any:
        if index == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return row(self, index)

    monkeypatch.setattr(CorpusSource, "row", interrupting)
    out = tmp_path / "out"
    assert main([command, str(out)]) == 130
    assert only_line_but_progress(capsys.readouterr().err) == (
        f"stopped by SIGINT; every file in {out} is whole; the same command makes what is missing"
    )
    assert not out.exists()


def test_a_second_signal_ends_a_run_at_once(train, tmp_path, monkeypatch, capsys) -> None:
    example = Sequences.example

    def interrupting(self: Sequences, index: int) -> Any:
        if index in (4, 5):  # of the third step
            signal.raise_signal(signal.SIGINT)
        return example(self, index)

    monkeypatch.setattr(Sequences, "example", interrupting)
    assert train("parts", "--save-every", "2") == 130
    assert "the state of step 2 of 5 is saved" in capsys.readouterr().err


def test_a_second_run_into_a_directory_is_refused(train, tmp_path, capsys) -> None:
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        assert train("out") == 1
    finally:
        os.close(descriptor)
    assert "by another run; wait for it or stop it" in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_keeps_the_last_state_and_the_next_run_completes(
    train, whole, tmp_path, capsys
) -> None:
    assert train("out", "--until", "2") == 0
    before = files(tmp_path / "out")
    with files_of_at_most(50_000):
        assert train("out") == 1
    said = capsys.readouterr().err
    assert f"{STATE_NAME} cannot be written at step {STEPS} (File too large)" in said
    assert "the state of step 2 is kept" in said
    assert files(tmp_path / "out") == before
    assert train("out") == 0
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.parametrize("size", [0, 500, 50_000])
def test_an_export_onto_a_full_disk_is_made_again(train, whole, tmp_path, capsys, size) -> None:
    shutil.copytree(whole, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    with files_of_at_most(size):
        assert train("out") == 1
    assert f"the state of step {STEPS} is kept" in capsys.readouterr().err
    assert train("out") == 0
    assert files(tmp_path / "out") == files(whole)


def stamps(directory: Path) -> dict[str, tuple[int, int]]:
    return {
        path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in directory.iterdir()
    }


def test_a_finished_run_is_up_to_date_only_while_every_file_is_as_recorded(
    train, whole, tmp_path, capsys
) -> None:
    before = stamps(whole)
    bytes_before = files(whole)
    capsys.readouterr()
    assert train("whole") == 0
    assert "is up to date" in capsys.readouterr().out
    assert stamps(whole) == before
    for number, name in enumerate(EXPORTED):
        path = whole / name
        damaged = path.read_bytes()[:-1]
        path.unlink()
        if number % 2:
            path.write_bytes(damaged)
        assert train("whole") == 0
        out, said = capsys.readouterr()
        assert "is up to date" not in out
        assert f"{name} {'has' if number % 2 else 'is missing'}" in said
        assert files(whole) == bytes_before
    data = bytearray((whole / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (whole / "model.safetensors").write_bytes(data)
    assert train("whole") == 0
    assert "model.safetensors has other bytes: made again" in capsys.readouterr().err
    assert files(whole) == bytes_before
    os.utime(whole / "model.safetensors", ns=(1, 1))
    assert train("whole") == 0
    assert "is up to date" in capsys.readouterr().out


def test_another_precision_is_written_from_the_state(train, whole, capsys) -> None:
    assert train("whole", "--precision", "float32") == 0
    assert "checkpoint and loss.png written" in capsys.readouterr().out.replace("\n", " ")
    assert json.loads((whole / "config.json").read_text())["torch_dtype"] == "float32"
    assert json.loads((whole / "training.json").read_text())["steps"] == STEPS


CHANGES = {
    "rows.jsonl": (
        "three",
        "four",
        "another content of --data (it was rows.jsonl, 9 rows; it is rows.jsonl, 9 rows);",
    ),
    "tokenizer_config.json": ("{", "{ ", "another content of --tokenizer;"),
    "config.json": ('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05', "config.rms_norm_eps"),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("has_state", [True, False])
def test_a_changed_input_is_named(train, whole, inputs, capsys, name, has_state) -> None:
    path = inputs / name
    old, new, said = CHANGES[name]
    changed = path.read_text().replace(old, new, 1)
    assert changed != path.read_text()
    path.write_text(changed)
    if not has_state:
        (whole / STATE_NAME).unlink()
    before = files(whole)
    assert train("whole") == 1
    assert f"belongs to a run with {said} " in capsys.readouterr().err
    assert files(whole) == before


@pytest.mark.parametrize("has_state", [True, False])
def test_weights_to_start_from_are_given_to_all_parts_of_a_run_or_to_none(
    train, whole, finished, capsys, has_state
) -> None:
    tuned = whole.with_name("tuned")
    assert train("tuned", "--initial", str(finished), "--steps", "1") == 0
    longer = (*("--initial", str(finished)), *("--steps", str(STEPS + 1)))
    for run, more, said in (
        ("whole", longer, "a run without --initial; leave it out to resume the run, or give"),
        ("tuned", (), "a run with --initial, which is left out; give it to resume the run, or"),
    ):
        directory = whole.with_name(run)
        if not has_state:
            (directory / STATE_NAME).unlink()
        before = files(directory)
        assert train(run, *more) == 1
        assert said in capsys.readouterr().err
        assert files(directory) == before
    if has_state:
        assert train("tuned", *longer) == 0
        assert json.loads((tuned / "training.json").read_text())["steps"] == STEPS + 1


def test_a_directory_with_another_checkpoint_is_not_written_into(train, whole, capsys) -> None:
    for name in (STATE_NAME, "training.json"):
        (whole / name).unlink()
    before = stamps(whole)
    assert train("whole") == 1
    assert (
        "a checkpoint (model.safetensors) that no training has written" in capsys.readouterr().err
    )
    assert stamps(whole) == before


def test_nothing_is_made_beside_a_checkpoint_that_no_training_has_written(tmp_path, capsys) -> None:
    """Not even the tokenizer of a model from nothing."""
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    assert main(["train", str(tmp_path), "--family", "minimind", "--size", "tiny"]) == 1
    assert "that no training has written; choose another directory" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("command", ["train", "tokenizer", "corpus"])
@pytest.mark.parametrize("inside", ["", "folder"])
def test_a_file_where_the_output_is_to_be_is_named(tmp_path, capsys, command, inside) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("mine")
    assert main([command, str(path / inside)]) == 1
    said = capsys.readouterr().err
    assert said == f"error: {path} is no directory; choose another place for the output\n"
    assert path.read_text() == "mine"


def test_what_a_killed_run_left_half_written_goes(train, whole, tmp_path) -> None:
    shutil.copytree(whole, tmp_path / "out")
    for name in (*EXPORTED, STATE_NAME, "training.json"):
        (tmp_path / "out" / (name + PARTIAL_SUFFIX)).write_bytes(b"half")
    (tmp_path / "out/training.json").write_text("{")
    assert train("out") == 0
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.parametrize(
    "line",
    [
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": ' + b"[" * 100_000,
        b'{"text": 1}',
        b'{"text": null, "messages": null}',
        b'{"messages": "hello"}',
        b'{"messages": [1]}',
        b'{"messages": [{"role": 1, "content": "x"}]}',
        b'{"messages": [{"role": "user", "content": 1}]}',
        b'{"messages": [], "tools": {}}',
        b'{"messages": [], "tools": [1]}',
        b"[]",
        b"\0",
        b'{"text": "' + b"x" * LINE_BYTES + b'"}',
    ],
    ids=lambda line: repr(line[:30]),
)
def test_a_row_that_is_none_is_named_by_its_line(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(TrainingError, match=r"rows\.jsonl line 3 "):
        JsonLines.read(path)


def test_only_a_regular_file_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(TrainingError, match=r"rows\.jsonl cannot be read: it is no regular file"):
        JsonLines.read(tmp_path / "rows.jsonl")


def test_messages_that_a_template_refuses_are_named_by_their_line(train, inputs, capsys) -> None:
    refused = [{"role": "developer", "content": [1]}, {"role": "assistant", "content": "x"}]
    rows = [{"text": "one"}, {"messages": refused}]
    (inputs / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{% if messages[0].role == 'developer' %}{{ 1 / 0 }}{% endif %}"
    template += "{{ 'ai' if add_generation_prompt }}"
    (inputs / "chat_template.jinja").write_text(template)
    assert train("out") == 1
    said = capsys.readouterr().err
    assert "rows.jsonl line 2: the tokenizer's chat template cannot render" in said


OPTIONS = TrainingOptions(steps=6, batch_size=2, max_tokens=64, warmup_steps=2)


@pytest.fixture
def make_trainer(inputs: Path, tmp_path: Path) -> Callable[..., Trainer]:
    encoder = Encoder(load_tokenizer(inputs), 64)
    config = ModelConfig.from_dir(inputs)

    def make(options: TrainingOptions = OPTIONS) -> Trainer:
        return Trainer(
            config=config,
            options=options,
            source=encode_rows(JsonLines.read(inputs / "rows.jsonl"), encoder, DataOptions()),
            encoder=encoder,
            directory=tmp_path / "run",
            save_every=1,
        )

    return make


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_state(make_trainer, tmp_path) -> None:
    trainer = make_trainer()
    list(trainer.run(2))
    before = (tmp_path / "run" / STATE_NAME).read_bytes()
    with torch.no_grad():
        next(trainer.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"step 3: the loss is nan .* of step 2 stays"):
        list(trainer.run())
    assert (tmp_path / "run" / STATE_NAME).read_bytes() == before
    assert make_trainer().step == 2


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_neither_saved_nor_resumed(
    make_trainer, tmp_path, value
) -> None:
    trainer = make_trainer()
    list(trainer.run(2))
    path = tmp_path / "run" / STATE_NAME
    before = path.read_bytes()
    with torch.no_grad():
        trainer.optimizer.state[next(trainer.model.parameters())]["exp_avg"][0] = value
    with pytest.raises(TrainingError, match="exp_avg of parameter 0 is not finite; the state of"):
        trainer.save()
    assert path.read_bytes() == before
    contents = torch.load(path, weights_only=True)
    contents["model"][next(iter(contents["model"]))][0] = value
    torch.save(contents, path)
    with pytest.raises(TrainingError, match="that is not finite"):
        make_trainer()


class Planting:
    """An object whose unpickling runs a command."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def damages(contents: dict[str, Any]) -> dict[str, Any]:
    """States that are not what they should be, by what is wrong."""
    first = next(iter(contents["model"]))
    optimizer = contents["optimizer"]

    def moments(number: int, **fields: Any) -> dict[str, Any]:
        kept = {**optimizer["state"], number: {**optimizer["state"][number], **fields}}
        return {**contents, "optimizer": {**optimizer, "state": kept}}

    return {
        "no dict": [1],
        "a tensor": torch.zeros(3),
        "empty": {},
        "options": {**contents, "options": 3},
        "no options": {**contents, "options": {}},
        "config": {**contents, "options": {**contents["options"], "config": [1]}},
        "step": {**contents, "step": True},
        "step of text": {**contents, "step": "2"},
        "negative step": {**contents, "step": -1, "history": []},
        "history": {**contents, "history": [1.0]},
        "history of text": {**contents, "history": ["1.0", "2.0"]},
        "a tensor more": {**contents, "model": {**contents["model"], "x": torch.zeros(1)}},
        "another dtype": {
            **contents, "model": {**contents["model"], first: contents["model"][first].half()}
        },
        "another shape": {
            **contents, "model": {**contents["model"], first: contents["model"][first][:-1]}
        },
        "no tensor": {**contents, "model": {**contents["model"], first: [0.0]}},
        "model": {**contents, "model": None},
        "no optimizer": {name: value for name, value in contents.items() if name != "optimizer"},
        "optimizer": {**contents, "optimizer": {"state": {}, "param_groups": []}},
        "moment": moments(0, exp_avg=torch.zeros(1)),
        "moment of text": moments(0, exp_avg_sq="x"),
        "moment's step": moments(0, step=3),
        "random state": {**contents, "random_state": torch.zeros(5, dtype=torch.uint8)},
    }  # fmt: skip


def test_a_damaged_state_is_one_error_and_runs_no_code(make_trainer, tmp_path) -> None:
    trainer = make_trainer()
    list(trainer.run(2))
    saved = trainer.model.state_dict()
    path = tmp_path / "run" / STATE_NAME
    data = path.read_bytes()
    for what, contents in damages(torch.load(path, weights_only=True)).items():
        torch.save(contents, path)
        with pytest.raises(TrainingError, match=r"training_state\.pt (cannot|belongs)"):
            pytest.fail(f"{what}: step {make_trainer().step}")
    planted = tmp_path / "planted"
    torch.save({"step": 1, "options": Planting(planted)}, path)
    with pytest.raises(TrainingError, match="cannot be read"):
        make_trainer()
    path.write_bytes(pickle.dumps(Planting(planted)))
    with pytest.raises(TrainingError, match="cannot be read"):
        make_trainer()
    assert not planted.exists()
    for size in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(TrainingError, match="cannot be read"):
            make_trainer()
    for place in range(0, len(data) - 22, len(data) // 50):  # the last 22 bytes end the archive
        path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        try:
            resumed = make_trainer().model.state_dict()
        except TrainingError:
            continue
        assert all(torch.equal(tensor, saved[name]) for name, tensor in resumed.items()), place
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(TrainingError, match="cannot be read"):
        make_trainer()


def test_a_state_of_a_version_that_recorded_no_inputs_is_resumed(make_trainer, tmp_path) -> None:
    list(make_trainer().run(2))
    trainer = make_trainer()
    trainer.inputs = {"data_sha256": "0" * 64}
    assert "data_sha256" in trainer.identity()
    resumed = Trainer(**{**vars_of(trainer), "inputs": {"data_sha256": "0" * 64}})
    assert resumed.step == 2


def vars_of(trainer: Trainer) -> dict[str, Any]:
    names = ("config", "options", "source", "encoder", "directory")
    return {name: getattr(trainer, name) for name in names}
