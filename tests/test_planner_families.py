"""The planner on every family: bytes against a count by hand on every rank, and each family's own
refusals.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import bind_rules
from neuron_minimax.convert.layout import AttentionPrecision, Layout
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import ConfigError
from neuron_minimax.planner import instances
from neuron_minimax.planner.cases import REFUSE, Case
from neuron_minimax.planner.lint import lint
from neuron_minimax.planner.memory import rank_memory
from neuron_minimax.planner.report import plan_case, plan_deployment
from neuron_minimax.planner.settings import DeploymentSettings, deployment_case
from tests import families_page
from tests.published import published
from tests.tiny import tiny_config, write_tiny

BF16: dict[str, Any] = {"quantization_config": None}
FP8: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
}
# Heads and channels of whole blocks, so that FP8 can be shared by four ranks.
WHOLE = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 512}
SPARSE = WHOLE | {"moe_intermediate_size": 256, "num_experts": 8, "num_hidden_layers": 3}
SIX_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniMax-M2": ("minimax_m2", {"intermediate_size": 256}),
    "Qwen3 in FP8, tied": ("qwen3", WHOLE),
    "Qwen3 in BF16, six heads": ("qwen3", BF16 | SIX_HEADS | {"tie_word_embeddings": False}),
    "Qwen3-MoE in FP8": ("qwen3_moe", SPARSE),
    "Qwen3-MoE in FP8, one layer dense": ("qwen3_moe", SPARSE | {"mlp_only_layers": [0]}),
    "Qwen3-MoE in BF16, six heads": ("qwen3_moe", BF16 | SIX_HEADS | {"num_experts": 8}),
    "Qwen2": ("qwen2", SIX_HEADS),
    "Qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "MiniMind": ("minimind", {}),
    "MiniMind in FP8": ("minimind", FP8 | WHOLE),
    "MiniMind-MoE": ("minimind_moe", {}),
    "MiniMind2": ("minimind2", {}),
    "MiniMind2-MoE": ("minimind2_moe", {}),
    "MiniMind2-MoE in FP8": (
        "minimind2_moe",
        FP8 | {"hidden_size": 512} | {"intermediate_size": 512},
    ),
}


def tiny(name: str) -> ModelConfig:
    family, changes = MODELS[name]
    raw = tiny_config(family, **changes)
    if raw.get("quantization_config", 0) is None:
        del raw["quantization_config"]
    return ModelConfig.from_dict(raw)


def planned(config: ModelConfig, **settings: Any) -> Case:
    return deployment_case(
        config, DeploymentSettings(**{"instance": "trn2.48xlarge", "seq_len": 64} | settings)
    )


def arrays(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the conversion, in the bytes that it has on the device."""
    widths = {"F8_E4M3": np.uint8, "BF16": np.uint16, "F32": np.float32}
    sources = {each.name: each.spec for each in schema.declared(config)}
    head = None
    for output in bind_rules(sources, config, Layout()):
        dtype = np.float32 if ".router." in output.name else widths[output.dtype]
        array = np.zeros(output.shape, dtype)
        head = array if output.name == "embed_tokens.weight" else head
        yield output.name, array
    if config.tie_word_embeddings:
        assert head is not None
        yield "lm_head.weight", head


