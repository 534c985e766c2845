"""The public API: every name can be had and is documented; what stands on it uses nothing else."""

import ast
import inspect
import json
from importlib import import_module
from pathlib import Path

import pytest

import neuron_minimax as nm
from neuron_minimax.backends.report import CompileReport
from neuron_minimax.convert.verify import Verification
from tests.api_page import render_page
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer
from tests.tiny_traced import VOCAB

ROOT = Path(__file__).parents[1]
NAMES = [name for name in dir(nm) if name != "__version__"]
USERS = [
    ROOT / "generation_demo.py",
    *sorted((ROOT / "examples").glob("*.py")),
    *sorted((ROOT / "tools").glob("*.py")),
    *sorted((ROOT / "neuron_minimax" / "cli").glob("*.py")),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_says_what_it_is(name):
    value = getattr(nm, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"{name} has no docstring"


def test_a_name_that_is_not_public_is_not_found():
    with pytest.raises(AttributeError, match="module 'neuron_minimax' has no attribute 'nothing'"):
        nm.nothing  # noqa: B018


def test_the_documented_api_is_the_one_there_is():
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == render_page(), "docs/api.md: run `python -m tests.api_page`"


@pytest.mark.parametrize("path", USERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_demo_the_tools_and_the_commands_use_the_public_api_alone(path):
    """Beside it they may use each other, the errors that they print, the signals that end them, and
    the progress that they show.
    """
    allowed = tuple(f"neuron_minimax.{name}" for name in ("cli", "errors", "processes", "progress"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("neuron_minimax"):
            public = node.module == "neuron_minimax" and {n.name for n in node.names} <= {
                "__version__",
                "cli",
            }
            assert public or node.module.startswith(allowed), f"{path}:{node.lineno}"
        elif isinstance(node, ast.Import):
            names = [n.name for n in node.names if n.name.startswith("neuron_minimax.")]
            assert names == [], f"{path}:{node.lineno}"


def test_the_readmes_lines_give_an_answer(tmp_path, monkeypatch, capsys):
    """The first Python block of README.md, on a tiny checkpoint and without a compile."""
    monkeypatch.chdir(tmp_path)
    write_tokenizer(Path("tiny"), VOCAB)
    write_tiny(Path("tiny"), vocab_size=VOCAB)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    changes = {
        '"MiniMaxAI/MiniMax-M2"': '"tiny"',
        "seq_len=2048": 'seq_len=128, engine="eager"',
        'France?")': 'France?", nm.SamplingParams(temperature=0), max_new_tokens=4)',
    }
    for old, new in changes.items():
        assert code.count(old) == 1
        code = code.replace(old, new)
    exec(compile(code, "README.md", "exec"), {})
    llm = nm.LLM("traced_model/m2")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    events = list(llm.stream(question, nm.SamplingParams(temperature=0), max_new_tokens=4))
    said = "".join(event.text for event in events if isinstance(event, nm.Content))
    assert capsys.readouterr().out == f"{said}\n"


def rendered_types():
    """Every type of the package with a `render` that returns text and needs no argument."""
    for path in sorted((ROOT / "neuron_minimax").rglob("*.py")):
        if "def render(self" not in path.read_text(encoding="utf-8"):
            continue
        module = import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for _, value in inspect.getmembers(module, inspect.isclass):
            if value.__module__ == module.__name__ and "render" in vars(value):
                render = inspect.signature(value.render)
                _, *others = render.parameters.values()
                if render.return_annotation is str and all(
                    parameter.default is not parameter.empty for parameter in others
                ):
                    yield value


@pytest.mark.parametrize("report", list(rendered_types()), ids=lambda report: report.__qualname__)
def test_a_report_prints_as_it_renders(report, monkeypatch):
    monkeypatch.setattr(report, "render", lambda self: "x < y\nz")
    assert str(object.__new__(report)) == "x < y\nz"


@pytest.mark.parametrize("report", [nm.ConversionPlan, nm.Converted, Verification, CompileReport])
def test_a_notebooks_cell_shows_a_report_as_it_renders(report, monkeypatch):
    monkeypatch.setattr(report, "render", lambda self: "x < y\nz")
    assert object.__new__(report)._repr_html_() == "<pre>x &lt; y\nz</pre>"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "examples" / "notebook.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), "notebook", "exec"), names)
    assert "Ottawa" in capsys.readouterr().out
    assert names["source"].inspect()._repr_html_().startswith("<!doctype html>")
