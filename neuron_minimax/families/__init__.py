"""The families of models that are supported; config.json says which one a checkpoint is of."""

from collections.abc import Mapping
from typing import Any

from neuron_minimax.families.family import Family, Role, module_of, target_scale_name
from neuron_minimax.families.minimax_m2 import MINIMAX_M2
from neuron_minimax.families.minimind import MINIMIND, MINIMIND2, MINIMIND2_MOE, MINIMIND_MOE
from neuron_minimax.families.qwen2 import QWEN2
from neuron_minimax.families.qwen3 import QWEN3, QWEN3_MOE

__all__ = [
    "DEFAULT_FAMILY",
    "FAMILIES",
    "Family",
    "Role",
    "family_of",
    "module_of",
    "target_scale_name",
]

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        MINIMAX_M2,
        QWEN3_MOE,
        QWEN3,
        QWEN2,
        MINIMIND,
        MINIMIND_MOE,
        MINIMIND2,
        MINIMIND2_MOE,
    )
}
DEFAULT_FAMILY = MINIMAX_M2  # of a tokenizer that lies alone, without a config.json


def family_of(raw: Mapping[str, Any]) -> Family | None:
    """Return the family that a config.json is of; None when it is of no supported one."""
    return next((family for family in FAMILIES.values() if family.describes(raw)), None)
