"""Draw the architecture of a checkpoint and of its conversion: trees as text, block diagrams as
SVG.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.studies.explain.architecture import write_structure


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when there is no such model; a directory with only a config.json is enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument(
        "--output", type=Path, default=Path("minimax_m2_architecture.txt"), metavar="FILE"
    )
    arguments = parser.parse_args(argv)
    try:
        print(write_structure(arguments.checkpoint, arguments.output), end="")
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
