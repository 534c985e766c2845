"""What a real tracer recorded of the Neuron class at the published size, against the plan and the
conversion.

tests/data/neuron_traces.json holds one layer of each documented deployment as graphs that torch_xla
made of the class on NxDI and NxD, rank 0 (tests/neuron/tracing.py). Nothing of Neuron is needed
here.
"""

import json
import re
from typing import Any

import pytest

from neuron_minimax.checkpoint import schema
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import bind_rules
from neuron_minimax.convert.layout import Layout
from neuron_minimax.families.minimax_m2 import MINIMAX_M2
from neuron_minimax.planner.blockwise import BLOCKWISE_MATMULS, unrolled_products
from neuron_minimax.planner.instances import instance
from neuron_minimax.planner.memory import rank_memory
from neuron_minimax.planner.sdks import sdk_for
from neuron_minimax.planner.settings import DeploymentSettings, deployment_case
from tests.full_size import published_config
from tests.neuron.tracing import CASES, CONTEXT_ENCODING, TRACES, Case, code_lines, sources_digest

RECORDED = json.loads(TRACES.read_text(encoding="utf-8"))
CONFIG = ModelConfig.from_dict(published_config() | {"num_hidden_layers": 1})
GRAPHS = [
    pytest.param(CASES[name], graph, found, id=f"{name}: {graph}")
    for name, recorded in RECORDED.items()
    for graph, found in recorded["graphs"].items()
]
each_graph = pytest.mark.parametrize(("case", "graph", "found"), GRAPHS)
# Ranks are given to every module that might ask; these are read by features that are off.
UNREAD = {"rank_util.rank", "layers.0.self_attn.rank_util.rank"}
UNREAD_IN_STEPS = {"layers.0.block_sparse_moe.expert_mlps.spmd_rank.rank"}


def is_context(graph: str) -> bool:
    return graph.startswith(CONTEXT_ENCODING)


def tokens(case: Case, graph: str) -> tuple[int, int]:
    """(batch, tokens) of a graph's input."""
    return (1, int(graph.split()[1])) if is_context(graph) else (case.batch, 1)


def test_every_documented_compile_was_traced_from_the_code_as_it_is() -> None:
    assert RECORDED.keys() == CASES.keys()
    stale = [name for name, recorded in RECORDED.items() if recorded["sources"] != sources_digest()]
    assert not stale, (
        f"the code that decides the Neuron graphs has changed since {', '.join(stale)} were "
        "traced: run `make record-neuron` with the sources of each SDK (docs/neuron_proof.md), and "
        "look at what changed"
    )


def test_the_digest_of_the_sources_does_not_see_what_changes_no_graph() -> None:
    code = "x = 1\ndef f(a):\n    return f'# kept {a}'\n"
    noted = (
        '"""A module."""\n\n# A comment.\nx = 1\n\n\ndef f(\n    a,\n):\n    """Says\n'
        '    what."""\n'
        "    return f'# kept {a}'\n"
    )
    assert code_lines(noted) == code_lines(code)
    assert code_lines(code) != code_lines(code.replace("# kept", "# lost"))


def test_each_case_was_traced_with_the_sdk_of_its_instance() -> None:
    for name, recorded in RECORDED.items():
        pinned = sdk_for(instance(CASES[name].instance).family).python
        for package in ("neuronx-distributed", "neuronx-distributed-inference"):
            found = recorded["versions"][package.replace("-", "_")]
            assert found.split(".")[:2] == pinned[package].split(".")[:2]


