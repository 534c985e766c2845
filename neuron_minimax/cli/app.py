"""The application that the commands join, and their arguments, progress bars and exit codes."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from neuron_minimax import __version__
from neuron_minimax.errors import NeuronMiniMaxError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="MiniMax-M2 from its Hugging Face FP8 checkpoint to served tokens on AWS Neuron, proven "
    "on a CPU first.",
)

CheckpointDir = Annotated[
    Path, typer.Argument(metavar="CKPT", help="checkpoint directory, or its Hugging Face hub id")
]
ConvertedDir = Annotated[Path, typer.Argument(metavar="OUT", help="converted directory")]
TracedDir = Annotated[Path, typer.Argument(metavar="TRACED", help="compiled directory")]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"neuron-minimax {__version__}")
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


def exit_code(run: Callable[[], int]) -> int:
    """Run a command and return its exit code.

    Bad input (a NeuronMiniMaxError or an OSError) becomes one message on standard error and 1.
    """
    try:
        return run()
    except NeuronMiniMaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output is gone; nothing is wrong
        return 0
    except OSError as error:
        place = error.filename or "input or output"
        print(f"error: {place}: {error.strerror or error}", file=sys.stderr)
        return 1


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar in bytes with rate and time left; yield the function that advances it.

    It goes to standard error and shows only its end where that is not a terminal.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(what, total=total)
        yield lambda nbytes: progress.advance(task, nbytes)


@contextmanager
def token_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar in tokens on standard error; yield progress(prompt's name, tokens, all tokens)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    rate = TextColumn("{task.fields[rate]:.1f} tokens/s")
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        rate,
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("experts", total=None, rate=0.0)

        def advance(name: str, tokens: int, total: int) -> None:
            progress.update(task, description=name, advance=tokens, total=total)
            progress.update(task, rate=progress.tasks[task].speed or 0.0)

        yield advance
