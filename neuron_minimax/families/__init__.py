"""The families of models that are supported, found by config.json's `model_type`."""

from neuron_minimax.families.family import Family, Role, module_of, target_scale_name
from neuron_minimax.families.minimax_m2 import MINIMAX_M2

__all__ = ["DEFAULT_FAMILY", "FAMILIES", "Family", "Role", "module_of", "target_scale_name"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MINIMAX_M2,)}
DEFAULT_FAMILY = MINIMAX_M2  # of a tokenizer that lies alone, without a config.json
