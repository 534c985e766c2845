"""Walk the loading path of a checkpoint step by step, and say which stage, if any, is wrong and
what to do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli.app import exit_code
from neuron_minimax.inspection.document import to_text
from neuron_minimax.studies.explain.state_dict import walk


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 when a stage is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--converted", type=Path, metavar="DIR", help="compare this conversion too")
    parser.add_argument("--layer", type=int, metavar="N", help="show its rules (default 0)")
    parser.add_argument("--grep", metavar="TEXT", help="show the rules with this in a name")
    arguments = parser.parse_args(argv)

    def run() -> int:
        source = Checkpoint.open(arguments.checkpoint)
        walked = walk(source, arguments.converted, arguments.layer, arguments.grep)
        print(to_text(f"Loading path of {arguments.checkpoint}", walked.parts()), end="")
        return 1 if walked.first_wrong else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
