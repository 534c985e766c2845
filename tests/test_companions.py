"""Small files that are absent, cut off or of another model are found before hours of work."""

import json

import pytest

import neuron_minimax as nm
from neuron_minimax.errors import CheckpointError, GenerationError
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer


@pytest.fixture
def source(tmp_path):
    write_tokenizer(tmp_path / "source")
    write_tiny(tmp_path / "source", vocab_size=384)
    (tmp_path / "source" / "generation_config.json").write_text('{"eos_token_id": 1}')
    return tmp_path / "source"


def errors(source):
    findings = nm.Checkpoint.open(source).inspect().findings
    return [each for each in findings if each.severity == "error"]


def test_whole_ones_are_no_finding_and_come_along(source, tmp_path):
    report = nm.Checkpoint.open(source).inspect()
    assert [each for each in report.findings if each.kind == "tokenizer"] == []
    converted = nm.plan_conversion(nm.Checkpoint.open(source)).write(tmp_path / "out")
    assert "tokenizer.json" not in converted.render()
    assert "tokenizer.json" in converted.files


def test_an_absent_tokenizer_is_a_warning_of_inspect_and_a_line_of_convert(source, tmp_path):
    (source / "tokenizer.json").unlink()
    report = nm.Checkpoint.open(source).inspect()
    (found,) = [each for each in report.findings if each.kind == "tokenizer"]
    assert found.severity == "warning"
    converted = nm.plan_conversion(nm.Checkpoint.open(source)).write(tmp_path / "out")
    assert found.message in converted.render()


CHANGES = {
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no object": lambda data: b"[]",
    "no text": lambda data: b"\xff\xfe" + data,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_damaged_one_is_an_error_of_inspect_and_refused_by_convert(source, name, change):
    path = source / name
    path.write_bytes(CHANGES[change](path.read_bytes()))
    (found,) = [
        each for each in nm.Checkpoint.open(source).inspect().findings if str(path) in each.message
    ]
    assert (found.severity, found.subject) == ("error", name)
    with pytest.raises(CheckpointError, match=name):
        nm.plan_conversion(nm.Checkpoint.open(source))


WRONG = {
    "a text": ({"temperature": "0.7"}, "temperature"),
    "no penalty's": ({"repetition_penalty": 0}, "repetition_penalty is 0.0; expected a number"),
    "no share": ({"top_p": 1.5}, "top_p is 1.5; expected a number above 0 up to 1"),
    "no count": ({"top_k": -2}, "top_k"),
    "no token": ({"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_could_not_be_sampled_with_is_refused_before_the_conversion(source, name):
    fields, words = WRONG[name]
    path = source / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 1} | fields))
    (found,) = errors(source)
    assert words in found.message
    assert str(path) in found.message
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        nm.plan_conversion(nm.Checkpoint.open(source))
    with pytest.raises(GenerationError, match=r"generation_config\.json"):  # after a compile
        TextTokenizer.from_dir(source)


OFF = {
    "top_k -1": {"top_k": -1},
    "top_k 0": {"top_k": 0},
    "nulls": {"top_k": None, "top_p": None, "temperature": None, "repetition_penalty": None},
    "whole shares": {"top_p": 1, "min_p": 0, "repetition_penalty": 1},
    "greedy": {"do_sample": False, "temperature": 0, "top_p": 0, "top_k": -1},
}


@pytest.mark.parametrize("name", OFF)
def test_every_spelling_of_off_is_taken(source, name):
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": 1} | OFF[name]))
    assert errors(source) == []
    assert TextTokenizer.from_dir(source).stop_token_ids[0] == 1


def test_an_absent_chat_template_is_a_warning_of_inspect_and_a_line_of_convert(source, tmp_path):
    template = (source / "chat_template.jinja").read_text()
    (source / "chat_template.jinja").unlink()
    report = nm.Checkpoint.open(source).inspect()
    (found,) = [each for each in report.findings if each.kind == "tokenizer"]
    assert (found.severity, found.subject) == ("warning", "chat_template.jinja")
    converted = nm.plan_conversion(nm.Checkpoint.open(source)).write(tmp_path / "out")
    assert found.message in converted.render()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["chat_template"] = template  # where earlier versions have it
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    report = nm.Checkpoint.open(source).inspect()
    assert [each for each in report.findings if each.kind == "tokenizer"] == []


def test_a_pointer_of_git_lfs_is_named_as_such(source):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
    (source / "tokenizer.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"Git LFS has not fetched \(tokenizer.json\)"):
        nm.Checkpoint.open(source)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(source):
    path = source / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"].append({**fields["added_tokens"][-1], "id": 384, "content": "more"})
    path.write_text(json.dumps(fields))
    (found,) = errors(source)
    assert "has token 384, but the model has vocab_size 384" in found.message
    with pytest.raises(CheckpointError, match="has token 384"):
        nm.plan_conversion(nm.Checkpoint.open(source))
