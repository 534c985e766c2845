"""The table of weights against the published checkpoint's counts and transformers' own
parameters.
"""

from collections import Counter

import pytest
from transformers import AutoModelForCausalLM, MiniMaxM2Config

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.config import ModelConfig
from tests.full_size import published_config
from tests.tiny import tiny_config


def test_the_real_config_expands_to_the_published_checkpoint():
    tensors = list(schema.expected(ModelConfig.from_dict(published_config())))
    by_dtype = Counter(tensor.dtype for tensor in tensors if not tensor.is_scale)
    assert len(tensors) == len({tensor.name for tensor in tensors}) == 96_103
    assert sum(tensor.is_scale for tensor in tensors) == 47_864
    assert by_dtype == {"F8_E4M3": 47_864, "BF16": 251, "F32": 124}
    weights = [tensor for tensor in tensors if not tensor.is_scale]
    assert sum(weight.elements for weight in weights) == 228_689_764_864
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    assert shapes["model.layers.61.block_sparse_moe.experts.255.w2.weight_scale_inv"] == (24, 12)
    assert shapes["model.layers.0.self_attn.o_proj.weight_scale_inv"] == (24, 48)


def test_the_parameter_count_is_that_of_transformers():
    raw = {key: value for key, value in tiny_config().items() if key != "quantization_config"}
    oracle = AutoModelForCausalLM.from_config(MiniMaxM2Config(**raw))
    buffers = sum(
        b.numel() for name, b in oracle.named_buffers() if name.endswith("e_score_correction_bias")
    )
    tensors = schema.expected(ModelConfig.from_dict(raw))
    counted = sum(tensor.elements for tensor in tensors if not tensor.is_scale)
    assert counted == sum(parameter.numel() for parameter in oracle.parameters()) + buffers


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((256, 384), (2, 3)), ((192, 320), (2, 3)), ((1, 129), (1, 2)), ((127, 128), (1, 1))],
)
def test_the_last_block_of_a_dimension_may_be_partial(shape, grid):
    assert fp8.block_grid(shape, (128, 128)) == grid


def test_multi_token_prediction_tensors_are_recognized_by_whole_parts():
    declared, silent = (
        ModelConfig.from_dict(tiny_config(num_mtp_modules=count)) for count in (3, 0)
    )
    marked = ["model.mtp.0.w1.weight", "mtp_layers.0.weight"]
    beyond = ["model.layers.2.eh_proj.weight", "model.layers.2.self_attn.q_proj.weight"]
    within = ["model.layers.1.self_attn.q_proj.weight", "model.layers.1.eh_proj.weight"]
    assert schema.mtp_names([*marked, *beyond, *within], declared) == [*marked, *beyond]
    assert schema.mtp_names([*marked, *beyond, *within], silent) == [*marked, *beyond]
    unnamed = ["model.layers.2.projection.weight"]
    assert schema.mtp_names(unnamed, declared) == unnamed
    assert schema.mtp_names(unnamed, silent) == []


def test_a_layer_that_config_does_not_count_is_no_multi_token_prediction():
    raw = tiny_config(num_mtp_modules=3)
    names = [tensor.name for tensor in schema.expected(ModelConfig.from_dict(raw))]
    fewer = ModelConfig.from_dict(raw | {"num_hidden_layers": 1})
    assert schema.mtp_names(names, fewer) == []
    # What servers and earlier versions put beside a layer's own weights makes it no other one.
    for more in ("self_attn.k_proj.k_scale", "self_attn.rotary_emb.inv_freq"):
        assert schema.mtp_names([*names, f"model.layers.1.{more}"], fewer) == []
    # Weights of another dtype have no scales.
    plain = [name for name in names if not name.endswith("_scale_inv")]
    assert schema.mtp_names([*plain, "model.layers.1.new.weight"], fewer) == []
    predicting = [*names, "model.layers.1.eh_proj.weight"]
    assert schema.mtp_names(predicting, fewer) == [
        name for name in predicting if ".layers.1." in name
    ]
