"""Every path that a command takes, given as something else: one message, its exit code, nothing
written. The commands and their parameters are the application's own.
"""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import pytest
import typer

from neuron_minimax.cli import application, main

# What a command's arguments are given as, by what its help calls them; new paths where nothing is
# said. {new} is a path that is not there yet, the others are those of a tiny model.
PLACES = {"CKPT": "{checkpoint}", "OUT": "{converted}", "TRACED": "{traced}"}
# What makes a command short, or gives its arguments another sense.
GIVEN = {
    "convert": "{checkpoint} {new}",
    "import": "{checkpoint}/model.safetensors {new}",
    "plan": "{checkpoint} --instance trn2.48xlarge --tp-degree 4",
    "compile": "{converted} {new} --engine eager --seq-len 16",
    "generate": "{traced} --token-ids 1 --max-new-tokens 1",
    "check-device": "{converted} {new} --backend cpu --engine eager --layer 99",
    "serve": "{traced} --host 203.0.113.1 --allow-anonymous",  # no address of this machine
    "experts": "{traced} --prompt Hi --max-new-tokens 1 --output {new}",
    "train": "{new} --steps 1 --batch-size 1 --max-tokens 16",
    "quality": "{checkpoint} --questions 1",
    "tokenizer": "{new} --vocab-size 300 --data {text}",
    "corpus": "{new} --rows 2",
}
# Where a new path is right, and what is then done takes long.
WRITES = {("experts", "output"), ("train", "out"), ("tokenizer", "out")}
# Files that are replaced, as the user says.
REPLACED = {("inspect", "output"), ("inspect", "html")}
# What is right after all: a new path, and an empty directory to write into.
NEW = ("directory", "no text", "missing")
FITTING = {
    ("cache", "cache_dir"): NEW,
    ("compile", "traced"): ("directory", "missing"),  # whose manifest is to name it
    ("convert", "out"): NEW,
    ("corpus", "out"): NEW,
    ("generate", "dump_logits"): ("empty", "dangling", "loop", "no text", "missing"),
    **dict.fromkeys(
        REPLACED, ("text", "latin1", "empty", "locked", "dangling", "loop", "no text", "missing")
    ),
}
ERROR = re.compile("rror: |(?<!rror: )Invalid value")  # which may come together
# Options whose place in a command line another one takes.
INSTEAD = {("experts", "trace"): "{traced}", ("generate", "prompt"): "{traced}"}


class Parameter(NamedTuple):
    """A parameter of a command: whether it is a path, and how it is given ("" for an argument)."""

    name: str
    is_path: bool
    option: str
    metavar: str


def parameters_of(function: Callable[..., Any]) -> list[Parameter]:
    """The parameters that typer reads off a command's function."""
    found = []
    for name, hint in get_type_hints(function, include_extras=True).items():
        if name != "return":
            kind, info = get_args(hint)[:2]
            is_argument = isinstance(info, typer.models.ArgumentInfo)
            declared = [each for each in info.param_decls or () if each.startswith("--")]
            option = "" if is_argument else (*declared, f"--{name.replace('_', '-')}")[0]
            found.append(Parameter(name, "Path" in str(kind), option, info.metavar or ""))
    return found


COMMANDS = {
    each.name or each.callback.__name__.replace("_", "-"): parameters_of(each.callback)
    for each in application().registered_commands
    if each.callback is not None
}
CASES = [
    (command, each.name)
    for command, parameters in sorted(COMMANDS.items())
    for each in parameters
    if each.is_path
]


def write_wrong(folder: Path) -> dict[str, Path]:
    """What somebody may give for a file or a directory."""
    folder.mkdir()
    (folder / "text").write_text("a text")
    (folder / "empty").touch()
    (folder / "latin1").write_bytes("größe".encode("latin-1"))
    (folder / "directory").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "dangling").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "locked").write_text("a text")
    (folder / "locked").chmod(0)
    below = {"below a file": folder / "text" / "x", "no text": folder / os.fsdecode(b"\xff")}
    return {path.name: path for path in folder.iterdir()} | below | {"missing": folder / "missing"}


def listing(*roots: Path) -> dict[str, int]:
    """The names of all that is below, and the sizes of files."""
    found: Iterator[Path] = (path for root in roots for path in root.rglob("*"))
    return {str(path): 0 if path.is_dir() else path.lstat().st_size for path in found}


def arguments_with(command: str, name: str, value: Path, places: dict[str, Path]) -> list[str]:
    """A command's quickest arguments, with one path as given."""
    parameters = COMMANDS[command]
    positional = [each.name for each in parameters if not each.option]
    default = " ".join(PLACES.get(each.metavar, "{new}") for each in parameters if not each.option)
    words = [word.format(**places) for word in GIVEN.get(command, default).split()]
    if name in positional:
        words[positional.index(name)] = str(value)
        return [command, *words]
    words = INSTEAD.get((command, name), "").format(**places).split() or words
    option = next(each.option for each in parameters if each.name == name)
    return [command, *words, option, str(value)]


@pytest.mark.parametrize(("command", "name"), CASES)
def test_a_path_of_another_kind_is_one_message(
    command: str,
    name: str,
    traced: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    wrong = write_wrong(tmp_path / "wrong")
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.write_text("one line of text\n" * 50)
    model = traced.parent
    before = listing(model)
    for number, (kind, path) in enumerate(wrong.items()):
        if (command, name) in WRITES and kind not in ("text", "pipe", "loop", "below a file"):
            continue
        if (command, name) in REPLACED and kind == "pipe":
            continue  # what writes into a pipe waits for its reader, as everywhere
        places = {each: model / each for each in ("checkpoint", "converted", "traced")}
        places["text"] = text
        arguments = arguments_with(command, name, path, places | {"new": tmp_path / str(number)})
        kept = kind in ("text", "latin1") and (command, name) not in REPLACED
        content = path.read_bytes() if kept else b""
        found = listing(tmp_path)
        code = main(arguments)
        said = capfd.readouterr().err
        where = f"{arguments}, {kind}: {code}, {said}"
        assert code in (0, 1, 2), where
        if code:
            assert len(ERROR.findall(said)) == 1, where
            assert listing(tmp_path) == found, where
        else:
            assert kind in FITTING.get((command, name), ()), where
        assert "Traceback" not in said, where
        assert said.replace("\n", "").isprintable(), where
        assert not content or path.read_bytes() == content, where
    assert listing(model) == before
