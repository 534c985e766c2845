"""ModelConfig against transformers' own reading of the same config.json, in both published
styles.
"""

import json
import os

import pytest
from transformers import MiniMaxM2Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from neuron_minimax.checkpoint import schema
from neuron_minimax.config import REQUIRED_SIZES, ModelConfig
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import ConfigError
from neuron_minimax.families.fields import unused_fields
from neuron_minimax.model.rope import frequencies
from neuron_minimax.studies.quality import with_rope
from tests.published import PUBLISHED
from tests.tiny import CONFIGS, tiny_config

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
        ({"tie_word_embeddings": 0}, ["tie_word_embeddings: ", "boolean, not 0"]),
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


WRONG_TYPES = (
    None,
    True,
    -1,
    2.5,
    10**30,
    10**400,
    float("inf"),
    float("nan"),
    "8",
    [8],
    [],
    {"a": 1},
)
SIZES = (*REQUIRED_SIZES, "head_dim", "rotary_dim")
INSIDE = {
    "quantization_config": ("weight_block_size", "modules_to_not_convert", "quant_method"),
    "rope_scaling": (
        "type",
        "factor",
        "rope_theta",
        "original_max_position_embeddings",
        "beta_fast",
        "attention_factor",
        "truncate",
    ),
}


def refusal_of(change):
    """The message that refuses a config.json, or None; any other exception is a failure."""
    try:
        ModelConfig.from_dict(tiny_config() | change)
    except ConfigError as refused:
        return str(refused)
    return None


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_another_type_or_out_of_range_is_refused_by_name(name):
    for value in WRONG_TYPES:
        message = refusal_of({name: value})
        if value is None and name in ("head_dim", "rotary_dim"):
            continue  # as if it were absent
        assert message is not None, value
        assert name in message
        assert len(message) < 500


@pytest.mark.parametrize(
    "name",
    [
        "model_type",
        "hidden_act",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "rope_parameters",
        "quantization_config",
        "attn_type_list",
        "eos_token_id",
        "bos_token_id",
        "tie_word_embeddings",
        "norm_topk_prob",
        "partial_rotary_factor",
        "num_mtp_modules",
    ],
)
def test_a_field_of_any_type_is_taken_or_refused_by_name(name):
    for value in (*WRONG_TYPES, "\ud800", "\x1b[2J", [[[]]], [1, "1"], {"type": ["yarn"]}):
        message = refusal_of({name: value})
        assert message is None or name in message or "JSON" in message, (value, message)
        assert message is None or (len(message) < 600 and message.isprintable())


@pytest.mark.parametrize(
    ("section", "name"), [(s, n) for s, names in INSIDE.items() for n in names]
)
def test_a_field_of_a_section_of_any_type_is_taken_or_refused_by_name(section, name):
    for value in (*WRONG_TYPES, [1, "x"], [0, 0], [-1, 128], [10**9, 10**9]):
        message = refusal_of({section: {"type": "linear", "factor": 2.0, name: value}})
        assert message is None or name in message or "rope_type" in message, (value, message)


@pytest.mark.parametrize("factor", [None, 0, -1.0, float("inf"), "2", True])
def test_a_linear_scale_without_a_usable_factor_is_a_config_error(factor):
    scaling = {"type": "linear"} | ({} if factor is None else {"factor": factor})
    with pytest.raises(ConfigError, match="factor"):
        frequencies(ModelConfig.from_dict(tiny_config(rope_scaling=scaling)))


def test_more_tensors_than_any_model_has_are_refused_before_they_are_counted():
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        ModelConfig.from_dict(tiny_config(num_hidden_layers=10**9))
    with pytest.raises(ConfigError, match=r"num_hidden_layers 500 .* imply \d+ tensors"):
        ModelConfig.from_dict(tiny_config(num_hidden_layers=500, num_local_experts=1000))


@pytest.mark.parametrize("raw", [ORIGINAL, tiny_config(num_local_experts=3, num_hidden_layers=5)])
def test_the_tensor_count_is_that_of_the_schema(raw):
    config = ModelConfig.from_dict(raw)
    assert config.tensor_count == len(list(schema.expected(config)))


@pytest.mark.parametrize(
    ("listed", "words"),
    [
        (["x"] * 1001, "at most 1000 items"),
        (["x" * 201], "at most 200 characters"),
        (["(a+)+$" + str(number) for number in range(33)], "33 patterns"),
        (["gate\x1b[2J"], "expected names of modules"),
    ],
)
def test_a_list_of_modules_has_limits(listed, words):
    quantization = {"modules_to_not_convert": listed}
    with pytest.raises(ConfigError, match=f"modules_to_not_convert.*{words}"):
        ModelConfig.from_dict(tiny_config(quantization_config=quantization))


@pytest.mark.parametrize(
    "text",
    [
        b'{"model_type": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model_type": "minimax_m2", "model_type": "minimax_m2"}',
        b'{"model_type": "minimax_m2", "anything": Infinity}',
        b'{"model_type": "minimax_m2", "anything": 1e999}',
        b'{"model_type": "minimax_m2", "anything": "\\ud800"}',
        b'{"model_type": "minimax_m2", "anything": ' + b"9" * 10_000 + b"}",
        b"\xff\xfe{}",
        b"",
    ],
)
def test_a_config_that_is_no_plain_json_is_one_message(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(ConfigError, match=r"config\.json cannot be used .*; download it again$"):
        ModelConfig.from_dir(tmp_path)


def test_a_config_that_is_no_regular_file_is_refused_at_once(tmp_path):
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="it is no regular file"):
        ModelConfig.from_dir(tmp_path)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="it is no regular file"):
        ModelConfig.from_dir(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match=f"it has {1 << 40} bytes"):
        ModelConfig.from_dir(tmp_path)


