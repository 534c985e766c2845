"""One rank: a process that holds its part of the model on its device, and does what it is told.

It is started by group.py, and is the one place that TorchNeuron is imported in. It ends with the
process that has started it, and takes along what compilers it runs.
"""

import io
import mmap
import os
import queue
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from neuron_minimax.backends.base import LOGIT_ROWS
from neuron_minimax.backends.torch_neuron.graphs import (
    ContextEncoding,
    CopySlot,
    Logits,
    TokenGeneration,
    slot_cache,
)
from neuron_minimax.backends.torch_neuron.group import RankTask
from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError, NeuronMiniMaxError
from neuron_minimax.model.decoder import COMPUTE_DTYPES
from neuron_minimax.model.parallel import Shard

BACKENDS = {"neuron": "neuron", "cpu": "inductor"}  # of torch.compile
GROUPS = {"neuron": "neuron", "cpu": "gloo"}  # of torch.distributed
MOST_GRAPHS = 64  # of one function: a bucket is a graph

Tell = Callable[[str], None]


class Rank:
    """A rank's graphs over its cache. Each call's arguments are numbers; logits are written into
    `answer` [R,V] by the first rank.
    """

    def __init__(self, task: RankTask, answer: torch.Tensor, tell: Tell) -> None:
        self.task = task
        self.options = task.options
        self.answer = answer if task.rank == 0 else None
        if task.manifest is not None and self.options.engine == "compiled":
            _unpack(task)
        if self.options.device == "neuron":
            import torch_neuronx  # noqa: F401  # which registers the device
        self.device = torch.device(self.options.device)
        tell("reading the weights")
        loaded = load_rank(task.model, self._joined(), COMPUTE_DTYPES[self.options.compute])
        self.bytes_read = loaded.bytes_read
        self.model = loaded.model.to(self.device)
        cache = slot_cache(self.model, self.options.slots, self.options.seq_len)
        self.hidden_TH = torch.zeros(())
        self.step = self._compiled(TokenGeneration(self.model, cache))
        self.encode = self._compiled(ContextEncoding(self.model, cache))
        self.head = self._compiled(Logits(self.model, cache))
        self.copying = self._compiled(CopySlot(self.model, cache))
        if self.options.engine == "compiled":
            self._call_each(tell)

    def _joined(self) -> Shard:
        """This rank's share, after the group of all ranks has met."""
        options = self.options
        config = ModelConfig.from_dir(self.task.model)
        group = ""
        if options.tp_degree > 1:
            store = dist.FileStore(str(self.task.scratch / "store"), options.tp_degree)
            dist.init_process_group(
                GROUPS[options.device],
                store=store,
                rank=self.task.rank,
                world_size=options.tp_degree,
            )
            assert dist.group.WORLD is not None, "it has met"
            group = dist.group.WORLD.group_name
        degrees = (options.tp_degree, options.moe_ep_degree)
        return shard_of(config, self.task.rank, *degrees, group)

    def _compiled(self, graph: nn.Module) -> Callable[..., Any]:
        if self.options.engine == "eager":
            return graph
        backend = BACKENDS[self.options.device]
        compiled: Callable[..., Any] = torch.compile(
            graph, backend=backend, fullgraph=True, dynamic=False
        )
        return compiled

    def _call_each(self, tell: Tell) -> None:
        """Call every graph once, which is when it is compiled, or found to be. From then on another
        graph is an error: it would take minutes amid an answer.
        """
        torch._dynamo.config.recompile_limit = MOST_GRAPHS
        tell("token_generation")
        self.do_step([0] * self.options.slots, [0] * self.options.slots, [False])
        for bucket in self.options.buckets:
            tell(f"context_encoding_{bucket}")
            self.do_encode(0, [0] * bucket, 0)
        tell("logits")
        self.do_logits(0, 1)
        tell("copy")
        self.do_copy(0, 0, 0, 0)
        torch.compiler.set_stance("fail_on_recompile")

    def do_step(self, tokens: list[int], positions: list[int], active: list[bool]) -> None:
        """Token generation of all slots; the answer is [S,V]."""
        active = active * self.options.slots if len(active) == 1 else active
        inputs = (self._tensor(tokens), self._tensor(positions), self._tensor(active))
        self._put(self.step(*inputs), len(tokens))

    def do_encode(self, slot: int, ids: list[int], start: int) -> None:
        """Context encoding; the answer is [1,V], of the last token."""
        bucket = next(size for size in self.options.buckets if len(ids) <= size)
        ids_T = self._tensor(ids + [0] * (bucket - len(ids)))
        place = (self._tensor([slot]), self._tensor([start]), self._tensor([len(ids)]))
        logits_V, self.hidden_TH = self.encode(ids_T, *place)
        self._put(logits_V, 1)

    def do_logits(self, start: int, stop: int) -> None:
        """Logits of positions of the last encode: the answer is [stop - start,V]."""
        self.hidden_TH = self.hidden_TH.cpu()  # once, for all that is asked of an encode
        hidden_RH = self.hidden_TH[start:stop]
        padded_RH = F.pad(hidden_RH, (0, 0, 0, LOGIT_ROWS - len(hidden_RH)))
        self._put(self.head(padded_RH.to(self.device)), stop - start)

    def do_copy(self, source: int, target: int, start: int, end: int) -> None:
        self.copying(*(self._tensor([value]) for value in (source, target, start, end)))

    def _tensor(self, values: Iterable[int]) -> torch.Tensor:
        return torch.tensor(list(values)).to(self.device)

    def _put(self, logits: torch.Tensor, rows: int) -> None:
        """Answer the first rows. They are cut out on the host, as is all beside the graphs: each
        shape would be one more thing to compile for a device.
        """
        if self.answer is not None:
            self.answer[:rows] = logits.cpu().reshape(-1, self.answer.shape[1])[:rows]

    def packed(self) -> str:
        """What the compiler has kept of this rank's graphs, as one file of `graphs`; its name."""
        path = self.task.graphs / archive_name(self.task.rank)
        with tarfile.open(path, "w") as archive:
            for kept in sorted(self.task.caches.rglob("*")):
                if kept.is_file():
                    archive.add(kept, kept.relative_to(self.task.caches))
        return path.name


