"""Calls of closed kernels in a graph that the real torch_xla traces: one custom call each, with the
kernel's outputs.

Output shapes are those of nki-library (SDK 2.29) and of torch_neuronx's operators. Where the real
nki-library is on the path, arguments are bound to the kernel's own signature, so that a call it
would not take fails here too.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Outputs = list[tuple[tuple[int, ...], torch.dtype]]


def traced(arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether any tensor argument is on the XLA device."""
    return any(tensor.device.type == "xla" for tensor in _tensors(arguments, options))


def call(
    name: str, function: Any, grid: Any, arguments: Sequence[Any], options: Mapping[str, Any]
) -> Any:
    """Put the call into the graph: its tensors are operands, everything else is part of its
    description.
    """
    if name not in OUTPUTS:
        raise NotImplementedError(
            f"the kernel {name} was called; kernels.py does not know its outputs"
        )
    if inspect.isfunction(function):
        inspect.signature(function).bind(*arguments, **options)
    tensors = _tensors(arguments, options)
    settings = {
        key: str(value) for key, value in options.items() if not isinstance(value, torch.Tensor)
    }
    return custom_call(
        f"nki.{name}",
        tensors,
        OUTPUTS[name](*arguments, **options, grid=grid),
        f"{grid} {settings}",
    )


def custom_call(
    target: str, tensors: Sequence[torch.Tensor], outputs: Outputs, description: str = ""
) -> Any:
    """One custom call of XLA; a single output comes alone."""
    import torch_xla

    shapes = [list(shape) for shape, _ in outputs]
    dtypes = [dtype for _, dtype in outputs]
    made = torch_xla._XLAC._xla_custom_call(
        list(tensors), target, shapes, dtypes, False, description, 1, {}
    )
    return made[0] if len(made) == 1 else tuple(made)


def _tensors(arguments: Sequence[Any], options: Mapping[str, Any]) -> list[torch.Tensor]:
    return [value for value in (*arguments, *options.values()) if isinstance(value, torch.Tensor)]


def attention_cte(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **options: Any
) -> Outputs:
    """Flash attention of context encoding: [B,D,T] with tp_out, from [B,T,D] with tp_q, else
    [B,D,T].
    """
    heads, first, second = q.shape
    tokens, width = (first, second) if options.get("tp_q", True) else (second, first)
    return [
        (
            (heads, width, tokens) if options.get("tp_out", False) else (heads, tokens, width),
            q.dtype,
        )
    ]


def bwmm_shard_on_block(
    *, hidden_states: torch.Tensor, is_tensor_update_accumulating: bool, **_: Any
) -> Outputs:
    tokens, hidden = hidden_states.shape
    return [
        (
            (tokens, 2, hidden) if is_tensor_update_accumulating else (tokens, hidden),
            hidden_states.dtype,
        )
    ]


def blockwise_mm_baseline_shard_intermediate_hybrid(
    *, hidden_states: torch.Tensor, **_: Any
) -> Outputs:
    return [(tuple(hidden_states.shape), hidden_states.dtype)]


def find_nonzero_indices(*, input_tensor: torch.Tensor, n_cols: int, **_: Any) -> Outputs:
    return [((n_cols, input_tensor.shape[0]), torch.int32), ((n_cols,), torch.int32)]


def indexed_flatten(*, output_len: int, **_: Any) -> Outputs:
    return [((output_len,), torch.int32)]


def rotational_topk(*, inp: torch.Tensor, config: Any, **_: Any) -> Outputs:
    shape = (inp.shape[0], config.topk_config.k)
    return [(shape, inp.dtype), (shape, torch.int32)]


def rand_like(values: torch.Tensor, **_: Any) -> Outputs:
    return [(tuple(values.shape), values.dtype)]


def cumsum(values: torch.Tensor, **_: Any) -> Outputs:
    return [(tuple(values.shape), values.dtype)]


def expert_mlp_kernel(hidden_TH: torch.Tensor, *_: Any, grid: int) -> Outputs:
    """The project's own kernel: each core's float32 sum."""
    return [((grid, *hidden_TH.shape), torch.float32)]


OUTPUTS = {
    function.__name__: function
    for function in (
        attention_cte,
        bwmm_shard_on_block,
        blockwise_mm_baseline_shard_intermediate_hybrid,
        find_nonzero_indices,
        indexed_flatten,
        rotational_topk,
        rand_like,
        cumsum,
        expert_mlp_kernel,
    )
}


class Value:
    """A tensor as torch_neuronx's `xla_hlo_call` shows it: only custom calls of its own shape are
    known here.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def CustomCall(self, *operands: "Value", custom_call_target: Any) -> torch.Tensor:
        shape = (tuple(self.tensor.shape), self.tensor.dtype)
        return custom_call(
            target_name(custom_call_target), [operand.tensor for operand in operands], [shape]
        )


def target_name(target: Any) -> str:
    """The last part of a custom call target's name, which is a stand-in where torch_neuronx is
    one.
    """
    return getattr(target, "_name", str(target)).rsplit(".", 1)[-1]


def xla_hlo_call(function: Any) -> Any:
    """In place of torch_neuronx's decorator of functions that write HLO."""
    return lambda *tensors: function(*map(Value, tensors))
