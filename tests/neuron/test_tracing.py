"""The recorded graphs, traced again by the real torch_xla: each is what
tests/data/neuron_traces.json says.
"""

import json

import pytest

from tests.neuron import tracing
from tests.neuron.conftest import RUN_TRACES
from tests.neuron.standins import is_real

pytestmark = pytest.mark.skipif(
    not is_real("torch_xla"), reason=f"the real torch_xla is not installed; run {RUN_TRACES}"
)


@pytest.mark.parametrize("name", tracing.CASES)
def test_a_compile_still_has_the_recorded_graphs(name: str) -> None:
    if not tracing.belongs_here(tracing.CASES[name]):
        pytest.skip("this instance is for another SDK than the NxDI that is there")
    recorded = json.loads(tracing.TRACES.read_text(encoding="utf-8"))[name]["graphs"]
    traced = json.loads(json.dumps(tracing.run(name)))
    assert traced.keys() == recorded.keys()
    for graph, found in traced.items():
        for what, value in found.items():
            assert value == recorded[graph][what], f"{graph}: {what}"
