"""Conversion against slow, obvious code that builds each Neuron tensor from the safetensors
library's own reading.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_minimax.checkpoint import streaming
from neuron_minimax.checkpoint.header import TensorSpec
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.writer import ShardWriter
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import bind_rules, unquantized_modules
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range, Layout
from neuron_minimax.convert.manifest import read_manifest
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.convert.state_dict import (
    convert_hf_to_neuron_state_dict,
    neuron_to_hf_state_dict,
)
from neuron_minimax.errors import CheckpointError, ConversionError, NeuronMiniMaxError
from neuron_minimax.families import module_of
from neuron_minimax.fp8 import ScaleConvention
from tests.opened import contents, convert, journal_of
from tests.opened import verify_conversion as verify
from tests.tiny import write_tiny

RAGGED = {"hidden_size": 320, "intermediate_size": 192}
W1 = "model.layers.1.block_sparse_moe.experts.5.w1.weight"


def read_all(directory):
    return {
        name: t
        for path in sorted(directory.glob("*.safetensors"))
        for name, t in load_file(path).items()
    }


def bits(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def obvious_conversion(source, layers=2, experts=8):
    """Neuron names and shapes, codes and scales as they are stored."""
    result = {
        "embed_tokens.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
    }
    result["lm_head.weight"] = "lm_head.weight"
    for layer in range(layers):
        old = f"model.layers.{layer}."
        new = f"layers.{layer}."
        for norm in (
            "input_layernorm",
            "post_attention_layernorm",
            "self_attn.q_norm",
            "self_attn.k_norm",
        ):
            result[f"{new}{norm}.weight"] = f"{old}{norm}.weight"
        for name, place in (
            ("q", "qkv_proj"),
            ("k", "qkv_proj"),
            ("v", "qkv_proj"),
            ("o", "o_proj"),
        ):
            result[f"{new}self_attn.{place}.{name}_proj.weight"] = (
                f"{old}self_attn.{name}_proj.weight"
            )
            result[f"{new}self_attn.{place}.{name}_proj.scale"] = (
                f"{old}self_attn.{name}_proj.weight_scale_inv"
            )
        moe = f"{old}block_sparse_moe."
        result[f"{new}block_sparse_moe.router.linear_router.weight"] = f"{moe}gate.weight"
        result[f"{new}block_sparse_moe.router.e_score_correction_bias"] = (
            f"{moe}e_score_correction_bias"
        )
    tensors = {name: source[old] for name, old in result.items() if old in source}
    for layer in range(layers):
        experts_of = f"model.layers.{layer}.block_sparse_moe.experts."
        target = f"layers.{layer}.block_sparse_moe.expert_mlps.mlp_op."
        for old, new in (("weight", "weight"), ("weight_scale_inv", "scale")):
            if f"{experts_of}0.w1.{old}" not in source:
                continue

            def pick(e, w, old=old, experts_of=experts_of):
                return source[f"{experts_of}{e}.{w}.{old}"].t()

            tensors[f"{target}gate_up_proj.{new}"] = torch.stack(
                [torch.cat([pick(e, "w1"), pick(e, "w3")], dim=1) for e in range(experts)]
            )
            tensors[f"{target}down_proj.{new}"] = torch.stack(
                [pick(e, "w2") for e in range(experts)]
            )
    return tensors


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["aligned", "ragged"])
@pytest.mark.parametrize("shards", [1, 4])
def test_ocp_range_keeps_every_byte(tmp_path, sizes, shards):
    source = write_tiny(tmp_path / "source", shards=shards, **sizes)
    convert(source, tmp_path / "out", Layout(fp8_range=FP8Range.OCP))
    expected = obvious_conversion(read_all(source))
    found = read_all(tmp_path / "out")
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(bits(found[name]), bits(tensor)), name


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["aligned", "ragged"])
def test_neuron_range_halves_codes_and_doubles_scales(tmp_path, sizes):
    source = write_tiny(tmp_path / "source", **sizes)
    result = convert(source, tmp_path / "out")
    expected = obvious_conversion(read_all(source))
    found = read_all(tmp_path / "out")
    rounded = 0
    for name, tensor in expected.items():
        if tensor.dtype == torch.float8_e4m3fn:
            assert torch.equal(
                bits(found[name]), bits((tensor.float() / 2).to(torch.float8_e4m3fn))
            ), name
            rounded += int((found[name].float() * 2 != tensor.float()).sum())
            assert found[name].float().abs().max() <= 240
        else:
            factor = 2 if name.endswith(".scale") else 1
            assert torch.equal(found[name], tensor * factor), name
    assert result.rounded_codes == read_manifest(tmp_path / "out").rounded_codes == rounded > 0


def test_a_dense_source_is_only_renamed_and_stacked(tmp_path):
    source = write_tiny(tmp_path / "source", dense=True)
    convert(source, tmp_path / "out")
    expected = obvious_conversion(read_all(source))
    found = read_all(tmp_path / "out")
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def dequantized(source, name, block=128):
    codes = source[name].float()
    scale = source[name + "_scale_inv"]
    rows, columns = codes.shape
    return codes * scale.repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["aligned", "ragged"])
def test_attention_in_bf16_is_the_dequantized_weight_rounded_once(tmp_path, sizes):
    source = write_tiny(tmp_path / "source", **sizes)
    convert(source, tmp_path / "out", Layout(attention=AttentionPrecision.BF16))
    stored = read_all(source)
    found = read_all(tmp_path / "out")
    for name, place in (("q", "qkv_proj"), ("k", "qkv_proj"), ("v", "qkv_proj"), ("o", "o_proj")):
        expected = dequantized(stored, f"model.layers.1.self_attn.{name}_proj.weight").bfloat16()
        assert torch.equal(found[f"layers.1.self_attn.{place}.{name}_proj.weight"], expected)
    assert not [name for name in found if "self_attn" in name and name.endswith(".scale")]
    assert sorted(read_manifest(tmp_path / "out").modules_to_not_convert) == [
        "embed_tokens",
        "lm_head",
        "router",
        "self_attn",
    ]


def test_one_layers_modules_can_be_kept_in_bf16(tmp_path):
    source = write_tiny(tmp_path / "source")
    convert(
        source,
        tmp_path / "out",
        Layout(keep_in_bf16=("layers.1.self_attn", "layers.0.block_sparse_moe.experts")),
    )
    stored = read_all(source)
    found = read_all(tmp_path / "out")
    assert found["layers.0.self_attn.o_proj.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert found["layers.1.self_attn.o_proj.o_proj.weight"].dtype == torch.bfloat16
    down = [
        dequantized(stored, f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight").bfloat16()
        for e in range(8)
    ]
    kept = found["layers.0.block_sparse_moe.expert_mlps.mlp_op.down_proj.weight"]
    assert torch.equal(kept, torch.stack([weight.t() for weight in down]))
    assert found["layers.0.block_sparse_moe.router.linear_router.weight"].dtype == torch.float32
    assert verify(source, tmp_path / "out").equal


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("lm_hed", ["lm_hed", "lm_head"]),
        ("attn", ["attn", "no module", "self_attn"]),
        ("gate", ["gate", "float32"]),
        ("layers.7.self_attn", ["layers.7.self_attn", "no module"]),
        ("w1", ["w1", "8 of the 16 weights", "gate_up_proj"]),
    ],
)
def test_a_module_that_cannot_be_kept_is_refused_with_the_reason(tmp_path, module, words):
    with pytest.raises(ConversionError) as refused:
        convert(write_tiny(tmp_path / "source"), tmp_path / "out", Layout(keep_in_bf16=(module,)))
    assert all(word in str(refused.value) for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(attention=AttentionPrecision.BF16),
        Layout(keep_in_bf16=("layers.1.self_attn",)),
    ],
)
def test_no_entry_of_modules_to_not_convert_is_a_substring_of_a_quantized_module(tmp_path, layout):
    source = write_tiny(tmp_path / "source", num_hidden_layers=12)
    conversion = plan_conversion(Checkpoint(source), layout)
    entries = unquantized_modules(conversion.outputs)
    for output in conversion.outputs:
        module = module_of(output.name)
        listed = any(entry in module_of(output.name) for entry in entries)
        if output.dtype == "F8_E4M3":
            assert not listed, module
        elif len(output.shape) > 1 and not output.is_scale:
            assert listed, module


def make_reciprocal(source, names=None):
    path = source / "model.safetensors"
    tensors = load_file(path)
    for name in names or [name for name in tensors if name.endswith("_scale_inv")]:
        tensors[name] = 1 / tensors[name]
    save_file(tensors, path)


def test_reciprocal_scales_are_recognized_and_inverted(tmp_path):
    source = write_tiny(tmp_path / "source")
    make_reciprocal(source)
    convert(source, tmp_path / "out", Layout(fp8_range=FP8Range.OCP))
    expected = obvious_conversion(read_all(source))
    found = read_all(tmp_path / "out")
    scales = [name for name in expected if name.endswith(".scale")]
    assert scales
    assert all(torch.equal(found[name], 1 / expected[name]) for name in scales)
    record = read_manifest(tmp_path / "out").scale_convention
    assert record["convention"] == ScaleConvention.RECIPROCAL
    assert record["evidence"]["reciprocal"] == 56
    assert verify(source, tmp_path / "out").equal


def test_mixed_scale_evidence_is_refused_unless_the_user_says_what_it_is(tmp_path):
    source = write_tiny(tmp_path / "source")
    make_reciprocal(source, [W1 + "_scale_inv"])
    advice = "look at these tensors; `neuron-minimax convert` takes --scale-convention"
    with pytest.raises(ConversionError, match=rf"unclear.*experts\.5\.w1.*; {advice}$"):
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out", scale_convention="multiplier")
    assert read_manifest(tmp_path / "out").scale_convention["chosen_by"] == "multiplier"


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["aligned", "ragged"])
def test_a_state_dict_in_memory_becomes_the_same_bytes(tmp_path, sizes):
    source = write_tiny(tmp_path / "source", **sizes)
    convert(source, tmp_path / "out")
    stored = read_all(source)
    on_disk = read_all(tmp_path / "out")
    stripped = {
        name.removeprefix("model."): tensor for name, tensor in stored.items()
    }  # as NxDI hands it over
    config = ModelConfig.from_dir(source)
    for state_dict in (stored, stripped):
        found = convert_hf_to_neuron_state_dict(state_dict, config, Layout(tp_degree=4))
        ranks = {name for name in found if name.endswith("rank_util.rank")}
        assert ranks == {
            "rank_util.rank",
            *(f"layers.{n}.self_attn.rank_util.rank" for n in range(2)),
        }
        assert all(torch.equal(found[name], torch.arange(4, dtype=torch.int32)) for name in ranks)
        assert set(found) - ranks == set(on_disk)
        assert all(torch.equal(bits(found[name]), bits(tensor)) for name, tensor in on_disk.items())


@pytest.mark.parametrize("sizes", [{}, RAGGED], ids=["aligned", "ragged"])
def test_the_rules_read_backwards_give_the_checkpoint_again(tmp_path, sizes):
    stored = read_all(write_tiny(tmp_path / "c", **sizes))
    config = ModelConfig.from_dir(tmp_path / "c")
    back = neuron_to_hf_state_dict(
        convert_hf_to_neuron_state_dict(stored, config, Layout(fp8_range=FP8Range.OCP)), config
    )
    assert set(back) == set(stored)
    for name, tensor in stored.items():
        copy = back[name].clone(memory_format=torch.contiguous_format)
        assert torch.equal(bits(copy), bits(tensor)), name


def test_every_source_is_used_exactly_once(tmp_path):
    source = Checkpoint(write_tiny(tmp_path / "source"))
    tensors = dict(source.specs)
    outputs = bind_rules(tensors, source.config, Layout())
    used = [name for output in outputs for group in output.groups for name in group]
    assert sorted(used) == sorted(tensors)
    extra = TensorSpec("model.extra", "F32", (1,))
    with pytest.raises(ConversionError, match=r"used by no rule.*model\.extra"):
        bind_rules(tensors | {extra.name: extra}, source.config, Layout())
    del tensors[W1]
    with pytest.raises(
        ConversionError, match=r"gate_up_proj\.weight lacks 1 of its 16 sources.*experts\.5\.w1"
    ):
        bind_rules(tensors, source.config, Layout())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "model.layers.0.block_sparse_moe.gate.weight",
            lambda t: t.to(torch.float8_e5m2),
            "is F8_E5M2; expected BF16 or F32 or F16",
        ),
        (
            "model.layers.1.block_sparse_moe.e_score_correction_bias",
            lambda t: t.to(torch.float8_e5m2),
            "is F8_E5M2; expected BF16 or F32 or F16",
        ),
        (W1, lambda t: t[:, :1].contiguous(), r"has shape \[128, 1\]"),
        (
            W1 + "_scale_inv",
            lambda t: t[:1, :1].contiguous(),
            r"has shape \[1, 1\]; config.json implies \[1, 2\]",
        ),
    ],
)
def test_a_state_dict_in_memory_is_held_to_the_table(tmp_path, name, change, words):
    stored = read_all(write_tiny(tmp_path / "c"))
    stored[name] = change(stored[name])
    with pytest.raises(ConversionError, match=f"{name} {words}"):
        convert_hf_to_neuron_state_dict(
            stored, ModelConfig.from_dir(tmp_path / "c"), scale_convention="multiplier"
        )


@pytest.mark.parametrize("convention", ["auto", "multiplier"])
@pytest.mark.parametrize(
    ("end", "dtype"),
    [
        ("embed_tokens.weight", torch.float64),
        ("input_layernorm.weight", torch.int64),
        ("q_proj.weight", torch.bool),
        ("norm.weight", torch.uint8),
        ("gate.weight", torch.int32),
        ("q_proj.weight_scale_inv", torch.float64),
        ("w2.weight_scale_inv", torch.int64),
        ("o_proj.weight_scale_inv", torch.bool),
        ("norm.weight", torch.complex64),
    ],
    ids=str,
)
def test_a_state_dict_of_a_dtype_that_no_weight_has_is_refused_by_name(
    tmp_path, end, dtype, convention
):
    stored = {
        name: tensor.to(dtype) if name.endswith(end) else tensor
        for name, tensor in read_all(write_tiny(tmp_path / "c")).items()
        if not end.endswith(".weight") or not name.endswith(f"{end}_scale_inv")
    }
    config = ModelConfig.from_dir(tmp_path / "c")
    with pytest.raises(NeuronMiniMaxError, match=rf"^\S*{end} is .*; expected "):
        convert_hf_to_neuron_state_dict(stored, config, scale_convention=convention)


def test_experts_of_different_dtypes_cannot_be_stacked(tmp_path):
    source = write_tiny(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors[W1] = tensors[W1].bfloat16()
    del tensors[W1 + "_scale_inv"]
    save_file(tensors, source / "model.safetensors")
    words = r"layers\.1\..*gate_up_proj.*15 F8_E4M3, 1 BF16"
    with pytest.raises(CheckpointError, match=rf"experts\.5\.w1.*{words}"):
        convert(source, tmp_path / "out")
    with pytest.raises(ConversionError, match=rf"{words}.*experts\.5\.w1"):
        convert_hf_to_neuron_state_dict(
            tensors, ModelConfig.from_dir(source), scale_convention="multiplier"
        )


def test_the_full_size_plan_converts_47864_scales(full_size):
    # Sparse files hold zeros, which say nothing.
    source = Checkpoint(full_size, ScaleConvention.MULTIPLIER)
    conversion = plan_conversion(source)
    assert conversion.scale_count == 47_864
    assert (
        conversion.nbytes
        == sum(entry.nbytes for entry in source.entries.values())
        == 230_121_630_720
    )
    assert "x 62" in conversion.render()


Fault = namedtuple("Fault", "tensor change words")
FAULTS = {
    "nan code": Fault(W1, lambda t: t.view(torch.uint8).view(-1)[7:8].fill_(0x7F), ["1 NaN codes"]),
    "negative nan code": Fault(
        W1, lambda t: t.view(torch.uint8).view(-1)[0:1].fill_(0xFF), ["1 NaN codes"]
    ),
    "zero scale": Fault(
        W1 + "_scale_inv",
        lambda t: t[0, 1].fill_(0),
        ["1 scale of no", "block [0, 1]"],
    ),
    "nan scale": Fault(
        W1 + "_scale_inv",
        lambda t: t[0, 0].fill_(float("nan")),
        ["1 scale of no", "nan"],
    ),
    "negative scale": Fault(W1 + "_scale_inv", lambda t: t.neg_(), ["2 scales"]),
    "nan norm": Fault(
        "model.norm.weight", lambda t: t[3].fill_(float("nan")), ["1 NaN or infinite"]
    ),
    "infinite bias": Fault(
        "model.layers.0.block_sparse_moe.e_score_correction_bias",
        lambda t: t[0].fill_(float("inf")),
        ["1 NaN or infinite"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("attention", AttentionPrecision)
def test_a_bad_value_stops_the_run_with_its_name_and_leaves_no_manifest(tmp_path, fault, attention):
    source = write_tiny(tmp_path / "source")
    bad = FAULTS[fault]
    tensors = load_file(source / "model.safetensors")
    bad.change(tensors[bad.tensor])
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError) as refused:
        convert(
            source, tmp_path / "out", Layout(attention=attention), scale_convention="multiplier"
        )
    assert all(word in str(refused.value) for word in [bad.tensor, *bad.words])
    with pytest.raises(ConversionError, match="that is not finished"):
        read_manifest(tmp_path / "out")


# Converts in several processes, and kills itself without warning once this many bytes are written.
CONVERT_AND_DIE = """
import os, signal, sys
from neuron_minimax.checkpoint import streaming
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.plan import plan_conversion
streaming.PARALLEL_FROM = 0
left = int(sys.argv[3])
def progress(nbytes):
    global left
    left -= nbytes
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
plan_conversion(Checkpoint(sys.argv[1])).write(sys.argv[2], advance=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "reused"), [(0.0, 0), (0.3, 2), (0.7, 3), (1.0, 4)])
def test_after_kill_9_the_next_run_ends_bit_identical(tmp_path, moment, reused):
    source = write_tiny(tmp_path / "source", num_hidden_layers=4)
    nbytes = convert(source, tmp_path / "whole").nbytes
    arguments = [str(source), str(tmp_path / "out"), str(int(moment * nbytes))]
    victim = subprocess.run([sys.executable, "-c", CONVERT_AND_DIE, *arguments], check=False)
    assert victim.returncode == -signal.SIGKILL
    assert not (tmp_path / "out" / "conversion.json").exists()
    # The last finished shard may not have been synced yet.
    assert reused - 1 <= convert(source, tmp_path / "out").reused_shards <= reused
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(attention=AttentionPrecision.BF16)], ids=["fp8", "bf16"]
)
def test_several_processes_write_the_same_bytes_as_one(tmp_path, monkeypatch, layout):
    source = write_tiny(tmp_path / "source", **RAGGED)
    convert(source, tmp_path / "one", layout)
    monkeypatch.setattr(streaming, "PARALLEL_FROM", 0)
    convert(source, tmp_path / "several", layout)
    assert contents(tmp_path / "several") == contents(tmp_path / "one")
    assert verify(source, tmp_path / "several").equal


