"""The `neuron-minimax` command: parse, call one function of the library, print.

Exit codes: 0 good, 1 bad input, 2 usage, 130 and 143 stopped by SIGINT and SIGTERM.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from neuron_minimax.cli.ending import KEPT, exit_code, interruption_behind

if TYPE_CHECKING:
    import typer

__all__ = ["KEPT", "application", "main"]


def application() -> "typer.Typer":
    """Return the application with all its commands."""
    # Imported here, where an interruption is already one line; they add their commands.
    from neuron_minimax.cli import chat, checkpoints, models, run, studies  # noqa: F401
    from neuron_minimax.cli.app import app

    return app


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""

    def invoke() -> int:
        try:
            application()(args=None if argv is None else list(argv), prog_name="neuron-minimax")
        except SystemExit as exit_:
            behind = interruption_behind(exit_)  # while typer parsed, which says nothing of it
            if behind is not None:
                raise behind from None
            return exit_.code if isinstance(exit_.code, int) else 1
        return 0

    return exit_code(invoke)