def rank_share(
    name: str, array: np.ndarray, config: ModelConfig, degrees: tuple[int, int, int]
) -> np.ndarray:
    """What every rank gets of a tensor, cut as NxDI cuts it: heads whole, padded or repeated;
    experts by number and channel; MLPs by channel; the rest whole.
    """
    tp, moe_tp, moe_ep = degrees
    module, kind = name.split(".")[-2:]
    channels = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}

    def cut(array: np.ndarray, axis: int, ranks: int) -> np.ndarray:
        return np.split(array, ranks, axis)[-1]

    def by_heads(array: np.ndarray, axis: int, stored: int, wanted: int) -> np.ndarray:
        heads = np.split(array, stored, axis)
        return cut(np.concatenate([heads[n % stored] for n in range(wanted)], axis), axis, tp)

    queries = config.num_attention_heads
    keys = config.num_key_value_heads
    padded = (queries + tp - 1) // tp * tp
    if keys == queries:
        repeated = padded
    elif keys % tp == 0:
        repeated = keys
    else:
        repeated = tp if tp % keys == 0 else padded
    full_width = config.family.name == "minimax_m2"
    if module == "q_proj" or (module == "q_norm" and full_width):
        return by_heads(array, 0, queries, padded)
    if module in ("k_proj", "v_proj") or (module == "k_norm" and full_width):
        return by_heads(array, 0, keys, repeated)
    if module == "o_proj":
        return by_heads(array, 1, queries, padded)
    if "mlp_op" in name:
        return cut(cut(array, 0, moe_ep), 2 if module == "gate_up_proj" else 1, moe_tp)
    if module in channels:
        return cut(array, channels[module], tp)
    if name == "embed_tokens.weight":
        return cut(array, 1, tp)
    if name == "lm_head.weight":
        rows = (len(array) + tp - 1) // tp * tp
        return cut(np.resize(array, (rows, array.shape[1])), 0, tp)
    assert "norm" in name or "router" in name, (name, kind)
    return array


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("degrees", [(1, 1, 1), (2, 2, 1), (2, 1, 2), (4, 2, 2)])
def test_a_ranks_bytes_are_those_of_its_slices(name: str, degrees: tuple[int, int, int]) -> None:
    config = tiny(name)
    tp, moe_tp, moe_ep = degrees
    has_experts = config.family.architecture.has_experts
    case = planned(
        config,
        tp_degree=tp,
        moe_tp_degree=moe_tp if has_experts else tp,
        moe_ep_degree=moe_ep if has_experts else 1,
    )
    held = sum(rank_share(*each, config, degrees).nbytes for each in arrays(config))
    memory = rank_memory(config, case.deployment)
    assert memory.weights == held
    assert (memory.experts > 0) == has_experts
    dense = not has_experts or config.dense_layers or config.family.architecture.shared_expert
    assert (memory.mlp > 0) == bool(dense)


@pytest.mark.parametrize("name", MODELS)
def test_one_rank_holds_the_checkpoint_to_the_byte(name: str, tmp_path: Path) -> None:
    """And what is not in the files: a copy of a tied embedding, and what is widened to float32,
    scales and routers in BF16.
    """
    family, changes = MODELS[name]
    checkpoint = Checkpoint(write_tiny(tmp_path / "source", family=family, **changes))
    config = checkpoint.config
    widened = [
        entry.nbytes
        for entry in checkpoint.entries.values()
        if entry.dtype == "BF16" and entry.name.endswith(("_scale_inv", ".gate.weight"))
    ]
    embedding = checkpoint.entry("model.embed_tokens.weight").nbytes
    copied = embedding if config.tie_word_embeddings else 0
    memory = rank_memory(config, planned(config, tp_degree=1).deployment)
    assert memory.weights == checkpoint.nbytes + sum(widened) + copied
    assert (
        plan_deployment(checkpoint.directory, instance="trn2.48xlarge", tp_degree=1).converted_bytes
        == checkpoint.nbytes
    )


def refusals(case: Case) -> set[str]:
    return {finding.rule for finding in lint(case) if finding.severity == REFUSE}


def large(name: str, **settings: Any) -> Case:
    return planned(ModelConfig.from_dict(published(name)), **settings)