@each_graph
def test_no_operation_runs_on_the_host_while_a_graph_is_traced(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    assert found["fallbacks"] == []


@each_graph
def test_every_weight_is_an_input_of_the_graph_in_the_dtype_of_the_conversion(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    assert set(found["unbound"]) <= UNREAD | (set() if is_context(graph) else UNREAD_IN_STEPS)
    sources = {expected.name: expected.spec for expected in schema.expected(CONFIG)}
    outputs = bind_rules(sources, CONFIG, Layout())
    dtypes = {"F8_E4M3": "float8_e4m3fn", "BF16": "bfloat16", "F32": "float32"}
    held = {
        name: dtype
        for name, (dtype, _) in found["parameters"].items()
        if not re.search("rank|kv_mgr|local_", name)
    }
    assert held == {output.name: dtypes[output.dtype] for output in outputs}
    kept = MINIMAX_M2.float32_endings
    assert all(dtype == "float32" for name, dtype in held.items() if name.endswith(kept))


@each_graph
def test_nothing_else_enters_a_graph_but_its_inputs_and_nxdis_own_numbering(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    # NxDI writes a prompt into the cache by places it numbers on the host (kvcache/utils.py); NxD's
    # top-k over ranks adds where the vocabulary of each begins (operators/topk.py).
    tp = case.degrees[0]
    length = tokens(case, graph)[1]
    places = rf"int32 \[1, [12], {length}\], (zeros|multiples of 1, 1 of each)"
    starts = (
        rf"int64 \[1\], zeros|int64 \[1, {256 * tp}\], multiples of {200064 // tp}, 256 of each"
    )
    numbering = places if is_context(graph) else starts if case.overrides else "nothing"
    assert all(re.fullmatch(numbering, entered) for entered in found["foreign inputs"])
    assert found["inputs"]


@each_graph
def test_a_rank_holds_the_bytes_of_the_plan(case: Case, graph: str, found: dict[str, Any]) -> None:
    tp, moe_tp, moe_ep = case.degrees
    deployment = deployment_case(
        CONFIG,
        DeploymentSettings(
            instance=case.instance,
            tp_degree=tp,
            moe_tp_degree=moe_tp,
            moe_ep_degree=moe_ep,
            batch_size=case.batch,
            seq_len=case.seq_len,
        ),
    ).deployment
    memory = rank_memory(CONFIG, deployment)
    ranks = sum(
        4 * shape[-1]
        for name, (_, shape) in found["parameters"].items()
        if re.search("rank|local_", name)
    )
    assert found["parameter bytes"] == memory.weights + memory.key_value_cache + ranks


@each_graph
def test_the_router_is_float32_from_the_gate_to_the_choice(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    batch, length = tokens(case, graph)
    rows = batch * length
    assert found["router"] == [f"logistic f32[{rows}, 256]", f"sort f32[{rows}, 256]"]
    assert found["products"][f"f32[{rows}, 3072] f32[3072, 256] -> f32[{rows}, 256]"] == 1
    assert [product for product in found["products"] if product.startswith("f32")] == [
        f"f32[{rows}, 3072] f32[3072, 256] -> f32[{rows}, 256]"
    ]


@each_graph
def test_a_layer_needs_four_collectives_over_all_ranks(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    (tp, moe_tp, moe_ep) = case.degrees
    (batch, length) = tokens(case, graph)
    everyone = f"over {tp} ranks (0, 1..) in 1 groups"
    norm = f"all-reduce f32[{batch}, {length}, 1] f32[] -> f32[{batch}, {length}, 1] {everyone}"
    hidden = (
        f"all-reduce bf16[{batch}, {length}, 3072] bf16[] -> bf16[{batch}, {length}, 3072] "
        f"{everyone}"
    )
    layer = [collective for collective in found["collectives"] if "all-reduce" in collective]
    # Experts of a group of ranks tell each other which token has which place in their blocks.
    places = [collective for collective in layer if collective.startswith("all-reduce s64")]
    within = f"over {moe_tp} ranks (0, 1..) in {moe_ep} groups"
    assert all(collective.endswith(within) for collective in places)
    assert sorted(set(layer) - set(places)) == sorted({norm, hidden})
    assert (layer.count(norm), layer.count(hidden)) == (2, 2)
    assert len(places) == int(is_context(graph) and moe_tp > 1)
    assert found["collectives"][0].startswith("all-gather")  # the embedding's columns


@each_graph
def test_experts_are_unrolled_or_called_as_often_as_the_plan_says(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    calls = {
        call: count
        for call, count in found["custom calls"].items()
        if "bwmm" in call or "blockwise_mm" in call
    }
    blocks = sum(
        count
        for product, count in found["products"].items()
        if product.startswith("bf16[1, 1, 512, 3072]")
    )
    if not is_context(graph):
        kernels = [
            count for call, count in found["custom calls"].items() if "expert_mlp_kernel" in call
        ]
        assert kernels == ([1] if case.expert_kernel == "nki" else [])
        return
    tp, moe_tp, moe_ep = case.degrees
    deployment = deployment_case(
        CONFIG,
        DeploymentSettings(
            instance=case.instance,
            tp_degree=tp,
            moe_tp_degree=moe_tp,
            moe_ep_degree=moe_ep,
            context_lengths=(int(graph.split()[1]),),
        ),
    ).deployment
    way = BLOCKWISE_MATMULS[case.blockwise_matmul]
    planned = unrolled_products(way, CONFIG, deployment)
    assert (sum(calls.values()), blocks) == ((planned, 0) if way.is_kernel else (0, planned))


@each_graph
def test_float64_counts_tokens_and_experts_only(
    case: Case, graph: str, found: dict[str, Any]
) -> None:
    """NxD counts in float64 which token goes where: two small products, and no number of a hidden
    state or a weight.
    """
    batch, length = tokens(case, graph)
    channels = CONFIG.intermediate_size // case.degrees[1]
    widths = {CONFIG.head_dim, 2 * CONFIG.head_dim, CONFIG.hidden_size, channels, 2 * channels} - {
        batch * length,
        256,
    }
    for operation in found["float64"]:
        sizes = [int(size) for size in re.findall(r"\d+", operation.partition("[")[2])]
        assert not widths & set(sizes), operation
    products = {product: count for product, count in found["products"].items() if "f64" in product}
    experts = 256 // case.degrees[2]
    assert products == (
        {
            f"f64[{length}, {length}] f64[{length}, {experts}] -> f64[{length}, {experts}]": 1,
            f"f64[{experts}, {experts}] f64[{experts}, 1] -> f64[{experts}, 1]": 1,
        }
        if is_context(graph)
        else {}
    )
