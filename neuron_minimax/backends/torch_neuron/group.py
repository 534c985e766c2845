"""The ranks of a group from outside: processes that are started together, get every call together,
and end together.

The process that holds a group is none of its ranks: it stays whole where a rank ends or hangs, and
has neither the device nor a process group of torch. A rank finds in its environment what torchrun
would give it.
"""

import contextlib
import mmap
import os
import signal
import socket
import subprocess
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any

import torch

from neuron_minimax.backends.manifest import Manifest
from neuron_minimax.backends.torch_neuron.options import TorchNeuronOptions
from neuron_minimax.errors import BackendError
from neuron_minimax.processes import isolated

MAIN = "from neuron_minimax.backends.torch_neuron.rank import main; main()"
SHOWN_LINES = 20  # of what a rank has printed
SHOWN_BYTES = 1 << 16
SECONDS_TO_END = 10.0  # of a process that has closed its pipe
# Where the compilers keep what they have made, by their variables: TorchNeuron's are those that
# public sources which run on it set, vLLM-Neuron's among them.
CACHES = {
    "neuron": {
        "TORCH_NEURONX_NEFF_CACHE_DIR": "neff",
        "TORCH_NEURONX_NEFF_LOCAL_CACHE_DIR": "neff_local",
        "TORCH_NEURONX_HLO_CACHE_DIR": "hlo",
    },
    "cpu": {"TORCHINDUCTOR_CACHE_DIR": "inductor"},
}


@dataclass(frozen=True, kw_only=True)
class RankTask:
    """What a rank is told first.

    manifest    of the compiled directory that it loads from; None: it compiles into `graphs`
    scratch     a directory of the group; the caches of compilers are in `caches` of it
    logits      shape of the memory that the first rank writes its answers into
    """

    rank: int
    model: Path
    graphs: Path
    options: TorchNeuronOptions
    manifest: Manifest | None
    scratch: Path
    logits: tuple[int, int]

    @property
    def caches(self) -> Path:
        return self.scratch / f"rank_{self.rank}"


class RankGroup:
    """Started ranks of one model. `logits` [R,V] float32 is what the first rank has answered last.

    One thread at a time. `close` ends all ranks, as does the end of this process, however it ends.
    """

    def __init__(
        self,
        options: TorchNeuronOptions,
        vocab_size: int,
        rows: int,
        task: Callable[[int, Path], RankTask],
        directory: Path | None = None,
    ) -> None:
        """`task` makes each rank's task, of its number and the scratch directory, which is made in
        `directory`, or where temporary ones are. Raises BackendError when a rank does not start, or
        torchrun has started this process: each of its processes would start all ranks.
        """
        if "TORCHELASTIC_RUN_ID" in os.environ:
            raise BackendError(
                "torchrun has started this command, which starts the model's ranks itself "
                f"({options.tp_degree} of them); run it without torchrun"
            )
        self.size = options.tp_degree
        self._number = 0
        self._failure: BackendError | None = None
        scratch = tempfile.TemporaryDirectory(prefix=".ranks-", dir=directory)
        place = Path(scratch.name).resolve()
        nbytes = rows * vocab_size * torch.float32.itemsize
        memory = os.memfd_create("logits")
        os.ftruncate(memory, nbytes)
        self.logits = torch.frombuffer(mmap.mmap(memory, nbytes), dtype=torch.float32)
        self.logits = self.logits.view(rows, vocab_size)
        self._ranks: list[_Process] = []
        self.close = weakref.finalize(self, _end, self._ranks, scratch)
        port = _free_port()
        try:
            for rank in range(self.size):
                environment = _environment(options, rank, place, port)
                self._ranks.append(_Process.start(environment, memory, place))
        finally:
            os.close(memory)
        self._tasks = [task(rank, place) for rank in range(self.size)]

    @property
    def failure(self) -> BackendError | None:
        """Why nothing can be asked of the ranks any more. One that has ended between two calls is
        noticed here, and ends the others.
        """
        if self._failure is None and self.close.alive:
            for rank, each in enumerate(self._ranks):
                if each.process.poll() is not None:
                    return self._failed(rank, each.ended())
        return self._failure

    def start(self, tell: Callable[[str], None] = lambda line: None) -> list[Any]:
        """Let every rank read its weights and make its graphs; return what each answers. `tell`
        hears what the first rank does. Raises BackendError when one fails.
        """
        return self._call([(task,) for task in self._tasks], "start", tell)

    def call(self, name: str, *arguments: Any) -> Any:
        """Let every rank do the same; return the first one's answer.

        Raises BackendError when one fails or has ended: then all are ended, and every later call
        raises it too.
        """
        return self._call([arguments] * self.size, name, lambda line: None)[0]

    def _call(
        self, arguments: Sequence[tuple[Any, ...]], name: str, tell: Callable[[str], None]
    ) -> list[Any]:
        if self._failure is not None:
            raise BackendError(str(self._failure))
        self._number += 1
        try:
            for each, given in zip(self._ranks, arguments, strict=True):
                with contextlib.suppress(BrokenPipeError):  # which the answer will show
                    each.pipe.send((self._number, name, given))
        except BaseException:  # an interruption: some have the call, and others have not
            self._torn()
            raise
        return self._answers(tell)

    def _answers(self, tell: Callable[[str], None]) -> list[Any]:
        """Every rank's answer to the last call; those to calls that were interrupted are left."""
        answers: dict[int, Any] = {}
        by_pipe = {each.pipe: rank for rank, each in enumerate(self._ranks)}
        while len(answers) < self.size:
            for pipe in wait(list(by_pipe)):
                assert isinstance(pipe, Connection), "only pipes are waited for"
                rank = by_pipe[pipe]
                try:
                    number, kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    raise self._failed(rank, self._ranks[rank].ended()) from None
                except BaseException:  # an interruption: what is left in the pipe may be half of it
                    self._torn()
                    raise
                if kind in ("refused", "failed"):
                    raise self._first_failure(rank, kind, value)
                if number == self._number and kind == "done":
                    answers[rank] = value
                elif kind == "doing" and rank == 0:
                    tell(value)
        return [answers[rank] for rank in range(self.size)]

    def _first_failure(self, rank: int, kind: str, said: str) -> BackendError:
        """The error of a rank that says that it failed; where another has ended, which is why
        others fail, that one's.
        """
        for other, each in enumerate(self._ranks):
            with contextlib.suppress(OSError):
                while other != rank and each.pipe.poll():
                    try:
                        each.pipe.recv()
                    except EOFError:
                        return self._failed(other, each.ended())
        if kind == "failed":
            return self._failed(rank, f"failed: {said}")
        self.close()
        self._failure = BackendError(said)
        return self._failure

    def _torn(self) -> None:
        """End ranks that an interruption has left without a common state."""
        self.close()
        self._failure = BackendError("the ranks were ended amid a call; start the command again")

    def _failed(self, rank: int, problem: str) -> BackendError:
        lines = self._ranks[rank].last_lines()
        self.close()
        of = f"rank {rank} of {self.size}" if self.size > 1 else "the model's process"
        message = f"{of} {problem}; all ranks were ended: start the command again"
        if lines:
            message += f". It had printed:\n{lines}"
        self._failure = BackendError(message)
        return self._failure


