"""The scales of FP8 experts, repeated along the intermediate channels, so that any number of ranks
may share these; needs torch alone, so it is proven everywhere.

Shapes: E experts, H hidden, I intermediate. A stored scale covers a block of rows and columns. NxD
cuts scales as it cuts their weights, and where two ranks share a block neither could get its scale.
Repeated, a channel has scales of its own, and every cut is exact: with blocks of 128, those of
gate_up are [E,H/128,2I] and those of down [E,I,H/128].
"""

from collections.abc import Iterable, MutableMapping

import torch

from neuron_minimax.config import ModelConfig
from neuron_minimax.families import Role, target_scale_name
from neuron_minimax.fp8 import ceil_div


def expand_scales(
    state: MutableMapping[str, torch.Tensor], config: ModelConfig, layers: Iterable[int]
) -> None:
    """Repeat the scales of the experts of these layers in full checkpoint tensors. What is missing,
    or is not one scale for each block, is left as it is: coverage names it.
    """
    channels = config.intermediate_size
    rows, columns = config.weight_block_size  # of the published [I,H] and [H,I]
    for layer in layers:
        for role, dimension, (along, across), parts in (
            (Role.EXPERT_GATE, 2, (rows, columns), 2),
            (Role.EXPERT_DOWN, 1, (columns, rows), 1),
        ):
            name = target_scale_name(config.family.rule_of(role).target).format(l=layer)
            blocks = [ceil_div(config.hidden_size, across)]
            blocks.insert(dimension - 1, parts * ceil_div(channels, along))
            if name in state and list(state[name].shape[1:]) == blocks:
                state[name] = repeated(state[name], dimension, channels, along, parts)


def repeated(
    scale: torch.Tensor, dimension: int, channels: int, size: int, parts: int = 1
) -> torch.Tensor:
    """Each scale `size` times along a dimension, as often as there are channels; `parts` weights
    lie side by side there, each of which ends with its own last block (gate and up: 2).
    """
    return torch.cat(
        [
            part.repeat_interleave(size, dimension).narrow(dimension, 0, channels)
            for part in scale.chunk(parts, dimension)
        ],
        dimension,
    )
