"""A family's names are stated in its own file only, and one file is enough for another family."""

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig, Qwen3MoeForCausalLM

import neuron_minimax
from neuron_minimax import Checkpoint
from neuron_minimax.checkpoint import schema
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import AttentionPrecision, Layout
from neuron_minimax.convert.plan import Converted, plan_conversion
from neuron_minimax.convert.verify import verify
from neuron_minimax.errors import ConfigError, ConversionError
from neuron_minimax.families import FAMILIES, Role, family_of
from neuron_minimax.families.family import MODULE_GROUPS, Family
from neuron_minimax.inspection.modules import Framework, modules_of
from neuron_minimax.inspection.precision import inspect
from neuron_minimax.planner.placement import Placement
from tests.tiny import tiny_config, write_tiny

PACKAGE = Path(neuron_minimax.__file__).parent
FAMILIES_FOLDER = PACKAGE / "families"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != FAMILIES_FOLDER)
# A study's import path has a word of the family in it.
IMPORT_PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
}
# Parts of names that say nothing about a family: Hugging Face's and torch's own.
COMMON = {"model", "layers", "weight", "bias", "{l}", "{e}", "0"}
# vLLM's registration has no config.json at hand; its layers have names that are nobody's weights.
NAMES_A_FAMILY = {"backends/nxdi/vllm_plugin.py"}
NAMES_LAYERS = {"backends/torch_neuron/vllm_plugin.py": [".self_attn"]}


def words_of(family: Family) -> set[str]:
    """Every part of a family's published, converted and rank tensors' names."""
    names = [weight.template for weight in family.weights]
    names += [rule.target for rule in family.rules]
    names += family.rank_tensors
    return {part for name in names for part in name.split(".")} - COMMON


def typed_names(source: str) -> list[str]:
    """Strings of a module, docstrings and what is counted aside, that spell a name of a family's
    weight or module.

    A word that is English too ("norm", "gate", "experts") counts in a dotted path, or alone where
    it is not the name of a module group.
    """
    words = set().union(*(words_of(family) for family in FAMILIES.values()))
    english = {word for word in words if word.isalpha()}
    named = re.compile(rf"(?<![\w.])\.?(?:[\w{{}}]+\.)*(?:{'|'.join(words - english)})(?![\w])")
    path = re.compile(rf"\.?(?:[\w{{}}]+\.)*(?:{'|'.join(english)})(?:\.[\w{{}}]*)*")
    tree = ast.parse(source)
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    nouns = {
        id(argument)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "counted"
        for argument in node.args
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation | nouns
        and node.value not in MODULE_GROUPS.values()
        and "://" not in node.value
        and node.value.removeprefix("neuron_minimax.") not in IMPORT_PATHS
        and (named.search(node.value) or path.fullmatch(node.value))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_weights_name_is_typed_in_its_family_only(path):
    layers = NAMES_LAYERS.get(str(path.relative_to(PACKAGE)), [])
    assert typed_names(path.read_text(encoding="utf-8")) == layers


@pytest.mark.parametrize(
    "line",
    [
        'name = "e_score_correction_bias"',
        'name = f"layers.{n}.self_attn.qkv_proj.q_proj"',
        'kept = ("gate", "lm_head")',
        'text = "the two halves of gate_up_proj"',
        'rows = state["norm.weight"]',
        'experts = ("w1", "w2", "w3")',
    ],
)
def test_a_typed_name_is_found(line):
    assert typed_names(line)


@pytest.mark.parametrize(
    "line",
    [
        '"""Reads q_proj."""',
        'command = "experts"',
        'lazy = {"Run": "studies.experts.command"}',
        'text = "every rank holds the norm whole"',
        'text = counted(2, "rank")',
        'link = "http://www.w3.org/2000/svg"',
        "layer.self_attn.q_proj.weight",
    ],
)
def test_prose_and_attributes_are_not_names(line):
    assert typed_names(line) == []


def test_a_family_is_chosen_by_config_json():
    """Not by an import: code that imports one family's file serves no other."""
    assert len(SOURCES) > 50
    for path in SOURCES:
        imported = "families.minimax_m2" in path.read_text(encoding="utf-8")
        assert not imported or str(path.relative_to(PACKAGE)) in NAMES_A_FAMILY, path


def test_names_are_derived_from_the_rows():
    """As MiniMax-M2's published checkpoints and NxDI spell them."""
    family = FAMILIES["minimax_m2"]
    assert family.attention_module == "self_attn"
    assert family.experts_module == "expert_mlps"
    assert set(family.routing_modules) == {"gate", "router", "linear_router"}
    assert family.unconverted == ("gate", "e_score_correction_bias", "lm_head")
    assert family.float32_endings == (
        ".block_sparse_moe.router.linear_router.weight",
        ".block_sparse_moe.router.e_score_correction_bias",
        ".scale",
    )
    assert family.module(Role.EXPERT_DOWN).endswith(".expert_mlps.mlp_op.down_proj")


def test_the_page_on_adding_a_model_quotes_the_file_that_it_names():
    page = (PACKAGE.parent / "docs" / "adding_a_model.md").read_text(encoding="utf-8")
    quoted = re.search(r"```python\n(.*?)```", page, re.DOTALL)[1]
    source = (FAMILIES_FOLDER / "qwen3.py").read_text(encoding="utf-8")
    assert quoted in source


def tiny_checkpoint(directory: Path, family: str, **overrides: Any) -> Checkpoint:
    return Checkpoint(write_tiny(directory / family, family=family, **overrides))


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    """Qwen3-MoE: names, norms and router of another kind, scales in BF16."""
    return tiny_checkpoint(tmp_path, "qwen3_moe")


def test_a_family_is_found_by_config_json_alone():
    for name in FAMILIES:
        assert ModelConfig.from_dict(tiny_config(name)).family.name == name


def test_the_models_of_one_model_type_are_told_apart_by_its_fields():
    """As MiniMind's releases write them; transformers leaves out what is False or None."""
    raw = tiny_config("minimind2_moe")
    assert family_of(raw | {"use_moe": False}).name == "minimind2"
    del raw["n_routed_experts"]
    assert family_of(raw).name == "minimind_moe"
    del raw["use_moe"]
    assert family_of(raw).name == "minimind"


def test_what_is_no_supported_family_is_refused_by_name():
    for model_type in ("qwen2_moe", "llama", "deepseek_v3", "qwen3_next", None, ["qwen3"]):
        with pytest.raises(
            ConfigError, match=r"model_type is .*; expected 'minimax_m2' or 'qwen3_moe'"
        ):
            ModelConfig.from_dict(tiny_config("qwen3") | {"model_type": model_type})


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("qwen3", "attention_bias", True),
        ("qwen3_moe", "use_sliding_window", True),
        ("qwen2", "use_sliding_window", True),
        ("qwen2", "hidden_act", "gelu"),
        ("qwen2", "use_mrope", True),
        ("qwen2", "dual_chunk_attention_config", {"chunk_size": 262144}),
        ("minimind2_moe", "n_shared_experts", 2),
        ("minimind2_moe", "scoring_func", "sigmoid"),
    ],
)
def test_another_value_of_a_fixed_field_is_refused(family, field, value):
    with pytest.raises(ConfigError, match=f"{field} is .*; .* has .*: another architecture"):
        ModelConfig.from_dict(tiny_config(family, **{field: value}))


