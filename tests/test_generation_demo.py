"""The demo script on a tiny checkpoint of random weights: every stage runs, a second run reuses,
faults stop it.
"""

import io
import json

import pytest

import generation_demo
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
    }
]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    base = tmp_path_factory.mktemp("demo")
    checkpoint = write_tiny(write_tokenizer(base / "checkpoint", 384), vocab_size=384)
    return [
        "--checkpoint",
        str(checkpoint),
        "--traced-model-dir",
        str(base / "traced"),
        "--engine",
        "eager",
    ]


def run(capsys, *arguments):
    code = generation_demo.main([*arguments, "--seq-len", "256", "--max-new-tokens", "8"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_stage_runs_and_a_second_run_reuses_them(arguments, capsys):
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    for words in (
        "Usable as it is",
        "FP8 scales converted: 56",
        "39 tensors equal their 127 sources",
        "all done in",
    ):
        assert words in out
    assert out.count("user | ") == 3
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.count("is up to date") == 2
    assert "verify: done when it was converted" in out


def test_skip_compile_needs_nothing_but_the_compiled_directory(arguments, capsys):
    run(capsys, *arguments)
    code, out, _ = run(
        capsys, "--checkpoint", "absent", *arguments[2:], "--skip-compile", "--prompt", "hello"
    )
    assert code == 0
    assert "convert" not in out
    assert out.count("user | ") == 1


def test_chat_remembers_resets_and_takes_tool_results(arguments, capsys, monkeypatch, tmp_path):
    run(capsys, *arguments)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nmore\n/reset\nagain\n"))
    code, out, _ = run(
        capsys, *arguments, "--skip-compile", "--chat", "--tools", str(tmp_path / "tools.json")
    )
    assert code == 0
    assert out.count("you> ") == 6
    assert out.count("(a new conversation)") == 1


def test_a_bad_checkpoint_stops_with_one_message(tmp_path, capsys):
    code, _, err = run(
        capsys, "--checkpoint", str(tmp_path / "absent"), "--traced-model-dir", str(tmp_path / "t")
    )
    assert code == 1
    assert err.startswith("error: ")
    assert "absent" in err
    bad = write_tiny(tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(b"")
    code, _, err = run(capsys, "--checkpoint", str(bad), "--traced-model-dir", str(tmp_path / "t"))
    assert code == 1
    assert "model.safetensors" in err
    assert not (tmp_path / "t").exists()


def test_a_model_that_repeats_itself_is_not_passed_over(arguments, capsys, monkeypatch):
    run(capsys, *arguments)
    monkeypatch.setattr(generation_demo, "SMOKE_RATIO", 1.1)
    code, _, err = run(capsys, *arguments, "--skip-compile")
    assert code == 1
    assert "repetition" in err
