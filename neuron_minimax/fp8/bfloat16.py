"""Stored elements (BF16 as uint16 bits, float16, float32, scales of powers of two as bytes): widen,
round, and check them.
"""

import numpy as np

from neuron_minimax.errors import CheckpointError

# Values of E8M0 bytes: 2 to the byte minus 127; the last is NaN (OCP MX 1.0, section 5.4.1).
POWERS_OF_TWO = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))


def to_float32(stored: np.ndarray) -> np.ndarray:
    """Float32 of stored BF16 (uint16), float16 or float32 elements; exact."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32, copy=False)


def scales_to_float32(stored: np.ndarray) -> np.ndarray:
    """Float32 of stored scales: of bytes, which are exponents (E8M0), or as `to_float32`; exact."""
    return POWERS_OF_TWO[stored] if stored.dtype == np.uint8 else to_float32(stored)


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """BF16 bits (uint16) of finite float32 values, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded.view(np.uint16)[..., 1::2]  # the upper halves


def check_finite(name: str, stored: np.ndarray) -> None:
    """Raise CheckpointError naming the tensor when an element is NaN or infinite."""
    if stored.dtype == np.uint16:
        bad = int(np.count_nonzero((stored & 0x7F80) == 0x7F80))
    else:
        bad = int(np.count_nonzero(~np.isfinite(stored)))
    if bad:
        raise CheckpointError(
            f"{name} has {bad} NaN or infinite elements; expected none: download its shard again"
        )
