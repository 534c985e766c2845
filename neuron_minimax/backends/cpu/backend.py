"""The engines of the CPU backend: eager, and over compiled or exported graphs; how each is made."""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.backends.base import LOGIT_ROWS, Backend, Capabilities
from neuron_minimax.backends.cpu import graphs as cpu_graphs
from neuron_minimax.backends.cpu.options import EXPORTED, KERNELS, CPUOptions
from neuron_minimax.backends.manifest import Manifest
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, counted
from neuron_minimax.kernels.cpu import library
from neuron_minimax.kernels.cpu.library import compiler
from neuron_minimax.kernels.reference import KV_CACHE_DTYPES
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import COMPUTE_DTYPES, Decoder
from neuron_minimax.progress import Progress

TESTED_TORCH = (2, 13)
EAGER_AS_ASKED = "eager engine, as asked: nothing was compiled"
EXPORTED_AS_ASKED = "exported graphs, as asked: they run uncompiled"
NO_COMPILER = (
    "no C++ compiler (g++, or $CXX) was found: the exported graphs run instead of compiled ones, "
    "and torch instead of the kernels, which expands every weight that it reads"
)
# of malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3


class CPUBackend(Backend):
    """Slots that are rows of one cache."""

    cache: KVCache

    def reset(self, slot: int) -> None:
        """Nothing to do: a position is written before it is read, whatever a slot held before."""
        self._check_slot(slot)

    @torch.inference_mode()
    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        for buffer in self.cache.keys + self.cache.values:
            buffer[target, :, start:end] = buffer[source, :, start:end]


class EagerBackend(CPUBackend):
    """The model as it is, over one cache with a row per slot."""

    def __init__(self, model: Path | Converted, options: CPUOptions) -> None:
        self.model_directory = model.directory if isinstance(model, Converted) else model
        self.model = Decoder.from_converted(model, compute=COMPUTE_DTYPES[options.compute])
        self.config = self.model.config
        self.capabilities = capabilities_of(options, self.config.vocab_size)
        self.cache = cache_for(self.model, options, options.seq_len)

    @torch.inference_mode()
    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        hidden_TH = self._encode_hidden(slot, ids, start)
        logits_TV = self._head(hidden_TH if all_positions else hidden_TH[-1:])
        return logits_TV if all_positions else logits_TV[0]

    def _encode_rows(self, slot: int, ids: list[int], start: int) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            hidden_TH = self._encode_hidden(slot, ids, start)
        yield from rows_of(hidden_TH, self._head)

    @torch.inference_mode()
    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        logits_SV = torch.zeros(self.capabilities.slots, self.capabilities.vocab_size)
        rows = active.nonzero().flatten()
        if len(rows):
            hidden_BTH = self._run(tokens[rows, None], positions[rows, None], rows)
            logits_SV[rows] = self._head(hidden_BTH[:, 0])
        return logits_SV

    def _encode_hidden(self, slot: int, ids: list[int], start: int) -> torch.Tensor:
        positions_BT = torch.arange(start, start + len(ids))[None]
        return self._run(torch.tensor([ids]), positions_BT, torch.tensor([slot]))[0]

    def _run(
        self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, rows_B: torch.Tensor
    ) -> torch.Tensor:
        filled = int(positions_BT.max()) + 1
        hidden_BTH, _ = self.model.hidden_states(
            ids_BT, positions_BT, cache=self.cache, rows_B=rows_B, filled=filled
        )
        return hidden_BTH

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden).float()


