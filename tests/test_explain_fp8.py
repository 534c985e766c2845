"""The FP8 walkthrough: what each chip reads and what each way costs, against torch's own casts."""

import numpy as np
import pytest
import torch

from neuron_minimax import fp8
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.studies.explain.fp8 import (
    WeightBlock,
    alternatives,
    compare_readings,
    convention_of,
    explain,
    from_checkpoint,
    ieee_e4m3,
    made_here,
)
from tests.tiny import write_tiny


def expanded(scales, shape):
    rows, columns = np.indices(shape)
    return torch.from_numpy(scales[rows // 128, columns // 128])


def test_ieee_e4m3_keeps_values_to_240_and_loses_the_exponent_15():
    read = ieee_e4m3(np.arange(256, dtype=np.uint8))
    ocp = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    finite = np.isfinite(read)
    assert np.array_equal(read[finite], ocp[finite])
    assert np.abs(read[finite]).max() == 240
    assert list(np.flatnonzero(np.isinf(read))) == [0x78, 0xF8]
    assert list(np.flatnonzero(np.isnan(read))) == [*range(0x79, 0x80), *range(0xF9, 0x100)]


def test_the_costs_are_those_of_the_same_steps_in_torch():
    subject = made_here()
    codes = torch.from_numpy(subject.codes).view(torch.float8_e4m3fn).float()
    scales = expanded(subject.scales, subject.codes.shape)
    weight = codes * scales

    def rms(values):
        return ((values.double() - weight.double()).norm() / weight.double().norm()).item()

    def rounded(values):
        return values.to(torch.float8_e4m3fn).float()

    row_scale = weight.abs().amax(1, keepdim=True) / 240
    expected = [
        rms(rounded(codes / 2) * (scales * 2)),
        rms(rounded(codes * (240 / 448)) * (scales * (448 / 240))),
        rms(rounded(weight / row_scale) * row_scale),
    ]
    found = [cost.relative_rms for cost in alternatives(subject)]
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[0] < 1e-6 < 1e-2 < min(found[1:])


def test_a_reciprocal_is_recognized_and_costs_the_same():
    subject = made_here()
    inverted = WeightBlock(**{**vars(subject), "scales": np.float32(1) / subject.scales})
    assert convention_of(inverted) is ScaleConvention.RECIPROCAL
    assert convention_of(subject) is ScaleConvention.MULTIPLIER
    costs = [[cost.relative_rms for cost in alternatives(one)] for one in (inverted, subject)]
    assert costs[0] == pytest.approx(costs[1], rel=1e-3)


def test_scales_that_fit_no_reading_are_refused_by_name():
    subject = made_here()
    with pytest.raises(CheckpointError, match=r"normal weight.*unclear"):
        explain(WeightBlock(**{**vars(subject), "scales": np.ones_like(subject.scales)}))


def test_the_steps_show_the_real_numbers_of_the_block(tmp_path):
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    subject = from_checkpoint(
        Checkpoint(write_tiny(tmp_path / "c", hidden_size=320, intermediate_size=192)), name, (2, 1)
    )
    codes = subject.codes[256:320, 128:192]
    scale = subject.scales[2, 1]
    parts = {part.title[:1]: part for part in explain(subject)}
    assert "rows 256 to 319 and columns 128 to 191" in parts["1"].text
    assert [row[1:] for row in parts["1"].rows] == [
        tuple(f"0x{code:02x}" for code in row[:8]) for row in codes[:4]
    ]
    values = torch.from_numpy(codes.copy()).view(torch.float8_e4m3fn).float().numpy() * scale
    assert [row[1:] for row in parts["3"].rows] == [
        tuple(f"{value:.5f}" for value in row[:8]) for row in values[:4]
    ]
    largest = np.abs(fp8.decode(codes)).max()
    assert [row[2:] for row in parts["2"].rows] == [
        (f"{largest * scale:.6g}", "right"),
        (f"{largest / scale:.6g}", "wrong"),
    ]
    assert f"{np.count_nonzero((codes & 0x7F) >= 0x78)} of {codes.size}" in parts["4"].text


def test_both_readings_are_shown_for_every_block():
    subject = made_here()
    (part,) = compare_readings(subject)
    assert len(part.rows) == 6
    block = np.abs(subject.original[:128, :128]).max()
    assert float(part.rows[0][2]) == pytest.approx(block, rel=1e-3)
    assert float(part.rows[0][3]) == pytest.approx(448 / subject.scales[0, 0], rel=1e-3)


def test_the_dtype_of_the_scale_is_the_files(tmp_path):
    for family, dtype in (("minimax_m2", "float32"), ("qwen3", "BF16")):
        checkpoint = Checkpoint(write_tiny(tmp_path / family, family=family))
        part = explain(from_checkpoint(checkpoint, None, (0, 0)))[1]
        assert part.text.startswith(f"The block has one {dtype} number")
