"""BF16 and float32 elements as stored arrays (uint16 bits, float32): widen, round, and check
them.
"""

import numpy as np

from neuron_minimax.errors import CheckpointError


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Float32 of stored BF16 (uint16) or float32 elements; exact."""
    return (
        (stored.astype(np.uint32) << 16).view(np.float32) if stored.dtype == np.uint16 else stored
    )


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """BF16 bits (uint16) of finite float32 values, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded.view(np.uint16)[..., 1::2]  # the upper halves


def check_finite(name: str, stored: np.ndarray) -> None:
    """Raise CheckpointError naming the tensor when a BF16 or float32 element is NaN or infinite."""
    if stored.dtype == np.uint16:
        bad = int(np.count_nonzero((stored & 0x7F80) == 0x7F80))
    else:
        bad = int(np.count_nonzero(~np.isfinite(stored)))
    if bad:
        raise CheckpointError(
            f"{name} has {bad} NaN or infinite elements; expected none: download its shard again"
        )
