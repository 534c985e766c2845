"""The command line: exit codes, one message on standard error, and what its commands print."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import neuron_minimax
from neuron_minimax.backends.cpu.options import COMPUTE, ENGINES
from neuron_minimax.backends.directory import BACKENDS
from neuron_minimax.backends.torch_neuron.options import DEVICES
from neuron_minimax.cli import main
from neuron_minimax.convert.cache import DTYPES
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range
from neuron_minimax.device_check.check import CHECKED
from neuron_minimax.fp8 import ConventionChoice
from neuron_minimax.planner.blockwise import BLOCKWISE_MATMULS
from neuron_minimax.planner.memory import EXPERT_KERNELS
from neuron_minimax.studies.experts.batch import RECORD_FORMATS
from neuron_minimax.training.command import Precision
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """checkpoint, converted, traced (eager) of one tiny model, and the float32 twin of the
    checkpoint.
    """
    base = tmp_path_factory.mktemp("cli")
    write_tiny(base / "ckpt", shards=2)
    write_tiny(base / "twin", dense=True)
    assert main(["convert", str(base / "ckpt"), str(base / "out"), "--fp8-range", "ocp"]) == 0
    compiled = [
        "compile",
        str(base / "out"),
        str(base / "traced"),
        "--engine",
        "eager",
        "--seq-len",
        "64",
    ]
    assert main([*compiled, "--buckets", "16,64"]) == 0
    return base


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_version_is_the_package_s_under_both_names_of_the_command(capsys):
    version = f"neuron-minimax {neuron_minimax.__version__}\n"
    assert run(capsys, "--version") == (0, version, "")
    command = [sys.executable, "-m", "neuron_minimax", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == version


def test_inspect_exits_0_on_a_good_checkpoint_and_1_on_a_bad_one(traced, tmp_path, capsys):
    code, out, _ = run(capsys, "inspect", traced / "ckpt", "--json")
    assert code == 0
    assert json.loads(out)["usable"] is True
    bad = write_tiny(tmp_path / "bad", shards=2)
    (bad / "model-00002-of-00002.safetensors").unlink()
    code, out, _ = run(capsys, "inspect", bad)
    assert code == 1
    assert "model-00002-of-00002.safetensors" in out


def test_convert_says_how_many_scales_and_recognizes_its_own_output(traced, capsys):
    code, out, _ = run(capsys, "convert", traced / "ckpt", traced / "out", "--fp8-range", "ocp")
    assert code == 0
    assert out.startswith(f"{traced / 'out'} is up to date\nFP8 scales converted: 56\n")
    assert "the checkpoint has no tokenizer.json" in out


def test_a_dry_run_prints_the_plan_and_writes_nothing(traced, tmp_path, capsys):
    code, out, _ = run(capsys, "convert", traced / "ckpt", tmp_path / "none", "--dry-run")
    assert code == 0
    assert "[8, 256, 256]" in out
    assert "space needed: 2.55 MB" in out
    assert not (tmp_path / "none").exists()


def test_verify_proves_values_and_logits(traced, capsys):
    code, out, _ = run(capsys, "verify", traced / "ckpt", traced / "out", "--logits")
    assert code == 0
    assert "39 tensors equal their 127 sources" in out
    assert "the same token is first at 64" in out


def test_verify_exits_1_on_a_difference(tmp_path, capsys):
    source = write_tiny(tmp_path / "ckpt")
    assert main(["convert", str(source), str(tmp_path / "out")]) == 0
    shard = tmp_path / "out" / "model-00001-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    code, out, _ = run(capsys, "verify", source, tmp_path / "out")
    assert code == 1
    assert "NOT equal" in out


def test_generated_tokens_and_dumped_logits_are_those_of_transformers(traced, tmp_path, capsys):
    prompt = [3, 77, 120, 9, 150]
    ids = ",".join(map(str, prompt))
    dump = tmp_path / "logits.safetensors"
    command = [
        "generate",
        traced / "traced",
        "--token-ids",
        ids,
        "--greedy",
        "--json",
        "--max-new-tokens",
        6,
    ]
    code, out, err = run(capsys, *command, "--dump-logits", dump)
    assert code == 0
    assert f"logits: {dump}\n" in err
    found = json.loads(out)
    oracle = AutoModelForCausalLM.from_pretrained(traced / "twin", dtype=torch.float32).eval()
    with torch.inference_mode():
        tokens = list(prompt)
        rows = []
        prefill = oracle(torch.tensor([prompt])).logits[0]
        for _ in range(6):
            rows.append(oracle(torch.tensor([tokens])).logits[0, -1])
            tokens.append(int(rows[-1].argmax()))
    assert found == {"token_ids": tokens[len(prompt) :], "text": ""}
    logits = load_file(dump)
    torch.testing.assert_close(logits["prefill_logits"], prefill, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits["step_logits"], torch.stack(rows), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["inspect", "absent"], 1, ["absent", "does not exist"]),
        (["convert", "absent", "out"], 1, ["absent"]),
        (
            ["convert", "{ckpt}", "{base}/x", "--attention", "int4"],
            2,
            ["--attention", "int4", "fp8", "bf16"],
        ),
        (["convert", "{ckpt}", "{base}/x", "--keep-in-bf16", "lm_hed"], 1, ["lm_hed", "lm_head"]),
        (["convert", "{ckpt}", "{base}/out"], 1, ["another run", "--overwrite"]),
        (["verify", "{ckpt}", "{ckpt}"], 1, ["is a checkpoint", "neuron-minimax convert"]),
        (["compile", "{ckpt}", "{base}/x"], 1, ["is a checkpoint"]),
        (["verify", "{ckpt}", "absent"], 1, ["absent does not exist", "neuron-minimax convert"]),
        (["compile", "absent", "{base}/x"], 1, ["absent does not exist"]),
        (["generate", "{traced}", "--token-ids", "1,a"], 2, ["--token-ids", "1,a"]),
        (["generate", "{traced}", "--token-ids", "1,160"], 1, ["160", "vocabulary"]),
        (
            ["generate", "{traced}", "--token-ids", "1", "--max-new-tokens", "999"],
            1,
            ["999", "seq_len 64"],
        ),
        (["generate", "{traced}", "--prompt", "hi"], 1, ["tokenizer.json"]),
        (
            ["generate", "{traced}", "--token-ids", "1", "--greedy", "--top-k", "3"],
            2,
            ["--greedy", "--top-k"],
        ),
        (["generate", "{base}", "--token-ids", "1"], 1, ["manifest"]),
        (["generate", "{traced}"], 2, ["--prompt"]),
        (["convert", "{ckpt}"], 2, ["OUT"]),
        (["convert", "{ckpt}", "{ckpt}/config.json"], 1, ["config.json", "Not a directory"]),
        (["convert", "{ckpt}", "{ckpt}"], 1, ["is the source itself"]),
        (["compile", "{base}/out", "{base}/out"], 1, ["no compiled model"]),
        (["nonsense"], 2, ["nonsense"]),
        *(
            (
                ["check-device", "{base}/out", "{base}/x", option, str(least - 1)],
                2,
                [option, f"greater than or equal to {least}"],
            )
            for option, least in (
                ("--tp-degree", 1),
                ("--moe-tp-degree", 1),
                ("--moe-ep-degree", 1),
                ("--seq-len", 2),
            )
        ),
    ],
)
def test_bad_input_gets_one_message_and_its_exit_code(traced, capsys, arguments, code, words):
    places = {"ckpt": traced / "ckpt", "base": traced, "traced": traced / "traced"}
    found, out, err = run(capsys, *(argument.format(**places) for argument in arguments))
    assert found == code
    assert out == ""
    assert all(word in err for word in words), err
    assert "Traceback" not in err
    assert not (traced / "x").exists()


CHOICES = {
    "convert": {
        "attention": {*map(str, AttentionPrecision)},
        "fp8_range": {*map(str, FP8Range)},
        "scale_convention": {*map(str, ConventionChoice)},
    },
    "cache": {"dtype": {*DTYPES}},
    "compile": {
        "backend": {*BACKENDS},
        "compute": {*COMPUTE},
        "engine": {*ENGINES},
        "device": {*DEVICES},
        "blockwise_matmul": {*BLOCKWISE_MATMULS},
        "expert_kernel": {*EXPERT_KERNELS},
    },
    "check-device": {"backend": {*CHECKED}, "engine": {*ENGINES}},
    "experts": {"output_format": {*RECORD_FORMATS}},
    "train": {
        "precision": {*map(str, Precision)},
        "on_bad_step": {*map(str, neuron_minimax.OnBadStep)},
    },
}


@pytest.mark.parametrize("command", CHOICES)
def test_an_option_s_choices_are_the_library_s_and_others_are_usage(command, capsys):
    for name, values in CHOICES[command].items():
        option = f"--{name.replace('_', '-')}"
        assert run(capsys, command, option, "nonsense")[0] == 2
        assert run(capsys, command, "--help")[0] == 0
        assert main([command, "--help"]) == 0
        (shown,) = re.findall(rf"{option} <([^>]*)>", capsys.readouterr().out)
        assert set(shown.split("|")) == values


@pytest.mark.parametrize(
    ("backend", "option", "value"), [("cpu", "--tp-degree", "4"), ("neuron", "--engine", "eager")]
)
def test_an_option_of_another_backend_is_usage(traced, capsys, backend, option, value):
    code, _, err = run(
        capsys, "compile", traced / "out", "new", "--backend", backend, option, value
    )
    assert code == 2
    assert option in err
    assert not Path("new").exists()


def test_an_instance_that_does_not_exist_is_usage(traced, capsys):
    arguments = ["plan", traced / "ckpt", "--instance", "trn9.huge", "--tp-degree", 2]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "trn2.48xlarge" in err


def test_the_shell_completes_commands():
    environment = {
        **os.environ,
        "_NEURON_MINIMAX_COMPLETE": "complete_bash",
        "COMP_WORDS": "neuron-minimax inspe",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-m", "neuron_minimax"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["inspect"]


@pytest.mark.parametrize("closed", ["1", "2"])
def test_a_command_without_an_output_ends_as_it_does_with_one(closed):
    command = [sys.executable, "-m", "neuron_minimax", "--version"]
    closing = ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *command]
    done = subprocess.run(closing, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
