"""The one door to the Neuron packages: imports them, recognises their empty placeholders, settles
versions.

Proven with neuronx-distributed-inference 0.9.0 and neuronx-distributed 0.18.0 (SDK 2.29), and with
0.8.0 and 0.17.0 (SDK 2.28). Both have every name imported here; what else differs is settled below.
"""
# ruff: noqa: F401, E402

import importlib

from neuron_minimax.errors import BackendError
from neuron_minimax.planner.sdks import PACKAGES, install_lines, installed_versions

# A module that each real package has and the placeholder of its name on the public index has not.
REAL_MODULES = {
    "torch_neuronx": "torch_neuronx.xla_impl.ops",
    "neuronx_distributed": "neuronx_distributed.parallel_layers.parallel_state",
    "neuronx_distributed_inference": "neuronx_distributed_inference.models.model_base",
}


def require_packages() -> None:
    """Raise BackendError, with AWS's install line, unless the real Neuron packages can be
    imported.
    """
    for package, module in REAL_MODULES.items():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise BackendError(
                f"the Neuron backend needs {package}, which cannot be imported ({error}); "
                f"{install_lines()}"
            ) from error
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise BackendError(
                f"the installed {package} cannot import {module} ({error}): either it is the empty "
                "placeholder of the public package index, or it does not fit the other Neuron "
                f"packages; {install_lines()}"
            ) from error


require_packages()

from neuronx_distributed.modules.moe.expert_mlps_v2 import ExpertMLPsV2
from neuronx_distributed.modules.moe.routing import RouterTopK
from neuronx_distributed.parallel_layers import parallel_state
from neuronx_distributed.parallel_layers.layers import (
    BaseParallelLinear,
    ColumnParallelLinear,
    ParallelEmbedding,
    RowParallelLinear,
)
from neuronx_distributed.parallel_layers.mappings import reduce_from_tensor_model_parallel_region
from neuronx_distributed.parallel_layers.utils import set_tensor_model_parallel_attributes
from neuronx_distributed.quantization.quantization_config import (
    QuantizationType,
    QuantizedDtype,
    get_default_blockwise_custom_qconfig_dict,
)
from neuronx_distributed.quantization.quantization_layers import (
    BaseQuantizeParallelLinear,
    QuantizedColumnParallel,
    QuantizedExpertFusedColumnParallel,
    QuantizedExpertFusedRowParallel,
    QuantizedRowParallel,
)
from neuronx_distributed.trace.trace import invoke_preshard_hook
from neuronx_distributed.utils import cpu_mode
from neuronx_distributed_inference.models.config import (
    InferenceConfig,
    MoENeuronConfig,
    OnDeviceSamplingConfig,
)
from neuronx_distributed_inference.models.layer_boundary_marker import (
    ModuleMarkerEndWrapper,
    ModuleMarkerStartWrapper,
)
from neuronx_distributed_inference.models.model_base import NeuronBaseForCausalLM, NeuronBaseModel
from neuronx_distributed_inference.models.model_wrapper import (
    CONTEXT_ENCODING_MODEL_TAG,
    TOKEN_GENERATION_MODEL_TAG,
)
from neuronx_distributed_inference.modules.attention.attention_base import NeuronAttentionBase
from neuronx_distributed_inference.modules.attention.gqa import (
    GroupQueryAttention_O,
    GroupQueryAttention_QKV,
)
from neuronx_distributed_inference.modules.attention.utils import move_heads_front
from neuronx_distributed_inference.modules.custom_calls import CustomRMSNorm
from neuronx_distributed_inference.modules.moe_v2 import initialize_moe_module
from torch_neuronx.utils import get_platform_target

# NxDI gives it to the compiler of every chip (models/model_wrapper.py) when the weights are f8e4m3.
READ_FP8_AS_IEEE = "--experimental-unsafe-fp8e4m3fn-as-fp8e4m3"


class CausalLM(NeuronBaseForCausalLM):
    """NxDI's application class, whole in either version."""

    if not hasattr(NeuronBaseForCausalLM, "_get_captured_tensors_offset"):

        def _get_captured_tensors_offset(self) -> int:
            """NxDI 0.8 calls this in CPU mode and has it in another class; its decoders capture no
            tensors.
            """
            return 0


def versions() -> dict[str, str]:
    """Installed version of each Neuron package, "unknown" where its metadata is missing."""
    found = installed_versions()
    return {name: found.get(name, "unknown") for name in PACKAGES}


def register_model(key: str, task: str, model: type) -> None:
    """Add a class to the table in which the NxDI-based vllm-neuron looks models up."""
    from neuronx_distributed_inference.utils.constants import MODEL_TYPES

    MODEL_TYPES.setdefault(key, {})[task] = model
