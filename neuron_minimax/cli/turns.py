"""An assistant's turn as it is printed: its reasoning, its calls and its answer apart.

Each part but an answer that comes first has a line of its own before it: [thinking], [tool call]
and the function's name, [answer]. On a terminal these lines and the reasoning are dimmed.
"""

import json
import os
import sys
from typing import Any, Self

import neuron_minimax as nm
from neuron_minimax.cli.ending import say, show, show_words
from neuron_minimax.errors import counted, printable

DIM = "\033[2m"
PLAIN = "\033[0m"
THINKING = "[thinking]"
ANSWER = "[answer]"
CALL = "[tool call]"


def has_colors() -> bool:
    """Say whether standard output is a terminal that may be sent styles (see no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def show_note(text: str) -> None:
    """Print a line that the model did not say, dimmed where that is possible."""
    _style(DIM)
    show(text, end="")
    _style(PLAIN)
    show("")


def _style(code: str) -> None:
    if has_colors():
        print(code, end="", flush=True)


def say_if_cut(answer: "nm.Reply | nm.Answer", max_new_tokens: int | None) -> None:
    """Say on standard error that an answer did not end by itself, and why."""
    if answer.finish_reason == "length":
        count = len(answer.token_ids)
        why = "--max-new-tokens" if count == max_new_tokens else "the context is full"
        say(f"the answer was cut off after {counted(count, 'token')}: {why}")


def parts_of(reply: "nm.Reply") -> dict[str, Any]:
    """Return the parts of a turn, as JSON has them."""
    return {
        "reasoning": reply.reasoning,
        "content": reply.text,
        "tool_calls": [
            {"name": call.name, "arguments": json.loads(call.arguments)}
            for call in reply.tool_calls
        ],
        "finish_reason": reply.finish_reason,
    }


class TurnPrinter:
    """Prints the events of one turn as they appear, in a `with` block that ends the last line.

    Without `reasoning` that is left out; on a terminal a line says so.
    """

    def __init__(self, *, reasoning: bool = True) -> None:
        self._reasoning = reasoning
        self._section = ""
        self._line_ended = True
        self._arguments = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        self._end_line()

    def add(self, event: object) -> None:
        """Print an event."""
        match event:
            case nm.Reasoning(text):
                self._show(THINKING, text)
            case nm.Content(text):
                self._show(ANSWER, text)
            case nm.CallBegin(index, name):
                self._arguments = ""
                self._enter(f"{CALL} {index + 1}: {printable(name, kept='')}")
            case nm.CallArguments(_, text):
                self._arguments += text
            case nm.CallEnd(_, complete):
                show_words(_readable(self._arguments) if complete else "(cut off; its text is:)\n")

    def _show(self, section: str, text: str) -> None:
        """Show a piece of a section; the empty lines before its first words are left out."""
        words = text if section == self._section else text.lstrip("\n")
        hidden = section == THINKING and not self._reasoning
        if not words or (hidden and not sys.stdout.isatty()):
            return
        self._enter(section, hidden)
        if not hidden:
            show_words(words)
            self._line_ended = words.endswith("\n")

    def _enter(self, section: str, hidden: bool = False) -> None:
        """Begin a section, unless it is under way: end the line, and name what follows."""
        if section == self._section:
            return
        self._end_line()
        if self._section or section != ANSWER:
            show_note(f"{section} (not shown)" if hidden else section)
        if section == THINKING and not hidden:
            _style(DIM)
        self._section = section

    def _end_line(self) -> None:
        """End the line, in no style."""
        if not self._line_ended:
            show("")
        self._line_ended = True
        if self._section == THINKING:
            _style(PLAIN)


def _readable(arguments: str) -> str:
    """Return a call's arguments, one per line; a text of several lines is indented below its name.

    `arguments` is the text of a JSON object.
    """
    given: dict[str, Any] = json.loads(arguments or "{}")
    lines = []
    for name, value in given.items():
        if isinstance(value, str) and "\n" in value:
            lines += [f"  {name}:", *(f"    {line}" for line in value.splitlines())]
        else:
            lines.append(f"  {name}: {json.dumps(value, ensure_ascii=False)}")
    return "".join(f"{line}\n" for line in lines)