def accepted_degrees(name: str, rule: str) -> list[int]:
    """The powers of two up to 64 at which a rule has nothing against a dense model."""
    degrees = [1, 2, 4, 8, 16, 32, 64]
    return [tp for tp in degrees if rule not in refusals(large(name, tp_degree=tp))]


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("Qwen3-0.6B-FP8", [1, 2, 4, 8]),  # 3072 channels are 24 blocks
        ("Qwen3-4B-FP8", [1, 2, 4]),  # 9728 are 76
        ("Qwen3-8B-FP8", [1, 2, 4, 8, 16, 32]),  # 12288 are 96
        ("Qwen3-14B-FP8", [1, 2, 4, 8]),  # 17408 are 136
        ("Qwen3-32B-FP8", [1, 2, 4, 8]),  # 25600 are 200
        ("Qwen3-32B", [1, 2, 4, 8, 16, 32, 64]),
        ("Qwen2.5-7B", [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_ranks_of_a_dense_fp8_model_share_whole_blocks(name: str, degrees: list[int]) -> None:
    assert accepted_degrees(name, "R2") == degrees
    assert {"R3", "R4", "R5", "R8", "R13", "R14"} & {
        finding.rule for finding in lint(large(name, tp_degree=64))
    } == set()  # nothing is said of experts


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("Qwen3-30B-A3B-FP8", [1, 2, 3, 6]),
        ("Qwen3-235B-A22B-FP8", [1, 2, 3, 4, 6, 12]),
        ("Qwen3-Coder-480B-A35B-FP8", [1, 2, 4, 5, 10, 20]),
    ],
)
def test_moe_tp_degrees_of_qwen3_leave_whole_blocks(name: str, degrees: list[int]) -> None:
    """Divisors of 6, 12 and 20 blocks. The `intermediate_size` of its config.json belongs to dense
    layers, of which it has none, and refuses nothing.
    """
    config = ModelConfig.from_dict(published(name))
    accepted = [
        degree
        for degree in range(1, 65)
        if not {"R1", "R2"}
        & refusals(
            planned(
                config,
                tp_degree=degree,
                moe_tp_degree=degree,
                moe_ep_degree=1,
                expert_scales="block",
            )
        )
        - ({"R1"} if config.hidden_size % degree else set())
    ]
    assert accepted == degrees
    spread = planned(config, tp_degree=64, moe_ep_degree=32, moe_tp_degree=2, batch_size=32)
    assert not {"R1", "R2"} & refusals(spread)


def test_expert_parallelism_needs_as_many_sequences_as_experts_over_choices() -> None:
    degrees = {"tp_degree": 8, "moe_tp_degree": 2}
    for name, needed in (("Qwen3-30B-A3B-FP8", 16), ("Qwen3-Coder-480B-A35B-FP8", 20)):
        assert "R3" in refusals(large(name, batch_size=needed - 1, seq_len=512, **degrees))
        assert "R3" not in refusals(large(name, batch_size=needed, seq_len=512, **degrees))


def test_dense_layers_among_sparse_ones_share_their_channels_over_all_ranks() -> None:
    config = ModelConfig.from_dict(published("Qwen3-30B-A3B-FP8") | {"mlp_only_layers": [0]})
    four, eight, sixty_four = (
        planned(config, tp_degree=tp, moe_tp_degree=2, batch_size=16) for tp in (4, 8, 64)
    )
    assert "R2" not in refusals(four) | refusals(eight)  # 6144 channels are 48 blocks
    assert "R2" in refusals(sixty_four)
    finding = next(finding for finding in lint(sixty_four) if finding.rule == "R2")
    assert "tp_degree 64 leaves 96 dense MLP channels" in finding.message
    assert plan_case(eight).unrolled["shard_on_block"] == 47


