"""A `vllm.general_plugins` entry point: vllm-neuron 0.2 to 0.6, which loads models through NxDI,
finds MiniMax-M2, and the other families where that is asked for.

vLLM calls `register` in every process it starts. It adds one entry to NxDI's table of models and
one config class to transformers' table; no file of either is touched, and no remote code is
trusted. Families that NxDI has classes of its own for take the place of these only when
NEURON_MINIMAX_FAMILIES names them: vllm-neuron looks a model up by its architecture alone, so that
every checkpoint of the family would get this class, converted or not.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuron_minimax.backends.nxdi.options import MOE_SETTINGS, quantization_options
from neuron_minimax.errors import BackendError, ConfigError
from neuron_minimax.families import FAMILIES
from neuron_minimax.families.minimax_m2 import MINIMAX_M2
from neuron_minimax.planner import blockwise
from neuron_minimax.planner.sdks import sdk_for, untested
from neuron_minimax.planner.settings import default_buckets

# vllm-neuron splits config.json's architecture at "For" and lowers the first part:
# MiniMaxM2ForCausalLM.
MODEL_KEY = "minimaxm2"
# Keys under which NxDI has classes of its own, all of them names of families; vllm-neuron makes
# the second of Qwen3MoeForCausalLM.
REPLACEABLE = ("qwen3", "qwen3_moe", "qwen2")
FAMILIES_VARIABLE = "NEURON_MINIMAX_FAMILIES"
TASK = "causal-lm"

logger = logging.getLogger(__name__)


def register() -> bool:
    """Register the model class; True when done, False (and one log line) where the Neuron packages
    are missing.

    Calling it again changes nothing. Raises ConfigError when NEURON_MINIMAX_FAMILIES, a list with
    commas, names something that is not in REPLACEABLE.
    """
    try:
        from neuron_minimax.backends.nxdi import imports
        from neuron_minimax.backends.nxdi.application import application_class
    except BackendError as error:
        logger.info("MiniMax-M2 is not registered for Neuron: %s", error)
        return False
    try:
        lines = untested(sdk_for(imports.get_platform_target()), imports.installed_versions())
    except ConfigError as error:
        lines = [str(error)]
    for line in lines:
        logger.warning(
            "MiniMax-M2 was not prepared for the Neuron packages that are here: %s", line
        )
    imports.register_model(MODEL_KEY, TASK, application_class(MINIMAX_M2))
    for name in replaced_families():
        logger.info("%s is served by neuron_minimax in place of NxDI's own class", name)
        imports.register_model(name, TASK, application_class(FAMILIES[name]))
    register_config()
    return True


def replaced_families() -> list[str]:
    """The families of NEURON_MINIMAX_FAMILIES."""
    listed = os.environ.get(FAMILIES_VARIABLE, "").split(",")
    names = [name.strip() for name in listed if name.strip()]
    for name in names:
        if name not in REPLACEABLE:
            raise ConfigError(
                f"{FAMILIES_VARIABLE} has {name!r}; expected names out of {', '.join(REPLACEABLE)}"
            )
    return names


def register_config() -> None:
    """Let transformers 4.57, which has no minimax_m2, read this config.json with a plain class; 5.x
    has its own.
    """
    from transformers import AutoConfig, PretrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if MINIMAX_M2.model_type in CONFIG_MAPPING:
        return
    plain = type("MiniMaxM2PlainConfig", (PretrainedConfig,), {"model_type": MINIMAX_M2.model_type})
    AutoConfig.register(MINIMAX_M2.model_type, plain)


def override_neuron_config(
    directory: str | Path,
    *,
    buckets: Sequence[int],
    moe_tp_degree: int = 1,
    moe_ep_degree: int = 1,
    blockwise_matmul: str = blockwise.DEFAULT,
) -> dict[str, Any]:
    """The contents of vllm-neuron's `override_neuron_config` for a converted directory; JSON can
    carry them.

    The quantization settings are those of its config.json; the last bucket is vLLM's
    --max-model-len. The degrees are of experts, where there are some; `blockwise_matmul` is as for
    a compile. Raises ConfigError for one that is not known.
    """
    way = blockwise.blockwise_matmul(blockwise_matmul)
    return quantization_options(directory) | {
        "moe_tp_degree": moe_tp_degree,
        "moe_ep_degree": moe_ep_degree,
        "context_encoding_buckets": list(buckets),
        "token_generation_buckets": list(default_buckets(max(buckets))),
        "blockwise_matmul_config": way.settings,
        **MOE_SETTINGS,
        "save_sharded_checkpoint": True,
    }
