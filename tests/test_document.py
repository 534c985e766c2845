"""What is printed and written about files from outside obeys no name in them."""

import ast
import json
import os
from pathlib import Path

import pytest

from neuron_minimax.cli import main
from neuron_minimax.cli.ending import show, show_words
from neuron_minimax.errors import NeuronMiniMaxError, counted
from neuron_minimax.inspection.document import Part, table, to_html, to_markdown, write_text
from tests.full_disk import files_of_at_most
from tests.tiny import write_tiny

# Sets a terminal's title, goes up a line, ends the line, and is HTML and a Markdown cell.
HOSTILE = "\x1b]0;owned\x07\x1b[A\x9b2J\r\nfine: none | <img src=x onerror=alert(1)>\u202e"
ROOT = Path(__file__).parents[1]
PRINTING = sorted(
    [
        ROOT / "generation_demo.py",
        *(ROOT / "neuron_minimax/cli").glob("*.py"),
        *(ROOT / "tools").glob("*.py"),
    ]
)
COMMANDED = ("\x1b", "\x07", "\x9b", "\r", "\u202e")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in a directory of such a name; one weight is missing."""
    directory = write_tiny(tmp_path_factory.mktemp("named") / HOSTILE, shards=2)
    (directory / "model-00002-of-00002.safetensors").unlink()
    return directory


def test_reports_show_a_hostile_name_and_do_not_obey_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "report.txt"
    page = tmp_path / "report.html"
    arguments = ["inspect", str(checkpoint), "--output", str(text), "--html", str(page)]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    for found in (printed.out, printed.err, text.read_text(), page.read_text()):
        assert not any(mark in found for mark in COMMANDED)
    assert "owned" in printed.out
    assert "owned" in page.read_text()
    assert "<img src=x" not in page.read_text()
    assert main(["inspect", str(checkpoint), "--json"]) == 1
    assert HOSTILE in json.loads(capsys.readouterr().out)["directory"]


@pytest.mark.parametrize("command", ["convert", "cache"])
def test_errors_show_it_likewise(
    checkpoint: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, str(checkpoint), str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "owned" in said
    assert not any(mark in said for mark in COMMANDED)


def test_a_model_s_words_keep_tabs_and_joined_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    show_words("a\tb\n\U0001f469\u200d\U0001f680 \x1b[31mred\x07 caf\xe9")
    assert capsys.readouterr().out == ("a\tb\n\U0001f469\u200d\U0001f680 \\x1b[31mred\\x07 caf\xe9")
    show("a\tb \udcff")
    assert capsys.readouterr().out == "a\\tb \\udcff\n"


def test_a_cell_is_one_line_of_its_table() -> None:
    rows = table("", ("name",), [("a\nb",)]).splitlines()
    assert rows[2:] == ["  a\\nb"]


def test_a_name_is_neither_html_nor_a_column() -> None:
    part = Part(title="<b>", text=f"Of {HOSTILE}", head=("name",), rows=((HOSTILE,),))
    marked = to_markdown("<i>", [part])
    assert "<img" not in marked
    assert marked.splitlines()[-1].count("|") == 3  # one of them escaped
    assert "<img" not in to_html("<i>", [part])


def test_what_stands_in_backticks_is_code_on_a_page_and_nothing_in_it_is_html() -> None:
    part = Part(title="t", text="Run `a <b>` or ` and x", head=("`c`",), rows=(("`d`",),))
    page = to_html("t", [part])
    assert "<p>Run <code>a &lt;b&gt;</code> or ` and x</p>" in page
    assert '<td data-head="`c`"><span><code>d</code></span></td>' in page
    assert "<th>`c`</th>" in page  # a head is a name


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [(1, "file", "1 file"), (0, "file", "0 files"), (2000, "reply", "2,000 replies")],
)
def test_what_is_counted_is_in_the_plural_unless_it_is_one(count, noun, text) -> None:
    assert counted(count, noun) == text


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    write_text(path, "before")
    for size in (0, 3):
        with files_of_at_most(size), pytest.raises(NeuronMiniMaxError, match=r"report\.txt cannot"):
            write_text(path, "after that")
    assert path.read_text() == "before"
    assert [each.name for each in tmp_path.iterdir()] == ["report.txt"]


def test_a_report_may_go_into_a_device(tmp_path: Path) -> None:
    before = os.stat(os.devnull)
    write_text(os.devnull, "text")
    assert os.stat(os.devnull).st_ino == before.st_ino
    with pytest.raises(NeuronMiniMaxError, match="No space left"):
        write_text("/dev/full", "text")


@pytest.mark.parametrize("path", PRINTING, ids=lambda path: path.name)
def test_commands_print_through_the_functions_that_escape(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    printed = [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    own = [f"print({name}" for name in ("known, ", "code, ")]
    assert all(call.startswith(tuple(own)) for call in printed), printed