def test_forty_heads_are_padded_and_four_key_value_heads_repeated() -> None:
    for tp, padded in ((8, 40), (16, 48), (32, 64)):
        case = large("Qwen3-14B", tp_degree=tp)
        memory = rank_memory(case.config, case.deployment)
        queries = padded // tp
        keys = max(1, 8 // tp)
        per_layer = 2 * (queries + keys) * 128 * 5120 * 2
        assert memory.attention == 40 * per_layer
        warned = [finding.message for finding in lint(case) if finding.rule == "R7"]
        assert bool(warned) == (padded > 40)
        assert all(f"40 query heads become {padded}" in message for message in warned)
    eight = large("Qwen3-30B-A3B-FP8", tp_degree=8, moe_tp_degree=2, batch_size=16)
    four = large("Qwen3-30B-A3B-FP8", tp_degree=4, moe_tp_degree=2, batch_size=16)
    caches = [rank_memory(case.config, case.deployment).key_value_cache for case in (four, eight)]
    assert caches[0] == caches[1] == 16 * 64 * 2 * 48 * 128 * 2


def test_key_value_heads_that_do_not_divide_are_said_to_be_repeated() -> None:
    said = [finding for finding in lint(large("Qwen2.5-7B", tp_degree=14)) if finding.rule == "R16"]
    assert "num_key_value_heads 4 and tp_degree 14 do not divide" in said[0].message
    assert not [
        finding for finding in lint(large("Qwen2.5-7B", tp_degree=8)) if finding.rule == "R16"
    ]


def test_a_family_without_experts_takes_no_degrees_of_experts() -> None:
    for name, degree in (("moe_tp_degree", 2), ("moe_ep_degree", 2), ("moe_ep_degree", 8)):
        with pytest.raises(ConfigError, match=f"^{name} is {degree}, but Qwen3 has no experts"):
            large("Qwen3-8B-FP8", tp_degree=8, **{name: degree})
    assert "expert" not in plan_case(large("Qwen3-8B-FP8", tp_degree=8)).render()
    assert "R14" in refusals(large("Qwen3-8B-FP8", tp_degree=8, expert_kernel="nki"))


def test_a_family_without_a_class_for_neuron_is_told_so() -> None:
    plan = plan_case(large("MiniMind-3", tp_degree=1))
    assert plan.refused
    assert not plan.proposals
    assert "R17 refuse: MiniMind has no class for Neuron" in plan.render()
    assert "R17" not in refusals(large("Qwen2.5-7B", tp_degree=1))


def test_what_a_conversion_keeps_in_bf16_is_counted_and_not_held_to_blocks(tmp_path: Path) -> None:
    """300 channels over two ranks are no whole blocks: kept in BF16 they can be shared."""
    source = write_tiny(
        tmp_path / "source", family="qwen3", hidden_size=256, head_dim=128, intermediate_size=300
    )
    settings: dict[str, Any] = {"instance": "trn2.48xlarge", "tp_degree": 2, "seq_len": 64}
    assert "--keep-in-bf16" in plan_deployment(source, **settings).render()
    checkpoint = Checkpoint(source)
    plans = {}
    for name, layout in (
        ("fp8", Layout()),
        ("mlp", Layout(keep_in_bf16=("mlp",))),
        ("attention", Layout(attention=AttentionPrecision.BF16)),
        ("layer", Layout(keep_in_bf16=("layers.1.mlp",))),
    ):
        plan_conversion(checkpoint, layout).write(tmp_path / name)
        plans[name] = plan_deployment(tmp_path / name, **settings)
    assert {name: plan.refused for name, plan in plans.items()} == {
        "fp8": True,
        "mlp": False,
        "attention": True,
        "layer": True,
    }
    matrices = 3 * 150 * 256
    scales = 2 * (2 * 2 + 2 * 2) // 2  # blocks
    assert plans["mlp"].memory.mlp == 2 * matrices * 2
    one_layer = plans["fp8"].memory.mlp // 2
    assert plans["layer"].memory.mlp == matrices * 2 + one_layer
    assert one_layer > matrices + scales
    assert plans["attention"].memory.attention > 1.9 * plans["fp8"].memory.attention


@pytest.mark.parametrize("batch", [1, 16])
def test_every_degree_that_works_is_found(batch: int) -> None:
    """Whole blocks on every rank where there can be; then the fewest ranks to spread experts."""
    case = large("Qwen3-30B-A3B-FP8", tp_degree=1, batch_size=batch, seq_len=4096)
    for name in ("inf2.24xlarge", "trn1.32xlarge", "trn2.3xlarge"):
        machine = instances.instance(name)
        working: dict[int, Case] = {}
        for tp in range(1, machine.logical_cores + 1):
            shares = [ep for ep in range(1, tp + 1) if tp % ep == 0]
            # 768 channels are six blocks; of ways to share them as good the first is kept.
            for moe_ep in sorted(shares, key=lambda ep: 768 // (tp // ep) % 128 != 0):
                if tp not in machine.tp_degrees:
                    continue
                degrees = {"tp_degree": tp, "moe_tp_degree": tp // moe_ep, "moe_ep_degree": moe_ep}
                tried = replace(
                    case, instance=machine, deployment=replace(case.deployment, **degrees)
                )
                needed = rank_memory(tried.config, tried.deployment).total
                if needed <= machine.memory_per_core and not refusals(tried):
                    working.setdefault(tp, tried)
        assert list(families_page.accepted_deployments(case, name)) == list(working.values())


@pytest.mark.slow
def test_the_page_of_families_says_what_the_planner_says() -> None:
    text = families_page.PAGE.read_text(encoding="utf-8")
    assert families_page.renewed(text) == text, "run `python -m tests.families_page`"


@pytest.mark.parametrize(
    ("name", "changes", "settings", "said"),
    [
        (
            "Qwen3-4B-FP8",
            {},
            {"tp_degree": 8},
            "R2 refuse: tp_degree 8 leaves 1216 dense MLP channels per rank, not whole blocks of "
            "128; needs a tp_degree of 1 or 2 or 4, or a conversion with its projections in "
            "--keep-in-bf16",
        ),
        (
            "Qwen3-30B-A3B-FP8",
            {},
            {"tp_degree": 16, "moe_tp_degree": 4, "expert_scales": "block"},
            "R2 refuse: moe_tp_degree 4 leaves 192 expert channels per rank, not whole blocks of "
            "128 (MiniMax-M2 at moe_tp 64 was seen to repeat itself after 30 tokens); "
            "needs expert_scales auto, which repeats the scales of a block for its channels, or a "
            "moe_tp_degree of 1 or 2 or 3 or 6",
        ),
        (
            "Qwen3-4B-FP8",
            {"head_dim": 64},
            {"tp_degree": 4},
            "R2 refuse: head_dim 64 is not whole blocks of 128: ranks take whole heads, which NxDI "
            "pads and repeats, and a scale that covers parts of two goes with neither; needs a "
            "conversion with --attention bf16",
        ),
        (
            "Qwen3-4B-FP8",
            {"hidden_size": 2624},
            {"tp_degree": 4},
            "R2 refuse: hidden_size 2624 is not whole blocks of 128",
        ),
        (
            "Qwen2.5-7B",
            {},
            {"tp_degree": 24},
            "R1 refuse: 18944 dense MLP channels cannot be shared by the 24 ranks of tp_degree; "
            "needs a tp_degree that divides 18944",
        ),
        (
            "Qwen3-4B-FP8",
            {},
            {"tp_degree": 4, "expert_kernel": "nki"},
            "R14 refuse: expert_kernel nki is for experts, and Qwen3 has none",
        ),
        (
            "Qwen2.5-7B",
            {},
            {"tp_degree": 7},
            "R16 warn: num_key_value_heads 4 and tp_degree 7 do not divide: NxDI repeats them to "
            "28, one for each query head, and the cache takes 7 times the memory; tp degrees that "
            "divide 4 or are a multiple of it avoid it",
        ),
    ],
)
def test_what_cannot_work_is_said_with_what_would(
    name: str, changes: dict[str, Any], settings: dict[str, Any], said: str
) -> None:
    config = ModelConfig.from_dict(published(name) | changes)
    found = [str(finding) for finding in lint(planned(config, batch_size=32, **settings))]
    assert any(finding.startswith(said) for finding in found), found


def test_a_rank_of_a_dense_model_is_counted_out_by_hand() -> None:
    """Qwen3-4B in FP8 on four ranks."""
    plan = plan_case(large("Qwen3-4B-FP8", instance="trn2.3xlarge", tp_degree=4))
    query = 32 * 128 // 4
    key = 8 * 128 // 4
    projections = (2 * query + 2 * key) * 2560
    mlp = 3 * 2560 * 9728 // 4
    assert plan.memory.attention == 36 * (projections + projections // 128**2 * 4)
    assert plan.memory.mlp == 36 * (mlp + mlp // 128**2 * 4)
    assert plan.memory.embedding_and_head == 2 * 151936 * 2560 // 4 * 2
    assert plan.memory.replicated == (36 * (2 * 2560 + 2 * 128) + 2560) * 2
    assert plan.memory.key_value_cache == 64 * 36 * 2 * 2 * 128 * 2
    assert plan.memory.experts == 0
    assert plan.unrolled == {}
    assert "embedding and head (a copy of it)" in plan.render()
