"""What a run keeps while it trains: several states, of which one is chosen to go on from; a longer
run than was asked for at first; the curve, training.json, held-out losses and samples on the way.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.training import results
from neuron_minimax.training.data.encoding import Encoder, pad
from neuron_minimax.training.data.rows import parse_row
from neuron_minimax.training.data.sequences import Sequences
from neuron_minimax.training.data.sources import JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.objective import losses
from neuron_minimax.training.options import Schedule, TrainingOptions
from neuron_minimax.training.state import STATE_NAME, differences, kept_steps
from tests.test_training_endings import run, write_inputs


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    return write_inputs(tmp_path / "inputs")


@pytest.fixture
def train(inputs: Path, tmp_path: Path) -> Callable[..., int]:
    return lambda name, *more: run(inputs, tmp_path / name, *more)


def summary(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "training.json").read_text())


def state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def test_the_last_states_stay_and_each_is_gone_on_from(train, tmp_path, capsys) -> None:
    arguments = ("--save-every", "1", "--keep", "3")
    assert train("out", *arguments) == 0
    assert kept_steps(tmp_path / "out") == [3, 4]
    whole = state(tmp_path / "out" / STATE_NAME)
    for step in (3, 4):
        kept = state(tmp_path / "out" / f"training_state.{step}.pt")
        assert (kept["step"], kept["history"]) == (step, whole["history"][:step])
    assert train("out", *arguments, "--from-step", "3") == 0
    again = state(tmp_path / "out" / STATE_NAME)
    assert again["history"] == whole["history"]
    assert all(torch.equal(t, again["model"][name]) for name, t in whole["model"].items())
    assert kept_steps(tmp_path / "out") == [3, 4]
    capsys.readouterr()
    assert train("out", *arguments, "--from-step", "1") == 1
    assert "has no state of step 1; expected one of 3, 4, 5" in capsys.readouterr().err


def test_a_chosen_state_goes_on_with_other_options_and_says_so(train, tmp_path, capsys) -> None:
    arguments = ("--save-every", "1", "--keep", "3", "--learning-rate", "1e-3")
    assert train("out", *arguments) == 0
    capsys.readouterr()
    changed = (*arguments[:-1], "5e-4")
    assert train("out", *changed) == 1
    assert "belongs to a run with learning_rate 0.001, not 0.0005" in capsys.readouterr().err
    before = state(tmp_path / "out/training_state.3.pt")
    assert train("out", *changed, "--from-step", "3") == 0
    after = state(tmp_path / "out/training_state.3.pt")
    assert after["history"] == before["history"]
    assert all(torch.equal(t, after["model"][name]) for name, t in before["model"].items())
    assert "learning_rate 0.0005 from step 4 on, 0.001 before" in capsys.readouterr().err
    wanted = [{"step": 3, "name": "learning_rate", "before": 0.001, "after": 0.0005}]
    assert summary(tmp_path / "out")["changes"] == wanted
    assert state(tmp_path / "out" / STATE_NAME)["changes"] == wanted
    assert train("out", *changed) == 0
    assert "up to date" in capsys.readouterr().out
    assert train("out", *changed, "--seed", "1", "--from-step", "3") == 1
    assert "belongs to a run with seed 0, not 1" in capsys.readouterr().err


def test_what_lies_behind_a_chosen_state_goes_when_the_run_has_gone_on(train, tmp_path) -> None:
    arguments = ("--save-every", "1", "--keep", "4")
    assert train("out", *arguments) == 0
    assert train("out", *arguments, "--from-step", "3", "--until", "4") == 0
    assert state(tmp_path / "out" / STATE_NAME)["step"] == 4
    assert kept_steps(tmp_path / "out") == [2, 3]


def test_states_of_an_interrupted_run_are_those_of_one_that_was_not(train, tmp_path) -> None:
    arguments = ("--save-every", "2", "--keep", "2")
    assert train("whole", *arguments) == 0
    for step in ("1", "3", "4", "5"):
        assert train("parts", *arguments, "--until", step) == 0
    assert kept_steps(tmp_path / "whole") == kept_steps(tmp_path / "parts") == [4]
    for name in (STATE_NAME, "training_state.4.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


def test_one_state_is_kept_where_asked_for(train, tmp_path) -> None:
    assert train("out", "--save-every", "1", "--keep", "1") == 0
    assert kept_steps(tmp_path / "out") == []


def test_a_finished_run_is_lengthened_with_a_schedule_of_its_new_length(
    train, tmp_path, capsys
) -> None:
    arguments = ("--warmup-steps", "2")
    assert train("out", *arguments) == 0
    before = summary(tmp_path / "out")
    capsys.readouterr()
    assert train("out", *arguments, "--steps", "9") == 0
    said = capsys.readouterr().err
    assert "steps 9 from step 6 on, 5 before" in said
    after = summary(tmp_path / "out")
    assert after["steps"] == len(after["losses"]) == 9
    assert after["losses"][:5] == before["losses"]
    change = {"step": 5, "name": "steps", "before": 5, "after": 9}
    assert after["changes"] == [change]
    options = TrainingOptions(steps=9, warmup_steps=2)
    found = state(tmp_path / "out" / STATE_NAME)
    wanted = options.learning_rate * Schedule(options).share(8)
    assert found["optimizer"]["param_groups"][0]["lr"] == pytest.approx(wanted)
    assert train("out", *arguments, "--steps", "9") == 0
    assert "up to date" in capsys.readouterr().out
    assert train("out", *arguments) == 1
    assert "belongs to a run with steps 9, not 5" in capsys.readouterr().err


def test_a_finished_run_is_lengthened_by_epochs_and_resumed_to_the_bit(
    inputs, tmp_path, capsys
) -> None:
    def train(name: str, epochs: int, *more: str) -> int:
        arguments = ["--config", str(inputs), "--tokenizer", str(inputs), "--batch-size", "4"]
        arguments += ["--warmup-steps", "2", "--data", str(inputs / "rows.jsonl"), *more]
        return main(["train", str(tmp_path / name), *arguments, "--epochs", str(epochs)])

    for name in ("whole", "parts"):  # 9 rows: the third step has one
        assert train(name, 1) == 0
    capsys.readouterr()
    assert train("whole", 2) == 0
    said = capsys.readouterr().err
    assert "epochs 2 from step 4 on, 1 before" in said
    assert "steps 5 from step 4 on, 3 before" in said
    assert train("parts", 2, "--until", "4") == 0
    assert train("parts", 2) == 0
    assert summary(tmp_path / "whole")["losses"] == summary(tmp_path / "parts")["losses"]
    weights = (tmp_path / "whole/model.safetensors").read_bytes()
    assert (tmp_path / "parts/model.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert train("whole", 2) == 0
    assert "is up to date: 5 steps" in capsys.readouterr().out
    assert train("whole", 1) == 1
    assert "belongs to a run with epochs 2, not 1" in capsys.readouterr().err


def test_a_state_of_an_earlier_version_has_its_epochs_in_the_name_of_its_source() -> None:
    now = {"source": "rows.jsonl, 1 row", "epochs": 3, "steps": 1, "config": {}}
    then = {"source": "rows.jsonl, 1 rows, 3 epochs", "steps": 1, "config": {}}
    assert differences(then, now) == []
    [change] = differences(then, {**now, "epochs": 4})
    assert (change.name, change.before, change.after) == ("epochs", 3, 4)


def test_a_state_of_an_earlier_version_says_not_whether_it_began_from_a_checkpoint() -> None:
    then = {"config": {}}
    assert differences(then, {**then, "initial_fingerprint": ""}) == []
    assert differences(then, {**then, "initial_fingerprint": "a"}) == []


def test_a_lengthened_run_is_resumed_to_the_bit(train, tmp_path) -> None:
    longer = ("--warmup-steps", "2", "--steps", "8")
    for name in ("whole", "parts"):
        assert train(name, "--warmup-steps", "2") == 0
    assert train("whole", *longer) == 0
    assert train("parts", *longer, "--until", "6") == 0
    assert train("parts", *longer) == 0
    assert summary(tmp_path / "whole")["losses"] == summary(tmp_path / "parts")["losses"]
    whole, parts = (state(tmp_path / name / STATE_NAME)["model"] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


def test_training_json_and_the_curve_are_written_at_every_save(
    train, tmp_path, monkeypatch
) -> None:
    seen = []
    example = Sequences.example

    def looking(self: Sequences, index: int) -> Any:
        path = tmp_path / "out/training.json"
        if index >= 2 and index % 2 == 0 and path.exists():
            found = summary(tmp_path / "out")
            curve = (tmp_path / "out/loss.png").read_bytes()
            seen.append((found["steps"], len(found["losses"]), found["files"], curve[:4]))
        return example(self, index)

    monkeypatch.setattr(Sequences, "example", looking)
    assert train("out", "--save-every", "2") == 0
    assert next(each for each in seen if each[0] == 2) == (2, 2, {}, b"\x89PNG")
    assert next(each for each in seen if each[0] == 4) == (4, 4, {}, b"\x89PNG")
    assert set(summary(tmp_path / "out")["files"]) >= {"model.safetensors", "loss.png"}


def test_a_loss_that_is_no_number_is_null_in_training_json(tmp_path) -> None:
    assert results._rounded(float("nan")) is None
    assert results._rounded(float("inf")) is None
    assert results._rounded(1.234567) == 1.23457
    losses = [2.0, float("nan"), 1.0]
    results.plot_losses(losses, tmp_path / "loss.png", [(1, 2.5), (3, 1.5)])
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_greedy_replies_through_the_chat_template(train, tmp_path, capsys) -> None:
    arguments = ("--precision", "float32", "--sample", "one two", "--sample-every", "5")
    assert train("out", *arguments) == 0
    said = capsys.readouterr().err
    (line,) = [each for each in said.splitlines() if "sample" in each]
    assert line.startswith("step 5  sample 'one two' -> ")
    # What a model that others load from the checkpoint says.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    asked = [{"role": "user", "content": "one two"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    end = tokenizer.eos_token_id
    options = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": end, "use_mtp": False}
    reply = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    wanted = tokenizer.decode(reply[0, ids.shape[1] :], skip_special_tokens=True)
    assert line.removeprefix("step 5  sample 'one two' -> ") == repr(wanted)


@pytest.mark.parametrize(
    ("more", "wanted"), [((), [5]), (("--sample-every", "3"), [3, 5])], ids=["default", "3"]
)
def test_a_run_ends_with_a_sample_however_short_it_is(train, capsys, more, wanted) -> None:
    assert train("out", "--sample", "one two", *more) == 0
    said = re.findall(r"^step (\d+)  sample ", capsys.readouterr().err, re.MULTILINE)
    assert [int(step) for step in said] == wanted


def test_a_file_system_without_links_is_an_error_with_a_way_out(
    train, tmp_path, monkeypatch, capsys
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert train("out", "--save-every", "2") == 1
    assert "--keep 1 keeps the last state alone" in capsys.readouterr().err
    assert state(tmp_path / "out" / STATE_NAME)["step"] == 2
    assert train("out", "--save-every", "2", "--keep", "1") == 0


def test_the_loss_on_held_out_rows_is_taken_on_the_way(train, inputs, tmp_path, capsys) -> None:
    """Against the mean over the same rows, one by one, of the model that was written."""
    arguments = ("--held-out", "0.3", "--evaluate-every", "2", "--precision", "float32")
    assert train("out", *arguments) == 0
    said = capsys.readouterr().err
    found = summary(tmp_path / "out")["evaluation_losses"]
    assert list(found) == ["2", "4", "5"]
    assert f"step 5/5  held-out loss {found['5']:.4f}" in said
    tokenizer = load_tokenizer(inputs)
    encoder = Encoder(tokenizer, 64)
    _, held_out = JsonLines.read(inputs / "rows.jsonl").split(0.3)
    model = Decoder.from_checkpoint(Checkpoint(tmp_path / "out"))
    total = 0.0
    count = 0
    for row in held_out.rows:
        for example in encoder.encode(row).examples:
            with torch.no_grad():
                choices = model(torch.tensor([example.ids]))[0][0].log_softmax(-1)
            for place in range(1, len(example.ids)):
                if example.learned[place]:
                    total -= float(choices[place - 1, example.ids[place]])
                    count += 1
    assert found["5"] == pytest.approx(total / count, abs=2e-5)
    assert state(tmp_path / "out" / STATE_NAME)["evaluations"][-1][0] == 5


def test_a_state_of_an_earlier_version_is_gone_on_from(train, tmp_path) -> None:
    """One that knew no families, no FP16, no skipped steps, and called the balance loss's weight
    by another name, for the mean over layers.
    """
    assert train("whole") == 0
    assert train("parts", "--until", "3") == 0
    path = tmp_path / "parts" / STATE_NAME
    contents = state(path)
    options = contents["options"]
    layers = options["config"]["num_hidden_layers"]
    options["balance_coefficient"] = options.pop("aux_loss_alpha") * layers
    for name in ("seq_aux", "fp16"):
        del options[name]
    for name in ("family", "dense_layers", "dense_intermediate_size"):
        del options["config"][name]
    for name in ("skipped", "overflows", "evaluations", "changes", "scaler"):
        del contents[name]
    torch.save(contents, path)
    (tmp_path / "parts/training.json").unlink()
    assert train("parts") == 0
    assert summary(tmp_path / "parts")["losses"] == summary(tmp_path / "whole")["losses"]
    assert summary(tmp_path / "parts")["changes"] == []


def test_an_fp8_export_is_trained_on_with_chats(train, inputs, tmp_path) -> None:
    """With its own config and tokenizer; the first loss is that of the FP8 model, not of a fresh
    one or of the codes.
    """
    assert train("first", "--steps", "12", "--learning-rate", "5e-3", "--warmup-steps", "2") == 0
    first = Checkpoint(tmp_path / "first")
    assert any(first.is_fp8(name) for name in first.specs)
    turns = [
        {"role": "user", "content": "one two three?"},
        {"role": "assistant", "content": "one two three one two three one two three"},
    ]
    chats = tmp_path / "chats.jsonl"
    chats.write_text(json.dumps({"messages": turns}) + "\n")
    arguments = ["--data", str(chats), "--initial", str(tmp_path / "first"), "--steps", "3"]
    arguments += ["--batch-size", "1", "--max-tokens", "128", "--warmup-steps", "0"]
    assert main(["train", str(tmp_path / "second"), *arguments]) == 0
    found = summary(tmp_path / "second")["losses"]
    encoder = Encoder(load_tokenizer(inputs), 128)
    batch = pad(list(encoder.encode(parse_row({"messages": turns}, "")).examples))
    model = Decoder.from_checkpoint(first)
    with torch.no_grad():
        wanted = float(losses(model, batch).tokens) / int(batch.learned_BT.sum())
    assert found[0] == pytest.approx(wanted, rel=1e-3)
    assert found[2] < found[0]
    assert (tmp_path / "second/tokenizer.json").exists()
