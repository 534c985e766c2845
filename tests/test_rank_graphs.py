"""A rank's graphs are captured whole and once, and hold what a Neuron compiler takes.

What AWS's compiler refuses is told by its pages of error codes (NCC_...); what the graphs hold, and
their StableHLO by the public torch-mlir, is kept in tests/data/rank_graphs.json. Write it anew with
`python -m tests.test_rank_graphs`, where torch-mlir is installed.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from neuron_minimax.backends.torch_neuron.graphs import BlockStep, block_cache, graphs_of
from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.model.decoder import Decoder
from tests.captured import (
    COLLECTIVE,
    Captured,
    argument_bytes,
    capture,
    operations,
    stablehlo,
    without_collectives,
)
from tests.tiny import write_tiny

RECORDED = Path(__file__).parent / "data" / "rank_graphs.json"
PAGE = Path(__file__).parents[1] / "docs" / "torch_neuron.md"
# Collectives of a layer, which are sums of squares of QK norm, attention, the MLP; and the config.
# Two layers of one family show that they are a layer's.
FAMILIES = {
    "minimax_m2": (3, {"num_hidden_layers": 2}),
    "qwen3_moe": (2, {"num_hidden_layers": 1, "quantization_config": None}),
}
NAMES = ("token_generation", "context_encoding_8", "blocks")
CASES = [(family, name) for family in FAMILIES for name in NAMES]
TP_DEGREE = 4
EP_DEGREE = 2
INTEGERS = (torch.int32, torch.int64)


@contextmanager
def group_without_others() -> Iterator[str]:
    """The name of a group of TP_DEGREE ranks of which this process is the first, and the only."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=TP_DEGREE)
    try:
        yield dist.group.WORLD.group_name
    finally:
        dist.destroy_process_group()


@dataclass
class Graphs:
    held_bytes: int
    captured: dict[str, Captured]


def converted(directory: Path, family: str) -> Path:
    checkpoint = Checkpoint(write_tiny(directory / family, family=family, **FAMILIES[family][1]))
    plan_conversion(checkpoint).write(directory / f"{family} converted")
    return directory / f"{family} converted"


def graphs_with_inputs(directory: Path, *degrees: int, group: str = "") -> tuple[Decoder, list]:
    """The model of rank 0, and its graphs, each with a name and example inputs."""
    shard = shard_of(ModelConfig.from_dir(directory), 0, *degrees, group)
    model = load_rank(directory, shard, torch.bfloat16).model
    graphs = graphs_of(model, 2, 32, [8])
    blocks = BlockStep(model, block_cache(model, 5, 4))
    table = torch.tensor([[1, 2], [3, 4]])
    last = torch.zeros(2, dtype=torch.int64)
    tokens = torch.zeros(2, 1, dtype=torch.int64)
    graphs.append(("blocks", blocks, (tokens, tokens.clone(), table, tokens - 1, last)))
    return model, graphs


@torch.no_grad()
def captured_graphs(directory: Path, family: str) -> Graphs:
    """The graphs of rank 0, each called with its example inputs and with other tokens."""
    captured = {}
    with group_without_others() as group:
        model, graphs = graphs_with_inputs(
            converted(directory, family), TP_DEGREE, EP_DEGREE, group=group
        )
        for name, graph, inputs in graphs:
            compiled, captured[name] = capture(graph)
            for step in range(3):
                compiled(inputs[0] + step, *(each.clone() for each in inputs[1:]))
    held = sum(tensor.nbytes for tensor in model.state_dict().values())
    return Graphs(held, captured)


