"""The published checkpoints of every family: names, shapes and counts against transformers, and the
large ones inspected, planned and converted in plan from files of real size.
"""

from collections import Counter
from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import ConfigError
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.inspection.modules import Framework, judge, modules_of, uncovered
from neuron_minimax.inspection.precision import inspect
from neuron_minimax.planner.report import plan_deployment
from tests.full_size import write_sparse
from tests.published import PUBLISHED, published

NAMES = list(PUBLISHED)
FP8_NAMES = [f"{name}-FP8" for name in NAMES if name.startswith("Qwen3")]


def config_of(name: str, **changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(published(name) | changes)


def of_transformers(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of transformers' own model, on no device.

    MiniMind's dense models are those of Qwen3, before its third release of Llama; its experts are
    Qwen3-MoE's.
    """
    if raw["model_type"] != "minimind":
        config = AutoConfig.for_model(**raw)
    elif raw["use_moe"]:
        config = Qwen3MoeConfig(**raw | {"model_type": "qwen3_moe"})
    elif "n_routed_experts" in raw:
        config = LlamaConfig(**raw | {"model_type": "llama", "tie_word_embeddings": True})
    else:
        config = Qwen3Config(**raw | {"model_type": "qwen3"})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def fused(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The rows' names and shapes, the experts of a layer in one tensor as transformers has them:
    gate above up, [E, 2I, H], and down, [E, H, I].
    """
    shapes: dict[str, tuple[int, ...]] = {}
    experts: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for wanted in schema.declared(config):
        if wanted.is_scale:
            continue
        if wanted.expert is None:
            shapes[wanted.name] = wanted.shape
        else:
            layer, _, rest = wanted.name.partition(".experts.")
            matrix = rest.split(".")[1].replace("gate_proj", "gate_up_proj")
            matrix = "gate_up_proj" if matrix == "up_proj" else matrix
            experts[f"{layer}.experts.{matrix}", wanted.shape] += 1
    for (name, (rows, columns)), count in experts.items():
        joined = 2 if name.endswith("gate_up_proj") else 1
        shapes[name] = (count // joined, joined * rows, columns)
    return shapes


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_transformers_and_as_many_as_the_card_says(name: str) -> None:
    """Cards round: Qwen3-1.7B has 1.72 billion; Qwen2.5-32B has 32.76, and its card says 32.5."""
    found = fused(config_of(name))
    counted = sum(prod(shape) for shape in found.values())
    assert counted == pytest.approx(PUBLISHED[name].billions * 1e9, rel=0.015)
    if name != "MiniMind2-MoE":
        assert found == of_transformers(published(name))


def test_the_shared_expert_of_minimind2_is_counted_by_hand() -> None:
    """transformers has no model with it: attention, five MLPs, the router and two norms a layer."""
    attention = 2 * 640 * 640 + 2 * (640 // 8 * 2) * 640
    layer = attention + 5 * 3 * 640 * 1728 + 4 * 640 + 2 * 640
    config = config_of("MiniMind2-MoE")
    counted = sum(each.elements for each in schema.declared(config))
    assert counted == 8 * layer + 6400 * 640 + 640


@pytest.mark.parametrize("name", FP8_NAMES)
def test_fp8_checkpoints_have_one_bf16_scale_for_each_block_of_a_projection(name: str) -> None:
    config = config_of(name, num_hidden_layers=2)
    tensors = {each.name: each for each in schema.declared(config)}
    scaled = [each for each in tensors.values() if each.is_scale]
    experts = config.num_local_experts
    assert len(scaled) == 2 * (4 + 3 * (experts or 1))
    for scale in scaled:
        weight = tensors[scale.name.removesuffix("_scale_inv")]
        assert (weight.dtype, scale.dtype) == ("F8_E4M3", "BF16")
        assert scale.shape == tuple(-(-size // 128) for size in weight.shape)


@pytest.fixture(scope="module", params=["Qwen3-30B-A3B-FP8", "Qwen3-32B-FP8", "Qwen3-32B"])
def sparse(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A large checkpoint whose files have real headers and sizes, and holes for data."""
    directory = tmp_path_factory.mktemp("sparse") / request.param
    return Checkpoint(write_sparse(directory, published(request.param)), ScaleConvention.MULTIPLIER)


def test_a_large_checkpoint_is_inspected_and_its_list_is_judged(sparse: Checkpoint) -> None:
    report = inspect(sparse)
    assert report.usable
    assert [finding for finding in report.findings if finding.severity == "error"] == []
    name = sparse.directory.name
    assert report.parameters == pytest.approx(
        PUBLISHED[name.removesuffix("-FP8")].billions * 1e9, rel=0.015
    )
    verdicts = Counter(
        (entry.framework, entry.verdict) for each in report.module_lists for entry in each.verdicts
    )
    layers = sparse.config.num_hidden_layers
    listed = layers if name == "Qwen3-30B-A3B-FP8" else 0
    assert verdicts[Framework.HUGGING_FACE, "right"] == (1 + listed if listed else 0)
    assert verdicts[Framework.HUGGING_FACE, "no effect"] == 2 * listed  # norms are no modules
    assert verdicts[Framework.HUGGING_FACE, "breaks"] == 0


def test_a_large_checkpoint_is_converted_in_plan(sparse: Checkpoint) -> None:
    """Nothing is dropped, and NxDI's list keeps all that is not FP8 from being converted."""
    plan = plan_conversion(sparse)
    used = [n for o in plan.outputs for g in (*o.groups, *o.scale_groups) for n in g]
    assert sorted(used) == sorted(sparse.entries)
    scales = sum(entry.nbytes for name, entry in sparse.entries.items() if "_scale_inv" in name)
    assert plan.nbytes == sparse.nbytes + scales  # BF16 scales become float32
    matrices = [o for o in plan.outputs if len(o.shape) > 1 and not o.is_scale]
    listed = plan.modules_to_not_convert
    if not sparse.config.declares_fp8:
        assert listed == ()
        return
    for output in matrices:
        kept = any(entry in output.name for entry in listed)
        assert kept == (output.dtype != "F8_E4M3")


def test_a_large_checkpoint_is_planned_from_its_directory(sparse: Checkpoint) -> None:
    degrees = {"moe_tp_degree": 2, "batch_size": 16} if "30B" in sparse.directory.name else {}
    plan = plan_deployment(sparse.directory, instance="trn1.32xlarge", tp_degree=8, **degrees)
    assert plan.converted_bytes == sparse.nbytes
    assert not plan.refused
    assert plan.fits


@pytest.mark.parametrize("name", FP8_NAMES)
def test_the_published_list_of_every_fp8_checkpoint_is_right_for_transformers(name: str) -> None:
    """Its entries reach no FP8 weight. What it names of the head and the routers is all that is
    not FP8 and would be converted: a list is lacking in dense ones, whose head no release
    converts.
    """
    config = config_of(name, num_hidden_layers=3)
    entries: Any = {each.name: each.spec for each in schema.declared(config)}
    modules = modules_of(entries, config)[Framework.HUGGING_FACE]
    listed = config.modules_to_not_convert
    assert all(each.verdict != "breaks" for each in judge(Framework.HUGGING_FACE, listed, modules))
    left = {module.path for module in uncovered(Framework.HUGGING_FACE, listed, modules)}
    tied = config.tie_word_embeddings
    assert left == (set() if listed or tied else {"lm_head"})


# Of Qwen3-32B-FP8-Static-PerTensor.
MODELOPT = {
    "config_groups": {"group_0": {"weights": {"dynamic": False, "num_bits": 8, "type": "float"}}},
    "ignore": ["lm_head"],
    "quant_algo": "FP8",
    "kv_cache_scheme": "FP8",
    "producer": {"name": "modelopt", "version": "0.31.0"},
}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "model_type is 'llama'"),
        ({"model_type": "qwen2_moe"}, "model_type is 'qwen2_moe'"),
        ({"model_type": "qwen3_next"}, "model_type is 'qwen3_next'"),
        ({"model_type": "qwen3_5"}, "model_type is 'qwen3_5'"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quant_method is 'gptq'"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method is 'awq'"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors"}},
            "quant_method is 'compressed-tensors'",
        ),
        ({"quantization_config": MODELOPT}, "quant_algo is 'FP8': .* ModelOpt"),
        ({"use_sliding_window": True}, "use_sliding_window is True"),
        ({"dual_chunk_attention_config": {"chunk_size": 262144}}, "dual_chunk_attention_config is"),
        ({"model_type": "qwen3_5_moe"}, "model_type is 'qwen3_5_moe'; expected .*'qwen3_moe'"),
        ({"model_type": "qwen3_vl"}, "model_type is 'qwen3_vl'"),
        ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'"),
        ({"model_type": "kimi_k2"}, "model_type is 'kimi_k2'"),
        ({"model_type": "glm4_moe"}, "model_type is 'glm4_moe'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_type is 'llama3'"),
    ],
)
def test_what_is_not_one_of_these_is_refused_by_name(changes: dict[str, Any], said: str) -> None:
    """Among them: MiniMind2 exported as Llama, Qwen2-MoE, Qwen3-Next and 3.5, 4-bit weights."""
    with pytest.raises(ConfigError, match=said):
        ModelConfig.from_dict(published("Qwen3-8B") | changes)