def test_a_bad_value_found_by_another_process_has_its_name(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")
    bad = FAULTS["nan code"]
    tensors = load_file(source / "model.safetensors")
    bad.change(tensors[bad.tensor])
    save_file(tensors, source / "model.safetensors")
    monkeypatch.setattr(streaming, "PARALLEL_FROM", 0)
    with pytest.raises(CheckpointError, match=f"{bad.tensor} has 1 NaN codes"):
        convert(source, tmp_path / "out")


def test_resuming_rechecks_what_it_trusts_and_rebuilds_what_is_damaged(tmp_path):
    source = write_tiny(tmp_path / "source")
    out = tmp_path / "out"
    convert(source, tmp_path / "whole")
    convert(source, out)
    # As if the run had been stopped before its end: journals as a stopped run leaves them, no
    # manifest.
    manifest = json.loads((out / "conversion.json").read_text())
    (out / ".unfinished").mkdir()
    (out / ".unfinished" / "identity.json").write_text(json.dumps(manifest["identity"]))
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    for shard in shards:
        records = {
            name: record for name, record in manifest["tensors"].items() if record["shard"] == shard
        }
        (out / ".unfinished" / f"{shard}.json").write_text(journal_of(records))
    (out / "conversion.json").unlink()
    data = bytearray((out / shards[1]).read_bytes())
    data[-5] ^= 1
    (out / shards[1]).write_bytes(data)
    assert convert(source, out).reused_shards == len(shards) - 1
    assert contents(out) == contents(tmp_path / "whole")


def test_a_finished_output_is_recognized_and_another_source_or_layout_refused(tmp_path):
    source = write_tiny(tmp_path / "source")
    other = write_tiny(tmp_path / "other", seed=1)
    out = tmp_path / "out"
    assert not convert(source, out).was_finished
    before = contents(out)
    assert convert(source, out).was_finished
    for arguments in ((other, out), (source, out, Layout(fp8_range=FP8Range.OCP))):
        with pytest.raises(ConversionError, match=r"finished output of another run.*--overwrite"):
            convert(*arguments)
    assert contents(out) == before
    convert(other, out, overwrite=True)
    convert(other, tmp_path / "fresh")
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_directory_that_is_not_ours_is_refused_even_with_overwrite(tmp_path):
    source = write_tiny(tmp_path / "source")
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConversionError, match=r"thesis\.tex"):
            convert(source, out, overwrite=overwrite)
    with pytest.raises(ConversionError, match="source itself"):
        convert(source, source)
    assert contents(out) == {"thesis.tex": b"years of work"}


