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
    assert schema.is_mtp("model.mtp.0.w1.weight", silent)
    assert schema.is_mtp("mtp_layers.0.weight", silent)
    assert schema.is_mtp("model.layers.2.eh_proj.weight", declared)
    assert not schema.is_mtp("model.layers.2.eh_proj.weight", silent)
    assert not schema.is_mtp("model.layers.1.self_attn.q_proj.weight", declared)
