"""Exported graphs run as they are, where there is no compiler for their small operations: torch.export's file alone.

The weights and the cache are an input of such a graph, by name, so that its file holds neither.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn


class WithState(nn.Module):
    """A module as a function of its state: `forward(state, inputs)`; buffers are written in place."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.held = (module,)  # not as a submodule, whose weights would be the graph's own

    def forward(self, state: dict[str, torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Any:
        return torch.func.functional_call(self.held[0], state, inputs)


def save(module: nn.Module, inputs: tuple[torch.Tensor, ...], path: Path) -> None:
    """Export `module` for inputs of these shapes to `path`."""
    with torch.no_grad():
        program = torch.export.export(WithState(module), (module.state_dict(), inputs))
    program.example_inputs = None  # they would be saved too, and the weights are among them
    torch.export.save(program, path)


def load(path: Path, state: dict[str, torch.Tensor]) -> Callable[..., Any]:
    """The graph over these tensors themselves; `kernels.operators.compile_loops` must have made its operators."""
    graph = torch.export.load(path).module()
    return lambda *inputs: graph(state, inputs)
