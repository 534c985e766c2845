"""Measuring in processes of their own: a function that runs once, and sides that take turns."""

import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SPAWN = get_context("spawn")
# Every process computes with all cores, and no peer writes progress bars between the rows.
os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def run_apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Run a module's function in a fresh process; return its value, or raise its exception."""
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        return pool.submit(function, *arguments).result()


class Side:
    """A process that gets ready once and measures when it is asked.

    `function(*arguments)` is a generator: its first value tells what getting ready found, each
    further one is a measurement.
    """

    def __init__(self, function: Callable[..., Iterator[dict[str, Any]]], *arguments: Any) -> None:
        self.name = function.__name__
        self.connection, theirs = SPAWN.Pipe()
        self.process = SPAWN.Process(
            target=_answer, args=(theirs, function, arguments), daemon=True
        )
        self.process.start()
        theirs.close()
        try:
            self.ready = self.measure()
        except RuntimeError:
            self.close()
            raise

    def measure(self) -> dict[str, Any]:
        """Return the next value.

        Raises RuntimeError with the traceback of the process, or saying that it died.
        """
        self.connection.send(True)
        try:
            failed, found = self.connection.recv()
        except EOFError:
            self.process.join()
            raise RuntimeError(
                f"the process of {self.name} died with exit code {self.process.exitcode}"
            ) from None
        if failed:
            raise RuntimeError(f"{self.name} failed:\n{found}")
        return found

    def close(self) -> None:
        self.connection.close()  # its process sees the end and ends
        self.process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _answer(
    connection: Connection, function: Callable[..., Iterator[Any]], arguments: Sequence[Any]
) -> None:
    try:
        values = function(*arguments)
        while connection.recv():
            connection.send((False, next(values)))
    except EOFError:
        return
    except Exception:
        connection.send((True, traceback.format_exc()))


def memory() -> dict[str, int]:
    """Return this process's resident bytes: "RssAnon", its own, and "RssFile", mapped files."""
    lines = [
        line.split()
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("Rss")
    ]
    return {fields[0].rstrip(":"): 1024 * int(fields[1]) for fields in lines}


def anonymous_bytes_of_tree(pid: int | str = "self") -> int:
    """Return the anonymous bytes of a process and its children.

    Pages that they share after a fork count for each.
    """
    return sum(
        1024 * int(line.split()[1])
        for each in tree(pid)
        for line in _read(each / "status").splitlines()
        if line.startswith("RssAnon")
    )


def cpu_seconds_of_tree(pid: int) -> float:
    """Return the CPU time of a process, its threads and children, ended ones too, which other load
    hardly changes.
    """
    fields = [_read(each / "stat").rpartition(")")[2].split() for each in tree(pid)]
    ticks = sum(int(number) for each in fields for number in each[11:15])
    return ticks / os.sysconf("SC_CLK_TCK")


def tree(pid: int | str) -> list[Path]:
    """Return the directories below /proc of a process and its children."""
    process = Path("/proc", str(pid))
    children = [
        child for task in process.glob("task/*") for child in _read(task / "children").split()
    ]
    return [process, *(each for child in children for each in tree(child))]


def _read(path: Path) -> str:
    """Return what a file below /proc says; nothing where the process has just ended."""
    try:
        return path.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
