"""The planner: known fits and failures, the three worked examples of the documentation, and every
rule both ways.
"""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neuron_minimax.backends.nxdi import options
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError, ConfigError
from neuron_minimax.planner import instances
from neuron_minimax.planner.blockwise import token_blocks
from neuron_minimax.planner.cases import REFUSE, WARN, Case
from neuron_minimax.planner.instances import GIB, instance
from neuron_minimax.planner.lint import core_memory, lint
from neuron_minimax.planner.memory import (
    Deployment,
    cache_bytes_per_token,
    checkpoint_bytes,
    rank_memory,
    settled_scales,
)
from neuron_minimax.planner.report import plan_case, plan_deployment
from neuron_minimax.planner.settings import DeploymentSettings, deployment_case
from tests.full_size import published_config
from tests.published import published

TRN3 = "trn3 Gen1 server (1/4 of Gen1)"
PUBLISHED = ModelConfig.from_dict(published_config())


def deployment(**changes: Any) -> Deployment:
    """The deployment M2 was reported to run with."""
    known: dict[str, Any] = {
        "tp_degree": 64, "moe_tp_degree": 1, "moe_ep_degree": 64,
        "batch_size": 32, "seq_len": 1024, "context_length": 1024, "smallest_context": 1024,
    }  # fmt: skip
    return Deployment(**(known | changes))


def case(instance_name: str = "trn2.48xlarge", **changes: Any) -> Case:
    return Case(
        config=PUBLISHED, deployment=deployment(**changes), instance=instance(instance_name)
    )


def refusals(case: Case) -> set[str]:
    return {finding.rule for finding in lint(case) if finding.severity == REFUSE}


def known_cases() -> list[Any]:
    cases = instances.data()["known_cases"]
    return [
        pytest.param(known, id=f"{known['model']} {number}") for number, known in enumerate(cases)
    ]


@pytest.mark.parametrize("known", known_cases())
def test_known_fits_and_failures_come_out_right(known: dict[str, Any]) -> None:
    machine = instance(known["instance"])
    if "plan" in known:  # this model: every number is computed
        options = dict(known["plan"])
        fp8 = options.pop("precision") == "fp8"
        planned = deployment(
            **options, context_length=options["seq_len"], fp8_attention=fp8, fp8_experts=fp8
        )
        judged = Case(config=PUBLISHED, deployment=planned, instance=machine)
        assert (not list(core_memory(judged))) == known["fits"]
    else:  # another model: what its report states per rank, under the same rule
        need = known["per_rank_gib"] * GIB + instances.scratch_bytes()
        assert (need <= machine.memory_per_core) == known["fits"]


def test_there_are_thirteen_known_cases_three_of_them_this_model() -> None:
    cases = instances.data()["known_cases"]
    assert (len(cases), sum("plan" in known for known in cases)) == (13, 3)


@pytest.mark.slow
def test_sizes_of_the_published_model_are_those_of_its_checkpoint() -> None:
    assert cache_bytes_per_token(PUBLISHED, 8) == cache_bytes_per_token(PUBLISHED, 64) == 31744
    assert cache_bytes_per_token(PUBLISHED, 1) == 253952
    assert (
        checkpoint_bytes(PUBLISHED) == 230_121_630_720
    )  # 230.0 GB and 0.1 GB for the router being float32
    whole = rank_memory(
        PUBLISHED,
        deployment(tp_degree=1, moe_ep_degree=1, batch_size=1, seq_len=1, context_length=1),
    )
    assert whole.weights == checkpoint_bytes(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "changes", "refused", "gib_needed"),
    [
        ("trn2.48xlarge", {}, set(), 5.55),
        ("trn1.32xlarge", {"tp_degree": 32, "moe_tp_degree": 4, "moe_ep_degree": 8}, {"R5"}, 8.90),
        ("trn1.32xlarge", {"tp_degree": 32, "moe_tp_degree": 2, "moe_ep_degree": 16}, set(), 8.90),
        ("inf2.48xlarge", {"tp_degree": 24, "moe_tp_degree": 3, "moe_ep_degree": 8}, set(), 11.10),
    ],
)
def test_the_worked_examples_of_the_documentation(
    name: str, changes: dict[str, int], refused: set[str], gib_needed: float
) -> None:
    planned = plan_case(case(name, **changes))
    assert refusals(case(name, **changes)) == refused
    assert planned.verdict == ("refused" if refused else "fits")
    assert round(planned.memory.total / GIB, 2) == gib_needed


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        ("R1", {"moe_ep_degree": 32}, {}),
        (
            "R1",
            {"tp_degree": 24, "moe_ep_degree": 16},
            {"tp_degree": 24, "moe_tp_degree": 3, "moe_ep_degree": 8},
        ),
        (
            "R2",
            {"moe_tp_degree": 64, "moe_ep_degree": 1, "expert_scales": "block"},
            {"moe_tp_degree": 4, "moe_ep_degree": 16, "expert_scales": "block"},
        ),
        (
            "R2",
            {"moe_tp_degree": 8, "moe_ep_degree": 8, "expert_scales": "block"},
            {"moe_tp_degree": 64, "moe_ep_degree": 1},
        ),
        ("R3", {"batch_size": 31}, {"batch_size": 32}),
        ("R4", {"smallest_context": 63}, {"smallest_context": 64}),
        ("R6", {"tp_degree": 128, "moe_ep_degree": 128}, {}),
        ("R18", {"batch_size": 642}, {"batch_size": 641}),
    ],
)  # fmt: skip
def test_each_rule_refuses_what_cannot_work_and_nothing_else(
    rule: str, bad: dict, good: dict
) -> None:
    assert rule in refusals(case(**bad))
    assert rule not in refusals(case(**good))
    finding = next(finding for finding in lint(case(**bad)) if finding.rule == rule)
    assert finding.message
    assert finding.fix


