"""Draw the architecture of a checkpoint and of its conversion: trees as text, diagrams as SVG."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import neuron_minimax as nm
from neuron_minimax.cli.ending import exit_code, show

DEFAULT_OUTPUT = Path("minimax_m2_architecture.txt")


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 when no model is there; a directory with only a config.json is enough."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, metavar="FILE")
    arguments = parser.parse_args(argv)

    def run() -> int:
        show(nm.write_structure(arguments.checkpoint, arguments.output), end="")
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
