"""A family's names are stated in its own file only, and one file is enough for another family."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import neuron_minimax
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.writer import write_checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import AttentionPrecision, Layout
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import ConfigError, ConversionError
from neuron_minimax.families import FAMILIES, Role
from neuron_minimax.families.family import MODULE_GROUPS, Family
from neuron_minimax.inspection.modules import Framework, modules_of
from neuron_minimax.inspection.precision import inspect
from neuron_minimax.planner.memory import Deployment, checkpoint_bytes, rank_memory
from neuron_minimax.planner.placement import Placement
from tests.tiny import tiny_tensors

PACKAGE = Path(neuron_minimax.__file__).parent
GUIDE = PACKAGE.parent / "docs" / "adding_a_model.md"
FAMILIES_FOLDER = PACKAGE / "families"
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != FAMILIES_FOLDER)
# A study's import path has a word of the family in it.
IMPORT_PATHS = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    for path in SOURCES
}
# Parts of names that say nothing about a family: Hugging Face's and torch's own.
COMMON = {"model", "layers", "weight", "bias", "{l}", "{e}"}
# vLLM's registration has no config.json at hand.
NAMES_A_FAMILY = {"backends/nxdi/vllm_plugin.py"}


def words_of(family: Family) -> set[str]:
    """Every part of a family's published, converted and rank tensors' names."""
    names = [weight.template for weight in family.weights]
    names += [rule.target for rule in family.rules]
    names += family.rank_tensors
    return {part for name in names for part in name.split(".")} - COMMON


def typed_names(source: str) -> list[str]:
    """Strings of a module, docstrings aside, that spell a name of a family's weight or module.

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
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in documentation
        and node.value not in MODULE_GROUPS.values()
        and "://" not in node.value
        and node.value.removeprefix("neuron_minimax.") not in IMPORT_PATHS
        and (named.search(node.value) or path.fullmatch(node.value))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_weights_name_is_typed_in_its_family_only(path):
    assert typed_names(path.read_text(encoding="utf-8")) == []


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


# The guide's example, run as a reader would write it.


@pytest.fixture
def qwen3_moe(monkeypatch) -> Family:
    (block,) = re.findall(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    exec(block, names)
    monkeypatch.setitem(FAMILIES, "qwen3_moe", names["QWEN3_MOE"])
    return names["QWEN3_MOE"]


def qwen3_config(**overrides):
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 160,
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "max_position_embeddings": 512,
        "rope_theta": 1000000.0,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "gate"],
        },
    } | overrides


@pytest.fixture
def checkpoint(qwen3_moe, tmp_path) -> Checkpoint:
    raw = qwen3_config()
    write_checkpoint(tmp_path / "qwen", raw, tiny_tensors(ModelConfig.from_dict(raw)), 1)
    return Checkpoint(tmp_path / "qwen")


def test_the_guides_rows_are_the_weights_of_transformers_own_model(qwen3_moe):
    raw = qwen3_config()
    with torch.device("meta"):
        oracle = Qwen3MoeForCausalLM(Qwen3MoeConfig(**raw)).state_dict()
    # transformers 5 has the experts of a layer in one tensor.
    others = {n: tuple(t.shape) for n, t in oracle.items() if ".experts." not in n}
    expected = list(schema.expected(ModelConfig.from_dict(raw)))
    rows = {w.name: w.shape for w in expected if not w.is_scale and not w.weight.per_expert}
    assert rows == others
    of_experts = sum(np.prod(w.shape) for w in expected if w.weight.per_expert and not w.is_scale)
    assert of_experts == sum(t.numel() for n, t in oracle.items() if ".experts." in n)


def test_another_value_of_a_fixed_field_is_refused(qwen3_moe):
    with pytest.raises(ConfigError, match="norm_topk_prob is False; Qwen3-MoE has True"):
        ModelConfig.from_dict(qwen3_config(norm_topk_prob=False))


def test_a_checkpoint_of_the_new_family_is_read_and_inspected(checkpoint):
    assert checkpoint.problems == []
    report = inspect(checkpoint, check_values=True)
    assert report.usable
    kinds = [row.kind for row in report.kinds]
    assert kinds == [weight.kind for weight in checkpoint.config.family.weights]
    paths = {
        module.path for module in modules_of(checkpoint.entries, checkpoint.config)[Framework.NXDI]
    }
    assert "layers.1.mlp.expert_mlps.mlp_op.gate_up_proj" in paths


def test_the_new_family_is_converted_by_its_rules(checkpoint):
    conversion = plan_conversion(checkpoint)
    shapes = {output.name: output.shape for output in conversion.outputs}
    assert shapes["layers.0.mlp.expert_mlps.mlp_op.gate_up_proj.weight"] == (8, 256, 256)
    assert shapes["layers.1.self_attn.q_norm.weight"] == (128,)
    used = [n for o in conversion.outputs for g in (*o.groups, *o.scale_groups) for n in g]
    assert sorted(used) == sorted(checkpoint.entries)
    quantized = {o.name for o in conversion.outputs if o.dtype == "F8_E4M3"}
    listed = conversion.modules_to_not_convert
    for output in conversion.outputs:
        if len(output.shape) > 1 and not output.is_scale:
            assert any(entry in output.name for entry in listed) == (output.name not in quantized)


def test_bf16_attention_and_kept_modules_follow_the_new_names(checkpoint):
    conversion = plan_conversion(
        checkpoint, Layout(attention=AttentionPrecision.BF16, keep_in_bf16=("expert_mlps",))
    )
    assert {output.dtype for output in conversion.outputs} == {"BF16"}
    with pytest.raises(ConversionError, match="such as lm_head or self_attn"):
        plan_conversion(checkpoint, Layout(keep_in_bf16=("block_sparse_moe",)))


def test_one_rank_holds_the_new_familys_checkpoint_to_the_byte(checkpoint):
    deployment = Deployment(
        tp_degree=1,
        moe_tp_degree=1,
        moe_ep_degree=1,
        batch_size=1,
        seq_len=128,
        context_length=128,
        smallest_context=128,
    )
    stored = sum(entry.nbytes for entry in checkpoint.entries.values())
    assert rank_memory(checkpoint.config, deployment).weights == stored
    assert checkpoint_bytes(checkpoint.config) == stored


def test_experts_of_the_new_family_are_renumbered_by_its_rules(qwen3_moe):
    names = [template.format(l=0) for template in qwen3_moe.expert_targets]
    state = {name: np.arange(4.0) for name in names}
    placed = Placement(order=np.array([[3, 1, 2, 0]]), ranks=2).apply(state, qwen3_moe)
    assert len(names) == 5
    assert all((placed[name] == [3, 1, 2, 0]).all() for name in names)
