"""Walk the loading path of a checkpoint step by step, and say which stage, if any, is wrong and
what to do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.inspection.document import to_text
from neuron_minimax.studies.explain.state_dict import walk


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when a stage is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument(
        "--converted", type=Path, metavar="DIR", help="compare this converted directory as well"
    )
    parser.add_argument(
        "--layer", type=int, metavar="N", help="show the rules of this layer (default 0)"
    )
    parser.add_argument(
        "--grep", metavar="TEXT", help="show the rules whose sources or target contain this"
    )
    arguments = parser.parse_args(argv)
    try:
        walked = walk(
            Checkpoint.open(arguments.checkpoint),
            arguments.converted,
            arguments.layer,
            arguments.grep,
        )
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(to_text(f"Loading path of {arguments.checkpoint}", walked.parts()), end="")
    return 1 if walked.first_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
