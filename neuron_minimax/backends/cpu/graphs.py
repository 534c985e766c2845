"""The graphs of the CPU backend, by torch.export and AOTInductor; their weights stay outside.

Shapes: S slots, T tokens, C cache positions, V vocabulary, H hidden.
"""

import io
import json
import os
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from neuron_minimax.backends.cpu.compiling import FinishedGraphs, GraphCompilers, doing
from neuron_minimax.backends.cpu.options import EXPORTED, KERNELS, CPUOptions
from neuron_minimax.kernels.cpu.library import compiler, copy_built
from neuron_minimax.kernels.cpu.operators import attend, expert_mlp, linear
from neuron_minimax.kernels.reference import KV_CACHE_DTYPES
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import COMPUTE_DTYPES, Decoder
from neuron_minimax.model.layers import Kernels
from neuron_minimax.progress import Progress


class WithState(nn.Module):
    """A module as a function of its state: `forward(state, inputs)`; buffers are written in
    place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)  # not as a submodule, whose weights would be the graph's own

    def forward(self, state: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Any:
        return torch.func.functional_call(self.held[0], state, inputs)


@dataclass(frozen=True)
class Inputs:
    """Example inputs of a graph; the first dimension of the first one may be 2 to `longest`."""

    examples: tuple[torch.Tensor, ...]
    longest: int = 0

    @property
    def shapes(self) -> tuple[dict[int, Any], ...]:
        """What `torch.export.export` takes as dynamic_shapes."""
        first: dict[int, Any] = {}
        if self.longest > 2:
            first = {0: torch.export.Dim("tokens", min=2, max=self.longest)}
        return (first, *({} for _ in self.examples[1:]))


def save_exported(module: nn.Module, inputs: Inputs, path: Path) -> None:
    """Export `module` for these inputs to `path`."""
    state = module.state_dict()
    shapes = {"state": dict.fromkeys(state, None), "inputs": inputs.shapes}
    with torch.no_grad():
        program = torch.export.export(
            WithState(module), (state, inputs.examples), dynamic_shapes=shapes
        )
    program.example_inputs = None  # they would be saved too, and the weights are among them
    torch.export.save(program, path)


def load_exported(data: bytes, state: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """The graph over these tensors themselves, from its file's bytes."""
    graph = torch.export.load(io.BytesIO(data)).module()
    return lambda *inputs: graph(state, inputs)


def save_compiled(
    module: nn.Module,
    inputs: Inputs,
    path: Path,
    exported: Callable[[], None] = lambda: None,
) -> None:
    """Compile `module` for these inputs to a library, `path` with .so appended, and to a
    description of the operators that it calls, .json; `exported` is called between the two.
    """
    with torch.no_grad():
        program = torch.export.export(module, inputs.examples, dynamic_shapes=inputs.shapes)
        exported()
        package = torch._inductor.aoti_compile_and_package(
            program, package_path=f"{path}.pt2", inductor_configs=INDUCTOR_OPTIONS
        )
    with zipfile.ZipFile(package) as archive:
        names = archive.namelist()
        (library,) = (name for name in names if name.endswith(LIBRARY))
        for suffix in (LIBRARY, OPERATORS_CALLED):
            content = archive.read(library.removesuffix(LIBRARY) + suffix)
            path.with_name(path.name + suffix).write_bytes(content)
    os.unlink(package)


TOKEN_GENERATION = "token_generation"
CONTEXT_ENCODING = "context_encoding"
GRAPHS = (TOKEN_GENERATION, CONTEXT_ENCODING)
LIBRARY = ".so"
OPERATORS_CALLED = ".json"
SUFFIXES = {"compiled": (LIBRARY, OPERATORS_CALLED), "exported": (EXPORTED,)}
OPERATORS = Kernels(linear=linear, attend=attend, expert_mlp=expert_mlp)
INDUCTOR_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.precompile_headers": False,  # pays for more graphs than one compile has
}


