"""Errors that a user can cause; the command line prints their text alone and exits with 1."""

import unicodedata
from collections.abc import Container, Sequence
from importlib.util import find_spec

# Categories of Unicode: control characters and lone surrogates, which a terminal obeys or cannot
# show; and format characters and other line ends, which make a name look like another.
CONTROLS = ("Cc", "Cs")
UNPRINTABLE = (*CONTROLS, "Cf", "Zl", "Zp")

SHOWN = 200  # characters of a value from a file
QUOTED = 400  # characters of a text that somebody else wrote


def printable(text: str, escaped: Container[str] = UNPRINTABLE, kept: str = "\n") -> str:
    """Return text that a terminal shows and does not obey: names from files may hold anything.
    Characters of the `escaped` categories are written as in Python, but for those that are `kept`.
    """
    if text.isprintable():  # which no character of these categories is
        return text
    return "".join(
        repr(mark)[1:-1] if unicodedata.category(mark) in escaped and mark not in kept else mark
        for mark in text
    )


def counted(count: int, noun: str) -> str:
    """Return a number and what it counts, such as "1 row" or "2,000 replies"."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{count:,} {noun if count == 1 else plural}"


def shown(value: object) -> str:
    """Return a value from a file as a message shows it: in one line, of a long one the
    beginning.
    """
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def shortened(text: str, length: int = QUOTED) -> str:
    """Return a text of at most `length` characters: of a longer one the beginning."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


def some_of(names: Sequence[str]) -> str:
    """Return the first name and the number of the others."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


class NeuronMiniMaxError(Exception):
    """Base of all errors with a message meant for the user: the thing, what was found and expected,
    the next step.

    `usage` says that the fault is an option alone, whatever the input: it has no such value, or
    does not go with another.
    """

    def __init__(self, message: str, *, usage: bool = False) -> None:
        super().__init__(printable(message))
        self.usage = usage


class ConfigError(NeuronMiniMaxError):
    """A config.json that is missing, broken, or describes another architecture."""


class CheckpointError(NeuronMiniMaxError):
    """A checkpoint whose files or tensors are not what its config.json implies."""


class ConversionError(NeuronMiniMaxError):
    """A conversion that cannot go on, or a converted directory that is not what it claims to be."""


class ScaleConventionError(CheckpointError, ConversionError):
    """A checkpoint whose scales do not show what they mean, until the user says it."""


class BackendError(NeuronMiniMaxError):
    """A compiled model that cannot be made, loaded or asked for what was requested."""


class GenerationError(NeuronMiniMaxError):
    """A prompt, sampling option or tokenizer that cannot be used."""


class TrainingError(NeuronMiniMaxError):
    """Training data, options or a saved training state that cannot be used."""


def is_installed(package: str) -> bool:
    """Return whether an optional package can be imported, without importing it."""
    return find_spec(package) is not None


def require_package(package: str, purpose: str, error: type[NeuronMiniMaxError]) -> None:
    """Raise an error, with the command that installs it, unless an optional package is there."""
    if not is_installed(package):
        raise error(f"{purpose} needs {package}, which is not installed: `pip install {package}`")
