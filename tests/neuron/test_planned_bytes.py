"""The planner's bytes of a rank beside those of the parameters that NxDI builds for rank 0, by this
project's classes, in a BF16 compile.
"""

from pathlib import Path
from typing import Any

import pytest

from neuron_minimax.config import ModelConfig
from neuron_minimax.planner.memory import rank_memory
from neuron_minimax.planner.settings import DeploymentSettings, deployment_case
from tests.neuron.cases import FAMILY_MODELS, SEED, SEQ_LEN
from tests.neuron.ranks import Run, run
from tests.opened import convert
from tests.tiny import write_tiny


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("qwen3_moe fp8", {"tp_degree": 2, "moe_tp_degree": 2}),
        ("qwen3_moe fp8", {"tp_degree": 4, "moe_tp_degree": 4}),  # half a block: expanded scales
        ("qwen3_moe mixed", {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2}),
        ("qwen3_moe 7 experts", {"tp_degree": 2, "moe_ep_degree": 2}),
        ("qwen3 fp8", {"tp_degree": 4}),
        ("qwen3 bf16", {"tp_degree": 4}),
        ("qwen2 bf16", {"tp_degree": 4}),
    ],
)
def test_the_planner_counts_the_bytes_of_the_parameters_that_nxdi_builds(
    name: str, degrees: dict[str, Any], tmp_path: Path
) -> None:
    family, overrides = FAMILY_MODELS[name]
    convert(
        write_tiny(tmp_path / "source", seed=SEED, family=family, **overrides), tmp_path / "model"
    )
    settings = DeploymentSettings(instance="trn2.48xlarge", seq_len=SEQ_LEN, **degrees)
    config = ModelConfig.from_dir(tmp_path / "model")
    planned = rank_memory(config, deployment_case(config, settings).deployment)
    configuration = Run(
        directory=str(tmp_path / "model"),
        dtype="bfloat16",
        forward=False,
        through_load_module=True,
        **degrees,
    )
    held = run(configuration, tmp_path / "out")["bytes"]
    weights = {key: size for key, size in held.items() if "rank" not in key}
    assert planned.weights == sum(weights.values())
