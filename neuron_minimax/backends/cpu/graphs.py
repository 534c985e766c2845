"""The graphs of the CPU backend, by torch.export and AOTInductor; their weights stay outside.

Shapes: S slots, T tokens of a bucket, C cache positions, V vocabulary, H hidden.
"""

import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.errors import BackendError
from neuron_minimax.kernels.cpu.jit import code_of
from neuron_minimax.kernels.cpu.operators import attend, compile_loops, expert_mlp, linear
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import COMPUTE_DTYPES, Decoder
from neuron_minimax.model.layers import Kernels, Linear
from neuron_minimax.model.moe import StackedExperts


class WithState(nn.Module):
    """A module as a function of its state: `forward(state, inputs)`; buffers are written in
    place.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)  # not as a submodule, whose weights would be the graph's own

    def forward(self, state: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Any:
        return torch.func.functional_call(self.held[0], state, inputs)


def save_exported(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    """Export `module` for inputs of these shapes to `path`."""
    with torch.no_grad():
        program = torch.export.export(WithState(module), (module.state_dict(), inputs))
    program.example_inputs = None  # they would be saved too, and the weights are among them
    torch.export.save(program, path)


def load_exported(path: Path, state: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """The graph over these tensors themselves; `load_kernels` must have made its operators."""
    graph = torch.export.load(path).module()
    return lambda *inputs: graph(state, inputs)


MODULE = "neuron_minimax.backends.cpu.graphs"
TOKEN_GENERATION = "token_generation"
LOOPS = "loops.pickle"  # operator to compiled code
SUFFIXES = {"compiled": ".pt2", "exported": ".exported.pt2"}
OPERATORS = Kernels(linear=linear, attend=attend, expert_mlp=expert_mlp)
INDUCTOR_OPTIONS = {"aot_inductor.package_constants_in_so": False}


class SlotCache(nn.Module):
    """The cache of all slots as buffers of a graph: [S,K,C+1,D] per layer; writes of padding go to
    position C.
    """

    def __init__(self, cache: KVCache) -> None:
        super().__init__()
        for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):
            self.register_buffer(f"keys_{layer}", keys)
            self.register_buffer(f"values_{layer}", values)

    def view(self) -> KVCache:
        count = len(list(self.buffers())) // 2
        keys = [self.get_buffer(f"keys_{layer}") for layer in range(count)]
        values = [self.get_buffer(f"values_{layer}") for layer in range(count)]
        return KVCache(keys, values, torch.zeros(keys[0].shape[0], dtype=torch.int64))


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
    """Up to T tokens of one slot."""

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
            cache=self.cache.view(),
            rows_B=slot_1,
            filled=self.filled(start_1 + count_1),
            real_BT=real_T[None],
            kernels=OPERATORS,
        )
        last_1H = hidden_1TH[0][count_1 - 1]
        return self.model.logits(last_1H, OPERATORS)[0].float(), hidden_1TH[0]


def build_graphs(
    model_directory: Path, graphs: Path, options: CPUOptions, progress: Callable[[str], None]
) -> dict[str, float]:
    """Make the file of every graph in `graphs`, each in a process of its own, as many at a time as
    there are cores.

    Beside them the loops that graphs call are compiled here, and kept in a file too.

    Returns file name to seconds. Raises BackendError with the last line of what a failing compile
    said.
    """
    names = [TOKEN_GENERATION, *(context_name(bucket) for bucket in options.buckets)]
    seconds: dict[str, float] = {}
    with ThreadPoolExecutor(min(len(names), os.cpu_count() or 1)) as pool:
        running = {
            pool.submit(_build_in_process, model_directory, graphs, options, name): name
            for name in names
        }
        progress(f"compiling {len(names)} graphs")
        started = time.monotonic()
        model = Decoder.from_converted(model_directory, compute=COMPUTE_DTYPES[options.compute])
        operators = load_kernels(model, {})
        (graphs / LOOPS).write_bytes(
            pickle.dumps({operator: code_of(operator) for operator in operators})
        )
        of_loops = time.monotonic() - started
        progress(f"compiled the loops over FP8 codes in {of_loops:.1f} s")
        for future in as_completed(running):
            name = running[future]
            seconds[name] = future.result()
            progress(
                f"{options.engine} {name} in {seconds[name]:.1f} s ({len(seconds)} of {len(names)})"
            )
    return {LOOPS: of_loops} | {name + SUFFIXES[options.engine]: seconds[name] for name in names}


def _build_in_process(model_directory: Path, graphs: Path, options: CPUOptions, name: str) -> float:
    arguments = [str(model_directory), str(graphs), json.dumps(asdict(options)), name]
    started = time.monotonic()
    finished = subprocess.run(
        [sys.executable, "-m", MODULE, *arguments], capture_output=True, text=True, check=False
    )
    if finished.returncode:
        said = finished.stderr.strip().splitlines() or [f"exit code {finished.returncode}"]
        raise BackendError(f"compiling {name} failed: {said[-1]}")
    return time.monotonic() - started


def build_graph(model_directory: Path, graphs: Path, options: CPUOptions, name: str) -> None:
    """Export one graph, and compile it unless the exported graph is what was asked for."""
    compute = COMPUTE_DTYPES[options.compute]
    model = Decoder.from_converted(model_directory, compute=compute, byte_codes=True)
    cache = KVCache.allocate(model.config, options.slots, options.seq_len + 1, model.compute)
    graphs_by_name = {
        each: (graph, inputs) for each, graph, inputs in all_graphs(model, cache, options)
    }
    graph, inputs = graphs_by_name[name]
    path = graphs / (name + SUFFIXES[options.engine])
    if options.engine == "exported":
        save_exported(graph, inputs, path)
        return
    with torch.no_grad():
        program = torch.export.export(graph, inputs)
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(path), inductor_configs=INDUCTOR_OPTIONS
        )


def all_graphs(
    model: Decoder, cache: KVCache, options: CPUOptions
) -> list[tuple[str, Graph, tuple[torch.Tensor, ...]]]:
    """(name, module, example inputs) of token generation and of context encoding per bucket."""
    slots = options.slots
    step = (
        torch.zeros(slots, dtype=torch.int64),
        torch.arange(slots),
        torch.ones(slots, dtype=torch.bool),
    )
    graphs: list[tuple[str, Graph, tuple[torch.Tensor, ...]]] = [
        (TOKEN_GENERATION, TokenGeneration(model, cache, options.seq_len), step)
    ]
    for bucket in options.buckets:
        inputs = (
            torch.zeros(bucket, dtype=torch.int64),
            torch.tensor([0]),
            torch.tensor([0]),
            torch.tensor([bucket]),
        )
        graphs.append(
            (context_name(bucket), ContextEncoding(model, cache, options.seq_len), inputs)
        )
    return graphs


def context_name(bucket: int) -> str:
    return f"context_encoding_{bucket}"


def load_kernels(model: Decoder, code: Mapping[str, bytes]) -> list[str]:
    """Make the operators that this model's graphs call, from `code` where it has them compiled.

    Returns their names.
    """
    linears = {module.weight.dtype for module in model.modules() if isinstance(module, Linear)}
    if model.lm_head is None:
        linears.add(model.embed_tokens.weight.dtype)
    experts = {
        module.gate_up_proj.weight.dtype
        for module in model.modules()
        if isinstance(module, StackedExperts)
    }
    return compile_loops(model.compute, linears, experts, code)


def load_graph(graphs: Path, name: str, state: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """The graph over these tensors themselves: no copy of the weights, the cache written in
    place.
    """
    compiled = graphs / (name + SUFFIXES["compiled"])
    if not compiled.exists():
        return load_exported(graphs / (name + SUFFIXES["exported"]), state)
    return _Package(compiled, state)


class _Package:
    """The function of torch._inductor.aoti_load_package, without importing or probing the compiler.

    That this machine is the one that compiled is the manifest's business.
    """

    def __init__(self, path: Path, state: dict[str, torch.Tensor]) -> None:
        self.loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        self.state = {
            name: state[name] for name in self.loader.get_constant_fqns()
        }  # the loader keeps addresses only
        self.loader.load_constants(self.state, False, True, True)

    def __call__(self, *inputs: torch.Tensor) -> Any:
        outputs = self.loader.run(list(inputs))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


if __name__ == "__main__":
    build_graph(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        CPUOptions.parse(json.loads(sys.argv[3])),
        sys.argv[4],
    )
