"""Walk the loading path of a checkpoint step by step, and say which stage, if any, is wrong and
what to do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import neuron_minimax as nm
from neuron_minimax.cli.ending import exit_code, show


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 when a stage is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--converted", type=Path, metavar="DIR", help="compare this conversion too")
    parser.add_argument("--layer", type=int, metavar="N", help="show its rules (default 0)")
    parser.add_argument("--grep", metavar="TEXT", help="show the rules with this in a name")
    parser.add_argument(
        "--moe-tp-degree", type=int, metavar="N", help="say what N ranks hold of an expert"
    )
    arguments = parser.parse_args(argv)

    def run() -> int:
        source = nm.Checkpoint.open(arguments.checkpoint)
        walked = nm.walk_state_dict(
            source, arguments.converted, arguments.layer, arguments.grep, arguments.moe_tp_degree
        )
        show(walked.render(f"Loading path of {arguments.checkpoint}"), end="")
        return 1 if walked.first_wrong else 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