def test_layers_that_slide_are_refused():
    raw = tiny_config("qwen2", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ConfigError, match="layer_types has entries other than 'full_attention'"):
        ModelConfig.from_dict(raw)


def test_fields_that_are_present_but_off_are_taken():
    raw = tiny_config("qwen2", sliding_window=131072, max_window_layers=28, use_mrope=False)
    assert ModelConfig.from_dict(raw).family is FAMILIES["qwen2"]


def test_fp8_of_another_quantization_is_refused():
    raw = tiny_config("qwen2", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="quant_method is 'gptq'"):
        ModelConfig.from_dict(raw)


def test_absent_fields_mean_what_the_familys_own_code_takes_them_for():
    raw = tiny_config("minimind")
    assert ModelConfig.from_dict(raw).tie_word_embeddings
    moe = tiny_config("qwen3_moe")
    del moe["norm_topk_prob"]
    config = Qwen3MoeConfig(**moe)
    assert ModelConfig.from_dict(moe).norm_topk_prob is config.norm_topk_prob is False


def test_dense_layers_among_sparse_ones_are_transformers(tmp_path):
    """decoder_sparse_step and mlp_only_layers, each and together."""
    for fields in (
        {"decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 3]},
        {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ):
        raw = tiny_config("qwen3_moe", num_hidden_layers=4, **fields)
        with torch.device("meta"):
            layers = Qwen3MoeForCausalLM(Qwen3MoeConfig(**raw)).model.layers
        dense = tuple(n for n, layer in enumerate(layers) if not hasattr(layer.mlp, "experts"))
        assert ModelConfig.from_dict(raw).dense_layers == dense


def test_inference_rope_scaling_decides_whether_minimind_scales():
    """Its code has one scaling, beyond 2048 positions, whatever config.json spells out."""
    spelled = {"type": "yarn", "factor": 16, "original_max_position_embeddings": 2048}
    off = ModelConfig.from_dict(tiny_config("minimind", rope_scaling=spelled))
    assert off.rope_scaling is None
    on = tiny_config("minimind", inference_rope_scaling=True)
    for raw in (on, on | {"rope_scaling": spelled}):
        config = ModelConfig.from_dict(raw)
        assert config.rope_scaling["factor"] == 16
        assert config.rope_scaling["attention_factor"] == 1
        assert config.rope_theta == off.rope_theta == 1e6
    assert ModelConfig.from_dict(on | {"max_position_embeddings": 2048}).rope_scaling is None
    with pytest.raises(ConfigError, match="factor of rope_scaling is 4; MiniMind's code takes 16"):
        ModelConfig.from_dict(on | {"rope_scaling": spelled | {"factor": 4}})


def test_an_absent_rope_theta_is_transformers(tmp_path):
    for family, oracle in (
        ("qwen2", Qwen2Config),
        ("qwen3", Qwen3Config),
        ("qwen3_moe", Qwen3MoeConfig),
    ):
        raw = tiny_config(family)
        del raw["rope_theta"]
        wanted = oracle(**raw).rope_parameters["rope_theta"]
        assert ModelConfig.from_dict(raw).rope_theta == wanted


def test_scales_in_bf16_are_widened_exactly(checkpoint):
    fp8_names = [name for name in checkpoint.entries if checkpoint.is_fp8(name)]
    assert {checkpoint.entry(schema.scale_name(name)).dtype for name in fp8_names} == {"BF16"}
    for name in fp8_names:
        stored = checkpoint.tensor(schema.scale_name(name))
        assert stored.dtype == torch.bfloat16
        assert torch.equal(torch.from_numpy(checkpoint.multipliers(name)), stored.float())
        assert not (stored.float().view(torch.int32) & 0xFFFF).any()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_every_family_is_read_and_inspected(tmp_path, family):
    checkpoint = tiny_checkpoint(tmp_path, family)
    assert checkpoint.problems == []
    report = inspect(checkpoint, check_values=True)
    assert report.usable
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    config = checkpoint.config
    assert [row.kind for row in report.kinds] == [
        config.family.kind(weight)
        for weight in config.family.weights
        if config.layers_with(weight) and not schema.is_tied(weight, config)
    ]


def test_paths_on_neuron_follow_the_familys_names(checkpoint):
    paths = {
        module.path for module in modules_of(checkpoint.entries, checkpoint.config)[Framework.NXDI]
    }
    assert "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj" in paths


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_converted_verified_and_cached(tmp_path, family):
    checkpoint = tiny_checkpoint(tmp_path, family)
    conversion = plan_conversion(checkpoint)
    used = [n for o in conversion.outputs for g in (*o.groups, *o.scale_groups) for n in g]
    assert sorted(used) == sorted(checkpoint.entries)
    listed = conversion.modules_to_not_convert
    for output in conversion.outputs:
        if len(output.shape) > 1 and not output.is_scale and checkpoint.config.declares_fp8:
            kept = any(entry in output.name for entry in listed)
            assert kept == (output.dtype != "F8_E4M3")
    conversion.write(tmp_path / "converted")
    verification = verify(checkpoint, Converted.open(tmp_path / "converted"))
    assert verification.equal, verification.render()
    dense = checkpoint.cache(tmp_path / "cache", dtype="float32")
    twin = write_tiny(tmp_path / "dense", dense=True, family=family)
    wanted = {name: t for path in twin.glob("*.safetensors") for name, t in load_file(path).items()}
    found = {
        name: t
        for path in dense.directory.glob("*.safetensors")
        for name, t in load_file(path).items()
    }
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_changed_scale_in_bf16_is_found_by_verify(checkpoint, tmp_path):
    plan_conversion(checkpoint).write(tmp_path / "converted")
    [shard] = checkpoint.directory.glob("*.safetensors")
    state = load_file(shard)
    name = next(name for name in state if name.endswith("_scale_inv"))
    state[name] = state[name] * 2
    save_file(state, shard)
    with pytest.raises(ConversionError, match=r"another checkpoint|changed|differ"):
        verify(Checkpoint(checkpoint.directory), Converted.open(tmp_path / "converted"))


def test_the_new_family_is_converted_by_its_rules(checkpoint):
    conversion = plan_conversion(checkpoint)
    shapes = {output.name: output.shape for output in conversion.outputs}
    assert shapes["layers.0.mlp.expert_mlps.mlp_op.gate_up_proj.weight"] == (6, 96, 144)
    assert shapes["layers.1.self_attn.q_norm.weight"] == (32,)


def test_bf16_attention_and_kept_modules_follow_the_new_names(checkpoint):
    conversion = plan_conversion(
        checkpoint, Layout(attention=AttentionPrecision.BF16, keep_in_bf16=("expert_mlps",))
    )
    assert {output.dtype for output in conversion.outputs} == {"BF16"}
    with pytest.raises(ConversionError, match="such as lm_head or self_attn"):
        plan_conversion(checkpoint, Layout(keep_in_bf16=("block_sparse_moe",)))


def test_experts_of_the_new_family_are_renumbered_by_its_rules():
    family = FAMILIES["qwen3_moe"]
    names = [template.format(l=0) for template in family.expert_targets]
    state = {name: np.arange(4.0) for name in names}
    placed = Placement(order=np.array([[3, 1, 2, 0]]), ranks=2).apply(state, family)
    assert len(names) == 5
    assert all((placed[name] == [3, 1, 2, 0]).all() for name in names)
