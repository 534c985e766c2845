"""Print the precision report of a checkpoint and write it to a file: `neuron-minimax inspect` with
a default file.
"""

import sys
from collections.abc import Sequence

from neuron_minimax import cli

DEFAULT_OUTPUT = "model_precision_report.txt"


def main(argv: Sequence[str] | None = None) -> int:
    """Take the arguments of `neuron-minimax inspect` and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not any(argument.partition("=")[0] == "--output" for argument in arguments):
        arguments += ["--output", DEFAULT_OUTPUT]
    return cli.main(["inspect", *arguments])


if __name__ == "__main__":
    sys.exit(main())
