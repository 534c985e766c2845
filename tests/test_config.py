"""ModelConfig against transformers' own reading of the same config.json, in both published
styles.
"""

import json

import pytest
from transformers import MiniMaxM2Config

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConfigError
from tests.tiny import tiny_config

ORIGINAL = tiny_config(
    attn_type_list=[1, 1],
    shared_intermediate_size=0,
    qk_norm_type="per_layer",
    mtp_transformer_layers=1,
)
TRANSFORMERS_5 = {
    key: value for key, value in tiny_config().items() if key not in ("rotary_dim", "rope_theta")
} | {
    "rope_parameters": {"rope_theta": 5000000, "rope_type": "default", "partial_rotary_factor": 0.5}
}


@pytest.mark.parametrize("raw", [ORIGINAL, TRANSFORMERS_5], ids=["original", "transformers-5"])
def test_both_styles_mean_what_transformers_reads(raw):
    config = ModelConfig.from_dict(raw)
    oracle = MiniMaxM2Config(**raw)
    rope = oracle.rope_parameters
    assert config.rotary_dim == int(oracle.head_dim * rope["partial_rotary_factor"]) == 64
    assert config.rope_theta == rope["rope_theta"] == 5e6
    assert config.rope_scaling is None
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_local_experts",
        "num_experts_per_tok",
        "rms_norm_eps",
    ):
        assert getattr(config, name) == getattr(oracle, name)


def test_both_styles_are_equal():
    assert ModelConfig.from_dict(ORIGINAL) == ModelConfig.from_dict(TRANSFORMERS_5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "minimax_m3"}, ["minimax_m3", "MiniMax-M3", "another architecture"]),
        ({"model_type": "llama"}, ["llama", "minimax_m2"]),
        ({"scoring_func": "softmax"}, ["scoring_func", "softmax", "sigmoid"]),
        ({"use_qk_norm": False}, ["use_qk_norm", "False"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        ({"tie_word_embeddings": 0}, ["tie_word_embeddings is 0", "true or false"]),
        ({"norm_topk_prob": False}, ["norm_topk_prob", "False"]),
        ({"shared_intermediate_size": 64}, ["shared_intermediate_size", "64"]),
        ({"attn_type_list": [1, 0]}, ["attn_type_list"]),
        ({"hidden_size": "256"}, ["hidden_size", "'256'"]),
        ({"hidden_size": -1}, ["hidden_size", "-1"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok 9", "num_local_experts 8"]),
        ({"rotary_dim": 130}, ["rotary_dim 130", "head_dim 128"]),
        ({"rope_scaling": {"type": "magic"}}, ["rope_type", "magic"]),
        ({"quantization_config": {"quant_method": "awq"}}, ["quant_method", "awq"]),
        ({"quantization_config": {"weight_block_size": [128]}}, ["weight_block_size"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
    ],
)
def test_what_is_not_this_architecture_is_refused_by_name(change, words):
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_dict(tiny_config() | change)
    assert all(word in str(refused.value) for word in words)


def test_a_missing_field_is_named():
    raw = tiny_config()
    del raw["num_local_experts"]
    with pytest.raises(ConfigError, match="num_local_experts"):
        ModelConfig.from_dict(raw)


def test_a_directory_without_a_readable_config_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        ModelConfig.from_dir(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        ModelConfig.from_dir(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match="holds a list"):
        ModelConfig.from_dir(tmp_path)
