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
        *("--engine", "eager"),
        *("--seq-len", "256"),
    ]


def run(capsys, *arguments):
    code = generation_demo.main(["--max-new-tokens", "8", *arguments])
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
    assert out.count("you> ") == 3
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert out.count("is up to date") == 2
    assert "verify: done by an earlier run" in out


def test_skip_compile_needs_nothing_but_the_compiled_directory(arguments, capsys):
    run(capsys, *arguments)
    code, out, _ = run(
        capsys, "--checkpoint", "absent", *arguments[2:4], "--skip-compile", "--prompt", "hello"
    )
    assert code == 0
    assert "convert" not in out
    assert out.count("you> ") == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--tools", "nosuch.json"], 1, "nosuch.json does not exist"),
        (["--seed", str(2**64)], 2, "seed is "),
        (["--no-thinking"], 1, "no switch for thinking"),
        (["--max-new-tokens", "0"], 2, "--max-new-tokens is 0; expected at least 1"),
        (["--chat", "--prompt", "hello"], 2, "--prompt and --chat exclude each other"),
        *(
            (["--skip-compile", *option.split()], 2, f"{option.split()[0]} is of compiling")
            for option in (
                "--force",
                "--copy-weights",
                "--attention fp8",
                "--backend cpu",
                "--engine eager",
                "--instance trn2.48xlarge",
                "--tp-degree 64",
                "--moe-tp-degree 1",
                "--moe-ep-degree 64",
                "--blockwise-matmul torch",
                "--expert-kernel torch",
                "--allow-untested-versions",
                "--batch-size 1",
                "--seq-len 256",
                "--buckets 128",
            )
        ),
    ],
)
def test_what_cannot_be_used_is_one_message_before_anything_is_made(
    options, code, words, arguments, capsys, tmp_path
):
    place = str(tmp_path / "new")
    found, _, err = run(capsys, *arguments[:2], "--traced-model-dir", place, *options)
    (line,) = err.splitlines()
    assert (found, words in line) == (code, True)
    assert list(tmp_path.iterdir()) == []


def test_chat_remembers_resets_and_takes_tool_results(arguments, capsys, monkeypatch, tmp_path):
    run(capsys, *arguments)
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nmore\n/reset\nagain\n"))
    code, out, err = run(
        capsys, *arguments[:4], "--skip-compile", "--chat", "--tools", str(tmp_path / "tools.json")
    )
    assert code == 0
    assert out.count("you> ") == 5
    assert err.count("(a new conversation)") == 1


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
    code, _, err = run(capsys, *arguments[:4], "--skip-compile")
    assert code == 1
    assert "repetition" in err
