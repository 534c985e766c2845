"""Options of a Neuron compile for families other than MiniMax-M2: what is filled in, and what is
refused before anything is built.
"""

import pytest

from neuron_minimax.backends.nxdi import backend, options, vllm_plugin
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError, ConfigError
from tests.published import published


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_dict(published(name))


def test_a_model_without_experts_takes_all_ranks_and_no_expert_degrees() -> None:
    config = config_of("Qwen3-4B-FP8")
    checked = backend.check_options(config, {"instance": "trn2.3xlarge"})
    assert (checked["tp_degree"], checked["moe_tp_degree"], checked["moe_ep_degree"]) == (4, 4, 1)
    assert backend.check_options(config, checked) == checked
    with pytest.raises(ConfigError, match="moe_ep_degree is 2, but Qwen3 has no experts"):
        backend.check_options(config, {"tp_degree": 4, "moe_ep_degree": 2})


def test_the_router_stays_float32_whatever_a_checkpoint_stores() -> None:
    endings = options.float32_endings(config_of("Qwen3-30B-A3B").family)
    assert endings == (".mlp.router.linear_router.weight", ".scale")
    assert options.float32_endings(config_of("Qwen3-4B").family) == (".scale",)


def test_a_family_without_a_class_for_neuron_is_refused_by_name() -> None:
    with pytest.raises(BackendError, match=r"MiniMind has no class for Neuron; use --backend cpu"):
        backend.check_options(config_of("MiniMind-3"), {"tp_degree": 2, "instance": "inf2.xlarge"})


def test_classes_of_nxdi_are_replaced_for_vllm_by_request_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert vllm_plugin.replaced_families() == []
    monkeypatch.setenv("NEURON_MINIMAX_FAMILIES", "qwen3, qwen3_moe")
    assert vllm_plugin.replaced_families() == ["qwen3", "qwen3_moe"]
    monkeypatch.setenv("NEURON_MINIMAX_FAMILIES", "llama")
    with pytest.raises(ConfigError, match="'llama'; expected names out of qwen3, qwen3_moe, qwen2"):
        vllm_plugin.replaced_families()
