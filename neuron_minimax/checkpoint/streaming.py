"""Streaming of files larger than memory: tasks on all cores, and what is left in the page cache.

Tasks run in forked processes, because numpy's short calls make threads wait for the interpreter's
lock. They are inherited, not sent, so anything may be in them; what they return is pickled. The
children run numpy and system calls alone: safe after a fork, whatever the caller has loaded.

A stream that fits into memory stays in the page cache, so that the next command is fast; a larger
one leaves nothing, so that it does not push out other programs' files.
"""

import gc
import os
import signal
import sys
import traceback
import warnings
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Protocol, TypeVar

from neuron_minimax.errors import NeuronMiniMaxError
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.processes import end_with_parent, first_signal_noted

Result = TypeVar("Result")
WORKERS = min(8, os.cpu_count() or 1)  # eight stream faster than disks
PARALLEL_FROM = 64 << 20  # bytes; less is streamed before processes have started
NUMBER_BYTES = 8
WINDOW = 512 << 20  # bytes streamed between two droppings


def in_processes(
    tasks: Sequence[Callable[[], Result]], nbytes: int, at_once: int = 1
) -> Generator[Result, None, None]:
    """Yield what the tasks return, in their order; each process takes the next one when it is free.

    Up to `at_once` are taken, and reported on, together, since each report costs time. When they
    stream few bytes, all is done in the caller's process. A task's exception is raised here, in its
    turn; NeuronMiniMaxError when a process is killed. Leaving the iterator ends the processes.
    """
    workers = min(WORKERS, len(tasks))
    if workers <= 1 or nbytes < PARALLEL_FROM:
        for task in tasks:
            yield task()
        return
    at_once = min(at_once, ceil_div(len(tasks), 4 * workers))  # so that all have some until the end
    children: dict[Connection, int] = {}
    with TemporaryFile() as queue:  # all processes read it through one file position
        queue.write(array("q", range(len(tasks))))
        queue.seek(0)  # which writes it, too
        try:
            # An interruption amidst would leave a process out, or be raised in one.
            with first_signal_noted():
                for _ in range(workers):
                    reader, writer = Pipe(duplex=False)
                    children[reader] = _fork(
                        tasks, at_once, queue.fileno(), writer, [*children, reader]
                    )
                    writer.close()
            yield from _in_order(children, len(tasks))
        finally:
            for child in children.values():
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            for reader in children:
                reader.close()


def _fork(
    tasks: Sequence[Callable[[], Any]],
    at_once: int,
    queue: int,
    writer: Connection,
    others: list[Connection],
) -> int:
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # of Python 3.12: the child of a process with threads
        child = os.fork()
    if child:
        return child
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends its processes
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        end_with_parent(parent)
        gc.disable()  # collecting would copy the caller's pages
        for reader in others:
            reader.close()
        while numbers := array("q", os.read(queue, NUMBER_BYTES * at_once)):
            writer.send([(number, *_outcome(tasks[number])) for number in numbers])
        writer.send(None)
    finally:
        os._exit(0)


def _outcome(task: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return task(), None
    except Exception as error:
        error.add_note(traceback.format_exc())
        return None, error


def _in_order(children: dict[Connection, int], count: int) -> Iterator[Any]:
    found: dict[int, list[Any]] = {}  # result, exception
    working = set(children)
    for index in range(count):
        while index not in found:
            assert working, f"no process has a result of task {index}"
            for reader in wait(list(working)):
                assert isinstance(reader, Connection)
                try:
                    message = reader.recv()
                except EOFError:
                    raise NeuronMiniMaxError(
                        "a worker process was ended from outside, most likely for want of memory; "
                        "run again (a conversion or a cache goes on from what is finished)"
                    ) from None
                if message is None:
                    working.discard(reader)
                else:
                    found |= {number: outcome for number, *outcome in message}
        result, error = found.pop(index)
        if error is not None:
            raise error
        yield result


class MappedFiles(Protocol):
    """Files whose pages can be dropped."""

    def unmap(self) -> None: ...

    def drop_pages(self) -> None: ...


def too_large_to_keep(nbytes: int, available: int) -> bool:
    """True when a checkpoint would push out other programs' files: above half of the memory."""
    return nbytes > available // 2


def available_memory() -> int:
    """Bytes that can be had without swapping, page cache included (MemAvailable); no limit where it
    is not known.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return sys.maxsize
    lines = meminfo.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def drop_pages(descriptor: int) -> None:
    """Drop a file's clean pages that no process has mapped."""
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class PageDropper:
    """Drops the pages of directories behind a stream whose larger side is too large to keep."""

    def __init__(self, directories: Sequence[MappedFiles], nbytes: int) -> None:
        self.drops = too_large_to_keep(nbytes, available_memory())
        self.directories = directories if self.drops else ()
        self.passed = 0
        self.unmap()  # pages that are mapped cannot be dropped

    def unmap(self) -> None:
        """Let go of mapped files: after each task, in the process that ran it."""
        for directory in self.directories:
            directory.unmap()

    def advance(self, nbytes: int) -> None:
        """Count streamed bytes: after each result, in the caller's process."""
        self.passed += nbytes
        if self.passed >= WINDOW:
            self.passed = 0
            self.finish()

    def finish(self) -> None:
        """Drop what is left: when all is streamed."""
        for directory in self.directories:
            directory.drop_pages()