def test_moe_tp_degrees_with_whole_blocks_are_the_divisors_of_twelve() -> None:
    accepted = [
        degree
        for degree in range(1, 65)
        if "R2" not in refusals(case(moe_tp_degree=degree, expert_scales="block"))
        and PUBLISHED.intermediate_size % degree == 0
    ]
    assert accepted == [1, 2, 3, 4, 6, 12]


def test_expanded_scales_take_any_divisor_of_the_channels_for_three_percent() -> None:
    """The oracle counts one float32 for 128 codes beside each code, and rows of blocks aside."""
    sizes = (PUBLISHED.hidden_size, PUBLISHED.intermediate_size)
    for degree in (8, 16, 64):
        shared = case(tp_degree=degree, moe_tp_degree=degree, moe_ep_degree=1, batch_size=1)
        assert not refusals(shared) & {"R1", "R2", "R3", "R4"}
        codes = 62 * 256 * 3 * sizes[0] * (sizes[1] // degree)
        repeats = degree != 1 and sizes[1] // degree % 128 != 0
        scales = codes // 128 if repeats else codes // 128**2
        assert shared.memory.experts == codes + 4 * scales
        warned = [finding for finding in lint(shared) if finding.rule == "R19"]
        assert len(warned) == int(repeats)
    blocks = case(tp_degree=4, moe_tp_degree=4, moe_ep_degree=1)
    chosen = case(tp_degree=4, moe_tp_degree=4, moe_ep_degree=1, expert_scales="expanded")
    ratio = chosen.memory.experts / blocks.memory.experts
    assert ratio == pytest.approx((1 + 4 / 128) / (1 + 4 / 128**2))


def test_expanded_scales_are_for_fp8_experts() -> None:
    expanded = deployment(expert_scales="expanded", fp8_experts=False)
    assert "R19" in refusals(replace(case(), deployment=expanded))
    assert "R19" not in refusals(replace(case(), deployment=deployment(fp8_experts=False)))


def keeping(*modules: str) -> ModelConfig:
    """The published model, converted with the experts' modules of these names kept in BF16."""
    raw = published_config()
    quantization = raw["quantization_config"] | {"modules_to_not_convert": modules}
    return ModelConfig.from_dict(raw | {"quantization_config": quantization, "neuron_minimax": {}})


@pytest.mark.parametrize(
    ("kept", "expanded", "kernel"),
    [
        ((), "", ""),
        (("layers.7.block_sparse_moe.expert_mlps.mlp_op.down_proj",), "layer 7 ", "layer 7 "),
        (
            ("expert_mlps.mlp_op.gate_up_proj",),
            "layers 0, 1, 2, 3, 4, 5, 6, 7 and 54 more ",
            "layers 0, 1, 2",
        ),
        (
            ("layers.5.block_sparse_moe.expert_mlps", "layers.9.block_sparse_moe.expert_mlps"),
            "",
            "layers 5, 9 ",
        ),
    ],
    ids=["none", "down of one layer", "gate and up of all", "two layers whole"],
)
def test_experts_that_are_kept_in_part_go_with_neither_expanded_scales_nor_the_kernel(
    kept: tuple[str, ...], expanded: str, kernel: str
) -> None:
    model = keeping(*kept)
    for changes, rule, named in (
        ({"moe_tp_degree": 64, "moe_ep_degree": 1}, "R19", expanded),
        ({"expert_kernel": "nki"}, "R14", kernel),
    ):
        judged = replace(case(**changes), config=model)
        found = [
            each.message for each in lint(judged) if (each.rule, each.severity) == (rule, REFUSE)
        ]
        assert len(found) == bool(named)
        assert all(named in each for each in found)
        with pytest.raises(BackendError, match=f"{rule} refuse") if named else nullcontext():
            options.check(model, degrees_of(judged), force=False)


def degrees_of(judged: Case) -> dict[str, Any]:
    """The options of a compile of a case."""
    taken = judged.deployment
    return {
        "tp_degree": taken.tp_degree,
        "moe_tp_degree": taken.moe_tp_degree,
        "moe_ep_degree": taken.moe_ep_degree,
        "slots": taken.batch_size,
        "expert_kernel": taken.expert_kernel,
    }


@pytest.mark.parametrize(("batch_size", "refused"), [(64, False), (128, True)])
def test_the_nki_kernel_is_refused_what_does_not_fit_its_memory(
    batch_size: int, refused: bool
) -> None:
    """Experts of 6144 x 2560, in FP8."""
    model = ModelConfig.from_dict(published("Qwen3-Coder-480B-A35B-FP8"))
    wide = deployment(tp_degree=32, moe_ep_degree=32, expert_kernel="nki", batch_size=batch_size)
    found = [
        each for each in lint(replace(case(), config=model, deployment=wide)) if each.rule == "R14"
    ]
    assert [each.severity for each in found] == [REFUSE if refused else WARN]
    if refused:
        assert "128 tokens of 6144 features and 2560 channels need" in found[0].message
        assert "tokens fit" in found[0].message


def test_scales_are_blocks_where_a_share_is_whole_blocks_both_ways() -> None:
    raw = published_config()
    for block, degree, settled in (
        ([128, 128], 4, "block"),
        ([64, 128], 24, "expanded"),
        ([128, 64], 24, "expanded"),
        ([64, 64], 24, "block"),
    ):
        quantization = raw["quantization_config"] | {"weight_block_size": block}
        model = ModelConfig.from_dict(raw | {"quantization_config": quantization})
        assert settled_scales("auto", model, degree) == settled, block
        shared = case(
            moe_tp_degree=degree, moe_ep_degree=1, tp_degree=degree, expert_scales="block"
        )
        assert ("R2" in refusals(replace(shared, config=model))) == (settled == "expanded"), block


def test_batches_below_32_are_fine_without_expert_parallelism() -> None:
    alone = case(tp_degree=12, moe_tp_degree=12, moe_ep_degree=1, batch_size=1)
    assert not refusals(alone) & {"R1", "R2", "R3", "R4"}


def test_ocp_codes_are_refused_below_trn3_and_unproven_there() -> None:
    for name, said in (("trn2.48xlarge", "infinite or NaN"), (TRN3, "no compiler has shown")):
        native = replace(case(name), fp8_max=448)
        assert "R9" in refusals(native)
        assert any(finding.rule == "R9" and said in finding.message for finding in lint(native))
    assert not any(finding.rule == "R9" for finding in lint(case(TRN3)))


def test_the_nki_expert_kernel_is_refused_codes_it_misreads_and_chips_without_it() -> None:
    kernel = deployment(expert_kernel="nki")
    assert "R14" in refusals(replace(case(), deployment=kernel, fp8_max=448))
    assert "R14" not in refusals(replace(case(TRN3), deployment=kernel, fp8_max=448))
    assert "R14" in refusals(replace(case("trn1.32xlarge"), deployment=kernel))
    assert "R14" not in refusals(replace(case(), deployment=kernel))
    assert any(
        "simulator only" in finding.message for finding in lint(replace(case(), deployment=kernel))
    )
    assert "R3" not in refusals(replace(case(), deployment=replace(kernel, batch_size=1)))
    for changes in ({"batch_size": 129}, {"fp8_experts": False}):
        assert "R14" in refusals(replace(case(), deployment=replace(kernel, **changes)))
    assert "R14" not in refusals(replace(case(), deployment=replace(kernel, batch_size=128)))
    assert not any(
        finding.rule == "R14"
        for finding in lint(replace(case(), deployment=deployment(fp8_experts=False)))
    )


@pytest.mark.parametrize(
    ("name", "changes", "refused"),
    [
        ("trn2.48xlarge", {"blockwise_matmul": "shard_on_intermediate"}, False),
        ("trn2.48xlarge", {"blockwise_matmul": "shard_on_block"}, False),
        ("trn1.32xlarge", {"blockwise_matmul": "shard_on_block"}, True),
        (
            "trn2.48xlarge",
            {"blockwise_matmul": "shard_on_intermediate", "moe_tp_degree": 4, "moe_ep_degree": 16},
            True,
        ),
        (
            "trn2.48xlarge",
            {"blockwise_matmul": "shard_on_block", "moe_tp_degree": 4, "moe_ep_degree": 16},
            False,
        ),
        (
            "trn2.48xlarge",
            {"blockwise_matmul": "shard_on_block", "moe_tp_degree": 32, "moe_ep_degree": 2},
            True,
        ),
    ],
)
def test_kernels_of_context_encoding_are_refused_where_they_cannot_work(
    name: str, changes: dict, refused: bool
) -> None:
    assert ("R13" in refusals(case(name, **changes))) == refused
    assert any(finding.rule == "R13" for finding in lint(case(name, **changes)))


def test_an_unknown_way_through_the_blocks_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    with pytest.raises(
        ConfigError, match=r"blockwise_matmul is 'ping'; expected one of torch, shard_on_inter"
    ):
        plan_deployment(tmp_path, instance="trn2.48xlarge", tp_degree=64, blockwise_matmul="ping")
    with pytest.raises(ConfigError, match=r"expert_kernel is 'cuda'; expected one of torch, nki"):
        plan_deployment(tmp_path, instance="trn2.48xlarge", tp_degree=64, expert_kernel="cuda")


@pytest.mark.parametrize("buckets", [(0,), (1,), (256, 128), (4096,)])
def test_buckets_that_a_compile_refuses_are_refused_by_the_plan(
    buckets: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    with pytest.raises(ConfigError, match=r"buckets .*expected ascending lengths from 2 to 1024"):
        plan_deployment(tmp_path, instance="trn2.48xlarge", tp_degree=64, context_lengths=buckets)


@pytest.mark.slow
def test_a_sequence_ends_where_the_models_positions_end(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(published_config() | {"max_position_embeddings": 512})
    )
    settings: dict[str, Any] = {"instance": "trn2.48xlarge", "tp_degree": 64, "batch_size": 32}
    assert plan_deployment(tmp_path, **settings).deployment.seq_len == 512
    assert any(
        finding.rule == "R15"
        for finding in plan_deployment(tmp_path, seq_len=513, **settings).findings
    )


def test_shards_beyond_the_hosts_memory_are_warned_about() -> None:
    small = {"tp_degree": 2, "moe_tp_degree": 2, "moe_ep_degree": 1}
    assert any(finding.rule == "R11" for finding in lint(case("trn1.2xlarge", **small)))
    assert not any(finding.rule == "R11" for finding in lint(case("trn1.32xlarge")))


def test_trn1_and_inf2_are_told_the_last_sdk_that_supports_them_and_newer_chips_nothing() -> None:
    for name in instances.names():
        found = [finding for finding in lint(case(name)) if finding.rule == "R12"]
        if instance(name).family in ("trn1", "inf2"):
            assert [finding.severity for finding in found] == [WARN]
            assert "install the packages of SDK 2.28" in found[0].fix
        else:
            assert not found


def test_trn3_is_told_the_path_that_goes_on_and_other_chips_are_not() -> None:
    for name in instances.names():
        found = [finding for finding in lint(case(name)) if finding.rule == "R20"]
        assert [finding.severity for finding in found] == [WARN] * (instance(name).family == "trn3")
        assert all("--backend torch-neuron" in finding.fix for finding in found)
    native = [each for each in lint(replace(case(TRN3), fp8_max=448)) if each.rule == "R9"]
    assert "or --backend torch-neuron, which looks every code up" in native[0].fix


def test_trn3_has_the_cores_and_memory_that_its_page_gives() -> None:
    """Gen1: 64 chips, 9,216 GiB and 313.6 TB/s in 4 servers; Gen2: 144, 20,736 and 705.6 in 36."""
    for name, chips, gib, terabytes, servers in (
        (TRN3, 64, 9216, 313.6, 4),
        ("trn3 Gen2 server (1/36 of Gen2)", 144, 20736, 705.6, 36),
    ):
        machine = instance(name)
        assert machine.logical_cores * machine.logical_nc_config * servers == 8 * chips
        assert machine.device_memory * servers == gib * GIB
        bandwidth = machine.bandwidth_per_core * machine.logical_cores * servers
        assert bandwidth == pytest.approx(terabytes * 1e12)


def test_the_planner_needs_no_torch() -> None:
    code = "import sys, neuron_minimax.planner.report; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unrolled_blocks_are_counted_for_each_way() -> None:
    eight = deployment(tp_degree=8, moe_ep_degree=8)
    assert token_blocks(PUBLISHED, eight) == 47
    trn1 = case("trn1.32xlarge", tp_degree=32, moe_tp_degree=4, moe_ep_degree=8)
    assert any("47 blocks" in finding.message for finding in lint(trn1))
    kernel = case(blockwise_matmul="shard_on_intermediate")
    assert not any(finding.rule == "R8" for finding in lint(kernel))
    planned = plan_case(case())
    assert planned.unrolled == {"torch": 19 * 62, "shard_on_intermediate": 62, "shard_on_block": 62}
    assert "torch 1178 (chosen), shard_on_intermediate 62" in planned.render()
    assert planned.to_json()["unrolled_expert_products"]["torch"] == 1178


@pytest.mark.slow
def test_the_largest_batch_and_longest_sequence_are_the_last_that_fit() -> None:
    planned = plan_case(case())
    for name, limit in (
        ("batch_size", planned.largest_batch),
        ("seq_len", planned.longest_sequence),
    ):
        at, beyond = (plan_case(case(**{name: size})) for size in (limit, limit + 1))
        assert at.fits
        assert not beyond.fits


def test_what_does_not_fit_is_refused_and_told_what_would() -> None:
    planned = plan_case(
        case("inf2.48xlarge", tp_degree=24, moe_tp_degree=3, moe_ep_degree=8, batch_size=256)
    )
    assert planned.refused
    assert {reason.rule for reason in planned.reasons} == {"R18"}
    # The largest batch at these degrees, and the same batch on larger instances.
    found = [(each.case.instance.name, each.changes) for each in planned.proposals]
    assert found[0] == ("inf2.48xlarge", ("batch_size 193 in place of 256",))
    assert "trn2.48xlarge" in {name for name, _ in found}
    assert planned.render().startswith("refused: ")


def test_a_case_reads_precision_from_the_converted_config(tmp_path: Path) -> None:
    raw = published_config() | {"neuron_minimax": {"attention": "bf16", "fp8_range": "ocp"}}
    raw["quantization_config"] |= {
        "modules_to_not_convert": ["embed_tokens", "lm_head", "router", "self_attn"]
    }
    settings: dict[str, Any] = {"instance": "trn2.48xlarge", "tp_degree": 64, "batch_size": 32}
    found = deployment_case(ModelConfig.from_dict(raw), DeploymentSettings(**settings))
    assert (found.deployment.fp8_attention, found.deployment.fp8_experts, found.fp8_max) == (
        False,
        True,
        448,
    )
    assert found.deployment.moe_ep_degree == 64
    fp8, bf16 = (
        rank_memory(PUBLISHED, replace(found.deployment, fp8_attention=fp8))
        for fp8 in (True, False)
    )
    assert bf16.attention > 1.9 * fp8.attention
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert (
        json.loads(json.dumps(plan_deployment(tmp_path, **settings).to_json()))["bytes_per_rank"][
            "weights"
        ]
        == bf16.weights
    )


def test_an_unknown_instance_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"expected one of .*trn2\.48xlarge"):
        instance("p5.48xlarge")


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, 10**9) for name in ("tp_degree", "moe_tp_degree", "moe_ep_degree", "batch_size")),
        ("seq_len", 10**30),
        ("moe_ep_degree", -1),
    ],
)
def test_sizes_that_nothing_has_are_refused_before_anything_is_computed(
    name: str, size: int
) -> None:
    settings: dict[str, Any] = {"instance": "trn2.48xlarge", "tp_degree": 64, name: size}
    with pytest.raises(ConfigError, match=f"^{name} is {size}; expected [12] to "):
        deployment_case(PUBLISHED, DeploymentSettings(**settings))


def test_no_documented_degree_is_beyond_the_cores_of_a_machine() -> None:
    """Nor is the one that a compile takes by itself."""
    for name in instances.names():
        machine = instance(name)
        assert max(machine.tp_degrees, default=1) <= machine.logical_cores
        by_itself = deployment_case(PUBLISHED, DeploymentSettings(instance=name))
        assert "R6" not in {finding.rule for finding in lint(by_itself)}
    assert instance("inf2.xlarge").tp_degrees == (1, 2)
