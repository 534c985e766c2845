"""The expert MLPs, eager and as an operator of graphs, against float64 sums over one number at a
time.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_minimax import fp8 as numpy_fp8
from neuron_minimax.fp8 import block_grid, ceil_div
from neuron_minimax.kernels import reference
from neuron_minimax.kernels.cpu import operators
from neuron_minimax.kernels.reference import ExpertWeights, expert_mlp

pytestmark = pytest.mark.usefixtures("kernels")

BLOCK = 128
PATHS = [
    False,
    True,
]  # products of bfloat16 numbers as float32, and as pairs, where the machine can
FLOAT32_ERROR = 1.2e-6  # relative to the largest number: twice the largest that is found here


def on_threads(team: int, *arguments: Any) -> torch.Tensor:
    before = torch.get_num_threads()
    torch.set_num_threads(team)
    try:
        return operators.expert_mlp(*arguments)
    finally:
        torch.set_num_threads(before)


IMPLEMENTATIONS = {
    "eager": expert_mlp,
    "operator": partial(on_threads, 1),
    "operator on five threads": partial(on_threads, 5),  # few experts' weights are cut into pieces
}


def grid(size: int) -> int:
    return ceil_div(size, BLOCK)


def weights(experts: int, hidden: int, intermediate: int, seed: int = 0, scale: float = 1e-2):
    """Random codes without NaN, every other value included, and scales within a factor of two of
    `scale`.
    """
    generator = np.random.default_rng(seed)
    finite = np.array([code for code in range(256) if code & 0x7F != 0x7F], dtype=np.uint8)
    gate_up = generator.choice(finite, (experts, hidden, 2 * intermediate))
    down = generator.choice(finite, (experts, intermediate, hidden))
    gate_up_scale = scale * generator.uniform(
        0.5, 1, (experts, grid(hidden), 2 * grid(intermediate))
    )
    down_scale = scale * generator.uniform(0.5, 1, (experts, grid(intermediate), grid(hidden)))
    arrays = gate_up, gate_up_scale.astype(np.float32), down, down_scale.astype(np.float32)
    return ExpertWeights(*(torch.from_numpy(array) for array in arrays))


def routing(tokens: int, experts: int, chosen: int, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    index = torch.stack(
        [torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)]
    )
    return index, torch.rand(tokens, chosen, generator=generator)


def slow(hidden, index, affinity, weights):
    """The definition, in float64, one expert of one token at a time; scales looked up element by
    element.
    """
    gate_up, gate_up_scale, down, down_scale, _ = weights
    intermediate, width = down.shape[1:]
    column_block = [i // BLOCK for i in range(intermediate)]
    columns = column_block + [grid(intermediate) + block for block in column_block]
    rows = [row // BLOCK for row in range(width)]
    out = np.zeros((len(hidden), width))
    for token, experts in enumerate(index.tolist()):
        for place, expert in enumerate(experts):
            if not 0 <= expert < len(down):
                continue
            first = (
                numpy_fp8.DECODED[gate_up[expert].numpy()]
                * gate_up_scale[expert].numpy()[rows][:, columns]
            )
            second = (
                numpy_fp8.DECODED[down[expert].numpy()]
                * down_scale[expert].numpy()[column_block][:, rows]
            )
            gate, up = np.split(hidden[token].double().numpy() @ first.astype(np.float64), 2)
            product = (gate * (1 + np.tanh(gate / 2)) / 2 * up) @ second.astype(np.float64)
            out[token] += float(affinity[token, place]) * product
    return out


def error(found: torch.Tensor, wanted: np.ndarray) -> float:
    return float(np.abs(found.double().numpy() - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())
@pytest.mark.parametrize(
    ("tokens", "hidden", "intermediate"),
    [(1, 256, 128), (9, 192, 320), (9, 129, 64), (40, 1030, 600), (700, 130, 70)],
)
def test_every_implementation_computes_the_definition(implementation, tokens, hidden, intermediate):
    stacked = weights(6, hidden, intermediate)
    index, affinity = routing(tokens, 6, 3)
    index[0, 1] = -1
    index[-1, :2] = index[-1, 2]  # chosen more than once, in places that are not the first
    activations = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2))
    found = implementation(activations, index, affinity, stacked)
    assert error(found, slow(activations, index, affinity, stacked)) < FLOAT32_ERROR


BLOCKS = st.sampled_from([(128, 128), (64, 64), (1, 128), (64, 32), (128, 1)])
SIZES = st.integers(1, 300)


def scales(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator.uniform(5e-3, 1e-2, shape).astype(np.float32))


def some_codes(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    codes = generator.integers(0, 256, shape, dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return torch.from_numpy(codes)


@given(st.integers(1, 130), SIZES, SIZES, BLOCKS, st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_linear_layers_of_any_shape(rows, outputs, features, block, seed):
    generator = np.random.default_rng(seed)
    codes = some_codes(generator, outputs, features)
    scale = scales(generator, *block_grid((outputs, features), block))
    hidden = torch.from_numpy(generator.standard_normal((rows, features), np.float32))
    expanded = reference.dequantize(codes, scale, block).double()
    for dtype, bound in ((torch.float32, FLOAT32_ERROR), (torch.bfloat16, 2**-8)):
        found = operators.linear(hidden.to(dtype), codes, scale, block)
        wanted = hidden.to(dtype).double() @ expanded.T
        magnitude = hidden.abs().double() @ expanded.abs().T  # what may cancel out
        assert ((found.double() - wanted).abs() / magnitude.clamp(min=1e-9)).max() < bound


@given(
    st.integers(1, 70),
    SIZES,
    SIZES,
    BLOCKS,
    st.sampled_from(["any", "one for all", "nobody's", "padding"]),
    st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_experts_of_any_shape(tokens, hidden, intermediate, block, kind, seed):
    generator = np.random.default_rng(seed)
    rows, columns = block_grid((hidden, intermediate), block)
    stacked = ExpertWeights(
        some_codes(generator, 5, hidden, 2 * intermediate),
        scales(generator, 5, rows, 2 * columns),
        some_codes(generator, 5, intermediate, hidden),
        scales(generator, 5, *block_grid((intermediate, hidden), block)),
        block,
    )
    index, affinity = routing(tokens, 5, 2, seed)
    if kind == "one for all":
        index[:] = 3
    elif kind == "nobody's":
        index[index == 3] = 2
    elif kind == "padding":
        index[tokens // 2 :] = -1
    activations = torch.from_numpy(generator.standard_normal((tokens, hidden), np.float32))
    exact = stacked._replace(
        gate_up=reference.dequantize(*stacked[:2], block, parts=2).double(),
        gate_up_scale=None,
        down=reference.dequantize(*stacked[2:4], block).double(),
        down_scale=None,
    )
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    magnitude = torch.zeros_like(wanted)  # of what may cancel out
    for expert in range(5):
        gate, up = (activations.double() @ exact.gate_up[expert]).chunk(2, dim=-1)
        largest = activations.double().abs() @ exact.gate_up[expert].abs()
        share = (affinity * (index == expert)).sum(1).double()[:, None]
        wanted += share * ((torch.nn.functional.silu(gate) * up) @ exact.down[expert])
        magnitude += (
            share
            * (largest.chunk(2, dim=-1)[0] * largest.chunk(2, dim=-1)[1])
            @ (exact.down[expert].abs())
        )
    magnitude.clamp_(min=1e-9)
    found = operators.expert_mlp(activations, index, affinity, stacked)
    assert ((found.double() - wanted).abs() / magnitude).max() < 4 * FLOAT32_ERROR
    rounded = operators.expert_mlp(activations.bfloat16(), index, affinity, stacked)
    assert ((rounded.double() - wanted).abs() / magnitude).max() < 0.02  # the activations' rounding
    if kind == "padding":
        assert not found[tokens // 2 :].any()


@pytest.mark.parametrize("scale", [1e-6, 1e3])
def test_extreme_scales_neither_underflow_nor_overflow(scale):
    stacked = weights(4, 128, 128, scale=scale)
    stacked = stacked._replace(down_scale=stacked.down_scale / scale)
    index, affinity = routing(3, 4, 2)
    activations = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)) / scale
    for implementation in IMPLEMENTATIONS.values():
        found = implementation(activations, index, affinity, stacked)
        wanted = slow(activations, index, affinity, stacked)
        assert error(found, wanted) < FLOAT32_ERROR


def test_masked_tokens_and_experts_that_repeat_are_counted_right():
    stacked = weights(4, 128, 128)
    index = torch.tensor([[-1, -1], [2, 2], [4, 0], [2, 0]])
    affinity = torch.rand(4, 2, generator=torch.Generator().manual_seed(3))
    activations = torch.randn(4, 128, generator=torch.Generator().manual_seed(2))
    wanted = slow(activations, index, affinity, stacked)
    for implementation in IMPLEMENTATIONS.values():
        found = implementation(activations, index, affinity, stacked)
        assert error(found, wanted) < FLOAT32_ERROR
        assert not found[0].any()


def test_bf16_activations_round_where_the_interface_says():
    stacked = weights(4, 256, 128)
    index, affinity = routing(5, 4, 2)
    activations = torch.randn(5, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    wanted = torch.zeros(5, 256, dtype=torch.float64)
    for token in range(5):
        for place, expert in enumerate(index[token].tolist()):
            first, second = (
                reference.dequantize(codes[expert], scale[expert], (BLOCK, BLOCK), parts)
                .bfloat16()
                .double()
                for codes, scale, parts in (
                    (stacked[0], stacked[1], 2),
                    (stacked[2], stacked[3], 1),
                )
            )
            gate, up = (activations[token].double() @ first).bfloat16().chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            wanted[token] += (inner.double() @ second).bfloat16().double() * affinity[
                token, place
            ].double()
    found = expert_mlp(activations, index, affinity, stacked)
    assert found.dtype == torch.bfloat16
    # One rounding to 8 bits of mantissa at the end, and rare last-bit differences before it.
    assert error(found, wanted.numpy()) < 2**-8


@pytest.mark.parametrize("tokens", [1, 2, 7, 90])
def test_experts_round_bf16_once_and_by_pairs_silu_of_gate_times_up_too(tokens):
    stacked = weights(4, 256, 128)
    chosen = routing(tokens, 4, 2)
    activations = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(2)).bfloat16()
    unrounded = operators.expert_mlp(activations.float(), *chosen, stacked)
    found = operators.expert_mlp(activations, *chosen, stacked, pairs=False)
    assert torch.equal(found, unrounded.bfloat16())
    by_pairs = operators.expert_mlp(activations, *chosen, stacked)
    assert error(by_pairs, unrounded.double().numpy()) < 2**-7  # twice the largest that is found


@pytest.mark.parametrize("pairs", PATHS)
@pytest.mark.parametrize("tokens", [4, 30, 120])  # as a weight lies, by strips, in panels
@pytest.mark.parametrize(("hidden", "intermediate"), [(256, 128), (129, 70)])
def test_experts_with_more_tokens_round_bf16_activations_alone(hidden, intermediate, tokens, pairs):
    """Weights as they are, sums in float32, silu(gate) * up rounded where pairs are multiplied,
    then the sum over k.
    """
    stacked = weights(3, hidden, intermediate)
    index, affinity = routing(tokens, 3, 2)
    activations = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(2))
    activations = activations.bfloat16()
    first = reference.dequantize(stacked[0], stacked[1], (BLOCK, BLOCK), parts=2).double()
    second = reference.dequantize(stacked[2], stacked[3], (BLOCK, BLOCK)).double()
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for place, expert in enumerate(index[token].tolist()):
            gate, up = (activations[token].double() @ first[expert]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            inner = inner.float().bfloat16().double() if pairs and operators.has_pairs() else inner
            wanted[token] += inner @ second[expert] * affinity[token, place].double()
    arguments = index, affinity, *stacked[:4], BLOCK, BLOCK, pairs
    found = torch.ops.neuron_minimax.expert_mlp(activations.float(), *arguments)
    off = (found - wanted).abs() / wanted.abs().max()
    assert off.median() < FLOAT32_ERROR
    # Of pairs a few sums lie between two bfloat16 numbers and are rounded to the other one.
    assert off.max() < (2**-10 if pairs else FLOAT32_ERROR)
    rounded = operators.expert_mlp(activations, index, affinity, stacked, pairs)
    assert torch.equal(rounded, found.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 200])
def test_every_code_is_multiplied_exactly(rows, dtype):
    """One one in each row of input picks a code of each output, at each place of a register."""
    codes = torch.from_numpy((np.arange(256)[:, None] + 7 * np.arange(200)).astype(np.uint8))
    codes[(codes & 0x7F) == 0x7F] = 0
    hidden = torch.eye(200, dtype=dtype)
    found = [
        operators.linear(part, codes, torch.ones(2, 2), (BLOCK, BLOCK))
        for part in hidden.split(rows)
    ]
    assert torch.equal(torch.cat(found).float(), reference.decode(codes).T)


def test_the_exponential_is_within_two_ten_millionths():
    """Attention to two positions whose scores are s and 0, and whose values are 1 and 0."""
    scores = torch.linspace(-86, 0, 100_001)
    query = torch.zeros(len(scores), 1, 1, 64)
    query[:, 0, 0, 0] = scores * 8
    keys, values = torch.zeros(2, len(scores), 1, 2, 64)
    keys[:, 0, 0, 0] = values[:, 0, 0, 0] = 1
    found = operators.attend(query, keys, values, torch.ones(len(scores), 1))[:, 0, 0].double()
    wanted = torch.exp(query[:, 0, 0, 0].double() / 8)
    wanted /= 1 + wanted
    assert ((found - wanted).abs() / wanted).max() < 2.5e-7


@pytest.mark.parametrize("tokens", [5, 40, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_experts_are_multiplied_as_they_are(tokens, dtype):
    stacked = weights(4, 192, 64)
    first = reference.dequantize(stacked.gate_up, stacked.gate_up_scale, (BLOCK, BLOCK), parts=2)
    second = reference.dequantize(stacked.down, stacked.down_scale, (BLOCK, BLOCK))
    dense = ExpertWeights(first, None, second, None)
    index, affinity = routing(tokens, 4, 2)
    activations = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = operators.expert_mlp(activations.float(), index, affinity, dense)
    wanted = slow(activations.float(), index, affinity, stacked)
    assert error(found, wanted) < FLOAT32_ERROR
    # Float32 weights lose nothing beside bfloat16 activations.
    assert torch.equal(
        operators.expert_mlp(activations, index, affinity, dense),
        found.to(dtype),
    )
    rounded = ExpertWeights(first.bfloat16(), None, second.bfloat16(), None)
    widened = ExpertWeights(rounded.gate_up.float(), None, rounded.down.float(), None)
    found = operators.expert_mlp(activations, index, affinity, rounded)
    wanted = expert_mlp(activations.float(), index, affinity, widened)
    assert error(found, wanted.numpy()) < (FLOAT32_ERROR if dtype == torch.float32 else 2**-8)


def test_chosen_experts_may_be_any_integers_and_rows_have_to_fit():
    stacked = weights(4, 192, 64)
    (index, affinity) = routing(5, 4, 2)
    activations = torch.randn(5, 192, generator=torch.Generator().manual_seed(2))
    wanted = operators.expert_mlp(activations, index, affinity, stacked)
    assert torch.equal(operators.expert_mlp(activations, index.int(), affinity, stacked), wanted)
    with pytest.raises(RuntimeError, match="invalid for input of size 10"):
        operators.linear(
            torch.zeros(2, 5),
            torch.zeros(8, 4, dtype=torch.uint8),
            torch.ones(1, 1),
            (BLOCK, BLOCK),
        )


def test_experts_of_which_one_weight_is_kept_dense_are_left_to_torch():
    stacked = weights(4, 192, 64)
    index, affinity = routing(5, 4, 2)
    activations = torch.randn(5, 192, generator=torch.Generator().manual_seed(2))
    dense = reference.dequantize(stacked.down, stacked.down_scale, (BLOCK, BLOCK))
    mixed = stacked._replace(down=dense, down_scale=None)
    found = operators.expert_mlp(activations, index, affinity, mixed)
    assert error(found, slow(activations, index, affinity, stacked)) < FLOAT32_ERROR


def test_decoding_by_bit_pattern_equals_the_cast_for_every_code():
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    assert torch.equal(reference.decode(codes), codes.view(torch.float8_e4m3fn).float())
    assert torch.equal(
        reference.decode(codes.view(torch.float8_e4m3fn)), codes.view(torch.float8_e4m3fn).float()
    )


@pytest.mark.parametrize(
    ("shape", "block"), [((256, 384), (128, 128)), ((193, 257), (128, 128)), ((130, 70), (64, 32))]
)
def test_dequantization_equals_the_byte_table(shape, block):
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 0x7F, shape, dtype=np.uint8)
    scale = generator.uniform(
        1e-3, 1, [ceil_div(size, step) for size, step in zip(shape, block, strict=True)]
    )
    wanted = numpy_fp8.dequantize(codes, scale.astype(np.float32), block)
    found = reference.dequantize(
        torch.from_numpy(codes), torch.from_numpy(scale.astype(np.float32)), block
    )
    assert np.array_equal(found.numpy(), wanted)


FEW_DENSE_ROWS = 12  # of bfloat16 numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 13, 70, 600])
@pytest.mark.parametrize("dense", [False, True])
def test_a_linear_layer_equals_the_product_with_the_expanded_weight(dtype, rows, dense):
    generator = np.random.default_rng(0)
    codes = torch.from_numpy(generator.integers(0, 0x7F, (301, 257), dtype=np.uint8))
    scale = torch.from_numpy(generator.uniform(1e-3, 1e-2, (3, 3)).astype(np.float32))
    weight = reference.dequantize(codes, scale, (128, 128))
    hidden = torch.randn(rows, 257, generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = (weight.bfloat16(), None) if dense else (codes, scale)
    wanted = hidden.double() @ (weight.bfloat16() if dense else weight).double().T
    found = operators.linear(hidden[None], *arguments, (128, 128))[0]
    assert found.dtype == dtype
    pairs = dtype == torch.bfloat16
    by_torch = dense and pairs and rows > FEW_DENSE_ROWS  # which rounds the result itself
    if not by_torch:
        unrounded = torch.ops.neuron_minimax.linear(hidden.float(), *arguments, 128, 128, pairs)
        assert error(unrounded, wanted.numpy()) < FLOAT32_ERROR
    assert error(found, wanted.numpy()) < (FLOAT32_ERROR if dtype == torch.float32 else 2**-8)


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
def test_a_weight_without_a_scale_that_needs_one_is_refused(rows, dtype):
    with pytest.raises(TypeError, match=r"a weight \[8, 4\] in .* has no scale"):
        operators.linear(torch.zeros(rows, 4), torch.zeros(8, 4, dtype=dtype), None, (BLOCK, BLOCK))


@pytest.mark.parametrize("rows", [1, 80])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int32])
def test_a_weight_with_a_scale_that_is_not_fp8_is_refused(rows, dtype):
    with pytest.raises(
        TypeError, match=r"a weight \[8, 4\] in .* has a scale; expected float8_e4m3fn or uint8"
    ):
        operators.linear(
            torch.zeros(rows, 4), torch.zeros(8, 4, dtype=dtype), torch.ones(1, 1), (BLOCK, BLOCK)
        )


def test_scales_that_are_not_one_per_block_are_refused():
    with pytest.raises(
        ValueError, match=r"scale has shape \[1, 1\]; expected \[2, 1\] beside \[130, 4\]"
    ):
        operators.linear(
            torch.zeros(1, 4),
            torch.zeros(130, 4, dtype=torch.uint8),
            torch.ones(1, 1),
            (BLOCK, BLOCK),
        )


def test_a_shape_that_does_not_belong_is_named():
    stacked = weights(4, 256, 128)
    narrow = stacked._replace(gate_up_scale=stacked.gate_up_scale[..., :1])
    index, affinity = routing(2, 4, 2)
    with pytest.raises(
        ValueError, match=r"gate_up_scale has shape \[4, 2, 1\]; expected \[4, 2, 2\]"
    ):
        expert_mlp(torch.randn(2, 256), index, affinity, narrow)
    with pytest.raises(ValueError, match="hidden_TH"):
        expert_mlp(torch.randn(2, 128), index, affinity, stacked)
    with pytest.raises(
        ValueError, match=r"affinity_TK has shape \[2, 1\]; expected one per chosen .*\[2, 2\]"
    ):
        operators.expert_mlp(torch.randn(2, 256), index, affinity[:, :1], stacked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tokens_are_multiplied(dtype):
    stacked = weights(4, 256, 128)
    hidden = torch.zeros(0, 256, dtype=dtype)
    index, affinity = torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2)
    assert operators.expert_mlp(hidden, index, affinity, stacked).shape == (0, 256)
    for weight, scale in ((torch.zeros(128, 256), None), (stacked.down[0], torch.ones(1, 2))):
        assert operators.linear(hidden, weight, scale, (128, 128)).shape == (0, 128)
