"""A checkpoint in another format is one finding, which names it and what to take instead."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import neuron_minimax as nm
from neuron_minimax.errors import CheckpointError, ConfigError
from tests.tiny import write_tiny

EXPERT = ".experts."
FILE = "model.safetensors"


def rewritten(directory: Path, change) -> Path:
    """Change each weight of an expert, without its scale, to what `change(name, tensor)` gives."""
    tensors = {}
    for name, tensor in load_file(directory / FILE).items():
        if EXPERT not in name:
            tensors[name] = tensor
        elif not name.endswith("_scale_inv"):
            tensors |= change(name.removesuffix(".weight"), tensor)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / FILE)
    return directory


def packed(*ends_and_dtypes):
    def change(module, tensor):
        return {f"{module}{end}": torch.ones(8, 8).to(dtype) for end, dtype in ends_and_dtypes}

    return change


F32, F8, U8, I32 = torch.float32, torch.float8_e4m3fn, torch.uint8, torch.int32
FORMATS = {
    "GPTQ": packed((".qweight", I32), (".qzeros", I32), (".scales", F32), (".g_idx", I32)),
    "AWQ": packed((".qweight", I32), (".qzeros", I32), (".scales", F32)),
    "NVFP4, of NVIDIA ModelOpt": packed(
        (".weight", U8), (".weight_scale", F8), (".weight_scale_2", F32), (".input_scale", F32)
    ),
    "NVFP4, of compressed-tensors": packed(
        (".weight_packed", U8), (".weight_scale", F8), (".weight_global_scale", F32)
    ),
    "compressed-tensors, packed": packed((".weight_packed", I32), (".weight_scale", F32)),
    "MXFP4": packed((".weight_blocks", U8), (".weight_scales", U8)),
    "MLX": packed((".weight", torch.uint32), (".scales", F32), (".biases", F32)),
    "bitsandbytes": packed((".weight", U8), (".weight.absmax", F32)),
    "scales named weight_scale": packed((".weight", F8), (".weight_scale", F32)),
}


@pytest.mark.parametrize("title", FORMATS)
def test_a_format_is_named_by_its_tensors_in_one_finding(title, tmp_path):
    source = rewritten(write_tiny(tmp_path / "source", quantization_config=None), FORMATS[title])
    report = nm.Checkpoint.open(source).inspect()
    (error,) = [each for each in report.findings if each.severity == "error"]
    assert title in error.message
    assert "take MiniMaxAI/MiniMax-M2" in error.message
    with pytest.raises(CheckpointError, match=title.split(",")[0]):
        nm.plan_conversion(nm.Checkpoint.open(source))


@pytest.mark.parametrize(
    ("section", "title"),
    [
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "nvfp4-pack"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'NVFP4'.*ModelOpt"),
        ({"quant_algo": "FP8"}, "ModelOpt"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "yet another"}, "yet another"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_format_is_named_by_config_json_with_what_to_take_instead(section, title, tmp_path):
    source = write_tiny(tmp_path / "source")
    raw = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(raw | {"quantization_config": section}))
    with pytest.raises(ConfigError, match=f"{title}.*take MiniMaxAI/MiniMax-M2"):
        nm.Checkpoint.open(source)


def test_the_section_of_mlx_is_known(tmp_path):
    with pytest.raises(ConfigError, match="MLX"):
        write_tiny(
            tmp_path / "source",
            quantization_config=None,
            quantization={"bits": 4, "group_size": 64},
        )


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("model.model.", "model."),
        ("", "model."),
    ],
)
def test_names_with_other_prefixes_are_one_finding(there, wanted, tmp_path):
    source = write_tiny(tmp_path / "source")
    tensors = load_file(source / FILE)
    renamed = {
        there + name.removeprefix(wanted) if name.startswith(wanted) else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, source / FILE)
    report = nm.Checkpoint.open(source).inspect()
    (error,) = [each for each in report.findings if each.severity == "error"]
    assert error.kind == "names"
    assert repr(there) in error.message
    assert repr(wanted) in error.message


def with_more(source: Path, more: dict[str, torch.Tensor]) -> Path:
    save_file(load_file(source / FILE) | more, source / FILE)
    return source


def test_scales_of_a_servers_cache_are_left_out_with_a_note(tmp_path):
    attention = "model.layers.1.self_attn."
    names = [attention + "k_proj.k_scale", attention + "attn.v_scale", attention + "v_scale"]
    source = with_more(write_tiny(tmp_path / "source"), {name: torch.ones(1) for name in names})
    checkpoint = nm.Checkpoint.open(source)
    (note,) = [each for each in checkpoint.inspect().findings if each.kind == "cache scales"]
    assert note.severity == "note"
    assert "3 scales" in note.message
    converted = nm.plan_conversion(checkpoint).write(tmp_path / "out")
    assert sorted(converted.manifest.left_out) == sorted(names)
    assert nm.verify(checkpoint, converted).equal


LAYER = "model.layers.2."
MTP = {
    "a layer behind the last": [
        LAYER + rest
        for rest in ("eh_proj.weight", "self_attn.q_proj.weight", "shared_head.head.weight")
    ],
    "mtp": ["mtp.layers.0.mlp.gate.weight", "mtp.fc.weight"],
    "mtp_modules": ["model.mtp_modules.0.eh_proj.weight", "mtp_modules.1.norm.weight"],
    "nextn": ["model.nextn.0.eh_proj.weight"],
}


@pytest.mark.parametrize("declared", ["num_mtp_modules", "num_nextn_predict_layers", None], ids=str)
@pytest.mark.parametrize("title", MTP)
def test_multi_token_prediction_is_left_out_in_every_layout(title, declared, tmp_path):
    fields = {"num_mtp_modules": 0} | ({} if declared is None else {declared: 1})
    source = with_more(
        write_tiny(tmp_path / "source", **fields), {name: torch.ones(2, 2) for name in MTP[title]}
    )
    checkpoint = nm.Checkpoint.open(source)
    report = checkpoint.inspect()
    assert report.usable
    assert sorted(report.mtp) == sorted(MTP[title])
    assert sorted(nm.plan_conversion(checkpoint).left_out) == sorted(MTP[title])


def test_scales_of_a_cache_in_a_layer_of_prediction_are_counted_once(tmp_path):
    names = [LAYER + rest for rest in ("eh_proj.weight", "self_attn.attn.k_scale")]
    source = with_more(write_tiny(tmp_path / "source"), {name: torch.ones(1) for name in names})
    checkpoint = nm.Checkpoint.open(source)
    assert (checkpoint.mtp_names, checkpoint.cache_scale_names) == (names, [])
    converted = nm.plan_conversion(checkpoint).write(tmp_path / "out")
    assert "left out, since not run: 2 tensors" in converted.render()


def test_a_real_layer_that_config_does_not_count_is_refused_beside_scales_of_a_cache(tmp_path):
    source = write_tiny(tmp_path / "source")
    tensors = load_file(source / FILE)
    scales = {f"model.layers.{layer}.self_attn.attn.k_scale": torch.ones(1) for layer in range(2)}
    raw = json.loads((source / "config.json").read_text())
    assert raw["num_mtp_modules"]
    (source / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1}))
    save_file(tensors | scales, source / FILE)
    checkpoint = nm.Checkpoint.open(source)
    assert checkpoint.mtp_names == []
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\..*is no weight of this model"):
        nm.plan_conversion(checkpoint)


def test_prediction_in_another_format_does_not_speak_for_the_model(tmp_path):
    names = [f"mtp.layers.0.mlp.w{end}" for end in (".weight", ".weight_scale", ".weight_scale_2")]
    source = with_more(
        write_tiny(tmp_path / "source"),
        {name: torch.ones(1).to(torch.uint8) for name in names},
    )
    checkpoint = nm.Checkpoint.open(source)
    assert checkpoint.problems == []
    assert checkpoint.mtp_names == names


def test_a_stray_tensor_of_a_whole_model_is_named_and_no_format(tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    source = with_more(write_tiny(tmp_path / "source"), {name: torch.ones(1)})
    (problem,) = nm.Checkpoint.open(source).problems
    assert (problem.kind, problem.subject) == ("extra", name)


OTHERS = {
    "adapter_model.safetensors": "is an adapter and is not applied",
    "adapter_model.bin": "is an adapter and is not applied",
    "consolidated.safetensors": "is not read",
}


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("other", OTHERS)
def test_the_model_is_read_beside_another_file_which_everyone_is_told_of(
    other, shards, tmp_path, capsys
):
    source = write_tiny(tmp_path / "source", shards=shards)
    save_file({"lora_A.weight": torch.ones(2)}, source / other)
    checkpoint = nm.Checkpoint.open(source)
    assert checkpoint.problems == []
    (warning,) = [each for each in checkpoint.inspect().findings if each.kind == "leftover"]
    assert warning.message.startswith(f"{other} {'lies' if 'con' in other else 'is'} ")
    assert OTHERS[other] in warning.message
    assert warning.severity == "warning"
    plan = nm.plan_conversion(checkpoint)
    converted = plan.write(tmp_path / "out")
    assert converted.leftovers == (warning.message,)
    for text in (plan.render(), converted.render()):
        assert text.endswith(f"\nwarning: {warning.message}")


def test_weights_of_another_format_are_told_of_in_one_line(tmp_path):
    source = write_tiny(tmp_path / "source")
    others = ("model-q4.gguf", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json")
    for name in (*others, "training_args.bin"):
        (source / name).write_bytes(b"{}")
    checkpoint = nm.Checkpoint.open(source)
    (warning,) = [each for each in checkpoint.inspect().findings if each.kind == "leftover"]
    assert warning.message.startswith(f"{others[0]} and 1 more: weights of another format")
    assert nm.plan_conversion(checkpoint).leftovers == (warning.message,)


@pytest.mark.parametrize("token", [-1, 10**6, [1, 10**6]])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_an_end_token_that_the_model_does_not_have_is_told_of(file, token, tmp_path):
    source = write_tiny(tmp_path / "source")
    path = source / file
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**fields, "eos_token_id": token}))
    findings = nm.Checkpoint.open(source).inspect().findings
    (note,) = [each for each in findings if "passed over" in each.message]
    assert note.message.startswith(f"{file}: eos_token_id is {-1 if token == -1 else 10**6}, ")


def test_an_adapter_alone_is_no_model(tmp_path):
    source = write_tiny(tmp_path / "source")
    (source / FILE).rename(source / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="an adapter for another model, and not that model"):
        nm.Checkpoint.open(source)


def test_a_stale_index_gives_way_to_the_single_file(tmp_path):
    source = write_tiny(tmp_path / "source")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = nm.Checkpoint.open(source)
    assert checkpoint.problems == []
    (warning,) = [each for each in checkpoint.inspect().findings if each.kind == "leftover"]
    assert "none of which is there" in warning.message


def test_a_single_file_beside_whole_shards_is_warned_of(tmp_path):
    source = write_tiny(tmp_path / "source", shards=2)
    save_file({"lm_head.weight": torch.ones(2)}, source / FILE)
    report = nm.Checkpoint.open(source).inspect()
    assert report.usable
    (warning,) = [each for each in report.findings if each.kind == "leftover"]
    assert "transformers would read it" in warning.message
