"""NxDI's CPU mode against transformers: last prompt position and 12 greedy steps, from converted directories."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from neuron_minimax.convert.plan import Layout
from neuron_minimax.convert.run import convert
from tests.neuron.cases import MODELS, REFERENCE, SEED
from tests.neuron.ranks import Run, run
from tests.tiny import write_tiny

TOLERANCE = 2e-5  # measured: at most 5e-6
SPLIT = {"tp_degree": 2, "moe_tp_degree": 2}
EXPERTS = {"tp_degree": 2, "moe_ep_degree": 2}
BOTH = {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2}

Converted = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A model of `cases.py`, converted as "dense", "fp8" or "bf16" (FP8 with BF16 attention); made once each."""
    base = tmp_path_factory.mktemp("models")

    def make(name: str, kind: str) -> Path:
        source, output = base / f"{name}-{kind}", base / f"{name}-{kind}-converted"
        if not output.exists():
            write_tiny(source, seed=SEED, dense=kind == "dense", **MODELS[name])
            convert(source, output, Layout(attention="bf16" if kind == "bf16" else "fp8"))  # type: ignore[arg-type]
        return output

    return make


def check(result: dict[str, Any], name: str, variant: str = "") -> None:
    reference = load_file(REFERENCE)
    assert (result["logits"] - reference[f"{name}.logits{variant}"]).abs().max() < TOLERANCE
    assert torch.equal(result["tokens"], reference[f"{name}.tokens{variant}"])


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("grouped", {}),
        ("grouped", SPLIT),
        ("grouped", EXPERTS),
        ("grouped", {"tp_degree": 4, "moe_tp_degree": 4}),  # 2 key/value heads on 4 ranks
        ("padded", BOTH),  # 6 query heads over 2 key/value heads become 8 over 4
        ("converted", SPLIT),  # 3 key/value heads on 2 ranks become 6
    ],
)
def test_float32_equals_transformers(name: str, degrees: dict, converted: Converted, tmp_path: Path) -> None:
    check(run(Run(directory=str(converted(name, "dense")), **degrees), tmp_path / "out"), name)


@pytest.mark.parametrize(
    ("name", "degrees"), [("grouped", {}), ("grouped", SPLIT), ("grouped", EXPERTS), ("padded", BOTH)]
)
def test_fp8_equals_transformers_on_the_same_dequantized_weights(
    name: str, degrees: dict, converted: Converted, tmp_path: Path
) -> None:
    configuration = Run(directory=str(converted(name, "fp8")), through_load_module=True, **degrees)
    result = run(configuration, tmp_path / "out")
    check(result, name)
    dtypes = {key.rpartition("self_attn.")[2]: dtype for key, (dtype, _) in result["parameters"].items()}
    assert dtypes["qkv_proj.q_proj.weight"] == dtypes["o_proj.o_proj.weight"] == "torch.float8_e4m3fn"
    assert dtypes["qkv_proj.k_proj.scale"] == "torch.float32"


@pytest.mark.parametrize("degrees", [{}, SPLIT])
def test_fp8_experts_with_bf16_attention_equal_transformers(
    degrees: dict, converted: Converted, tmp_path: Path
) -> None:
    configuration = Run(directory=str(converted("grouped", "bf16")), through_load_module=True, **degrees)
    check(run(configuration, tmp_path / "out"), "grouped", ".bf16_attention")
