"""State dicts in memory: Hugging Face to Neuron by the conversion's own rules, and back by their
inverse.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import TORCH_DTYPES, TensorSpec
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.scaled import ScaledWeights
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import bind_rules
from neuron_minimax.convert.layout import Layout
from neuron_minimax.convert.pieces import pieces, take_apart
from neuron_minimax.errors import ConversionError, counted
from neuron_minimax.families import Role, target_scale_name
from neuron_minimax.families.family import Operation
from neuron_minimax.fp8 import ConventionChoice, ScaleConvention, ceil_div

if TYPE_CHECKING:
    import torch

STORED_NAMES = {f"torch.{torch_name}": name for name, torch_name in TORCH_DTYPES.items()}


class StateDict(ScaledWeights):
    """A torch state dict in memory, seen as stored arrays, zero-copy."""

    title = "the state dict"

    def __init__(
        self,
        tensors: Mapping[str, "torch.Tensor"],
        config: ModelConfig,
        scale_convention: ConventionChoice | ScaleConvention = ConventionChoice.AUTO,
    ) -> None:
        self.tensors = tensors
        self.config = config
        self.convention_choice = ConventionChoice(scale_convention)

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        specs = {}
        for name, tensor in self.tensors.items():
            dtype = STORED_NAMES.get(str(tensor.dtype))
            if dtype is None:
                raise ConversionError(
                    f"{name} is {tensor.dtype}; expected one of {', '.join(STORED_NAMES)}"
                )
            specs[name] = TensorSpec(name, dtype, tuple(tensor.shape))
        return specs

    def array(self, name: str) -> np.ndarray:
        import torch

        tensor = self.tensors[name].detach().contiguous()
        bytes_of = {"F8_E4M3": torch.uint8, "F8_E8M0": torch.uint8, "BF16": torch.uint16}
        same_bytes = bytes_of.get(self.specs[name].dtype)
        return (tensor if same_bytes is None else tensor.view(same_bytes)).numpy()


def convert_hf_to_neuron_state_dict(
    state_dict: Mapping[str, "torch.Tensor"],
    config: ModelConfig,
    layout: Layout | None = None,
    scale_convention: ConventionChoice | ScaleConvention = ConventionChoice.AUTO,
) -> dict[str, "torch.Tensor"]:
    """The converted tensors of a Hugging Face state dict in memory, by the rules of a conversion.

    Names may come with or without the leading `model.` (NxDI strips it). With `layout.tp_degree`
    the int32 rank tensors [tp_degree] are added. Raises ConversionError naming missing, unused or
    unscaled tensors.
    """
    import torch

    layout = layout or Layout()
    embedding = config.family.weight_of(Role.EMBEDDING).template
    if embedding.removeprefix("model.") in state_dict:
        head = f"{config.family.head_module}."
        state_dict = {
            name if name.startswith(head) else f"model.{name}": t for name, t in state_dict.items()
        }
    source = StateDict(state_dict, config, scale_convention)
    tolerated = [
        *schema.mtp_names(state_dict, config),
        *schema.cache_scale_names(state_dict, config),
    ]
    converted: dict[str, torch.Tensor] = {}
    for output in bind_rules(source.specs, config, layout, source.convention, tolerated):
        memory = np.empty(output.nbytes, np.uint8)
        filled = 0
        for piece in pieces(output, source):
            piece.fill(memory[filled : filled + piece.nbytes])
            filled += piece.nbytes
        elements = torch.from_numpy(memory).view(getattr(torch, TORCH_DTYPES[output.dtype]))
        converted[output.name] = elements.view(output.shape)
    if layout.tp_degree is not None:
        for name in config.family.rank_names(config.num_hidden_layers):
            converted[name] = torch.arange(layout.tp_degree, dtype=torch.int32)
    return converted


def mapped_state_dict(cache: Checkpoint) -> dict[str, "torch.Tensor"]:
    """The converted tensors of a dequantized cache: views of its mapped files, nothing copied.

    Experts that do not lie in the model's order, as in caches of earlier versions, are arranged in
    memory. Values are not looked at, as they were when the cache was written.
    """
    import torch

    state: dict[str, torch.Tensor] = {}
    for output in bind_rules(cache.specs, cache.config, Layout(), tolerated=cache.left_out):
        names = [name for group in output.groups for name in group]
        if output.rule.operation is Operation.COPY:
            state[output.name] = cache.tensor(names[0])
            continue
        stacked = cache.adjacent(names)
        if stacked is None:
            stacked = torch.cat([cache.tensor(name) for name in names])
        (experts, columns, rows) = output.shape
        state[output.name] = stacked.view(experts, rows, columns).transpose(1, 2)
    return state


def neuron_to_hf_state_dict(
    state_dict: Mapping[str, "torch.Tensor"], config: ModelConfig
) -> dict[str, "torch.Tensor"]:
    """The Hugging Face names and shapes of a state dict in Neuron layout: the rules read backwards,
    as views.

    Codes and scales keep their values: a `.scale` comes back as `weight_scale_inv`, the multiplier
    of its codes. Raises ConversionError naming a tensor that is missing or belongs to no rule.
    """
    sizes = {weight.template: schema.shape_of(weight, config) for weight in config.family.weights}
    published: dict[str, torch.Tensor] = {}
    unused = set(state_dict)
    for rule in config.family.rules:
        rows = [sizes[source][0] for source in rule.sources]
        for layer in config.layers_with(config.family.weight(rule.sources[0])):
            target = rule.target.format(l=layer)
            if target not in state_dict:
                if schema.is_tied(config.family.weight(rule.sources[0]), config):
                    continue
                raise ConversionError(
                    f"the state dict has no {target}; expected every weight of the model"
                )
            for name in (target, target_scale_name(target)):
                if name not in state_dict:
                    continue
                unused.discard(name)
                scaled = name != target
                counts = (
                    [ceil_div(count, config.weight_block_size[0]) for count in rows]
                    if scaled
                    else rows
                )
                for expert in range(config.num_local_experts) if rule.per_expert else (None,):
                    piece = state_dict[name] if expert is None else state_dict[name][expert]
                    for source, part in zip(
                        rule.sources, take_apart(rule.operation, piece, counts), strict=True
                    ):
                        source_name = source.format(l=layer, e=expert)
                        published[schema.scale_name(source_name) if scaled else source_name] = part
    if unused:
        tensors = counted(len(unused), "tensor")
        raise ConversionError(f"found {tensors} of no rule, such as {min(unused)}")
    return published