class CompiledBackend(CPUBackend):
    """Slots over compiled or exported graphs, which share one cache and the mapped weights."""

    def __init__(
        self, model: Converted, read: Callable[[str], bytes], engine: str, options: CPUOptions
    ) -> None:
        """`read` gives the bytes of a compiled file; `engine` is the one that it was made for."""
        self.model_directory = model.directory
        compute = COMPUTE_DTYPES[options.compute]
        self.model = Decoder.from_converted(model, compute=compute, byte_codes=True)
        self.config = self.model.config
        self.capabilities = capabilities_of(options, self.config.vocab_size)
        self.cache = cache_for(self.model, options, options.seq_len + 1)
        self.kernels = cpu_graphs.OPERATORS
        state = cpu_graphs.Graph(self.model, self.cache, options.seq_len).state_dict()
        self.token_generation, self.context_encoding = (
            cpu_graphs.load_graph(read, engine, name, state) for name in cpu_graphs.GRAPHS
        )

    @torch.inference_mode()
    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        logits_V, hidden_TH = self._encode_piece(slot, ids, start)
        return self._head(hidden_TH) if all_positions else logits_V

    def _encode_rows(self, slot: int, ids: list[int], start: int) -> Iterator[torch.Tensor]:
        with torch.inference_mode():
            _, hidden_TH = self._encode_piece(slot, ids, start)
        yield from rows_of(hidden_TH, self._head)

    @torch.inference_mode()
    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        return self.token_generation(tokens, positions, active)

    def _encode_piece(
        self, slot: int, ids: list[int], start: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits [V] of the last position, and the hidden states [T,H] of all."""
        ids_T = torch.tensor(ids if len(ids) > 1 else [*ids, 0])  # a size of 1 is never dynamic
        place = (torch.tensor([slot]), torch.tensor([start]), torch.tensor([len(ids)]))
        logits_V, hidden_TH = self.context_encoding(ids_T, *place)
        return logits_V, hidden_TH[: len(ids)]

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden, self.kernels).float()


def rows_of(
    hidden_TH: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor]
) -> Iterator[torch.Tensor]:
    """Yield the logits [R,V] of hidden states, LOGIT_ROWS at a time.

    Inference mode is a thread's, not a generator's: it ends before each of them is given.
    """
    for hidden_RH in hidden_TH.split(LOGIT_ROWS):
        with torch.inference_mode():
            logits_RV = head(hidden_RH)
        yield logits_RV


def cache_for(model: Decoder, options: CPUOptions, positions: int) -> KVCache:
    """The empty cache of all slots. Raises BackendError when it does not fit into memory."""
    try:
        dtype = KV_CACHE_DTYPES[options.cache_dtype]
        return KVCache.allocate(model.config, options.slots, positions, dtype)
    except (RuntimeError, MemoryError):
        raise BackendError(
            f"the cache of {counted(options.slots, 'slot')} of {options.seq_len} positions does "
            "not fit into memory; compile with fewer"
        ) from None


def capabilities_of(options: CPUOptions, vocab_size: int) -> Capabilities:
    return Capabilities(
        slots=options.slots,
        seq_len=options.seq_len,
        buckets=options.buckets,
        vocab_size=vocab_size,
        chunked_encoding=True,
        all_position_logits=True,
        slot_copies=True,
        padded=False,
    )


def build(
    model: Path, graphs: Path, options: Mapping[str, Any], progress: Progress
) -> tuple[dict[str, float], list[str]]:
    """Compile graphs into `graphs`; returns file name to seconds, and notes for the manifest.

    Without a C++ compiler, or where a torch older than the tested one fails to compile, the
    exported graphs run instead, and a note says so. Raises BackendError when the tested torch
    fails.
    """
    parsed = CPUOptions.parse(options)
    if parsed.engine == "eager":
        return {}, [EAGER_AS_ASKED]
    notes = []
    try:
        if parsed.engine == "exported":
            notes = [EXPORTED_AS_ASKED if compiler() else NO_COMPILER]
        return cpu_graphs.build_graphs(model, graphs, parsed, progress), notes
    except Exception as error:  # whatever an export or a compiler may raise
        said = str(error).strip().splitlines() or ["no message"]
        problem = f"{type(error).__name__}: {said[0]}"
        version = metadata.version("torch")
        if (
            parsed.engine == "exported"
            or tuple(int(part) for part in version.split(".")[:2]) >= TESTED_TORCH
        ):
            raise BackendError(
                f"compiling for the CPU failed ({problem}); check that $CXX or g++ works, or use "
                "--engine eager"
            ) from error
        note = (
            f"torch {version} could not compile this model ({problem}): the exported graphs run "
            "instead"
        )
        exported = replace(parsed, engine="exported")
        return cpu_graphs.build_graphs(model, graphs, exported, progress), [note]


def load(model: Converted, graphs: Path, manifest: Manifest) -> Backend:
    """The backend over the weights in `model`. Raises BackendError when a graph is missing, or is
    not what the manifest says.
    """
    options = CPUOptions.parse(manifest.options, "compile again")
    _keep_freed_memory()
    if options.engine == "eager":
        return EagerBackend(model, options)
    # Where the compiler failed the exported graphs run instead.
    exported = any(name.endswith(EXPORTED) for name in manifest.graphs)
    engine = "exported" if exported else options.engine
    read = partial(manifest.read_graph, graphs)
    if engine == "compiled" or KERNELS in manifest.graphs:  # which need a compiler
        library.load(read(KERNELS))
    return CompiledBackend(model, read, engine, options)


def _keep_freed_memory() -> None:
    """Make glibc keep the scratch of a pass, which the next pass would fault in again.

    Other C libraries stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most that it takes
        mallopt(M_TRIM_THRESHOLD, 256 * 2**20)
