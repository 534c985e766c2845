"""Whole heads of full checkpoint tensors put into their places; needs torch alone, so it is proven
everywhere.
"""

from collections.abc import MutableMapping, Sequence

import torch


def place_heads(
    tensor: torch.Tensor, dimension: int, heads: int, slots: Sequence[int | None]
) -> torch.Tensor:
    """Reorder, repeat and zero-pad whole heads along a dimension that holds `heads` of them.

    Serves weights, biases, norms and block scales alike (a scale has whole blocks per head). FP8
    moves as bytes.
    """
    bits = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
    by_head = bits.unflatten(dimension, (heads, -1))
    index = torch.tensor([0 if slot is None else slot for slot in slots])
    placed = by_head.index_select(dimension, index)
    empty = torch.tensor(
        [position for position, slot in enumerate(slots) if slot is None], dtype=torch.long
    )
    placed.index_fill_(dimension, empty, 0)
    return placed.flatten(dimension, dimension + 1).view(tensor.dtype)


def rearrange(
    state: MutableMapping[str, torch.Tensor],
    module: str,
    dimension: int,
    heads: int,
    slots: Sequence,
) -> None:
    """Apply `place_heads` to a module's weight and, where there are such, its scale and bias."""
    for name in (f"{module}.weight", f"{module}.scale", f"{module}.bias"):
        if name in state:
            state[name] = place_heads(state[name], dimension, heads, slots)
