"""The loading path: what it shows is what a conversion does, and it ends at the stage that is
wrong.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from neuron_minimax.checkpoint.finished import record_of, renew
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range, Layout
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.families import FAMILIES
from neuron_minimax.studies.explain.state_dict import walk_state_dict as walk_opened
from tests.faults import FAULTS
from tests.opened import convert
from tests.tiny import write_tiny


def walk(checkpoint, *arguments, **options):
    return walk_opened(Checkpoint(checkpoint), *arguments, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("walk") / "checkpoint")


def stage(walked, title):
    return next(stage for stage in walked.stages if stage.title == title)


def fault(title):
    return next(fault for fault in FAULTS if fault.title == title)


def test_every_target_of_the_plan_is_shown_with_its_sources(checkpoint):
    conversion = plan_conversion(Checkpoint(checkpoint), Layout())
    names = [row[0] for row in stage(walk(checkpoint, grep="."), "Rules").rows]
    assert [name[3:] for name in names if name.startswith("-> ")] == [
        output.name for output in conversion.outputs
    ]
    sources = [template for output in conversion.outputs for template in output.source_templates]
    assert [name for name in names if not name.startswith("-> ")] == sources


def test_the_values_before_and_after_are_those_of_the_files(checkpoint, tmp_path):
    convert(checkpoint, tmp_path / "out")
    before = load_file(checkpoint / "model.safetensors")
    after = {
        name: t
        for path in (tmp_path / "out").glob("*.safetensors")
        for name, t in load_file(path).items()
    }
    rows = stage(walk(checkpoint, layer=1), "Rules").rows
    compared = 0
    source = ()
    for target in rows:
        if not target[0].startswith("-> "):
            source = target if target[2] else source  # the first source of a target has its value
            continue
        for tensor, shown in (
            (before[source[0].replace("{e}", "0")], source[2]),
            (after[target[0][3:]], target[2]),
        ):
            first = tensor.reshape(-1)[0]
            if tensor.dtype == torch.float8_e4m3fn:
                assert (
                    shown == f"0x{tensor.view(torch.uint8).reshape(-1)[0]:02x} ({first.float():g})"
                )
            else:
                assert shown.split()[0] == f"{first.float():.4e}"
        if target[0].endswith(".scale"):
            weight = (
                before[source[0].replace("{e}", "0").removesuffix("_scale_inv")]
                .float()
                .reshape(-1)[0]
            )
            scale = before[source[0].replace("{e}", "0")].reshape(-1)[0]
            assert source[2].split()[1] == target[2].split()[1] == f"({weight * scale:.4e})"
            compared += 1
    assert compared == 6


def test_one_layer_or_one_text_selects(checkpoint):
    only = [row[0] for row in stage(walk(checkpoint, layer=1, grep="w2"), "Rules").rows]
    assert len(only) == 4
    assert all("layers.1." in name for name in only)
    assert walk(checkpoint, grep="nothing_like_it").first_wrong.title == "Rules"


def test_scales_are_counted(checkpoint):
    assert "FP8 scales converted: 56" in stage(walk(checkpoint), "Scales").sentence


@pytest.mark.parametrize(
    ("title", "where", "named"),
    [
        ("a shard is truncated", "Shards", "model-00002-of-00003.safetensors"),
        ("names are already those of the conversion", "Shards", "self_attn.o_proj.o_proj.weight"),
        ("one expert of a layer is BF16", "Shards", "experts.0.w1.weight"),
        ("some scales are reciprocals", "Rules", "o_proj.weight"),
        ("a scale is NaN", "Rules", "layers.1.self_attn.o_proj.weight_scale_inv"),
        ("FP8 codes are NaN", "Rules", "layers.1.self_attn.o_proj.weight has 1 NaN codes"),
    ],
)
def test_the_path_ends_at_the_stage_that_is_wrong(tmp_path, title, where, named):
    walked = walk(fault(title).write(tmp_path / "c"), layer=1)
    assert walked.first_wrong.title == where
    assert walked.stages[-1].title in (where, "Prefix")
    assert named in walked.first_wrong.wrong
    assert walked.first_wrong.advice
    assert f'Stage "{where}" is wrong.' in walked.parts()[-1].text


def test_a_good_conversion_agrees(checkpoint, tmp_path):
    convert(
        checkpoint,
        tmp_path / "out",
        Layout(attention=AttentionPrecision.BF16, fp8_range=FP8Range.OCP),
    )
    assert walk(checkpoint, tmp_path / "out").first_wrong is None


def spoil_value(out):
    path = next(out.glob("model-00002*"))
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little")] ^= (
        1  # the first element of the first tensor of layer 0
    )
    path.write_bytes(data)


def spoil_config(out):
    raw = json.loads((out / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] = ["gate"]
    (out / "config.json").write_text(json.dumps(raw))


def spoil_shard(out):
    next(out.glob("model-00003*")).unlink()


@pytest.mark.parametrize(
    ("spoil", "file", "detail"),
    [
        (spoil_value, "model-00002", "layers.0.input_layernorm.weight has other values"),
        (spoil_config, "config.json has", "modules_to_not_convert ['gate']"),
        (spoil_shard, "model-00003-of-00003.safetensors is missing", None),
    ],
)
def test_a_spoiled_conversion_is_named(checkpoint, tmp_path, spoil, file, detail):
    out = tmp_path / "out"
    convert(checkpoint, out)
    spoil(out)
    wrong = walk(checkpoint, out).first_wrong
    assert wrong.title == "Converted directory"
    assert file in wrong.wrong
    if detail:  # of what a manifest vouches for, as a wrong conversion would leave it
        files = {
            name: record_of(out / name, shard=name.endswith(".safetensors"))
            for name in files_of(out)
        }
        renew(out / "conversion.json", files)
        assert detail in walk(checkpoint, out).first_wrong.wrong


def files_of(out):
    return json.loads((out / "conversion.json").read_text())["files"]


def test_a_conversion_of_another_checkpoint_is_named(checkpoint, tmp_path):
    convert(write_tiny(tmp_path / "other", seed=1), tmp_path / "out")
    assert "another checkpoint" in walk(checkpoint, tmp_path / "out").first_wrong.wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_the_path_of_every_family_is_right(family, tmp_path):
    walked = walk(write_tiny(tmp_path / family, family=family))
    assert walked.first_wrong is None
    bf16 = family == "qwen2" or family.startswith("minimind")
    assert ("No weight is stored as FP8" in stage(walked, "Scales").sentence) == bf16


@pytest.mark.parametrize(
    ("degree", "said", "gate_up_scales"),
    [
        (1, "128 are whole blocks of 128, which keep a scale each", "[2, 2]"),
        (2, "64 are not whole blocks of 128, so each channel gets", "[2, 128]"),
    ],
)
def test_what_ranks_hold_of_the_experts_is_said(checkpoint, degree, said, gate_up_scales):
    walked = walk(checkpoint, moe_tp_degree=degree)
    shares = stage(walked, "Experts on a rank")
    assert said in shares.sentence
    assert shares.rows[0][2] == gate_up_scales
    assert walked.first_wrong is None
    assert walk(checkpoint, moe_tp_degree=3).first_wrong.title == "Experts on a rank"


def test_blocks_that_the_model_does_not_fill_have_scales_on_a_rank_too(tmp_path):
    ragged = write_tiny(tmp_path / "ragged", hidden_size=192, intermediate_size=384)
    rows = stage(walk(ragged, moe_tp_degree=4), "Experts on a rank").rows
    assert [(weight, scales) for _, weight, scales in rows] == [
        ("[192, 192]", "[2, 192]"),  # 96 channels of gate and of up
        ("[96, 192]", "[96, 2]"),
    ]
