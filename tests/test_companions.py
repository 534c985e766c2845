"""Small files that are absent, cut off or of another model are found before hours of work."""

import json

import pytest

import neuron_minimax as nm
from neuron_minimax.errors import CheckpointError
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
