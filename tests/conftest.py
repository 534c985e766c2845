"""What all tests share: one thread for torch, `--quick`, and fixtures that nothing writes into."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from neuron_minimax.generation.tokenizer import TextTokenizer

# Sums over models this small end sooner than a second thread is awake, and servers and browsers
# need the other cores. Before the first import of torch; child processes inherit it.
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
NOT_QUICK = {
    "neuron": NEURON,
    "test_attention.py": COMPILES,
    "test_backend.py": COMPILES,
    "test_benchmarks.py": MEASURES,
    "test_chat_page.py": BROWSES,
    "test_demo_model.py": COMPILES,
    "test_device_check.py": COMPILES,
    "test_experts_command.py": ANALYSES,
    "test_experts_report.py": BROWSES,
    "test_explain_architecture.py": LARGE,
    "test_fp8_mlp.py": COMPILES,
    "test_fp8_mlp_nki.py": LARGE,
    "test_generation_demo.py": COMPILES,
    "test_hub.py": PROCESSES,
    "test_inspect_page.py": BROWSES,
    "test_loops.py": COMPILES,
    "test_neuron_backend.py": LARGE,
    "test_neuron_recorded.py": LARGE,
    "test_opened_once.py": PROCESSES,
    "test_page_cache.py": PROCESSES,
    "test_parallel.py": PROCESSES,
    "test_parity.py": COMPARES,
    "test_serve_command.py": SERVES,
    "test_server.py": SERVES,
    "test_server_demo.py": SERVES,
    "test_server_format.py": SERVES,
    "test_server_fuzz.py": SERVES,
    "test_server_limits.py": SERVES,
    "test_training.py": TRAINS,
}


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
    """Leave out single slow tests of modules that are quick: those marked, and what reads the
    headers of 96,103 tensors.
    """
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
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse checkpoint of the published size."""
    from tests.full_size import write_sparse

    return write_sparse(tmp_path_factory.mktemp("full") / "checkpoint")
