"""The settings under `neuron_config` that a model is given."""

from dataclasses import dataclass


@dataclass
class OnDeviceSamplingConfig:
    all_greedy: bool = False
    max_top_k: int = 256
    deterministic: bool = False
    sampling_dp_degree: int = 1


@dataclass
class NeuronConfig:
    ep_degree: int = 1
    attention_dp_size: int = 1
    mlp_dp_size: int = 1
    on_device_sampling_config: OnDeviceSamplingConfig | None = None
    max_logprobs: int = 0
    debug_logits_dir: str | None = None
    quantization: str | None = None
