"""The server's log: JSON lines on standard error, whoever writes them, and never a flood."""

import json
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOBase
from typing import Any, NamedTuple, TextIO

# So many lines of a kind are written within so many seconds; what is beyond is counted.
INTERVAL = 10.0
REQUESTS_PER_INTERVAL = 100
WARNINGS_PER_INTERVAL = 10
LONGEST_LINE = 1 << 16


class JsonLogFormatter(logging.Formatter):
    """One JSON object per line; fields come from the record's `fields`.

    Lines are ASCII, so that neither the stream's encoding nor a terminal changes one.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": f"{record.created:.3f}",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Kind(NamedTuple):
    """What lines that count together have in common: a place in the code, and how it went."""

    logger: str
    level: int
    source_line: int
    exception: str | None
    status: int | None


@dataclass
class _Count:
    """The lines of one kind in an interval that began at `since`, in the clock's seconds."""

    event: str
    since: float
    written: int = 0
    left_out: int = 0


class LimitedHandler(logging.Handler):
    """Writes few lines of a kind per INTERVAL to `stream`: fewer warnings and errors than others.

    How many were left out is written with the first line of any kind after the interval, and at the
    end. `clock` returns seconds.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self.setFormatter(JsonLogFormatter())
        self._stream = stream
        self._clock = clock
        self._counts: dict[_Kind, _Count] = {}

    def emit(self, record: logging.LogRecord) -> None:
        now = self._clock()
        self._end_intervals(now - INTERVAL)
        fault = record.exc_info[0] if record.exc_info else None
        kind = _Kind(
            record.name,
            record.levelno,
            record.lineno,
            fault.__name__ if fault else None,
            getattr(record, "fields", {}).get("status"),
        )
        count = self._counts.setdefault(kind, _Count(str(record.msg)[:200], now))
        warns = record.levelno >= logging.WARNING
        if count.written < (WARNINGS_PER_INTERVAL if warns else REQUESTS_PER_INTERVAL):
            count.written += 1
            self._write(record)
        else:
            count.left_out += 1

    def close(self) -> None:
        self.acquire()
        try:
            self._end_intervals(self._clock())
        finally:
            self.release()
        super().close()

    def _end_intervals(self, until: float) -> None:
        """Forget the intervals that began by `until`; write what each has left out."""
        ended = [kind for kind, count in self._counts.items() if count.since <= until]
        for kind in ended:
            count = self._counts.pop(kind)
            if count.left_out:
                fields = {"like": count.event, "left_out": count.left_out} | kind._asdict()
                del fields["level"]
                record = logging.LogRecord(
                    __name__, kind.level, __file__, 0, "lines left out", None, None
                )
                record.fields = fields
                self._write(record)

    def _write(self, record: logging.LogRecord) -> None:
        try:
            self._stream.write(self.format(record) + "\n")
            self._stream.flush()
        except (OSError, ValueError):  # a full disk, a closed stream: the server goes on without
            pass


class _Printed(TextIOBase):
    """Takes the place of sys.stderr, and makes records of the lines that are printed there."""

    def __init__(self) -> None:
        self._begun = threading.local()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        begun = getattr(self._begun, "line", "") + text.replace("\r", "\n")
        *lines, rest = begun.split("\n")
        if len(rest) > LONGEST_LINE:
            lines.append(rest)
            rest = ""
        self._begun.line = rest
        for line in lines:
            if line.strip():
                logging.getLogger("stderr").warning("%s", line)
        return len(text)


def _log_fault(of: Any) -> None:
    """Log what a thread or a finalizer raised and nobody caught."""
    where = getattr(of, "err_msg", None) or "Exception in a thread"
    fault = (of.exc_type, of.exc_value, of.exc_traceback)
    logging.getLogger("python").error("%s", where, exc_info=fault)


@contextmanager
def json_log(stream: TextIO) -> Iterator[None]:
    """Write all that a server says to `stream` as one JSON object per line, until the block ends.

    That is the records of all loggers (a library's from warnings on), Python's warnings, faults of
    threads and finalizers, and what is printed to sys.stderr.
    """
    handler = LimitedHandler(stream)
    printed = _Printed()
    root = logging.getLogger()
    ours = logging.getLogger("neuron_minimax")
    hooks = (threading.excepthook, sys.unraisablehook)
    before = (root.handlers, root.level, ours.level, sys.stderr)
    of_libraries = _handlers_of(sys.stderr)
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    ours.setLevel(logging.INFO)
    logging.captureWarnings(True)
    threading.excepthook = _log_fault
    sys.unraisablehook = _log_fault
    sys.stderr = printed  # type: ignore[assignment]
    for library in of_libraries:
        library.setStream(printed)  # type: ignore[arg-type]
    try:
        yield
    finally:
        root.handlers, root.level, ours.level, sys.stderr = before
        threading.excepthook, sys.unraisablehook = hooks
        logging.captureWarnings(False)
        for library in of_libraries:
            library.setStream(sys.stderr)
        handler.close()


def _handlers_of(stream: TextIO) -> list["logging.StreamHandler[TextIO]"]:
    """Return the handlers of single loggers that write to `stream`, as some libraries have them."""
    loggers = [
        logger
        for logger in logging.getLogger().manager.loggerDict.values()
        if isinstance(logger, logging.Logger)
    ]
    return [
        handler
        for logger in loggers
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is stream
    ]
