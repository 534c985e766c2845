"""Weights and scales stored in another dtype than is published keep their values exactly."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import neuron_minimax as nm
from neuron_minimax.checkpoint import schema
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import bfloat16
from tests.tiny import write_tiny

ROUTER = ("gate.weight", "e_score_correction_bias")


def rewritten(directory: Path, change) -> Path:
    """A checkpoint of one file whose tensors are `change(name, tensor)`."""
    path = directory / "model.safetensors"
    tensors = {name: change(name, tensor.clone()) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    return directory


def converted(source: Path, out: Path, **layout) -> tuple[nm.Converted, dict[str, torch.Tensor]]:
    checkpoint = nm.Checkpoint.open(source)
    made = nm.plan_conversion(checkpoint, nm.Layout(**layout)).write(out)
    assert nm.verify(checkpoint, made).equal
    return made, {name: made.tensors.tensor(name).clone() for name in made.tensors.entries}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_router_of_less_than_float32_is_widened_and_warned_of(tmp_path, dtype):
    def narrow(name, tensor):
        return tensor.to(dtype) if name.endswith(ROUTER) else tensor

    source = rewritten(write_tiny(tmp_path / "source"), narrow)
    stored = load_file(source / "model.safetensors")
    made, tensors = converted(source, tmp_path / "out")
    bias = "block_sparse_moe.{}e_score_correction_bias"
    found = tensors["layers.1." + bias.format("router.")]
    assert found.dtype == torch.float32
    assert torch.equal(found, stored["model.layers.1." + bias.format("")].float())
    assert "widened to float32, exactly: 4 tensors" in made.render()
    report = nm.Checkpoint.open(source).inspect(values=True)
    assert report.usable
    warned = [each for each in report.findings if each.severity == "warning"][:2]
    assert [each.subject for each in warned] == ["gate", "e_score_correction_bias"]
    assert "rounded by whoever wrote it" in warned[1].message
    # The distance of 8 and the number behind it, as torch has it.
    step = (torch.tensor(8.0, dtype=dtype).view(torch.int16) + 1).view(dtype).item() - 8
    (said,) = re.findall(r"at 8 a step of \w+ is ([\d.]+);?", warned[1].message.replace(",", ""))
    assert float(said) == pytest.approx(step, rel=0.05)
    assert report.values.router_bias[1][1] == stored["model.layers.1." + bias.format("")].max()


def test_float16_weights_become_float32_or_bf16(tmp_path):
    source = write_tiny(tmp_path / "source", quantization_config=None)
    rewritten(source, lambda name, tensor: tensor.half())
    stored = load_file(source / "model.safetensors")
    notes = [
        each for each in nm.Checkpoint.open(source).inspect().findings if "F16" in each.message
    ]
    (note,) = [each for each in notes if each.severity == "note"]  # of all kinds together
    assert note.message.startswith("embed_tokens, ")
    assert "w1, w2, w3" in note.message.replace("w1, w3, w2", "w1, w2, w3")
    _, tensors = converted(source, tmp_path / "out")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    expert = stored["model.layers.0.block_sparse_moe.experts.3.w2.weight"].float()
    name = "layers.0.block_sparse_moe.expert_mlps.mlp_op.down_proj.weight"
    assert torch.equal(tensors[name][3], expert.T)
    _, rounded = converted(source, tmp_path / "rounded", keep_in_bf16=("experts",))
    assert torch.equal(rounded[name][3], expert.bfloat16().T)
    report = nm.Checkpoint.open(source).inspect(values=True)
    assert report.usable
    for dtype, wanted in (("float32", expert), ("bf16", expert.bfloat16())):
        nm.Checkpoint.open(source).cache(tmp_path / dtype, dtype)
        cached = load_file(tmp_path / dtype / "model.safetensors")
        assert torch.equal(cached["model.layers.0.block_sparse_moe.experts.3.w2.weight"], wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize("convention", ["multiplier", "reciprocal"])
def test_scales_of_any_exact_dtype_mean_the_same(tmp_path, dtype, convention):
    """Scales are powers of two, which all of these dtypes hold; those of float32 are the oracle."""

    def scaled(narrow):
        def change(name, tensor):
            if not name.endswith(schema.SCALE_SUFFIX):
                return tensor
            powers = torch.exp2(torch.floor(torch.log2(tensor)))
            powers = 1 / powers if convention == "reciprocal" else powers
            return narrow(powers)

        return change

    def narrow(powers):
        if dtype == "uint8":
            return (torch.log2(powers) + 127).to(torch.uint8)
        return powers.to(getattr(torch, dtype))

    wide = rewritten(write_tiny(tmp_path / "wide"), scaled(lambda powers: powers))
    source = rewritten(write_tiny(tmp_path / "source"), scaled(narrow))
    _, wanted = converted(wide, tmp_path / "wide-out")
    _, tensors = converted(source, tmp_path / "out")
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    report = nm.Checkpoint.open(source).inspect(values=True)
    assert report.usable
    assert any(each.severity == "note" and "widened" in each.message for each in report.findings)


def test_a_scale_that_is_no_number_is_refused_in_every_dtype(tmp_path):
    source = write_tiny(tmp_path / "source")

    def change(name, tensor):
        if not name.endswith(schema.SCALE_SUFFIX):
            return tensor
        exponents = (torch.log2(tensor) + 127).to(torch.uint8)
        exponents[0, 0] = 255
        return exponents.view(torch.float8_e8m0fnu)

    rewritten(source, change)
    with pytest.raises(CheckpointError, match="no positive finite value, the first nan"):
        nm.plan_conversion(nm.Checkpoint.open(source))


@pytest.mark.parametrize("convention", ["multiplier", "reciprocal"])
def test_a_block_of_zeros_may_have_the_scale_0(tmp_path, convention):
    weight = "model.layers.0.block_sparse_moe.experts.5.w1.weight"

    def change(name, tensor):
        if name == weight:
            tensor.view(torch.uint8)[:128, 128:] = 0
        if name.endswith(schema.SCALE_SUFFIX) and convention == "reciprocal":
            tensor = 1 / tensor
        if name == schema.scale_name(weight):
            tensor[0, 1] = 0
        return tensor

    source = rewritten(write_tiny(tmp_path / "source"), change)
    _, tensors = converted(source, tmp_path / "out")
    scales = tensors["layers.0.block_sparse_moe.expert_mlps.mlp_op.gate_up_proj.scale"]
    assert scales.isfinite().all()
    assert scales[5, 1, 0] == 0
    assert int((scales == 0).sum()) == 1
    assert nm.Checkpoint.open(source).inspect(values=True).usable
    nm.Checkpoint.open(source).cache(tmp_path / "cache")
    cached = load_file(tmp_path / "cache" / "model.safetensors")[weight]
    assert not cached[:128, 128:].any()
    assert cached[:128, :128].all(dim=1).any()

    rewritten(source, lambda name, tensor: tensor.fill_(1) if name == weight else tensor)
    with pytest.raises(CheckpointError, match=r"no positive finite value, the first 0.0"):
        nm.plan_conversion(nm.Checkpoint.open(source, convention)).write(tmp_path / "wrong")


def test_a_tensor_of_a_dtype_that_is_not_read_is_one_problem(tmp_path):
    source = write_tiny(tmp_path / "source")
    name = "model.layers.0.self_attn.k_norm.weight"
    rewritten(source, lambda each, tensor: tensor.to(torch.uint32) if each == name else tensor)
    checkpoint = nm.Checkpoint.open(source)
    assert [problem.subject for problem in checkpoint.problems] == [name]
    assert "is U32; expected" in str(checkpoint.problems[0])
    assert not checkpoint.inspect(values=True).usable
    with pytest.raises(CheckpointError, match="is U32, which is not read"):
        checkpoint.array(name)


def test_exponents_are_the_powers_of_two_that_torch_reads():
    stored = np.arange(256, dtype=np.uint8)
    wanted = torch.from_numpy(stored).view(torch.float8_e8m0fnu).float().numpy()
    assert np.array_equal(bfloat16.scales_to_float32(stored), wanted, equal_nan=True)
