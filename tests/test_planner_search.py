"""What a plan recommends: it fits by the planner's own judgement, for every family, instance and
number of experts; it is found wherever there is something to find; one verdict is all that is said.
"""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_minimax.backends.nxdi import backend
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.cache import DTYPES
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range, Layout
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import BackendError, ConfigError
from neuron_minimax.planner import instances, lint, search
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.memory import EXPERT_SCALES, rank_memory
from neuron_minimax.planner.report import DeploymentPlan, plan, plan_case
from neuron_minimax.planner.settings import (
    GOALS,
    Asked,
    DeploymentSettings,
    deployment_case,
)
from neuron_minimax.planner.text import COLUMNS, options, worse
from neuron_minimax.planner.traffic import collectives, traffic
from tests.full_size import published_config
from tests.neuron.tracing import CASES, TRACES
from tests.published import published
from tests.tiny import write_tiny

ROOT = Path(__file__).parents[1]
M2 = published_config()
MODELS: dict[str, dict[str, Any]] = {
    "MiniMax-M2": M2,
    **{f"MiniMax-M2, {n} experts": M2 | {"num_local_experts": n} for n in (128, 154, 180, 192)},
    **{
        name: published(name)
        for name in (
            "Qwen3-0.6B",
            "Qwen3-4B-FP8",
            "Qwen2.5-72B",
            "Qwen3-30B-A3B-FP8",
            "Qwen3-235B-A22B",
            "Qwen3-Coder-480B-A35B-FP8",
        )
    },
}
# What was counted of a model, as a search hands it on.
KNOWN: dict[str, tuple[ModelConfig, dict]] = {}
every_model = pytest.mark.parametrize("raw", MODELS.values(), ids=MODELS)


def planned(raw: dict[str, Any], **chosen: Any) -> DeploymentPlan:
    asked = DeploymentSettings(**chosen)
    config, counted = KNOWN.setdefault(
        json.dumps(raw, sort_keys=True), (ModelConfig.from_dict(raw), {})
    )
    case = replace(deployment_case(config, asked), counted=counted)
    return plan(Asked(case=case, given=asked.given, goal=asked.goal))


def settings_of(line: str) -> dict[str, Any]:
    """The settings that options of the command line name."""
    words = shlex.split(line)
    named = {
        option[2:].replace("-", "_"): value
        for option, value in zip(words[::2], words[1::2], strict=True)
    }
    lengths = named.pop("buckets", "")
    texts = ("instance", "blockwise_matmul", "expert_kernel", "expert_scales")
    chosen: dict[str, Any] = {
        name: value if name in texts else int(value) for name, value in named.items()
    }
    return chosen | ({"context_lengths": list(map(int, lengths.split(",")))} if lengths else {})


def check_advice(found: DeploymentPlan) -> None:
    """Everything proposed fits when it is asked for, as the options that say so."""
    for proposal in found.proposals:
        case = proposal.case
        again = planned(dict(case.config.raw), **settings_of(options(case)))
        assert again.verdict == "fits", (options(case), again.render())
        assert again.case.deployment == case.deployment
        assert again.case.instance == case.instance
        assert again.memory.total == rank_memory(case.config, case.deployment).total
    assert found.fits == (not lint.refusals(found.case))
    if found.fits:
        edges = {"batch_size": found.largest_batch, "seq_len": found.longest_sequence}
        for name, edge in edges.items():
            sizes: dict[str, Any] = {name: edge}
            deployment = replace(found.deployment, **sizes)
            assert not lint.refusals(replace(found.case, deployment=deployment))


