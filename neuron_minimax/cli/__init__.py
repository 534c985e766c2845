"""The `neuron-minimax` command: parse, call one function of the library, print.

Exit codes: 0 good, 1 bad input, 2 usage.
"""

from collections.abc import Sequence

from neuron_minimax.cli import checkpoints, models, studies  # noqa: F401 (they add their commands)
from neuron_minimax.cli.app import app, exit_code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""

    def run() -> int:
        try:
            app(args=None if argv is None else list(argv), prog_name="neuron-minimax")
        except SystemExit as exit_:
            return exit_.code if isinstance(exit_.code, int) else 1
        return 0

    return exit_code(run)
