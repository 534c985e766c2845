"""A `vllm.general_plugins` entry point: vllm-neuron 0.2 to 0.6, which loads models through NxDI,
finds MiniMax-M2.

vLLM calls `register` in every process it starts. It adds one entry to NxDI's table of models and
one config class to transformers' table; no file of either is touched, and no remote code is
trusted.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuron_minimax.backends.nxdi.options import MOE_SETTINGS, default_buckets, quantization_options
from neuron_minimax.errors import BackendError, ConfigError
from neuron_minimax.families.minimax_m2 import MINIMAX_M2
from neuron_minimax.planner import blockwise
from neuron_minimax.planner.sdks import sdk_for, untested

# vllm-neuron splits config.json's architecture at "For" and lowers the first part:
# MiniMaxM2ForCausalLM.
MODEL_KEY = "minimaxm2"
TASK = "causal-lm"

logger = logging.getLogger(__name__)


def register() -> bool:
    """Register the model class; True when done, False (and one log line) where the Neuron packages
    are missing.

    Calling it again changes nothing.
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
    register_config()
    return True


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
    moe_tp_degree: int,
    moe_ep_degree: int,
    buckets: Sequence[int],
    blockwise_matmul: str = blockwise.DEFAULT,
) -> dict[str, Any]:
    """The contents of vllm-neuron's `override_neuron_config` for a converted directory; JSON can
    carry them.

    The quantization settings are those of its config.json; the last bucket is vLLM's
    --max-model-len. `blockwise_matmul` is as for a compile. Raises ConfigError for one that is not
    known.
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
