"""The `neuron-minimax` command: parse, call one function of the library, print. Exit 0 good, 1 bad
input, 2 usage.
"""

import sys
from collections.abc import Sequence

from neuron_minimax.cli import checkpoints, devices, models, studies  # noqa: F401 (they add their commands)
from neuron_minimax.cli.app import app
from neuron_minimax.errors import NeuronMiniMaxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        app(args=None if argv is None else list(argv), prog_name="neuron-minimax")
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else 1
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; nothing is wrong
        return 0
    except OSError as error:
        print(
            f"error: {error.filename or 'input or output'}: {error.strerror or error}",
            file=sys.stderr,
        )
        return 1
    return 0
