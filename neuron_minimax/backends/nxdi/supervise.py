"""A long command in a process of its own: its log kept, a line of progress each minute, a time
limit.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from neuron_minimax.errors import BackendError
from neuron_minimax.processes import bound

PROGRESS_SECONDS = 60.0
SHOWN_LINES = 20


def run_supervised(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    progress: Callable[[str], None],
    *,
    limit: float,
    interval: float = PROGRESS_SECONDS,
    what: str = "the compile",
) -> float:
    """Run to the end and return the seconds it took; `what` names the command in messages.

    Raises BackendError with the log's last lines when it fails or is stopped after `limit` seconds;
    the command's own children (the compiler's) end with it, and all with this process, however it
    ends.
    """
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            bound(command),
            env=dict(environment),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                passed = time.monotonic() - start
                if passed >= limit:
                    raise BackendError(
                        f"{what} was stopped after {limit:.0f} seconds; its log is "
                        f"{log}:\n{last_lines(log)}"
                    )
                try:
                    process.wait(min(interval, limit - passed))
                except subprocess.TimeoutExpired:
                    progress(progress_line(time.monotonic() - start, log))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode:
        raise BackendError(
            f"{what} failed with exit code {process.returncode}; its log is "
            f"{log}:\n{last_lines(log)}"
        )
    return time.monotonic() - start


def progress_line(seconds: float, log: Path) -> str:
    last = last_lines(log, 1)
    return f"{seconds / 60:.0f} min: {last[:160] or 'nothing logged yet'}"


def last_lines(log: Path, count: int = SHOWN_LINES) -> str:
    """The last lines of a log that another process is writing."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join([line for line in lines if line.strip()][-count:])
