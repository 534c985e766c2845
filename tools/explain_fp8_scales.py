"""Explain one FP8 block step by step, as text, Markdown and HTML with a plot of the errors."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import neuron_minimax as nm
from neuron_minimax.cli.ending import exit_code, show


def main(argv: Sequence[str] | None = None) -> int:
    """Return 1 when the block does not exist."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("checkpoint", type=Path, metavar="CKPT", nargs="?", help="default: a weight made here")
    add("--tensor", metavar="NAME", help="an FP8 weight (default: the first)")
    add("--block", type=int, nargs=2, default=(0, 0), metavar=("I", "J"), help="its row and column")
    add("--output-dir", type=Path, default=Path(), metavar="DIR", help="default: here")
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is None and arguments.tensor is not None:
        parser.error("--tensor needs CKPT")

    def run() -> int:
        source = nm.Checkpoint.open(arguments.checkpoint) if arguments.checkpoint else None
        place = tuple(arguments.block)
        show(nm.explain_fp8(source, arguments.tensor, place, arguments.output_dir), end="")
        return 0

    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