def test_a_linked_config_is_read_and_kept_as_it_is(tmp_path):
    raw = tiny_config(anything={"nested": [1, 2.5, None, "é"]})
    (tmp_path / "blob").write_text(json.dumps(raw))
    (tmp_path / "config.json").symlink_to("blob")
    assert ModelConfig.from_dir(tmp_path).raw == raw


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
    with pytest.raises(ConfigError, match=r"config\.json cannot be used \(Invalid JSON: EOF"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match=r"object, not \[1\]"):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rotary_dim": 128, "partial_rotary_factor": 0.5}, "rotary_dim 128 contradicts"),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "rotary_dim 64 contradicts"),
        ({"rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 5000000.0, but .* 10000.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "lacks 'factor'"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 4.0}}, "rope_type"),
        ({"num_experts": 16}, "num_experts is 16, but num_local_experts is 8"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5"),
        ({"n_group": 8}, "n_group is 8"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ({"layernorm_mlp_beta": 3.5}, "layernorm_mlp_beta is 3.5"),
    ],
)
def test_what_contradicts_or_asks_for_another_part_is_refused_when_it_is_read(change, words):
    with pytest.raises(ConfigError, match=words):
        ModelConfig.from_dict(tiny_config() | change)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("parameters", "scaling", "named"),
    [
        (YARN, YARN, None),
        (YARN | {"rope_theta": 5e6}, YARN, None),
        (YARN, {**YARN, "rope_type": None, "type": "yarn"}, None),
        (YARN, None, None),
        ({"rope_theta": 5e6, "rope_type": "default"}, {"type": "default"}, None),
        (YARN, YARN | {"factor": 8.0}, "factor of rope_parameters is 4.0, but of rope_scaling 8.0"),
        (YARN | {"beta_fast": 32.0}, YARN, "beta_fast of rope_parameters is 32.0, but .* None"),
        ({"rope_theta": 5e6}, YARN, "rope_type of rope_parameters is 'default', but .* 'yarn'"),
        (YARN | {"rope_theta": 5e6}, YARN | {"rope_theta": 1e4}, "rope_theta of rope_parameters"),
    ],
    ids=[
        *("equal", "theta beside", "by its older name", "one", "two defaults"),
        *("factor", "beta", "type", "theta"),
    ],
)
def test_two_rope_sections_say_the_same_or_are_refused(parameters, scaling, named):
    raw = tiny_config() | {"rope_parameters": parameters, "rope_scaling": scaling}
    if named:
        with pytest.raises(ConfigError, match=named):
            ModelConfig.from_dict(raw)
        return
    alone = ModelConfig.from_dict(tiny_config() | {"rope_parameters": parameters})
    assert ModelConfig.from_dict(raw) == alone


@pytest.mark.parametrize("raw", [tiny_config(), TRANSFORMERS_5], ids=["original", "newer"])
def test_a_study_of_lengths_scales_either_style_of_config(raw):
    trained = ModelConfig.from_dict(raw)
    plain = ModelConfig.from_dict(with_rope(raw, {}))
    scaled = ModelConfig.from_dict(with_rope(raw, YARN))
    assert (plain.rope_theta, plain.rotary_dim) == (trained.rope_theta, trained.rotary_dim)
    assert plain.rope_scaling is None
    assert scaled.rope_scaling["factor"] == 4.0
    assert (scaled.rope_theta, scaled.rotary_dim) == (trained.rope_theta, trained.rotary_dim)


@pytest.mark.parametrize(
    ("change", "severity"),
    [
        ({"dropout": 0.1}, "note"),
        ({"attention_dropout": 0.1}, "note"),
        ({"a_new_switch": True}, "warning"),
        ({"a_new_switch": None}, "note"),
        ({"rope_scaling": {"type": "default", "long_factor": [1.0]}}, "warning"),
        ({"quantization_config": {"quant_method": "fp8", "lm_head": True}}, "warning"),
    ],
)
def test_a_field_that_is_not_used_is_a_finding(change, severity):
    raw = tiny_config() | change
    config = ModelConfig.from_dict(raw)
    (found,) = unused_fields(raw, config.family)
    assert found.is_note == (severity == "note")


def own_configs():
    yield from CONFIGS.items()
    yield from ((name, model.raw) for name, model in PUBLISHED.items())
    yield "demo", json.loads((DEMO / "config.json").read_text())
    yield "ORIGINAL", ORIGINAL
    for made in (MiniMaxM2Config, Qwen2Config, Qwen3Config, Qwen3MoeConfig):
        yield made.__name__, made(pad_token_id=0).to_dict()


@pytest.mark.parametrize(
    ("name", "raw"), list(own_configs()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_field_of_the_published_files_and_of_transformers_is_known(name, raw):
    assert list(unused_fields(raw, ModelConfig.from_dict(raw).family)) == []
