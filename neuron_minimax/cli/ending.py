"""How a command ends: its exit code, one message, and what is printed on the way. Loads nothing
heavy: an interruption while the rest is imported ends here too.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from neuron_minimax.errors import CONTROLS, NeuronMiniMaxError, printable
from neuron_minimax.processes import Terminated, signals_interrupt

KEPT = "nothing half-written is left; run the same command again"


def exit_code(run: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    Bad input (a NeuronMiniMaxError or an OSError) becomes one message on standard error and 1, or 2
    where it is of usage; an interruption one line and 128 + the signal's number. Where nobody reads
    the output, the command ends quietly.
    """
    _open_output()
    with signals_interrupt() as noted:
        try:
            code = run()
            sys.stdout.flush()
            return code
        except KeyboardInterrupt as stop:
            return _stopped(stop)
        except BrokenPipeError:
            _give_up_output()
            return 0
        except (NeuronMiniMaxError, OSError) as error:
            behind = interruption_behind(error)
            return _failed(error) if behind is None else _stopped(behind)
        except Exception as error:
            if noted.number is None:
                raise
            return _stopped(interruption_behind(error) or noted.interruption())


def interruption_behind(error: BaseException) -> KeyboardInterrupt | None:
    """Return the interruption that other code made an error of."""
    cause = error.__cause__ or error.__context__
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause


def _stopped(stop: KeyboardInterrupt) -> int:
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    notes = getattr(stop, "__notes__", None) or [KEPT]
    say("; ".join([f"stopped by {number.name}", *dict.fromkeys(notes)]))
    return 128 + number


def _failed(error: NeuronMiniMaxError | OSError) -> int:
    if isinstance(error, NeuronMiniMaxError):
        say(f"error: {error}")
        return 2 if error.usage else 1
    _give_up_output()
    say(f"error: {error.filename or 'input or output'}: {error.strerror or error}")
    return 1


@contextmanager
def resumable(advice: str) -> Iterator[None]:
    """Say in an interruption's line what is kept, and how to go on, where nothing more exact is
    said yet.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if not getattr(stop, "__notes__", None):
            stop.add_note(advice)
        raise


def show(text: str, end: str = "\n") -> None:
    """Print on standard output what may hold names from files: escaped, as `errors.printable`
    does, and where the output's encoding lacks a character.
    """
    _print(printable(text), end, sys.stdout)


def show_words(text: str, end: str = "") -> None:
    """Print a piece of a model's text: tabs and format characters stay, a terminal's controls are
    escaped.
    """
    _print(printable(text, CONTROLS, kept="\n\t"), end, sys.stdout)


def say(line: str) -> None:
    """Print a line on standard error, escaped; a command goes on where nobody hears it."""
    with suppress(OSError):
        _print(printable(line), "\n", sys.stderr)


def _print(text: str, end: str, stream: TextIO) -> None:
    encoding = stream.encoding or "utf-8"
    known = text.encode(encoding, "backslashreplace").decode(encoding)
    print(known, end=end, file=stream, flush=True)


def _open_output() -> None:
    """Give standard output and error, where a program was started without them, a place where
    nobody reads. What is opened later would get their numbers.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def _give_up_output() -> None:
    """Let what standard output still holds go nowhere, or Python would fail on it when it ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
