"""docs/api.md from the docstrings of the public API: `python -m tests.api_page` writes it."""

import inspect
import re
from enum import Enum
from functools import cached_property
from pathlib import Path
from types import FunctionType
from typing import Any

import neuron_minimax as nm

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """\
# The public API

`import neuron_minimax as nm` has everything that the demo, the tools and the command line use of
the library; names are imported when they are first used. This page is made from the docstrings
(`python -m tests.api_page`), and a test holds it.

```python
"""
SOURCE = Path(nm.__file__)


def sections() -> list[tuple[str, list[str]]]:
    """The titles and names of the public API, in the order of the package's own table."""
    found: list[tuple[str, list[str]]] = []
    for line in SOURCE.read_text(encoding="utf-8").splitlines():
        title = re.fullmatch(r"    # (.+)\.", line)
        name = re.fullmatch(r'    "(\w+)": ".+",', line)
        if title:
            found.append((title[1], []))
        elif name:
            found[-1][1].append(name[1])
    return found


def signature(name: str, value: Any) -> str:
    """`name(parameters)` with defaults, without types, which the docstrings tell."""
    if isinstance(value, type) and issubclass(value, Exception):
        return name
    parameters = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        default = parameter.default
        if isinstance(default, Enum):
            default = default.value
        plain = isinstance(default, str | int | float | bool | tuple | type(None))
        shown = "" if default is parameter.empty else f"={default!r}" if plain else "=..."
        star = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
        parameters.append(f"{star}{parameter.name}{shown}")
    return f"{name}({', '.join(parameters)})"


def entry(name: str, value: Any) -> str:
    """One name's part of the page."""
    if not (inspect.isclass(value) or inspect.isfunction(value)):
        return f"### `{name}`\n\nA path: the directory of the embedded model.\n"
    if inspect.isclass(value) and issubclass(value, Enum):
        choices = ", ".join(f'`"{choice.value}"`' for choice in value)
        return f"### `{name}`\n\n{described(value)}\n\nOne of {choices}.\n"
    lines = [f"### `{signature(name, value)}`", "", described(value), ""]
    for member, found in own_members(value) if inspect.isclass(value) else ():
        shown = (
            member if isinstance(found, property | cached_property) else signature(member, found)
        )
        lines += [f"**`{shown}`**", "", described(found), ""]
    return "\n".join(lines)


def own_members(value: type) -> list[tuple[str, Any]]:
    """The documented public methods and properties that this package defines, by name."""
    found: dict[str, Any] = {}
    for base in reversed(value.__mro__):
        if base.__module__.startswith("neuron_minimax"):
            found.update(vars(base))
    kinds = (FunctionType, classmethod, property, cached_property)
    return [
        (name, getattr(value, name) if isinstance(member, classmethod) else member)
        for name, member in sorted(found.items())
        if isinstance(member, kinds) and not name.startswith("_") and inspect.getdoc(member)
    ]


def described(value: Any) -> str:
    """A docstring as Markdown: examples become code."""
    text = inspect.getdoc(value) or ""
    plain, prompt, example = text.partition("\n>>> ")
    return plain if not prompt else f"{plain.rstrip()}\n\n```python\n>>> {example}\n```"


def render_page() -> str:
    """The whole page."""
    example = (nm.__doc__ or "").split("\n\n", 1)[1].rpartition("\n\nNames are imported")[0]
    lines = [HEAD + inspect.cleandoc(example) + "\n```\n"]
    for title, names in sections():
        lines.append(f"## {title}\n")
        lines += [entry(name, getattr(nm, name)) for name in names]
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(render_page(), encoding="utf-8")