def archive_name(rank: int) -> str:
    return f"rank_{rank}.tar"


def _unpack(task: RankTask) -> None:
    """Give the compiler what it has made; it makes again what it does not know. Raises BackendError
    unless the file is the one that was compiled.
    """
    assert task.manifest is not None, "it is loaded"
    name = archive_name(task.rank)
    data = task.manifest.read_graph(task.graphs, name)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.extractall(task.caches, filter="data")


class Process:
    """The calls that come, one after another, and their answers."""

    def __init__(self, pipe: Connection, memory: int, scratch: str) -> None:
        self.pipe = pipe
        self.memory = memory
        self.scratch = scratch
        self.calls: queue.SimpleQueue[tuple[int, str, tuple[Any, ...]]] = queue.SimpleQueue()
        self.rank: Rank | None = None

    def receive(self) -> None:
        """Take calls until the pipe ends: then all ends that this process has started. The process
        that has made the scratch directory was killed, and has left it.
        """
        try:
            while True:
                self.calls.put(self.pipe.recv())
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            os.killpg(os.getpgrp(), signal.SIGKILL)

    @torch.no_grad()
    def run(self) -> None:
        """Answer calls, for ever. What fails is answered too; group.py ends the ranks then."""
        while True:
            number, name, arguments = self.calls.get()
            try:
                value = self.start(number, *arguments) if name == "start" else None
                if name != "start":
                    assert self.rank is not None, "it has started"
                    value = getattr(self.rank, f"do_{name}")(*arguments)
                self.pipe.send((number, "done", value))
            except NeuronMiniMaxError as error:
                self.pipe.send((number, "refused", str(error)))
            except Exception as error:  # of torch, or of a compiler
                said = str(error).strip().splitlines() or ["no message"]
                self.pipe.send((number, "failed", f"{type(error).__name__}: {said[0]}"))

    def start(self, number: int, task: RankTask) -> dict[str, Any]:
        """Make the rank; return the name of what was compiled, if anything was, the seconds it
        took, and the bytes of weights that were read.
        """
        started = time.monotonic()
        rows, vocab_size = task.logits
        memory = mmap.mmap(self.memory, rows * vocab_size * torch.float32.itemsize)
        answer = torch.frombuffer(memory, dtype=torch.float32).view(rows, vocab_size)
        self.rank = Rank(task, answer, lambda text: self.pipe.send((number, "doing", text)))
        made = self.rank.packed() if task.manifest is None else ""
        seconds = time.monotonic() - started
        return {"made": made, "seconds": seconds, "bytes_read": self.rank.bytes_read}


def main() -> None:
    """Run as a rank. Arguments: the pipe, the memory of logits (file descriptors), and the group's
    scratch directory.
    """
    if os.getpgrp() != os.getpid():
        raise BackendError("a rank leads its process group; load a compiled model, which starts it")
    process = Process(Connection(int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
    threading.Thread(target=process.receive, name="calls", daemon=True).start()
    process.run()
