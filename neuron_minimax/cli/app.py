"""The application that the command modules add themselves to, and the arguments they share."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="MiniMax-M2 from its Hugging Face FP8 checkpoint to served tokens on AWS Neuron, proven "
    "on a CPU first.",
)

CheckpointDir = Annotated[
    Path, typer.Argument(metavar="CKPT", help="Hugging Face checkpoint directory")
]
ConvertedDir = Annotated[Path, typer.Argument(metavar="OUT", help="converted directory")]
TracedDir = Annotated[Path, typer.Argument(metavar="TRACED", help="compiled directory")]
