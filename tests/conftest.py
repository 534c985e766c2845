"""What all tests share: one thread for torch, `--quick`, and fixtures that nothing writes into."""

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from neuron_minimax.generation.tokenizer import TextTokenizer

# Sums over models this small end sooner than a second thread is awake, and servers and browsers
# need the other cores. Before the first import of torch; child processes inherit it.
# A shell that starts a command in the background has it ignore Ctrl-C, and so all its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")

HERE = Path(__file__).parent
# What `make quick` leaves out, and why; all else is in it.
COMPILES = "compiles"
SERVES = "serves"
TRAINS = "trains"
BROWSES = "starts a browser"
ANALYSES = "runs permutation tests and draws plots"
NEURON = "needs NxDI"
LARGE = "works at the published size"
COMPARES = "runs transformers' model; test_decoder does too, on smaller ones"
MEASURES = "runs the benchmarks on small models"
PROCESSES = "starts process after process"
SEARCHES = "searches all deployments of many models"
NOT_QUICK = {
    "fuzz": PROCESSES,
    "interruptions": PROCESSES,
    "neuron": NEURON,
    "test_agents.py": SERVES,
    "test_attention.py": COMPILES,
    "test_backend.py": COMPILES,
    "test_benchmarks.py": MEASURES,
    "test_cache_interface.py": COMPARES,
    "test_chat_command.py": SERVES,
    "test_chat_families.py": SERVES,
    "test_chat_markdown.py": BROWSES,
    "test_chat_page.py": BROWSES,
    "test_clients.py": SERVES,
    "test_compiled_directory.py": COMPILES,
    "test_completions.py": SERVES,
    "test_demo_model.py": COMPILES,
    "test_device_check.py": COMPILES,
    "test_examples.py": COMPARES,
    "test_experts_command.py": ANALYSES,
    "test_experts_endings.py": ANALYSES,
    "test_experts_report.py": BROWSES,
    "test_explain_architecture.py": LARGE,
    "test_family_pipeline.py": COMPARES,
    "test_fp8_mlp.py": COMPILES,
    "test_fp8_mlp_nki.py": LARGE,
    "test_generation_demo.py": COMPILES,
    "test_hostile_outputs.py": PROCESSES,
    "test_hub.py": PROCESSES,
    "test_hub_streaming.py": PROCESSES,
    "test_inspect_page.py": BROWSES,
    "test_limited.py": PROCESSES,
    "test_kernels.py": COMPILES,
    "test_messages.py": SERVES,
    "test_neuron_backend.py": LARGE,
    "test_neuron_recorded.py": LARGE,
    "test_opened_once.py": PROCESSES,
    "test_page_cache.py": PROCESSES,
    "test_parallel.py": PROCESSES,
    "test_parity.py": COMPARES,
    "test_rank_graphs.py": COMPILES,
    "test_responses_api.py": SERVES,
    "test_run_command.py": PROCESSES,
    "test_serve_command.py": SERVES,
    "test_published_shapes.py": LARGE,
    "test_shards.py": PROCESSES,
    "test_server.py": SERVES,
    "test_server_connections.py": SERVES,
    "test_server_demo.py": SERVES,
    "test_server_format.py": SERVES,
    "test_server_attacks.py": SERVES,
    "test_server_fuzz.py": SERVES,
    "test_server_limits.py": SERVES,
    "test_stopping.py": PROCESSES,
    "test_planner_search.py": SEARCHES,
    "test_torch_neuron_backend.py": COMPILES,
    "test_tutorial.py": COMPILES,
    "test_training.py": TRAINS,
    "test_training_endings.py": TRAINS,
    "test_training_families.py": TRAINS,
    "test_training_states.py": TRAINS,
    "test_training_steps.py": TRAINS,
    "test_training_sequences.py": TRAINS,
    "test_vllm.py": PROCESSES,
    "test_vllm_contract.py": PROCESSES,
}
# The modules that take longest, the longest first: `make test` gives whole modules to two
# processes, and none of these is the last of one while the other waits.
LONGEST = (
    "test_backend.py",
    "test_compiled_directory.py",
    "test_family_pipeline.py",
    "test_device_check.py",
    "test_kernels.py",
    "test_torch_neuron_backend.py",
    "test_demo_model.py",
    "test_tutorial.py",
    "test_training.py",
    "test_planner_search.py",
    "fuzz/test_fuzz.py",
    "interruptions/test_sweep.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out what compiles, serves, trains or browses"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave whole modules out before they are imported."""
    if config.getoption("--quick") and collection_path.parent == HERE:
        return collection_path.name in NOT_QUICK or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest modules first, and leave out single slow tests of modules that are quick:
    those marked, and what reads the headers of 96,103 tensors.
    """
    places = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))
    if config.getoption("--quick"):
        slow = [
            item
            for item in items
            if item.get_closest_marker("slow") or "full_size" in item.fixturenames
        ]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


# What a session makes once. Nothing may write into these directories; modules are imported when a
# test asks, for `--quick` and for tests that need no torch.
@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer with MiniMax's chat format."""
    from tests.tiny_tokenizer import write_tokenizer

    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_directory: Path) -> "TextTokenizer":
    """The same, read."""
    from neuron_minimax.generation.tokenizer import TextTokenizer

    return TextTokenizer.from_dir(tokenizer_directory)


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model for the eager engine, 4 slots of 256; beside it its checkpoint and
    conversion.
    """
    from tests.tiny_traced import write_traced

    return write_traced(tmp_path_factory.mktemp("model"), seq_len=256)


@pytest.fixture(scope="session")
def kernels() -> None:
    """The C++ kernels, built where they are not, loaded into this process."""
    from neuron_minimax.kernels.cpu.library import load_built

    if not load_built():
        pytest.skip("there is no C++ compiler")


@pytest.fixture(scope="session")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint of the published size."""
    from tests.full_size import write_sparse

    return write_sparse(tmp_path_factory.mktemp("full") / "checkpoint")
