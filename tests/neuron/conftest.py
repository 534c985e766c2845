"""Where NxDI and NxD can be imported these tests run, with stand-ins for the closed packages;
elsewhere they skip.
"""

import importlib.util
from importlib import metadata
from pathlib import Path

import pytest

from tests.neuron import standins

HERE = Path(__file__).parent
# What makes the environment and fetches nothing: docs/neuron_proof.md says where the sources are.
RUN = "`make test-neuron SOURCES=DIR` (docs/neuron_proof.md)"
RUN_TRACES = "`make trace-neuron SOURCES=DIR` (docs/neuron_proof.md)"


def why_not() -> str | None:
    for package in ("neuronx_distributed", "neuronx_distributed_inference"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; run {RUN}"
    transformers = metadata.version("transformers")
    if int(transformers.split(".")[0]) >= 5:
        return f"NxD cannot be imported with transformers {transformers}, it needs 4.57; run {RUN}"
    return None


REASON = why_not()
if REASON is None:
    standins.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if REASON is not None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))
