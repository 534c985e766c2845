"""Parallel projections with block-scaled FP8 weights on NxDI, and the dense MLP of a layer.

Shapes: B batch, T tokens, H hidden, I a rank's share of the intermediate size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from neuron_minimax.backends.nxdi import imports
from neuron_minimax.families import Role


class BlockQuantization:
    """NxD's quantized layers for 2-D weights whose float32 scales cover blocks of both
    dimensions.
    """

    def __init__(self, block: tuple[int, int], dtype: torch.dtype, group: Any) -> None:
        self.options = {
            "quantization_type": imports.QuantizationType.BLOCKWISE_SYMMETRIC,
            "quantized_dtype": imports.QuantizedDtype.F8E4M3,
            "block_axis": [0, 1],
            "block_size": list(block),
            "dtype": dtype,
            "tensor_model_parallel_group": group,
        }

    def column(self, inputs: int, outputs: int, biased: bool = False) -> nn.Module:
        return imports.QuantizedColumnParallel(
            inputs, outputs, gather_output=False, bias=biased, **self.options
        )

    def row(self, inputs: int, outputs: int) -> nn.Module:
        return imports.QuantizedRowParallel(
            inputs, outputs, input_is_parallel=True, bias=False, **self.options
        )


class NeuronMLP(nn.Module):
    """SwiGLU with the intermediate channels shared over all ranks: down(silu(gate) * up).

    Each projection is block-scaled FP8 where the checkpoint's is, else `torch_dtype`.
    """

    def __init__(self, config: Any, layer: int, intermediate_size: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        hidden = config.model_config.hidden_size
        self.gate_proj = self._column(Role.MLP_GATE, hidden, intermediate_size)
        self.up_proj = self._column(Role.MLP_UP, hidden, intermediate_size)
        self.down_proj = self._row(Role.MLP_DOWN, intermediate_size, hidden)

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """[B,T,H] to [B,T,H], summed over the ranks."""
        gate_BTI = self.gate_proj(hidden_BTH)
        return self.down_proj(F.silu(gate_BTI) * self.up_proj(hidden_BTH))

    def _quantization(self, role: Role) -> BlockQuantization | None:
        if not self.config.quantizes(role, self.layer):
            return None
        options = self.config.neuron_config
        block = self.config.model_config.weight_block_size
        group = imports.parallel_state.get_tensor_model_parallel_group()
        return BlockQuantization(block, options.torch_dtype, group)

    def _column(self, role: Role, inputs: int, outputs: int) -> nn.Module:
        quantization = self._quantization(role)
        if quantization is not None:
            return quantization.column(inputs, outputs)
        dtype = self.config.neuron_config.torch_dtype
        return imports.ColumnParallelLinear(
            inputs, outputs, bias=False, gather_output=False, dtype=dtype
        )

    def _row(self, role: Role, inputs: int, outputs: int) -> nn.Module:
        quantization = self._quantization(role)
        if quantization is not None:
            return quantization.row(inputs, outputs)
        options = self.config.neuron_config
        return imports.RowParallelLinear(
            inputs,
            outputs,
            bias=False,
            input_is_parallel=True,
            dtype=options.torch_dtype,
            reduce_dtype=options.rpl_reduce_dtype,
        )
