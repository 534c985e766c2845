"""The backend over NxDI in CPU mode, NxD's own sharding into rank files, and settings; each in a
fresh process.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from tests.neuron.cases import FAMILY_MODELS, MODELS, SEED
from tests.neuron.conftest import RUN_TRACES
from tests.neuron.ranks import ROOT
from tests.neuron.standins import is_real
from tests.opened import convert
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("backend")
    convert(write_tiny(base / "source", seed=SEED, **MODELS["grouped"]), base / "converted")
    return base / "converted"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model of another family, of `cases.py`; made once each."""
    base = tmp_path_factory.mktemp("families")

    @cache
    def make(name: str) -> Path:
        family, overrides = FAMILY_MODELS[name]
        directory = base / name.replace(" ", "-")
        source = write_tiny(directory / "source", seed=SEED, family=family, **overrides)
        convert(source, directory / "converted")
        return directory / "converted"

    return make


def check(name: str, *arguments: object) -> str:
    """Run one check of `checks.py`; its output, or an AssertionError with it."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "tests.neuron.checks", name, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("length", [64, 256])
def test_slots_give_what_the_eager_backend_gives(length: int, model: Path) -> None:
    assert "largest difference" in check("slots", model, length)


@pytest.mark.parametrize(
    ("name", "length"), [("qwen3 fp8", 64), ("qwen3_moe mixed", 256), ("qwen2 bf16", 64)]
)
def test_slots_of_every_family_give_what_the_eager_backend_gives(
    name: str, length: int, converted: Callable
) -> None:
    assert "largest difference" in check("slots", converted(name), length)


def test_nxdis_own_generation_adapter_generates_the_same_tokens(model: Path) -> None:
    said = check("adapter", model)
    if "skipped: " in said:
        pytest.skip(said.rpartition("skipped: ")[2])


def test_sampling_in_the_graph_returns_the_greedy_tokens(model: Path) -> None:
    check("on_device_sampling", model)


def test_every_ranks_saved_weights_are_whole_and_a_damaged_file_is_refused(
    model: Path, tmp_path: Path
) -> None:
    check("rank_files", model, tmp_path, "layers.1.self_attn.k_norm.weight", 2)


@pytest.mark.parametrize(
    ("name", "lost", "moe_tp_degree"),
    [
        ("qwen3_moe fp8", "layers.1.mlp.router.linear_router.weight", 2),
        ("qwen3 fp8", "layers.0.mlp.down_proj.scale", 4),
        ("qwen2 bf16", "layers.1.self_attn.qkv_proj.k_proj.bias", 4),
    ],
)
def test_saved_weights_of_every_family_are_whole_and_a_damaged_file_is_refused(
    name: str, lost: str, moe_tp_degree: int, converted: Callable, tmp_path: Path
) -> None:
    check("rank_files", converted(name), tmp_path, lost, moe_tp_degree)


def test_unserved_settings_are_refused_with_the_reason(model: Path) -> None:
    check("settings", model)


def test_settings_that_other_families_cannot_have_are_refused_by_name(converted: Callable) -> None:
    check("family_settings", converted("qwen3 fp8"), converted("qwen3_moe fp8"))


def test_codes_up_to_448_are_read_as_such_or_refused(model: Path, tmp_path: Path) -> None:
    check("code_range", model, tmp_path)


def test_vllm_neuron_finds_and_configures_the_class(model: Path) -> None:
    check("vllm", model)


@pytest.mark.parametrize("name", ["qwen3_moe fp8", "qwen3 fp8", "qwen2 bf16"])
def test_vllm_neuron_gets_the_class_of_a_family_when_asked(name: str, converted: Callable) -> None:
    check("vllm_families", converted(name), name.split()[0])


@pytest.mark.skipif(
    not is_real("torch_xla"), reason=f"the real torch_xla is not installed; run {RUN_TRACES}"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_submodels_are_xla_graphs_with_the_values_of_eager_torch(
    model: Path, dtype: str
) -> None:
    assert check("trace", model, dtype).count("largest difference") == 2


@pytest.mark.skipif(
    not is_real("torch_xla"), reason=f"the real torch_xla is not installed; run {RUN_TRACES}"
)
@pytest.mark.parametrize("name", ["qwen3_moe fp8", "qwen3 fp8", "qwen2 bf16"])
def test_submodels_of_every_family_are_xla_graphs_with_the_values_of_eager_torch(
    name: str, converted: Callable
) -> None:
    assert check("trace", converted(name), "float32").count("largest difference") == 2
