"""Progress bars on standard error, which show nothing but their end where that is no terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar in bytes with rate and time left on standard error; gives the function to advance it
    by.
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
    """A bar in tokens with rate and time left on standard error; gives progress(prompt's name,
    tokens, all tokens).
    """
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