@dataclass(frozen=True)
class _Process:
    """One rank's process, the pipe to it, and what it prints."""

    process: "subprocess.Popen[bytes]"
    pipe: Connection
    printed: IO[bytes]

    @classmethod
    def start(cls, environment: dict[str, str], memory: int, scratch: Path) -> "_Process":
        """A process that leads a group of its own, so that Ctrl-C reaches it through this one."""
        ours, theirs = Pipe()
        printed = tempfile.TemporaryFile()  # noqa: SIM115  # open as long as the process is
        process = subprocess.Popen(
            isolated(MAIN, str(theirs.fileno()), str(memory), str(scratch)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=printed,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs.fileno(), memory),
            start_new_session=True,
        )
        theirs.close()
        return cls(process, ours, printed)

    def ended(self) -> str:
        """How it has ended, of a process whose pipe is closed."""
        try:
            code = self.process.wait(SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"ended with exit code {code}"

    def last_lines(self) -> str:
        size = self.printed.seek(0, os.SEEK_END)
        self.printed.seek(max(0, size - SHOWN_BYTES))
        lines = self.printed.read().decode(errors="replace").splitlines()
        return "\n".join([line for line in lines if line.strip()][-SHOWN_LINES:])


def _end(ranks: list[_Process], scratch: "tempfile.TemporaryDirectory[str]") -> None:
    """Kill every rank with all that it has started, and wait for it."""
    for each in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
    for each in ranks:
        each.process.wait()
        each.pipe.close()
        each.printed.close()
    scratch.cleanup()


def _environment(
    options: TorchNeuronOptions, rank: int, scratch: Path, port: int
) -> dict[str, str]:
    """This process's variables with those that torchrun gives a rank, and the compiler's caches."""
    size = options.tp_degree
    ours = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if options.device == "cpu":
        ours["GLOO_SOCKET_IFNAME"] = "lo"
        ours["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
        threads = max(1, (os.cpu_count() or 1) // size)
        ours["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
    for variable, name in CACHES[options.device].items():
        ours[variable] = str(scratch / f"rank_{rank}" / name)
    return os.environ | ours


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
