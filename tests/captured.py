"""A rank's graphs as torch.compile hands them to a backend, and their StableHLO where torch-mlir is
installed.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import fx, nn
from torch._decomp import core_aten_decompositions
from torch._dynamo.backends.common import aot_autograd

COLLECTIVE = "_c10d_functional"


@dataclass
class Captured:
    """The functional graphs of all calls; one, unless a call was compiled anew."""

    graphs: list[fx.GraphModule] = field(default_factory=list)

    @property
    def graph(self) -> fx.GraphModule:
        [graph] = self.graphs
        return graph

    @property
    def operators(self) -> Counter[str]:
        """Operators and how often the graph has each."""
        return Counter(
            str(node.target) for node in self.graph.graph.nodes if node.op == "call_function"
        )

    @property
    def collectives(self) -> Counter[str]:
        return Counter(
            {
                name.split(".")[1]: count
                for name, count in self.operators.items()
                if name.startswith(COLLECTIVE) and "wait" not in name
            }
        )

    @property
    def input_bytes(self) -> int:
        """Bytes of all inputs: weights, caches, tables and tokens."""
        return sum(
            node.meta["val"].nbytes for node in self.graph.graph.nodes if node.op == "placeholder"
        )


def capture(module: nn.Module) -> tuple[Callable[..., Any], Captured]:
    """The compiled module, run as captured, and what is captured when it is called.

    A break in the graph raises.
    """
    captured = Captured()

    def keep(graph: fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        captured.graphs.append(graph)
        return graph.forward

    backend = aot_autograd(fw_compiler=keep, decompositions=core_aten_decompositions())
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=False), captured


def without_collectives(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph with what each collective gives as an input, and what it takes as an output: the
    public torch-mlir knows none of them.
    """
    cut = fx.Graph()
    outputs = cut.graph_copy(graph.graph, {})
    first = next(iter(cut.nodes))
    taken = []
    for wait in [node for node in cut.nodes if str(node.target).startswith(f"{COLLECTIVE}.wait")]:
        [collective, *_] = wait.args
        taken.append(collective.args[0])
        with cut.inserting_before(first):
            given = cut.placeholder(f"{wait.name}_given")
        given.meta = wait.meta
        wait.replace_all_uses_with(given)
        cut.erase_node(wait)
        cut.erase_node(collective)
    cut.output((*outputs, *taken))
    return fx.GraphModule(graph, cut)


def stablehlo(graph: fx.GraphModule) -> str:
    """The graph's StableHLO, by torch-mlir."""
    from torch_mlir.fx import OutputType, stateless_fx_import

    return str(stateless_fx_import(graph, output_type=OutputType.STABLEHLO))


def operations(text: str) -> Counter[str]:
    return Counter(re.findall(r"\b(?:stablehlo|chlo)\.\w+", text))


ELEMENT_BYTES = {"i1": 1, "i8": 1, "ui8": 1, "i32": 4, "i64": 8, "bf16": 2, "f32": 4}


def argument_bytes(text: str) -> list[int]:
    """Bytes of each argument of a module's function."""
    signature = text.split("func.func", 1)[1].split("->", 1)[0]
    found = []
    for tensor in re.findall(r"%\w+: tensor<([^>]*)>", signature):
        *sizes, element = tensor.split("x")
        found.append(prod(map(int, sizes)) * ELEMENT_BYTES[element])
    return found
