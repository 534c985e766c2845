"""Rotary position embedding: the angles of each RoPE type, and their application to the first
channels of a head.

Shapes: R rotary_dim, B batch, T tokens, N heads, D head_dim.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError


def _default(
    base: float, dim: int, scaling: Mapping[str, Any], limit: int
) -> tuple[torch.Tensor, float]:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)), 1.0


def _linear(
    base: float, dim: int, scaling: Mapping[str, Any], limit: int
) -> tuple[torch.Tensor, float]:
    frequencies, factor = _default(base, dim, scaling, limit)
    return frequencies / scaling["factor"], factor


def _yarn(
    base: float, dim: int, scaling: Mapping[str, Any], limit: int
) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al. 2023, arXiv 2309.00071), section 3.2: slow channels interpolated, fast ones
    kept.
    """
    trained = scaling["original_max_position_embeddings"]
    factor = scaling.get("factor") or limit / trained

    def channel(rotations: float) -> float:
        return dim * math.log(trained / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = channel(scaling.get("beta_fast") or 32)
    high = channel(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    if low == high:
        high += 0.001
    frequencies, _ = _default(base, dim, scaling, limit)
    interpolated = torch.clamp(
        (torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low), 0, 1
    )
    mixed = frequencies / factor * interpolated + frequencies * (1 - interpolated)
    return mixed, _yarn_magnitude(factor, scaling)


def _yarn_magnitude(factor: float, scaling: Mapping[str, Any]) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    given = scaling.get("attention_factor")
    if given is not None:
        return float(given)
    weight = scaling.get("mscale")
    weight_all = scaling.get("mscale_all_dim")
    return magnitude(weight) / magnitude(weight_all) if weight and weight_all else magnitude(1)


_TYPES: dict[str, Callable[..., tuple[torch.Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
}


def frequencies(config: ModelConfig) -> tuple[torch.Tensor, float]:
    """Angle per position of each channel pair, [R/2] float32, and the factor on sine and cosine.

    Raises ConfigError when `rope_scaling` lacks a field that its type needs.
    """
    scaling = config.rope_scaling or {}
    rope_type = scaling.get("rope_type", "default")
    try:
        return _TYPES[rope_type](
            config.rope_theta, config.rotary_dim, scaling, config.max_position_embeddings
        )
    except KeyError as missing:
        raise ConfigError(
            f"config.json: rope type {rope_type!r} lacks {missing.args[0]!r} in its rope "
            "parameters; take the config.json of the checkpoint"
        ) from None


def rope_table(
    config: ModelConfig, positions_BT: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine [B,T,1,R] at given positions, computed in float32 and rounded to `dtype`."""
    per_pair, magnitude = frequencies(config)
    angles_BTR = (positions_BT[..., None].float() * per_pair.to(positions_BT.device)).repeat(
        1, 1, 2
    )[:, :, None]
    return (angles_BTR.cos() * magnitude).to(dtype), (angles_BTR.sin() * magnitude).to(dtype)


def rotate(heads_BTND: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate the first R channels of every head, half against half; the other channels pass."""
    cosine, sine = rope
    rotary_dim = cosine.shape[-1]
    turning = heads_BTND[..., :rotary_dim]
    passing = heads_BTND[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1)
    turned = turning * cosine + torch.cat((-second, first), dim=-1) * sine
    return torch.cat((turned, passing), dim=-1)