@pytest.mark.slow
def test_the_second_run_into_one_output_is_refused(tmp_path):
    source = write_tiny(tmp_path / "source")
    refusals = []

    def try_again(nbytes):
        if not refusals:
            with pytest.raises(ConversionError, match="another run") as refused:
                convert(source, tmp_path / "out")
            refusals.append(refused)

    convert(source, tmp_path / "out", advance=try_again)
    assert len(refusals) == 1
    assert verify(source, tmp_path / "out").equal


def test_too_little_disk_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
    with pytest.raises(ConversionError, match=r"needs 19\.\d\d MB more and its disk has 1 B free"):
        convert(write_tiny(tmp_path / "source"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors*"))


def test_a_disk_that_fills_up_is_one_message_and_the_next_run_resumes(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")
    real_write = ShardWriter.write_at
    left = [3]

    def write_until_full(writer, position, data):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_write(writer, position, data)

    monkeypatch.setattr(ShardWriter, "write_at", write_until_full)
    with pytest.raises(ConversionError, match=r"model-00002.*No space left on device.*run again"):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    assert convert(source, tmp_path / "out").reused_shards == 1
    assert verify(source, tmp_path / "out").equal


def test_a_sync_that_fails_once_fails_the_run(tmp_path, monkeypatch):
    source = write_tiny(tmp_path / "source")
    real_sync = os.fdatasync
    failures = [OSError(errno.EIO, "I/O error")]

    def fail_once(descriptor):
        if failures:
            raise failures.pop()
        real_sync(descriptor)

    monkeypatch.setattr("neuron_minimax.checkpoint.shards.SYNC_EVERY", 1)
    monkeypatch.setattr(os, "fdatasync", fail_once)
    with pytest.raises(ConversionError, match=r"cannot be written \(I/O error\)"):
        convert(source, tmp_path / "out")
    assert convert(source, tmp_path / "out").reused_shards == 0
    assert verify(source, tmp_path / "out").equal


def test_a_place_that_cannot_hold_a_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match=r"file/out cannot be used"):
        convert(write_tiny(tmp_path / "source"), tmp_path / "file" / "out")


def test_companion_files_come_along_but_no_code(tmp_path):
    source = write_tiny(tmp_path / "source")
    texts = {
        "tokenizer.json": '{"model": {"vocab": {}}}',
        "generation_config.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "modeling_minimax_m2.py": "pass",
    }
    for name, text in texts.items():
        (source / name).write_text(text)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == texts["tokenizer.json"]
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    assert not (tmp_path / "out" / "modeling_minimax_m2.py").exists()


def test_verify_finds_a_changed_byte_a_dropped_tensor_and_another_source(tmp_path):
    source = write_tiny(tmp_path / "source")
    out = tmp_path / "out"
    convert(source, out)
    good = verify(source, out)
    assert good.equal
    assert good.source_tensors == len(Checkpoint(source).entries)
    path = out / "model-00002-of-00003.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    found = verify(source, out)
    assert len(found.differences) == 2  # its digest, and its value
    assert "digest" in found.render()
    tensors = load_file(path)
    path.write_bytes(whole)
    with pytest.raises(ConversionError, match="another source fingerprint"):
        verify(write_tiny(tmp_path / "other", seed=1), out)
    tensors.pop("layers.0.input_layernorm.weight")
    save_file(tensors, path)
    with pytest.raises(ConversionError, match=r"model-00002-of-00003\.safetensors has \d+ bytes"):
        verify(source, out)


def test_verify_sees_scales_that_were_not_doubled_even_when_the_digests_agree(tmp_path):
    source = write_tiny(tmp_path / "source")
    out = tmp_path / "out"
    convert(source, out, Layout(fp8_range=FP8Range.OCP))
    manifest = json.loads((out / "conversion.json").read_text())
    manifest["identity"]["options"]["fp8_range"] = "neuron"
    (out / "conversion.json").write_text(json.dumps(manifest))
    differences = verify(source, out).differences
    assert any("q_proj.scale" in difference for difference in differences)
    assert any("down_proj.weight" in difference for difference in differences)


def test_the_manifest_says_what_became_of_every_tensor(tmp_path):
    source = write_tiny(tmp_path / "source")
    out = tmp_path / "out"
    convert(source, out)
    manifest = read_manifest(out)
    assert manifest.scales_converted == 56
    assert set(manifest.operations) == set(manifest.tensors) == set(read_all(out))
    gate_up = manifest.operations[
        "layers.1.block_sparse_moe.expert_mlps.mlp_op.gate_up_proj.weight"
    ]
    assert gate_up.sources == tuple(
        f"model.layers.1.block_sparse_moe.experts.{{e}}.{w}.weight" for w in ("w1", "w3")
    )
    assert gate_up.treatment == "codes halved"
