"""Nothing silent at load: every parameter of every rank gets its value, and every checkpoint tensor
is used.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch

from neuron_minimax.errors import CheckpointError

# State of the run, not weights.
STATE = "kv_mgr."
# Dtypes as safetensors spells them.
STORED_NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.int32: "I32",
}


def parameters_of(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Every parameter under each of its names; the model has no persistent buffers."""
    return dict(module.named_parameters(remove_duplicate=False))


def check_checkpoint(
    parameters: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor], experts: int
) -> None:
    """Compare full checkpoint tensors with a rank's parameters, after NxD's preshard hooks and
    before sharding.

    NxD deletes the keys it does not know and leaves parameters without a value as they are, with a
    warning. Raises CheckpointError naming the tensors that are missing, unknown, of the wrong
    shape, or FP8 where they must not be.
    """
    wanted = weight_names(parameters, state.keys())
    for name in sorted(wanted & state.keys()):
        if is_fp8(state[name]) != is_fp8(parameters[name]):
            raise CheckpointError(
                f"{name} is {state[name].dtype} in the checkpoint and {parameters[name].dtype} in "
                "the model: FP8 codes would be read as weights; modules_to_not_convert must be "
                "that of the converted config.json"
            )
    refuse_names(wanted, state.keys(), "the checkpoint")
    for name in sorted(wanted):
        parameter = parameters[name]
        tensor = state[name]
        shape = full_shape(parameter, experts)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{name} has shape {list(tensor.shape)}, but the model built for this "
                f"configuration expects {list(shape)} before sharding; check config.json and the "
                "parallel degrees"
            )
        if tensor.is_floating_point() != parameter.is_floating_point() or wider(tensor, parameter):
            raise CheckpointError(
                f"{name} is {tensor.dtype} in the checkpoint and {parameter.dtype} in the model; "
                "it must not be rounded"
            )


def check_loaded(parameters: Mapping[str, torch.Tensor], given: Collection[str]) -> None:
    """After loading: raise CheckpointError unless every parameter was given a value and no value
    was left over.
    """
    refuse_names(weight_names(parameters, given), given, "the weights of this rank")


def check_rank_file(
    expected: Mapping[str, Any], found: Mapping[str, tuple[str, tuple[int, ...]]], file: str
) -> None:
    """A rank's saved weights against {name: [dtype, shape]} recorded at compile time; raises
    CheckpointError.
    """
    refuse_names(expected.keys(), found.keys(), file)
    for name, (dtype, shape) in expected.items():
        if found[name] != (dtype, tuple(shape)):
            raise CheckpointError(
                f"{name} in {file} is {found[name][0]} {list(found[name][1])}; expected {dtype} "
                f"{list(shape)}: compile again"
            )


def refuse_names(wanted: Collection[str], given: Iterable[str], where: str) -> None:
    """Raise CheckpointError unless both sets of names are equal."""
    given = set(given)
    missing = sorted(set(wanted) - given)
    unknown = sorted(given - set(wanted))
    if missing:
        raise CheckpointError(
            f"{len(missing)} parameters of the model have no value in {where}: {shown(missing)}; "
            "convert the checkpoint again, and give the quantization settings of its config.json"
        )
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} tensors of {where} belong to no parameter of the model: "
            f"{shown(unknown)}; NxD would drop them silently"
        )


def weight_names(parameters: Mapping[str, torch.Tensor], given: Collection[str]) -> set[str]:
    """Names that need a value of their own: not the key/value cache, not a second name of a tensor
    that is given one (NxD's quantized layers call their weight `master_weight` too when they are
    built for a compile).
    """
    served = {id(parameters[name]) for name in given if name in parameters}
    return {
        name
        for name, tensor in parameters.items()
        if not name.startswith(STATE) and (name in given or id(tensor) not in served)
    }


def shown(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def full_shape(parameter: torch.Tensor, experts: int) -> tuple[int, ...]:
    """Shape before sharding, from the attributes NxD puts on a rank's parameter."""
    shape = list(parameter.shape)
    if getattr(parameter, "tensor_model_parallel", False):
        shape[parameter.partition_dim] *= parameter.num_partitions  # type: ignore[attr-defined]
    if getattr(parameter, "expert_model_parallel", False):
        shape[0] = experts
    return tuple(shape)


def is_fp8(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float8_e4m3fn


def wider(tensor: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Return whether loading would round float32 values."""
    return tensor.dtype == torch.float32 and parameter.dtype in (torch.bfloat16, torch.float16)
