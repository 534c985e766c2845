"""The inspection tools: each is a parser and one call, writes its files, and exits with 1 on bad
input.
"""

import importlib.util
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.faults import FAULTS
from tests.opened import convert
from tests.tiny import write_tiny

TOOLS = Path(__file__).parents[1] / "tools"
NAMES = (
    "check_model_precision",
    "debug_get_state_dict",
    "explain_fp8_scales",
    "visualize_minimax_structure",
)


def tool(name):
    specification = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tools") / "checkpoint", shards=2)


@pytest.fixture(autouse=True)
def in_a_directory_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_is_under_40_lines_and_explains_itself(name, capsys):
    assert len((TOOLS / f"{name}.py").read_text().splitlines()) < 40
    try:
        code = tool(name).main(["--help"])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    assert "CKPT" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_a_tool_says_what_is_wrong_with_its_input(name, capsys):
    assert tool(name).main(["no_such_directory"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: no_such_directory does not exist")
    assert not list(Path().iterdir())


def test_the_precision_report_goes_to_its_file(checkpoint, capsys):
    assert tool("check_model_precision").main([str(checkpoint)]) == 0
    assert Path("model_precision_report.txt").read_text() == capsys.readouterr().out
    assert tool("check_model_precision").main([str(checkpoint), "--output", "other.txt"]) == 0
    assert Path("other.txt").exists()


def test_the_state_dict_walk_ends_in_a_verdict(checkpoint, tmp_path, capsys):
    assert tool("debug_get_state_dict").main([str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert "FP8 scales converted: 56" in out
    assert out.endswith("Every stage is right.\n")
    broken = next(
        fault for fault in FAULTS if fault.title == "an attention scale is missing"
    ).write(tmp_path / "b")
    assert tool("debug_get_state_dict").main([str(broken)]) == 1
    assert 'Stage "Shards" is wrong.' in capsys.readouterr().out


def test_the_state_dict_walk_compares_a_converted_directory(checkpoint, tmp_path, capsys):
    convert(checkpoint, tmp_path / "out")
    assert tool("debug_get_state_dict").main([str(checkpoint), "--converted", "out"]) == 0
    (tmp_path / "out" / "conversion.json").unlink()
    assert tool("debug_get_state_dict").main([str(checkpoint), "--converted", "out"]) == 1
    assert 'Stage "Converted directory" is wrong.' in capsys.readouterr().out


@pytest.mark.parametrize("with_checkpoint", [True, False])
def test_the_fp8_guide_is_written_in_three_forms(checkpoint, with_checkpoint, capsys):
    arguments = (
        [str(checkpoint), "--tensor", "model.layers.1.self_attn.o_proj.weight"]
        if with_checkpoint
        else []
    )
    assert tool("explain_fp8_scales").main([*arguments, "--block", "1", "1"]) == 0
    out = capsys.readouterr().out
    guide = Path("fp8_visual_guide.md").read_text()
    page = Path("fp8_visual_guide.html").read_text()
    for title in (
        "1. Codes",
        "2. The scale",
        "3. Dequantized",
        "4. The same bytes",
        "5. Halving",
        "6. What each way",
    ):
        assert title in out
        assert f"## {title}" in guide
        assert f"<h2>{title}" in page
    assert "![6. What each way costs](fp8_errors.svg)" in guide
    ElementTree.fromstring(Path("fp8_errors.svg").read_text())
    assert "as reciprocal" in Path("scale_comparison.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tensor", "model.norm.weight"], ["model.norm.weight is BF16", "name an FP8 weight"]),
        (["--tensor", "no.such.weight"], ["no tensor no.such.weight"]),
        (["--block", "9", "0"], ["4 x 2 blocks", "(9, 0)"]),
        (["--output-dir", "no/such"], ["cannot be written"]),
    ],
)
def test_the_fp8_guide_says_what_it_cannot_find(checkpoint, arguments, words, capsys):
    assert tool("explain_fp8_scales").main([str(checkpoint), *arguments]) == 1
    error = capsys.readouterr().err
    assert all(word in error for word in words)


def test_the_structure_is_written_as_text_and_two_diagrams(checkpoint, capsys):
    assert tool("visualize_minimax_structure").main([str(checkpoint)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(Path("minimax_m2_architecture.txt").read_text())
    for name in ("minimax_m2_architecture.svg", "minimax_m2_architecture_converted.svg"):
        ElementTree.fromstring(Path(name).read_text())
    assert "qkv_proj" in Path("minimax_m2_architecture_converted.svg").read_text()
