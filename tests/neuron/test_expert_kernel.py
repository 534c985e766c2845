"""The NxDI model with the NKI kernel (interpreted) and with placed experts: the same logits as
without.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from neuron_minimax.planner.placement import Placement
from tests.neuron.cases import MODELS, SEED
from tests.neuron.ranks import Run, run
from tests.neuron.test_parity import check_against_cpu_model
from tests.opened import convert
from tests.tiny import write_tiny

TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("kernel")
    convert(write_tiny(base / "source", seed=SEED, **MODELS["grouped"]), base / "converted")
    return base / "converted"


def test_the_nki_kernel_takes_a_split_within_blocks(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", seed=SEED, **MODELS["192 channels"])
    convert(source, tmp_path / "converted")
    result = run(
        Run(
            directory=str(tmp_path / "converted"),
            through_load_module=True,
            expert_kernel="nki",
            tp_degree=2,
            moe_tp_degree=2,
        ),
        tmp_path / "out",
    )
    check_against_cpu_model(result, tmp_path / "converted", torch.float32, TOLERANCE)
    assert result["kernel_matmuls"] > 0


@pytest.mark.parametrize(
    "degrees",
    [
        {},
        {"tp_degree": 2, "moe_tp_degree": 2},
        {"tp_degree": 2, "moe_ep_degree": 2},
        {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2},
    ],
)
def test_the_nki_kernel_gives_the_logits_of_nxds_experts(
    degrees: dict, converted: Path, tmp_path: Path
) -> None:
    results = [
        run(
            Run(
                directory=str(converted), through_load_module=True, expert_kernel=kernel, **degrees
            ),
            tmp_path / kernel,
        )
        for kernel in ("torch", "nki")
    ]
    assert (results[0]["logits"] - results[1]["logits"]).abs().max() < TOLERANCE
    assert torch.equal(results[0]["tokens"], results[1]["tokens"])
    assert results[0]["parameters"] == results[1]["parameters"]
    assert results[0]["kernel_matmuls"] == 0 < results[1]["kernel_matmuls"]


def test_the_nki_kernel_serves_batches_that_nxd_refuses_with_expert_parallelism(
    tmp_path: Path,
) -> None:
    # Four sequences choose two experts each of sixteen: less than one choice per expert.
    sizes = MODELS["grouped"] | {"num_local_experts": 16}
    convert(write_tiny(tmp_path / "source", seed=SEED, **sizes), tmp_path / "converted")
    configuration = Run(
        directory=str(tmp_path / "converted"),
        through_load_module=True,
        expert_kernel="nki",
        tp_degree=2,
        moe_ep_degree=2,
    )
    result = run(configuration, tmp_path / "out")
    check_against_cpu_model(result, tmp_path / "converted", torch.float32, TOLERANCE)
    with pytest.raises(
        AssertionError, match="Selective Loading with Expert parallelism is not supported"
    ):
        run(replace(configuration, expert_kernel="torch"), tmp_path / "out")


@pytest.mark.parametrize("kernel", ["torch", "nki"])
def test_placed_experts_give_the_same_logits(kernel: str, converted: Path, tmp_path: Path) -> None:
    placement = Placement(
        order=np.array([[6, 1, 4, 3, 0, 7, 2, 5], [7, 6, 5, 4, 3, 2, 1, 0]]), ranks=2
    )
    placement.save(tmp_path / "placement.json")
    degrees = {"tp_degree": 2, "moe_ep_degree": 2, "through_load_module": True}
    plain = run(Run(directory=str(converted), **degrees), tmp_path / "plain")
    placed = Run(
        directory=str(converted),
        expert_kernel=kernel,
        expert_placement=str(tmp_path / "placement.json"),
        **degrees,
    )
    found = run(placed, tmp_path / "placed")
    assert (plain["logits"] - found["logits"]).abs().max() < TOLERANCE
    assert torch.equal(plain["tokens"], found["tokens"])
    router = "layers.1.block_sparse_moe.router.e_score_correction_bias"
    assert torch.equal(found["routers"][router], plain["routers"][router].flip(0))