@every_model
def test_whatever_a_plan_recommends_fits(raw: dict[str, Any]) -> None:
    for name in ("inf2.xlarge", "inf2.48xlarge", "trn1.32xlarge", "trn2.3xlarge", "trn2.48xlarge"):
        cores = instances.instance(name).logical_cores
        for chosen in (
            {},
            {"goal": "throughput", "seq_len": 4096},
            {"tp_degree": cores, "batch_size": 24},
            {"tp_degree": min(4, cores), "seq_len": 32768, "batch_size": 300},
            {"batch_size": 300, "seq_len": 200_000, "expert_kernel": "nki"},
        ):
            check_advice(planned(raw, instance=name, **chosen))
    for goal in GOALS:
        check_advice(planned(raw, goal=goal))
        check_advice(planned(raw, goal=goal, seq_len=30000, batch_size=48))


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.fixed_dictionaries(
        {
            "num_local_experts": st.sampled_from((8, 128, 154, 160, 180, 192, 256)),
            "num_experts_per_tok": st.sampled_from((1, 2, 8)),
            "num_attention_heads": st.sampled_from((14, 16, 32, 40, 48, 64)),
            "num_key_value_heads": st.just(2),
            "hidden_size": st.sampled_from((2048, 2624, 3072, 5120)),
            "intermediate_size": st.sampled_from((384, 768, 1000, 1536)),
            "head_dim": st.sampled_from((64, 128)),
            "num_hidden_layers": st.sampled_from((2, 62)),
        }
    ),
    chosen=st.fixed_dictionaries(
        {},
        optional={
            "instance": st.sampled_from(instances.names()),
            "tp_degree": st.sampled_from((1, 2, 3, 8, 24, 64)),
            "moe_tp_degree": st.sampled_from((1, 2, 4)),
            "batch_size": st.sampled_from((1, 20, 500)),
            "seq_len": st.sampled_from((2, 100, 1024, 100_000, 200_000)),
            "expert_kernel": st.sampled_from(("torch", "nki")),
            "expert_scales": st.sampled_from(EXPERT_SCALES),
            "blockwise_matmul": st.sampled_from(("torch", "shard_on_intermediate")),
            "goal": st.sampled_from(GOALS),
        },
    ),
)
def test_advice_never_runs_in_a_circle(sizes: dict[str, int], chosen: dict[str, Any]) -> None:
    raw = M2 | {"rotary_dim": 32} | sizes
    found = planned(raw, **chosen)
    check_advice(found)
    assert all(len(line) <= COLUMNS for line in found.render().splitlines())


