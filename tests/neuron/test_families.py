"""Every family beside transformers and NxDI's own classes, in CPU mode: the last prompt position
and 12 greedy steps, from directories that this project converted.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import Layout
from neuron_minimax.planner.memory import rank_memory
from neuron_minimax.planner.placement import Placement
from neuron_minimax.planner.settings import DeploymentSettings, deployment_case
from tests.neuron.cases import FAMILY_MODELS, SEED, prompts
from tests.neuron.make_reference import answer
from tests.neuron.ranks import Run, run
from tests.neuron.test_parity import check_against_cpu_model
from tests.opened import convert
from tests.tiny import write_tiny

TOLERANCE = 2e-5
ONE: dict[str, int] = {}
SPLIT = {"tp_degree": 2, "moe_tp_degree": 2}
EXPERTS = {"tp_degree": 2, "moe_ep_degree": 2}
BOTH = {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2}
TWO = {"tp_degree": 2}
FOUR = {"tp_degree": 4}

Stored = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Stored:
    """A model of `cases.py` as "published", "converted", or "float32", the same weights as
    dequantized; made once each.
    """
    base = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str, form: str) -> Path:
        family, overrides = FAMILY_MODELS[name]
        directory = base / f"{name}-{form}".replace(" ", "-")
        if form == "converted":
            convert(make(name, "published"), directory)
            return directory
        dense = form == "float32"
        return write_tiny(directory, seed=SEED, dense=dense, family=family, **overrides)

    return make


@pytest.fixture(scope="session")
def reference(stored: Stored) -> Callable[[str], tuple[torch.Tensor, torch.Tensor]]:
    """Greedy tokens and the logits that chose them, by transformers in float32."""

    @cache
    def make(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        model = AutoModelForCausalLM.from_pretrained(stored(name, "float32"), dtype=torch.float32)
        with torch.no_grad():
            found = [answer(model.eval(), prompt) for prompt in prompts(model.config.vocab_size)]
        return torch.stack([tokens for tokens, _ in found]), torch.stack(
            [rows for _, rows in found]
        )

    return make


@pytest.fixture(scope="session")
def result_of(stored: Stored, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """This project's class over a converted directory; each configuration runs once."""
    found: dict[tuple, dict[str, Any]] = {}

    def make(name: str, degrees: dict[str, int]) -> dict[str, Any]:
        key = (name, *sorted(degrees.items()))
        if key not in found:
            directory = str(stored(name, "converted"))
            configuration = Run(directory=directory, through_load_module=True, **degrees)
            found[key] = run(configuration, tmp_path_factory.mktemp("results") / "out")
        return found[key]

    return make


def check(result: dict[str, Any], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    tokens, logits = expected
    difference = float((result["logits"] - logits).abs().max())
    print(f"largest difference {difference:.1e}")
    assert difference < TOLERANCE
    assert torch.equal(result["tokens"], tokens)


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        *(("qwen3_moe fp8", degrees) for degrees in (ONE, SPLIT, EXPERTS, BOTH)),
        *(("qwen3_moe bf16", degrees) for degrees in (ONE, SPLIT, EXPERTS)),
        *(("qwen3_moe mixed", degrees) for degrees in (ONE, BOTH)),
        *(("qwen3_moe 7 experts", degrees) for degrees in (ONE, EXPERTS)),  # 4, and 3 and zeros
        *(("qwen3 fp8", degrees) for degrees in (ONE, TWO, FOUR)),
        *(("qwen3 bf16", degrees) for degrees in (ONE, TWO, FOUR)),
        *(("qwen2 bf16", degrees) for degrees in (ONE, TWO, FOUR)),
    ],
)
def test_a_converted_checkpoint_gives_transformers_logits_and_tokens(
    name: str, degrees: dict, result_of: Callable, reference: Callable
) -> None:
    check(result_of(name, degrees), reference(name))


def test_a_published_checkpoint_loads_without_conversion_to_disk(
    stored: Stored, reference: Callable, tmp_path: Path
) -> None:
    """FP8 with scales in BF16, and a tied head that is not stored."""
    directory = str(stored("qwen3 fp8", "published"))
    result = run(Run(directory=directory, through_load_module=True), tmp_path / "out")
    check(result, reference("qwen3 fp8"))
    assert result["parameters"]["layers.1.mlp.up_proj.weight"][0] == "torch.float8_e4m3fn"


def test_dense_mlps_kept_in_bf16_need_no_whole_blocks(tmp_path: Path) -> None:
    """Three blocks of channels on two ranks, beside this project's own model."""
    family, overrides = FAMILY_MODELS["qwen3 fp8"]
    changed = overrides | {"intermediate_size": 384}
    source = write_tiny(tmp_path / "source", seed=SEED, family=family, **changed)
    convert(source, tmp_path / "converted", Layout(keep_in_bf16=("mlp",)))
    configuration = Run(directory=str(tmp_path / "converted"), through_load_module=True, **TWO)
    result = run(configuration, tmp_path / "out")
    parameters = {name: dtype for name, (dtype, _) in result["parameters"].items()}
    assert parameters["layers.0.mlp.down_proj.weight"] == "torch.float32"
    assert parameters["layers.0.self_attn.o_proj.o_proj.weight"] == "torch.float8_e4m3fn"
    check_against_cpu_model(result, tmp_path / "converted", torch.float32, TOLERANCE)


