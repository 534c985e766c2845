"""`neuron-minimax inspect`: its options, exit codes and files, and that it never loads torch."""

import json
import shutil
import subprocess
import sys

import pytest
from safetensors.torch import save_file

from neuron_minimax.cli import main
from tests.faults import FAULTS
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("inspect") / "good", shards=2)


def run(capsys, *arguments):
    code = main(["inspect", *(str(argument) for argument in arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def fault(title):
    return next(fault for fault in FAULTS if fault.title == title)


def test_json_on_standard_output_is_json_alone_even_with_a_progress_bar(good, capsys):
    code, out, _ = run(capsys, good, "--json", "--check-values")
    report = json.loads(out)
    assert code == 0
    assert report["usable"]
    assert report["values"]["convention"] == "multiplier"
    assert report["comparison"] is None


def test_output_and_html_are_written_and_say_the_same(good, tmp_path, capsys):
    code, out, _ = run(capsys, good, "--output", tmp_path / "r.txt", "--html", tmp_path / "r.html")
    assert code == 0
    assert (tmp_path / "r.txt").read_text() == out
    assert "Usable as it is" in (tmp_path / "r.html").read_text()


def test_a_value_fault_changes_the_exit_code_only_when_values_are_read(tmp_path, capsys):
    directory = fault("a scale is NaN").write(tmp_path / "bad")
    assert run(capsys, directory)[0] == 0
    code, out, _ = run(capsys, directory, "--check-values")
    assert code == 1
    assert "o_proj.weight_scale_inv" in out


def test_a_checkpoint_without_any_weight_is_not_usable(good, tmp_path, capsys):
    shutil.copy(good / "config.json", tmp_path)
    save_file({}, tmp_path / "model.safetensors")
    code, out, _ = run(capsys, tmp_path, "--json")
    assert code == 1
    assert not json.loads(out)["usable"]


def test_a_list_that_breaks_a_run_exits_with_1(good, capsys):
    code, out, _ = run(capsys, good, "--modules-to-not-convert", "self_attn, lm_head")
    assert code == 1
    assert "ERROR: --modules-to-not-convert, NxDI: self_attn" in out
    assert run(capsys, good, "--modules-to-not-convert", "lm_head")[0] == 0


def test_against_shows_the_differences_without_changing_the_exit_code(good, tmp_path, capsys):
    other = write_tiny(tmp_path / "other", seed=1)
    code, out, _ = run(capsys, good, "--against", other, "--check-values")
    assert code == 0
    assert "different values: " in out
    assert "model.layers.0.self_attn.q_proj.weight" in out.partition("different values")[2]
    code, out, _ = run(capsys, good, "--against", other)
    assert "the same names, dtypes and shapes in 127 tensors" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere", "does not exist"]),
        (["GOOD", "--against", "nowhere"], ["nowhere", "does not exist"]),
        (
            ["GOOD", "--output", "no/such/directory/r.txt"],
            ["no/such/directory/r.txt", "cannot be written"],
        ),
        (
            ["GOOD", "--html", "no/such/directory/r.html"],
            ["no/such/directory/r.html", "cannot be written"],
        ),
    ],
)
def test_bad_input_is_one_message_on_standard_error(good, capsys, arguments, words):
    code, _, err = run(
        capsys, *(good if argument == "GOOD" else argument for argument in arguments)
    )
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert all(word in err for word in words)


def test_inspection_never_loads_torch(good, tmp_path):
    arguments = ["inspect", str(good), "--check-values", "--html", str(tmp_path / "p.html")]
    code = f"""
import sys
from neuron_minimax.cli import main
assert main({arguments!r}) == 0
assert not {{"torch", "transformers", "matplotlib"}} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
