"""FP8 bytes against torch's own casts, for every code, and against slow obvious arithmetic."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neuron_minimax import fp8
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import ScaleConvention, ceil_div

CODES = np.arange(256, dtype=np.uint8)
VALUES = torch.from_numpy(CODES).view(torch.float8_e4m3fn).float().numpy()
FINITE = ~np.isnan(VALUES)


def test_every_code_decodes_as_torch_does():
    np.testing.assert_array_equal(fp8.decode(CODES), VALUES)


def test_encoding_rounds_as_torch_does():
    generator = np.random.default_rng(0)
    halfway = (VALUES[FINITE][:-1] + VALUES[FINITE][1:]) / 2
    values = np.concatenate(
        [VALUES[FINITE], halfway, *(generator.normal(size=4000) * s for s in (1e-3, 1e-2, 1, 99))]
    )
    values = values[np.abs(values) <= 448].astype(np.float32)
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8.encode(values), expected)


def test_encoding_saturates_and_keeps_nan():
    np.testing.assert_array_equal(
        fp8.encode(np.array([1e9, -1e9, np.inf, np.nan, -0.0], dtype=np.float32)),
        [0x7E, 0xFE, 0x7E, 0x7F, 0x80],
    )


def test_halving_is_exact_but_for_sixteen_subnormal_codes():
    halved = fp8.decode(fp8.halve(CODES[FINITE]))
    inexact = 2 * halved != VALUES[FINITE]
    assert inexact.sum() == 16 == fp8.count_rounded(CODES)
    assert (np.abs(VALUES[FINITE][inexact]) <= 15 * 2.0**-9).all()
    assert np.abs(halved).max() == 224
    nearest = torch.from_numpy(VALUES / 2).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(fp8.halve(CODES[FINITE]), nearest[FINITE])


def test_halving_leaves_no_code_that_neuron_cannot_read():
    assert (np.abs(VALUES[FINITE]) > fp8.NEURON_MAX).sum() == 14
    assert np.abs(VALUES[fp8.halve(CODES[FINITE])]).max() <= fp8.NEURON_MAX


def slow_dequantize(codes, scales, block):
    result = np.empty(codes.shape, dtype=np.float32)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            result[row, column] = (
                VALUES[codes[row, column]] * scales[row // block[0], column // block[1]]
            )
    return result


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 16), st.integers(1, 16)),
)
def test_dequantizing_takes_the_scale_of_the_block_even_when_the_last_is_partial(
    rows, columns, block
):
    generator = np.random.default_rng(rows * 41 + columns)
    codes = generator.choice(CODES[FINITE], (rows, columns))
    scales = generator.uniform(
        0.5, 2, (ceil_div(rows, block[0]), ceil_div(columns, block[1]))
    ).astype(np.float32)
    np.testing.assert_array_equal(
        fp8.dequantize(codes, scales, block), slow_dequantize(codes, scales, block)
    )


@pytest.mark.parametrize("shape", [(256, 384), (192, 320), (5, 130)])
def test_quantizing_puts_block_maxima_at_the_end_of_the_range(shape):
    weight = np.random.default_rng(1).normal(0, 0.02, shape).astype(np.float32)
    codes, scales = fp8.quantize(weight, (128, 128))
    as_multiplier, _ = fp8.block_maxima(codes, scales, (128, 128))
    assert (np.abs(fp8.decode(codes)).max(), codes.shape) == (448, shape)
    error = np.abs(fp8.dequantize(codes, scales, (128, 128)) - weight)
    # Half a unit in the last of four significant bits, or half the smallest subnormal step.
    bound = (
        np.abs(weight) * (2.0**-4 + 1e-6) + fp8.expand_scales(scales, shape, (128, 128)) * 2.0**-10
    )
    assert (error <= bound).all()
    assert len(as_multiplier) == scales.size


def test_a_zero_block_has_a_usable_scale():
    codes, scales = fp8.quantize(np.zeros((128, 256), dtype=np.float32), (128, 128))
    assert (codes == 0).all()
    assert (scales == 1).all()


def sample(scale_of_weights, convention, count=3):
    for number in range(count):
        weight = (
            np.random.default_rng(number).normal(0, scale_of_weights, (128, 256)).astype(np.float32)
        )
        codes, scales = fp8.quantize(weight, (128, 128))
        yield (
            f"w{number}",
            codes,
            1 / scales if convention is ScaleConvention.RECIPROCAL else scales,
        )


@pytest.mark.parametrize("convention", list(ScaleConvention))
@pytest.mark.parametrize("size", [1e-3, 0.02, 1.0])
def test_the_convention_is_read_off_the_block_maxima(convention, size):
    found, evidence = fp8.decide_convention(sample(size, convention), (128, 128))
    assert found is convention
    assert {evidence.multiplier, evidence.reciprocal} == {3, 0}
    assert "3 have block maxima" in evidence.render() or "reciprocal 3" in evidence.render()


def test_mixed_evidence_decides_nothing_and_names_the_dissenters():
    mixed = [
        *sample(0.02, ScaleConvention.MULTIPLIER),
        *sample(0.02, ScaleConvention.RECIPROCAL, 1),
    ]
    found, evidence = fp8.decide_convention(mixed, (128, 128))
    assert found is None
    assert (evidence.multiplier, evidence.reciprocal, evidence.dissenters) == (3, 1, ("w0",))


def test_zero_weights_and_implausible_scales_decide_nothing():
    zeros = [("z", np.zeros((128, 128), np.uint8), np.ones((1, 1), np.float32))]
    ones = [("o", np.full((128, 128), 0x7E, np.uint8), np.ones((1, 1), np.float32))]
    assert fp8.decide_convention(zeros, (128, 128))[0] is None
    assert fp8.decide_convention(ones, (128, 128))[0] is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_a_bad_scale_is_named_with_its_block(bad):
    scales = np.ones((3, 4), dtype=np.float32)
    fp8.check_scales("w", scales)
    scales[1, 2] = bad
    with pytest.raises(CheckpointError, match=r"w has 1 scale of no .* at block \[1, 2\]"):
        fp8.check_scales("w", scales)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes_are_counted_and_named(code):
    codes = np.zeros((4, 4), dtype=np.uint8)
    fp8.check_codes("w", codes)
    codes[3, 3] = code
    with pytest.raises(CheckpointError, match="w has 1 NaN codes"):
        fp8.check_codes("w", codes)