@pytest.fixture(scope="module")
def graphs(tmp_path_factory) -> dict[str, Graphs]:
    directory = tmp_path_factory.mktemp("graphs")
    return {family: captured_graphs(directory, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def recorded() -> dict:
    return json.loads(RECORDED.read_text(encoding="utf-8"))


@pytest.fixture(params=CASES, ids=" ".join)
def case(request, graphs) -> tuple[str, str, Captured]:
    family, name = request.param
    return family, name, graphs[family].captured[name]


def test_a_graph_is_whole_and_serves_every_step(case):
    _, _, captured = case
    assert len(captured.graphs) == 1


def test_a_layer_has_its_collectives_and_no_other(case):
    family, _, captured = case
    embedding = 1
    of_layer, overrides = FAMILIES[family]
    assert captured.collectives == {
        "all_reduce": embedding + of_layer * overrides["num_hidden_layers"],
        "all_gather_into_tensor": 1,
    }


def test_a_graph_reads_every_weight_once(case, graphs):
    family, _, captured = case
    caches = sum(
        node.args[0].meta["val"].nbytes
        for node in captured.graph.graph.nodes
        if str(node.target) == "aten.index_put.default"
    )
    beside = captured.input_bytes - caches - graphs[family].held_bytes
    assert 0 < beside < 2048, "tokens, angles and the table of codes alone"


def test_what_a_graph_holds_is_what_was_recorded(case, recorded):
    if torch.__version__.split("+")[0] != recorded["torch"]:
        pytest.skip(f"torch {recorded['torch']} was recorded, which decomposes in its own way")
    family, name, captured = case
    assert sorted(captured.operators) == recorded["operators"][f"{family} {name}"]


def nodes_of(captured: Captured, *names: str) -> list[torch.fx.Node]:
    return [
        node
        for node in captured.graph.graph.nodes
        if any(word in str(node.target) for word in names)
    ]


def dtypes_of(nodes: list[torch.fx.Node]) -> set[torch.dtype]:
    """Dtypes of the first inputs."""
    return {node.args[0].meta["val"].dtype for node in nodes}


def test_no_graph_has_a_value_that_the_compiler_refuses(case):
    """EVRF051 and EVRF005 (FP8 dtypes), EVRF004 (complex), EMOD025 (shapes that vary)."""
    _, _, captured = case
    for node in captured.graph.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert "float8" not in str(value.dtype)
            assert not value.dtype.is_complex
            assert all(isinstance(size, int) for size in value.shape)


def test_no_operator_has_a_dtype_that_the_compiler_refuses(case):
    """Integers in EVRF013 (top-k), EVRF035 (products), EVRF061 (sums), EVRF062 (powers)."""
    *_, captured = case
    for names in (("topk",), ("aten.mm.", "aten.bmm"), (COLLECTIVE,), ("aten.pow",)):
        found = nodes_of(captured, *names)
        assert found, names
        assert not dtypes_of(found) & {*INTEGERS}
    assert dtypes_of(nodes_of(captured, "topk")) == {torch.float32}
    assert not nodes_of(captured, "scatter_add", "index_add", "bitwise_left_shift", "sort")


def test_codes_stay_bytes_until_they_are_looked_up(graphs):
    [found] = {
        node.meta["val"].dtype
        for node in graphs["minimax_m2"].captured["token_generation"].graph.graph.nodes
        if node.op == "placeholder"
        and node.meta["val"].element_size() == 1
        and node.users
        and node.meta["val"].dtype != torch.bool
    }
    assert found == torch.uint8


def test_every_graph_has_the_recorded_stablehlo(case, recorded):
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    family, name, captured = case
    text = stablehlo(without_collectives(captured.graph))
    assert sorted(operations(text)) == recorded["stablehlo"][f"{family} {name}"]
    assert "?x" not in text
    assert "f8E4M3" not in text


def test_the_stablehlo_takes_the_bytes_of_the_weights_and_has_a_cut_for_each_collective(case):
    """Its arguments are those of the graph, weights in their stored dtype, and what the
    collectives give.
    """
    pytest.importorskip("torch_mlir", reason="torch-mlir is not installed")
    *_, captured = case
    given = [node.meta["val"] for node in nodes_of(captured, f"{COLLECTIVE}.wait")]
    arguments = argument_bytes(stablehlo(without_collectives(captured.graph)))
    assert len(given) == sum(captured.collectives.values())
    assert sum(arguments) == captured.input_bytes + sum(each.nbytes for each in given)


def lines_of_the_page() -> list[list[str]]:
    """The cells of the page's table of operators, names without their overloads."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.split("## Operators", 1)[1].split("| aten |", 1)[1].split("\n\n", 1)[0]
    return [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]


def test_every_operator_has_a_line_in_the_page(recorded):
    for column, names in (
        (0, {name.split(".")[1] for name in every(recorded["operators"]) if "." in name}),
        (1, {name.split(".")[1] for name in every(recorded["stablehlo"])} - {"return"}),
    ):
        found = [
            word for cells in lines_of_the_page() for word in re.findall(r"`(\w+)`", cells[column])
        ]
        assert names == set(found)
        assert column == 1 or len(found) == len(set(found)), "one line for each"


def every(by_graph: dict[str, list[str]]) -> set[str]:
    return {name for names in by_graph.values() for name in names}


def test_values_are_written_over_and_not_added(case):
    """EVRF016 and EVRF060 refuse a scatter that reduces integers."""
    *_, captured = case
    written = nodes_of(captured, "aten.index_put")
    assert written
    assert not any(node.args[3] for node in written if len(node.args) > 3)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_torch_xla_lowers_every_operator(family, tmp_path):
    torch_xla = pytest.importorskip("torch_xla", reason="torch_xla is not installed")
    from torch_xla.debug import metrics

    device = torch_xla.device()
    for _, graph, inputs in graphs_with_inputs(converted(tmp_path, family), 1, 1)[1]:
        graph.to(device)
        metrics.clear_all()
        graph(*(each.to(device) for each in inputs))
        assert any(name.startswith("xla::") for name in metrics.counter_names())
        assert not [name for name in metrics.counter_names() if name.startswith("aten::")]
    torch.linalg.eigvals(torch.eye(2, device=device))
    assert [name for name in metrics.counter_names() if name.startswith("aten::")], "a fallback"


def record() -> None:
    """Write what the graphs hold, and their StableHLO."""
    found: dict[str, dict[str, list[str]]] = {"operators": {}, "stablehlo": {}}
    version = {"torch": torch.__version__.split("+")[0]}
    with tempfile.TemporaryDirectory() as directory:
        for family in FAMILIES:
            for name, captured in captured_graphs(Path(directory), family).captured.items():
                found["operators"][f"{family} {name}"] = sorted(captured.operators)
                text = stablehlo(without_collectives(captured.graph))
                found["stablehlo"][f"{family} {name}"] = sorted(operations(text))
    RECORDED.write_text(json.dumps(version | found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(record())