class OneSlotRead(KVCache):
    """A KVCache of which one slot is read, without a copy: it is a number, not a tensor's rows."""

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        lengths: torch.Tensor,
        slot: int,
    ) -> None:
        super().__init__(keys, values, lengths)
        self.slot = slot

    def read(
        self, layer: int, rows_B: torch.Tensor | None, filled: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [1,K,filled,D] of the slot."""
        keys, values = (
            each[layer].narrow(0, self.slot, 1)[:, :, :filled] for each in (self.keys, self.values)
        )
        return keys, values


class SlotCache(nn.Module):
    """The cache of all slots as buffers of a graph: [S,K,C+1,D] per layer; writes of padding go to
    position C.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self.register_buffer(f"keys_{layer}", keys)
            self.register_buffer(f"values_{layer}", values)

    def view(self, slot_1: torch.Tensor | None = None) -> KVCache:
        """The cache, of which `slot_1` alone is read where that is given."""
        count = len(list(self.buffers())) // 2
        keys = [self.get_buffer(f"keys_{layer}") for layer in range(count)]
        values = [self.get_buffer(f"values_{layer}") for layer in range(count)]
        lengths = torch.zeros(keys[0].shape[0], dtype=torch.int64)
        if slot_1 is None:
            return KVCache(keys, values, lengths)
        slot = cast(int, slot_1.item())
        torch._check(slot >= 0)
        torch._check(slot < len(lengths))
        return OneSlotRead(keys, values, lengths, slot)


class Graph(nn.Module):
    """A model with its slots' cache; `seq_len` positions per slot."""

    def __init__(self, model: Decoder, cache: KVCache, seq_len: int) -> None:
        super().__init__()
        self.model = model
        self.cache = SlotCache(cache)
        self.seq_len = seq_len

    def filled(self, positions: torch.Tensor) -> int:
        """The number of cache positions that attention reads, a size that varies by call.

        `positions` is a tensor of one element.
        """
        filled = cast(int, positions.item())  # int() would fix it when the graph is exported
        torch._check(filled >= 1)
        torch._check(filled <= self.seq_len)
        return filled


class TokenGeneration(Graph):
    """One token for every slot."""

    def forward(
        self, tokens_S: torch.Tensor, positions_S: torch.Tensor, active_S: torch.Tensor
    ) -> torch.Tensor:
        """Logits [S,V] float32; slots that are not active write to the spare position and reach no
        expert.
        """
        positions_S1 = torch.where(active_S, positions_S, self.seq_len)[:, None]
        filled = self.filled(torch.where(active_S, positions_S, 0).max() + 1)
        hidden_S1H, _ = self.model.hidden_states(
            tokens_S[:, None],
            positions_S1,
            cache=self.cache.view(),
            filled=filled,
            real_BT=active_S[:, None] if len(active_S) > 1 else None,
            kernels=OPERATORS,
        )
        return self.model.logits(hidden_S1H[:, 0], OPERATORS).float()


class ContextEncoding(Graph):
    """T tokens of one slot, 2 or more."""

    def forward(
        self,
        ids_T: torch.Tensor,
        slot_1: torch.Tensor,
        start_1: torch.Tensor,
        count_1: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [V] float32 of token count - 1, and the final hidden states [T,H]; tokens from
        `count` are padding.
        """
        offset_T = torch.arange(ids_T.shape[0])
        real_T = offset_T < count_1
        positions_T = torch.where(real_T, start_1 + offset_T, self.seq_len)
        hidden_1TH, _ = self.model.hidden_states(
            ids_T[None],
            positions_T[None],
            cache=self.cache.view(slot_1),
            rows_B=slot_1,
            filled=self.filled(start_1 + count_1),
            real_BT=real_T[None],
            kernels=OPERATORS,
        )
        last_1H = hidden_1TH[0][count_1 - 1]
        return self.model.logits(last_1H, OPERATORS)[0].float(), hidden_1TH[0]


def build_graphs(
    model_directory: Path, graphs: Path, options: CPUOptions, progress: Progress
) -> dict[str, float]:
    """Make the files of every graph in `graphs`, each in a process of its own, as many at a time as
    there are cores; those that an interrupted compile has finished there are kept.

    Beside them the kernels that graphs call are built here, where there is a compiler.

    Returns file name to seconds. Raises BackendError with the last line of what a failing compile
    said; an interruption gets a note that says how many graphs are kept.
    """
    finished = FinishedGraphs(graphs, SUFFIXES[options.engine])
    missing = [name for name in GRAPHS if name not in finished]
    if len(missing) < len(GRAPHS):
        kept = [name for name in GRAPHS if name in finished]
        progress(f"kept of an interrupted compile: {', '.join(kept)}")
    of_kernels: dict[str, float] = {}
    threads = max(1, min(len(missing), os.cpu_count() or 1))
    try:
        with ThreadPoolExecutor(threads) as pool, GraphCompilers(finished) as compilers:
            running = [
                pool.submit(compilers.run, model_directory, options, name, progress)
                for name in missing
            ]
            if compiler():
                with progress.stage("kernels"):
                    started = time.monotonic()
                    copy_built(graphs / KERNELS)
                    of_kernels[KERNELS] = time.monotonic() - started
            for future in as_completed(running):
                future.result()
    except KeyboardInterrupt as stop:
        kept = [name for name in GRAPHS if name in finished]
        stop.add_note(f"{len(kept)} of {len(GRAPHS)} graphs are finished and kept")
        raise
    seconds = finished.seconds()
    files = [name + suffix for suffix in SUFFIXES[options.engine] for name in GRAPHS]
    return of_kernels | {file: seconds[file] for file in files}


def build_graph(model_directory: Path, graphs: Path, options: CPUOptions, name: str) -> None:
    """Export one graph into `graphs`, and compile it unless the exported one is asked for."""
    doing("reading the model")
    compute = COMPUTE_DTYPES[options.compute]
    model = Decoder.from_converted(model_directory, compute=compute, byte_codes=True)
    dtype = KV_CACHE_DTYPES[options.cache_dtype]
    cache = KVCache.allocate(model.config, options.slots, options.seq_len + 1, dtype)
    graph, inputs = all_graphs(model, cache, options)[name]
    doing("exporting")
    if options.engine == "exported":
        save_exported(graph, inputs, graphs / (name + EXPORTED))
    else:
        save_compiled(graph, inputs, graphs / name, lambda: doing("writing C++ and compiling it"))


def all_graphs(
    model: Decoder, cache: KVCache, options: CPUOptions
) -> dict[str, tuple[Graph, Inputs]]:
    """The graphs by name, and their inputs."""
    slots = options.slots
    step = (
        torch.zeros(slots, dtype=torch.int64),
        torch.arange(slots),
        torch.ones(slots, dtype=torch.bool),
    )
    longest = max(2, options.buckets[-1])
    piece = (
        torch.zeros(longest, dtype=torch.int64),
        torch.tensor([0]),
        torch.tensor([0]),
        torch.tensor([options.buckets[-1]]),
    )
    return {
        TOKEN_GENERATION: (TokenGeneration(model, cache, options.seq_len), Inputs(step)),
        CONTEXT_ENCODING: (
            ContextEncoding(model, cache, options.seq_len),
            Inputs(piece, longest),
        ),
    }


def load_graph(
    read: Callable[[str], bytes], engine: str, name: str, state: dict[str, torch.Tensor]
) -> Callable[..., Any]:
    """The graph over these tensors themselves: no copy of the weights, the cache written in place.

    `read` gives the bytes of a file of the compiled directory.
    """
    if engine == "exported":
        return load_exported(read(name + EXPORTED), state)
    return _Library(read(name + LIBRARY), read(name + OPERATORS_CALLED), state)


class _Library:
    """The function of torch._inductor.aoti_load_package, without importing or probing the compiler.

    That this machine is the one that compiled is the manifest's business. The loader opens files by
    their names: it gets the bytes that were checked, where nobody else can write.
    """

    def __init__(self, library: bytes, operators: bytes, state: dict[str, torch.Tensor]) -> None:
        with tempfile.TemporaryDirectory(prefix="neuron-minimax-") as directory:
            path = Path(directory, "graph" + LIBRARY)
            path.write_bytes(library)
            path.with_suffix(OPERATORS_CALLED).write_bytes(operators)
            self.runner = torch._C._aoti.AOTIModelContainerRunnerCpu(str(path), 1)
        names = self.runner.get_constant_names_to_original_fqns()
        # The runner keeps addresses only.
        self.state = {name: state[original] for name, original in names.items()}
        self.runner.update_constant_buffer(self.state, False, True, True)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        outputs = self.runner.run(list(inputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


if __name__ == "__main__":
    build_graph(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        CPUOptions.parse(json.loads(sys.argv[3])),
        sys.argv[4],
    )
