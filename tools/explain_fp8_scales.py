"""Explain one FP8 block step by step: prints it, and writes it as Markdown and HTML with a plot of
the errors.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.studies.explain.fp8 import from_checkpoint, made_here, write_guide


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 when there is no such block."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CKPT",
        nargs="?",
        help="default: a normal weight made here",
    )
    parser.add_argument("--tensor", metavar="NAME", help="an FP8 weight (default: the first)")
    parser.add_argument(
        "--block",
        type=int,
        nargs=2,
        default=(0, 0),
        metavar=("I", "J"),
        help="row and column of it",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=Path(), metavar="DIR", help="default: here"
    )
    arguments = parser.parse_args(argv)
    if arguments.checkpoint is None and arguments.tensor is not None:
        parser.error("--tensor needs CKPT")
    try:
        place = tuple(arguments.block)
        if arguments.checkpoint is None:
            subject = made_here(place=place)
        else:
            subject = from_checkpoint(
                Checkpoint.open(arguments.checkpoint), arguments.tensor, place
            )
        print(write_guide(subject, arguments.output_dir), end="")
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