def test_bf16_keeps_the_router_in_float32_and_equals_a_model_with_the_same_casts(
    tmp_path: Path,
) -> None:
    # A seed without near-ties, as in test_parity.
    family, overrides = FAMILY_MODELS["qwen3_moe fp8"]
    directory = tmp_path / "converted"
    convert(write_tiny(tmp_path / "source", seed=7, family=family, **overrides), directory)
    configuration = Run(directory=str(directory), through_load_module=True, dtype="bfloat16")
    result = run(configuration, tmp_path / "out")
    tensors = TensorDirectory(directory)
    assert len(result["routers"]) == 2
    for name, tensor in result["routers"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors.tensor(name).float())
    check_against_cpu_model(result, directory, torch.bfloat16, 0.1)  # measured: at most 0.079


def test_the_nki_kernel_and_placed_experts_give_the_same_logits(
    stored: Stored, reference: Callable, tmp_path: Path
) -> None:
    order = np.array([[6, 1, 4, 3, 0, 7, 2, 5], [7, 6, 5, 4, 3, 2, 1, 0]])
    Placement(order=order, ranks=2).save(tmp_path / "placement.json")
    configuration = Run(
        directory=str(stored("qwen3_moe fp8", "converted")),
        through_load_module=True,
        expert_kernel="nki",
        expert_placement=str(tmp_path / "placement.json"),
        **EXPERTS,
    )
    result = run(configuration, tmp_path / "out")
    check(result, reference("qwen3_moe fp8"))
    assert result["kernel_matmuls"] > 0


def test_placed_experts_beside_zeros_and_the_nki_kernel_give_the_same_logits(
    stored: Stored, reference: Callable, tmp_path: Path
) -> None:
    order = np.array([[6, 1, 4, 3, 0, 2, 5], [6, 5, 4, 3, 2, 1, 0]])
    Placement(order=order, ranks=4).save(tmp_path / "placement.json")
    configuration = Run(
        directory=str(stored("qwen3_moe 7 experts", "converted")),
        through_load_module=True,
        expert_kernel="nki",
        expert_placement=str(tmp_path / "placement.json"),
        tp_degree=4,
        moe_ep_degree=4,
    )
    result = run(configuration, tmp_path / "out")
    check(result, reference("qwen3_moe 7 experts"))
    assert result["kernel_matmuls"] > 0


# Stock classes of NxDI beside this project's, on the same weights. NxDI's dense Qwen3 has no code
# for block scales, so that it is given the dequantized weights.
BESIDE = [
    ("qwen3_moe fp8", "published", ONE),
    ("qwen3_moe fp8", "published", SPLIT),
    ("qwen3_moe bf16", "published", ONE),
    ("qwen3 fp8", "float32", TWO),
    ("qwen3 bf16", "published", TWO),
    ("qwen2 bf16", "published", TWO),
]


@pytest.mark.parametrize(("name", "form", "degrees"), BESIDE)
def test_nxdis_own_class_gives_the_same_logits_and_tokens(
    name: str, form: str, degrees: dict, stored: Stored, result_of: Callable, tmp_path: Path
) -> None:
    stock = run(Run(directory=str(stored(name, form)), stock=True, **degrees), tmp_path / "stock")
    check(result_of(name, degrees), (stock["tokens"], stock["logits"]))


def test_nxdis_own_dense_class_reads_fp8_codes_as_weights(
    stored: Stored, reference: Callable, tmp_path: Path
) -> None:
    """Why it is given dequantized weights above: scales are dropped, without an error."""
    directory = str(stored("qwen3 fp8", "published"))
    stock = run(Run(directory=directory, stock=True), tmp_path / "out")
    _, logits = reference("qwen3 fp8")
    assert (stock["logits"][:, 0] - logits[:, 0]).abs().max() > 1  # 3 of logits up to 4


def bf16_bytes(directory: Path, output: Path, **options: Any) -> dict[str, int]:
    """Bytes of rank 0's weights in a BF16 compile."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "through_load_module": True, "forward": False}
    return run(Run(directory=str(directory), **settings, **options), output)["bytes"]


@pytest.mark.parametrize(
    ("name", "form", "degrees"),
    [("qwen3_moe fp8", "published", SPLIT), ("qwen3 fp8", "float32", TWO)],
)
def test_fp8_weights_take_half_the_bytes_that_nxdis_own_class_holds(
    name: str, form: str, degrees: dict, stored: Stored, tmp_path: Path
) -> None:
    """Half, and 4 bytes of scale for each block of 128 x 128; other weights take as much, but the
    router, which is float32 here. They are the bytes of the plan.
    """
    stock = bf16_bytes(stored(name, form), tmp_path / "stock", stock=True, **degrees)
    directory = stored(name, "converted")
    own = bf16_bytes(directory, tmp_path / "own", **degrees)
    settings = DeploymentSettings(instance="inf2.xlarge", **degrees)
    case = deployment_case(ModelConfig.from_dir(directory), settings)
    ranks = sum(size for key, size in own.items() if key.endswith(".rank"))
    assert rank_memory(case.config, case.deployment).weights == sum(own.values()) - ranks
    routers = {key for key in own if ".router." in key}
    assert {own.pop(key) / stock.pop(key) for key in routers} <= {2.0}
    scaled = {key.removesuffix(".scale") for key in own if key.endswith(".scale")}
    assert len(scaled) == 2 * (6 if "moe" in name else 7)  # of two layers
    codes = sum(own[f"{key}.weight"] for key in scaled)
    scales = sum(own[f"{key}.scale"] for key in scaled)
    others = sum(size for key, size in own.items() if key.rpartition(".")[0] not in scaled)
    stock_scaled = sum(stock[f"{key}.weight"] for key in scaled)
    print(f"{stock_scaled} bytes of BF16, {codes} of codes and {scales} of scales")
    assert codes * 2 == stock_scaled
    assert scales == codes // (128 * 128) * 4
    assert others == sum(stock.values()) - stock_scaled