def every_deployment(case: Case, machine: instances.Instance) -> Iterator[Case]:
    """A case at all degrees that there are on an instance."""
    has_experts = case.config.family.architecture.has_experts
    for tp in range(1, machine.logical_cores + 1):
        for moe_ep in range(1, tp + 1 if has_experts else 2):
            if tp % moe_ep == 0:
                degrees = {"tp_degree": tp, "moe_tp_degree": tp // moe_ep, "moe_ep_degree": moe_ep}
                deployment = replace(case.deployment, **degrees)
                yield replace(case, deployment=deployment, instance=machine)


@every_model
@pytest.mark.parametrize("name", ["inf2.xlarge", "inf2.24xlarge", "trn2.3xlarge"])
@pytest.mark.parametrize("batch", [1, 32])
def test_a_search_finds_something_where_any_degrees_fit(
    raw: dict[str, Any], name: str, batch: int
) -> None:
    found = planned(raw, instance=name, batch_size=batch, seq_len=2048)
    tried = every_deployment(found.asked.case, instances.instance(name))
    assert found.fits == any(not lint.refusals(case) for case in tried)


@every_model
def test_where_nothing_fits_as_asked_the_nearest_is_named(raw: dict[str, Any]) -> None:
    """Something smaller or larger does for every model that is published for Neuron."""
    for chosen in ({"seq_len": 40000, "batch_size": 4000}, {"instance": "inf2.xlarge"}):
        found = planned(raw, **chosen)
        if found.refused:
            assert found.proposals
            assert all(proposal.changes for proposal in found.proposals)


def test_batch_and_length_are_kept_before_other_degrees_are() -> None:
    found = planned(M2, instance="trn1.32xlarge", tp_degree=32, moe_tp_degree=4, batch_size=32)
    assert [reason.rule for reason in found.reasons] == ["R5"]
    first = found.proposals[0].case
    assert (first.instance.name, first.deployment.batch_size, first.deployment.seq_len) == (
        "trn1.32xlarge",
        32,
        1024,
    )
    assert first.deployment.moe_tp_degree != 4


@pytest.mark.parametrize(
    ("chosen", "degrees", "padding"),
    [
        ({}, (64, 32, 2), 0),
        ({"expert_scales": "block"}, (64, 2, 32), 6),
        ({"expert_scales": "block", "moe_ep_degree": 2}, (8, 4, 2), 0),
        ({"tp_degree": 64}, (64, 1, 64), 38),  # as a compile takes it
    ],
    ids=["expanded", "block", "block, undivided", "as asked"],
)
def test_pruned_experts_are_padded_where_no_degrees_that_divide_them_are_nearly_as_good(
    chosen: dict[str, Any], degrees: tuple[int, int, int], padding: int
) -> None:
    """154 is 2 x 7 x 11: of documented degrees two groups of experts at most; of whole blocks the
    channels leave four ranks to each.
    """
    raw = M2 | {"num_local_experts": 154}
    found = planned(raw, instance="trn2.48xlarge", batch_size=32, **chosen)
    assert found.fits
    deployment = found.deployment
    taken = (deployment.tp_degree, deployment.moe_tp_degree, deployment.moe_ep_degree)
    assert (taken, found.to_json()["padding_experts"]) == (degrees, padding)
    said = [warning.message for warning in found.warnings if warning.rule == "R21"]
    assert [f"{padding} of its ranks" in message for message in said] == [True] * bool(padding)
    noted = f"{padding} of moe_ep {degrees[2]} with an expert of zeros" in found.render()
    assert noted == (bool(padding) and bool(found.proposals))


def test_experts_of_zeros_take_the_memory_of_a_model_that_has_them() -> None:
    padded, whole = (
        planned(
            M2 | {"num_local_experts": experts},
            instance="trn2.48xlarge",
            tp_degree=64,
            batch_size=32,
        )
        for experts in (154, 192)
    )
    assert padded.memory.experts == whole.memory.experts
    assert padded.traffic.bytes_per_step < whole.traffic.bytes_per_step
    assert padded.unrolled == whole.unrolled


def test_a_single_sequence_has_every_expert_on_all_ranks() -> None:
    """Of whole blocks the ranks are groups, and those take 160 experts over 8 choices."""
    raw = M2 | {"num_local_experts": 154}
    for scales, degrees, batch in (("auto", (64, 1), 1), ("block", (2, 32), 20)):
        found = planned(raw, instance="trn2.48xlarge", expert_scales=scales)
        assert found.fits
        assert (found.deployment.moe_tp_degree, found.deployment.moe_ep_degree) == degrees
        assert found.deployment.batch_size == batch


@pytest.mark.parametrize(
    ("moe_ep_degree", "intermediate_size"), [(1, 40), (64, 1536)], ids=["channels", "experts"]
)
def test_more_ranks_than_channels_or_experts_are_refused_whole(
    moe_ep_degree: int, intermediate_size: int
) -> None:
    sizes = {"num_local_experts": 8, "intermediate_size": intermediate_size}
    chosen = {"instance": "trn2.48xlarge", "tp_degree": 64, "expert_scales": "expanded"}
    found = planned(M2 | sizes, **chosen, moe_ep_degree=moe_ep_degree)
    assert "R1" in {reason.rule for reason in found.reasons}
    check_advice(found)


def test_where_a_rank_gets_no_channel_no_scale_is_repeated() -> None:
    chosen = {"instance": "trn2.48xlarge", "tp_degree": 64, "expert_scales": "expanded"}
    found = planned(M2 | {"intermediate_size": 40}, **chosen, moe_tp_degree=64)
    assert found.memory.experts == 0
    assert "R19" not in {warning.rule for warning in found.warnings}
    check_advice(found)


def test_a_search_without_documented_degrees_names_what_fits_at_documented_ones_too() -> None:
    raw = published("Qwen3-30B-A3B-FP8")
    found = planned(raw, instance="trn2.3xlarge", batch_size=1, expert_scales="block")
    assert found.fits
    assert found.deployment.tp_degree == 2
    assert "R6" in {warning.rule for warning in found.warnings}
    other = found.proposals[-1]
    assert other.case.deployment.tp_degree == 4
    assert other.changes == ("batch_size 16 in place of 1",)
    expanded = planned(raw, instance="trn2.3xlarge", batch_size=1)
    assert [each.case.deployment.tp_degree for each in expanded.proposals] == [4]


def time_to_read(proposal: search.Proposal, goal: str) -> float:
    """Seconds for a step, or of all cores for a token, by the documented bandwidth."""
    machine = proposal.case.instance
    row = instances.data()["instances"][machine.name]
    amount, unit = instances.chip(machine.family)["memory_bandwidth"].split()
    rate = float(amount) * {"GiB/s": 2**30, "TB/s": 1e12}[unit]
    per_core = rate * row["chips"] / row["logical_cores"]
    deployment = proposal.case.deployment
    seconds = proposal.traffic.bytes_per_step / per_core
    tokens = deployment.batch_size / deployment.tp_degree
    return seconds if goal == "latency" else seconds / tokens


@pytest.mark.parametrize("goal", GOALS)
@every_model
def test_the_goal_orders_what_fits(raw: dict[str, Any], goal: str) -> None:
    """Against times computed here, of what each proposal reads."""
    found = planned(raw, goal=goal)
    times = [time_to_read(proposal, goal) for proposal in found.proposals]
    assert times == sorted(times)
    assert len({proposal.case.instance for proposal in found.proposals}) == len(times)


@pytest.mark.parametrize("goal", GOALS)
@every_model
def test_a_proposal_reads_as_fast_as_its_note_says(raw: dict[str, Any], goal: str) -> None:
    """One that changes what was asked for may read faster than the first."""
    for sizes in ({}, {"batch_size": 64, "seq_len": 16384}, {"batch_size": 1}):
        found = planned(raw, goal=goal, **sizes)
        if found.refused:
            continue
        best, *others = found.proposals
        for other in others:
            note = worse(best, other, goal)
            ratio = f"{time_to_read(other, goal) / time_to_read(best, goal):.2f}"
            if ratio == "1.00":
                assert note.startswith("reads as fast")
            else:
                assert note.startswith(f"{ratio} times the time")


def test_a_proposal_that_reads_faster_is_said_to() -> None:
    found = planned(published("Qwen3-30B-A3B-FP8"), batch_size=64, seq_len=16384)
    note = worse(found.proposals[0], found.proposals[3], "latency")
    assert note == "0.23 times the time to read a step, at 0.36 of the cores' bandwidth"


def test_a_graph_waits_for_as_many_collectives_as_recorded() -> None:
    """Of one layer, as torch_xla traced it."""
    config = ModelConfig.from_dict(M2 | {"num_hidden_layers": 1})
    recorded = json.loads(TRACES.read_text(encoding="utf-8"))
    for name, case in CASES.items():
        for graph, found in recorded[name]["graphs"].items():
            if graph.startswith("token_generation") and name != "trn2 sampling":
                assert collectives(config, case.degrees[0]) == len(found["collectives"])
    assert collectives(config, 1) == 0
    assert collectives(ModelConfig.from_dict(published("Qwen3-4B")), 4) == 36 * 2 + 2


def test_a_step_reads_every_weight_of_the_recorded_graph_but_the_embedding() -> None:
    recorded = json.loads(TRACES.read_text(encoding="utf-8"))["trn2"]["graphs"]
    sizes = {"bfloat16": 2, "float32": 4, "float8_e4m3fn": 1}
    weights = 0
    cache = 0
    for name, (dtype, shape) in recorded["token_generation_model 1024"]["parameters"].items():
        nbytes = sizes.get(dtype, 0)  # ranks' own numbers are int32
        for size in shape:
            nbytes *= size
        cache += nbytes if name.startswith("kv_mgr") else 0
        weights += nbytes if not name.startswith(("kv_mgr", "embed")) else 0
    found = planned(
        M2 | {"num_hidden_layers": 1}, instance="trn2.48xlarge", tp_degree=64, batch_size=32
    )
    assert (found.traffic.weights, found.traffic.key_value_cache) == (weights, cache)
    assert found.traffic.bytes_per_token == (weights + cache) // 32


def test_of_few_tokens_only_the_chosen_experts_are_read() -> None:
    raw = published("Qwen3-30B-A3B-FP8")
    degrees = {"instance": "trn2.48xlarge", "tp_degree": 2, "moe_tp_degree": 2, "seq_len": 64}
    one, two, many = (planned(raw, batch_size=batch, **degrees) for batch in (1, 2, 16))
    expert = 48 * 3 * (2048 * 384 + 16 * 3 * 4)  # half of the channels, and float32 scales
    assert two.traffic.weights - one.traffic.weights == 8 * expert
    assert many.traffic.weights - one.traffic.weights == 120 * expert


def test_a_plan_says_one_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for raw in (M2, published("Qwen3-4B-FP8"), published("MiniMind-3")):
        (tmp_path / "config.json").write_text(json.dumps(raw))
        for chosen in (
            [],
            ["--instance", "inf2.xlarge"],
            ["--instance", "trn2.48xlarge", "--tp-degree", "8"],
            ["--goal", "throughput", "--batch-size", "4"],
        ):
            command = ["plan", str(tmp_path), *chosen]
            code = main(command)
            said = capsys.readouterr().out
            assert main([*command, "--json"]) == code
            document = json.loads(capsys.readouterr().out)
            verdict = document["verdict"]
            assert verdict in ("fits", "refused")
            assert code == (verdict == "refused")
            assert bool(document["reasons"]) == (verdict == "refused")
            assert "refused" not in document
            assert "fits" not in document
            assert said.startswith(f"{verdict}: ")
            refusing = re.findall(r"^  R\d+ refuse: ", said, flags=re.MULTILINE)
            assert len(refusing) == len(document["reasons"])
            assert all(len(line) <= COLUMNS for line in said.splitlines())
            assert " 0.00 " not in said


def test_the_documented_plans_are_what_the_planner_says() -> None:
    page = (ROOT / "docs" / "neuron_instance.md").read_text(encoding="utf-8")
    shown = re.search(r"```\n(fits: MiniMax-M2.*?)```", page, flags=re.DOTALL)
    assert shown
    found = planned(M2)
    assert found.render().startswith(shown[1])
    below = planned(M2, batch_size=32).deployment
    degrees = f"moe_tp {below.moe_tp_degree} x moe_ep {below.moe_ep_degree}"
    assert (
        f"`--batch-size 32` it finds the degrees that the steps below take on trn2: {degrees}"
        in (" ".join(page.split()))
    )
    assert f"| tp {below.tp_degree} = {degrees} |" in page
    (row,) = re.findall(r"^\| `proposals` \|(.*)$", page, flags=re.MULTILINE)
    fields = set(re.findall(r"^\| (`.*?) \|", page, flags=re.MULTILINE))
    documented = set(re.findall(r"`(\w+)`", " ".join(fields)))
    assert found.to_json().keys() <= documented
    own = {"changes", "alike", "instance", "deployment", "buckets", "warnings"}
    assert own <= set(re.findall(r"`(\w+)`", row))
    assert found.proposals[0].to_json().keys() <= documented | own


def test_sums_of_a_small_model_have_units_of_their_size() -> None:
    found = planned(published("MiniMind-3"), instance="inf2.xlarge", tp_degree=1)
    said = found.render()
    assert re.search(r"KV cache, 1 x 1024 tokens +\d+\.\d\d MiB", said)
    assert re.search(r"on every rank \(norms\) +\d+\.\d\d KiB", said)


@every_model
def test_what_a_compile_refuses_is_what_a_plan_refuses(raw: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(raw)
    has_experts = config.family.architecture.has_experts
    for chosen in (
        {"instance": "trn2.48xlarge", "tp_degree": 64},
        {"instance": "trn2.48xlarge", "tp_degree": 8, "batch_size": 32},
        {"instance": "inf2.24xlarge", "tp_degree": 8, "seq_len": 100},
        {"instance": "trn1.32xlarge", "tp_degree": 32, "batch_size": 32, "context_lengths": [64]},
        {
            "instance": "trn2.3xlarge",
            "tp_degree": 4,
            **({"moe_ep_degree": 2} if has_experts else {}),
        },
    ):
        names = {"batch_size": "slots", "context_lengths": "buckets"}
        given_options = {names.get(name, name): value for name, value in chosen.items()}
        found = planned(raw, **chosen)
        if found.refused:
            with pytest.raises(BackendError, match=r"^refused: ") as refusal:
                backend.check_options(config, given_options)
            judged = found.render().partition("what fits")[0]
            assert str(refusal.value).startswith(judged)
            continue
        checked = backend.check_options(config, given_options)
        for name in ("tp_degree", "moe_tp_degree", "moe_ep_degree", "seq_len"):
            assert checked[name] == getattr(found.deployment, name)
        assert (min(checked["buckets"]), max(checked["buckets"])) == (
            found.deployment.smallest_context,
            found.deployment.context_length,
        )


@pytest.mark.parametrize(
    ("changes", "layout", "said"),
    [
        ({"head_dim": 64}, Layout(attention=AttentionPrecision.BF16), "--attention bf16"),
        ({"intermediate_size": 300}, Layout(keep_in_bf16=("mlp",)), "--keep-in-bf16 mlp"),
        (
            {"head_dim": 64, "intermediate_size": 300},
            Layout(attention=AttentionPrecision.BF16, keep_in_bf16=("mlp",)),
            "--attention bf16 --keep-in-bf16 mlp",
        ),
    ],
)
def test_a_conversion_that_is_recommended_makes_what_fits(
    changes: dict[str, int], layout: Layout, said: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 256, "head_dim": 128, "intermediate_size": 512} | changes
    checkpoint = Checkpoint(write_tiny(tmp_path / "source", family="qwen3", **sizes))
    raw = dict(checkpoint.config.raw)
    native = plan_conversion(checkpoint, Layout(fp8_range=FP8Range.OCP)).converted_config()
    for source, ranged in ((raw, ""), (native, "--fp8-range neuron ")):
        found = planned(source, instance="trn2.48xlarge", tp_degree=1, seq_len=64)
        assert found.refused
        assert found.proposals[0].changes[-1] == f"convert with {ranged}{said}"
        converted = plan_conversion(checkpoint, layout).converted_config()
        printed = re.search(
            r"^  (convert .*?);\s+then\s+the\s+first\s+as\s+options:\s(.*?)^memory of",
            found.render(),
            flags=re.DOTALL | re.MULTILINE,
        )
        assert printed
        assert " ".join(printed[1].split()) == f"convert with {ranged}{said}"
        again = planned(converted, **settings_of(printed[2]))
        assert again.verdict == "fits"
        assert again.memory == found.proposals[0].case.memory


def test_a_cache_is_recommended_with_a_dtype_that_caches_have() -> None:
    found = planned(M2 | {"hidden_size": 2624})
    assert found.proposals[0].conversion.startswith("convert a cache in BF16")
    (command,) = re.findall(r"\((neuron-minimax cache .*)\)", found.proposals[0].conversion)
    assert shlex.split(command)[-1] in DTYPES
    assert f"{found.proposals[0].conversion}; then the first" in " ".join(found.render().split())


def test_the_options_of_a_proposal_as_asked_name_no_conversion() -> None:
    found = planned(M2, instance="trn2.48xlarge", tp_degree=64, batch_size=1)
    assert found.refused
    assert "\n  the first as options: " in found.render()


def test_channels_that_no_degree_shares_in_whole_blocks_are_told_so() -> None:
    machine = {"instance": "trn2.48xlarge", "tp_degree": 1}
    for raw, chosen, said in (
        (
            published("Qwen3-4B-FP8"),
            {},
            "no tp_degree does, as 1000 is not whole blocks: needs the checkpoint in BF16, or a "
            "conversion with its projections in --keep-in-bf16",
        ),
        (
            M2,
            {"expert_scales": "block"},
            "needs expert_scales auto, which repeats the scales of a block for its channels",
        ),
    ):
        found = planned(raw | {"intermediate_size": 1000}, **machine, **chosen)
        assert [each.fix for each in found.reasons if each.rule == "R2"] == [said]
    found = planned(M2 | {"intermediate_size": 1000}, **machine)
    assert {each.rule for each in found.reasons} == {"R18"}  # one rank holds no such model


@pytest.mark.parametrize("section", ["written by hand", ["fp8"], 1])
def test_a_record_of_a_conversion_that_is_none_is_named(section: Any) -> None:
    with pytest.raises(ConfigError, match=r"^config\.json: neuron_minimax is .*; expected the obj"):
        planned(M2 | {"neuron_minimax": section})


@pytest.mark.parametrize(
    "chosen",
    [
        {"tp_degree": 100_000},
        {"tp_degree": 8, "moe_ep_degree": 0},
        {"moe_tp_degree": 0},
        {"batch_size": 0},
        {"seq_len": 1},
        {"context_lengths": [256, 128]},
        {"context_lengths": [128, 4096]},
        {"blockwise_matmul": "fast"},
        {"expert_kernel": "fast"},
        {"goal": "cost"},
        {"instance": "p5.48xlarge"},
    ],
)
def test_a_setting_that_no_model_has_is_a_fault_of_the_command(chosen: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as refusal:
        planned(M2, **chosen)
    assert refusal.value.usage


@pytest.mark.parametrize(
    "chosen",
    [
        {"tp_degree": 100_000},
        {"tp_degree": 0},
        {"slots": 1 << 40},
        {"buckets": [256, 128]},
        {"seq_len": 512, "buckets": [1024]},
        {"instance": "p5.48xlarge"},
    ],
)
def test_a_compile_for_neuron_takes_it_as_a_fault_of_the_command_too(
    chosen: dict[str, Any],
) -> None:
    with pytest.raises(ConfigError) as refusal:
        backend.check_options(ModelConfig.from_dict(M2), chosen)
    assert refusal.value.usage


def test_a_model_of_one_position_is_refused_and_not_its_options() -> None:
    found = planned(M2 | {"max_position_embeddings": 1}, instance="trn2.48xlarge", tp_degree=64)
    assert "R15" in {reason.rule for reason in found.reasons}


def test_the_smallest_instance_that_fits_is_among_what_is_proposed() -> None:
    found = planned(published("Qwen3-0.6B"))
    assert found.proposals[-1].case.instance.name == "inf2.xlarge"
    assert "the smallest instance" in found.render()


def test_what_speaks_against_a_proposal_is_said_beside_it() -> None:
    said = " ".join(planned(published("Qwen3-30B-A3B-FP8")).render().split())
    assert "R11: the shards of all ranks take" in said
    assert "inf2.xlarge has 16.00 GiB" in said
    asked = {"instance": "trn2.48xlarge", "tp_degree": 64, "batch_size": 1}
    said = planned(M2, **asked, expert_scales="block").render()
    assert "R6: tp_degree 12 is not among those documented" in " ".join(said.split())


def test_settings_that_were_given_are_kept_by_a_search() -> None:
    raw = published("Qwen3-30B-A3B-FP8")
    for proposal in planned(raw, tp_degree=8, batch_size=16, seq_len=2048).proposals:
        deployment = proposal.case.deployment
        assert (deployment.tp_degree, deployment.batch_size, deployment.seq_len) == (8, 16, 2048)
        assert not proposal.changes
    for proposal in planned(raw, instance="trn1.32xlarge", moe_tp_degree=2).proposals:
        assert proposal.case.deployment.moe_tp_degree == 2


def test_an_unknown_goal_is_named() -> None:
    with pytest.raises(ConfigError, match="goal is 'cost'; expected one of latency, throughput"):
        planned(M2, goal="cost")


def test_a_search_says_what_is_searched() -> None:
    said: list[str] = []
    asked = Asked(case=plan_case(m2_case()).case, given=frozenset())
    search.as_asked(asked, said.append)
    assert "searching trn2.48xlarge" in said


def m2_case() -> Case:
    chosen = DeploymentSettings(instance="trn2.48xlarge", tp_degree=64, batch_size=32)
    return deployment_case(ModelConfig.from_dict(M2), chosen)


def test_memory_and_traffic_are_of_the_case_and_not_of_another() -> None:
    """Memory is counted once for each case, also where one was made of another."""
    case = m2_case()
    traffic(case)
    other = replace(case, deployment=replace(case.deployment, moe_tp_degree=2, moe_ep_degree=32))
    longer = replace(case, deployment=replace(case.deployment, seq_len=999, batch_size=7))
    smaller = replace(case, config=ModelConfig.from_dict(M2 | {"num_hidden_layers": 3}))
    for each in (case, other, longer, smaller):
        assert each.memory == rank_memory(each.config, each.deployment)
        assert traffic(each) == traffic(replace(each, counted={}))
