"""Options of a Neuron compile for families other than MiniMax-M2: what is filled in, and what is
refused before anything is built.
"""

import pytest

from neuron_minimax.backends.nxdi import backend, options, vllm_plugin
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError, ConfigError, NeuronMiniMaxError
from tests.full_size import published_config
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


def test_the_manifest_says_how_ranks_hold_the_scales_of_experts() -> None:
    config = ModelConfig.from_dict(published_config())
    degrees = {"tp_degree": 64, "moe_tp_degree": 64}
    expanded = backend.check_options(config, degrees | {"slots": 1})
    assert expanded["expert_scales"] == "expanded"
    assert backend.check_options(config, degrees | {"expert_scales": "auto"}) == expanded
    spread = backend.check_options(config, {"moe_ep_degree": 64, "slots": 32})
    assert spread["expert_scales"] == "block"
    dense = backend.check_options(config_of("Qwen3-4B"), {"tp_degree": 4})
    assert dense["expert_scales"] == "block"
    with pytest.raises(BackendError, match=r"R2 refuse: moe_tp_degree 64 leaves 24 expert"):
        backend.check_options(config, degrees | {"expert_scales": "block"})
    with pytest.raises(BackendError, match=r"R19 refuse: expert_scales expanded"):
        backend.check_options(config_of("Qwen3-4B"), {"tp_degree": 4, "expert_scales": "expanded"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"moe_ep_degree": 0}, "moe_ep_degree is 0; expected at least 1"),
        ({"tp_degree": 0}, "tp_degree is 0; expected at least 1"),
        ({"slots": 0}, "slots is 0; expected at least 1"),
        ({"seq_len": 1, "buckets": (2,)}, "seq_len is 1; expected at least 2"),
        ({"expert_kernel": "cuda"}, "expert_kernel is 'cuda'; expected one of torch, nki"),
        ({"expert_scales": "wide"}, "expert_scales is 'wide'; expected one of auto, block"),
        ({"blockwise_matmul": "loop"}, "blockwise_matmul is 'loop'; expected one of torch"),
        ({"engine": "eager"}, "--engine belongs to the cpu backend"),
        ({"color": "red"}, "the neuron backend does not take --color"),
    ],
)
def test_a_fault_of_the_options_alone_is_one_of_usage(given: dict, said: str) -> None:
    with pytest.raises(NeuronMiniMaxError, match=said) as raised:
        backend.check_options(ModelConfig.from_dict(published_config()), given)
    assert raised.value.usage
