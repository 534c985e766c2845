"""The application that the commands join, and their arguments."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from neuron_minimax import __version__
from neuron_minimax.cli.ending import exit_code, show


class Commands(TyperGroup):
    """The commands, whose errors become exit codes here: typer has other ones for interruptions and
    closed pipes.
    """

    def invoke(self, ctx: Any) -> Any:
        def run() -> int:
            try:
                super(Commands, self).invoke(ctx)
            except typer.Exit as exit_:
                return exit_.exit_code
            return 0

        raise typer.Exit(exit_code(run))


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="MiniMax-M2, Qwen3, Qwen2 and MiniMind from their checkpoints to served tokens, on AWS "
    "Neuron, proven on a CPU first.",
)

CheckpointDir = Annotated[
    Path, typer.Argument(metavar="CKPT", help="checkpoint directory, or its Hugging Face hub id")
]
ConvertedDir = Annotated[Path, typer.Argument(metavar="OUT", help="converted directory")]
TracedDir = Annotated[Path, typer.Argument(metavar="TRACED", help="compiled directory")]


def _print_version(wanted: bool) -> None:
    if wanted:
        show(f"neuron-minimax {__version__}")
        raise typer.Exit()


@app.callback()
def _common_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="print the version and exit"
        ),
    ] = False,
) -> None:
    """Hold the options that stand before a command."""
