"""Every fault of tests/faults.py is named by the inspection, refused by the conversion, and in the
documentation.
"""

from pathlib import Path

import numpy as np
import pytest

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.errors import NeuronMiniMaxError
from tests.faults import FAULTS, HANDLED, MOE, Fault, put
from tests.opened import convert, inspect

GOOD = Fault(title="none", subject="", words=())


def named(fault: Fault, text: str) -> bool:
    return fault.subject in text and all(word in text for word in fault.words)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_inspect_names_the_fault_and_convert_refuses_it(fault, tmp_path):
    directory = fault.write(tmp_path / "checkpoint")
    report = inspect(directory)
    assert report.usable == fault.values, "headers alone must show exactly the faults of headers"
    if fault.values:
        report = inspect(directory, check_values=True)
    found = [finding for finding in report.findings if finding.severity == "error"]
    assert any(named(fault, f"{finding.subject} {finding.message}") for finding in found), found
    assert fault.subject in report.render()
    with pytest.raises(NeuronMiniMaxError) as refused:
        convert(directory, tmp_path / "out")
    assert fault.subject in str(refused.value)
    assert not (tmp_path / "out" / "conversion.json").exists()


def test_the_checkpoint_that_the_faults_are_made_from_is_good(tmp_path):
    directory = GOOD.write(tmp_path / "checkpoint")
    assert inspect(directory, check_values=True).usable
    convert(directory, tmp_path / "out")


@pytest.mark.parametrize("fault", HANDLED, ids=lambda fault: fault.title)
def test_what_only_others_get_wrong_is_reported_and_converts_to_the_same_tensors(fault, tmp_path):
    directory = fault.write(tmp_path / "checkpoint")
    report = inspect(directory, check_values=fault.values)
    assert report.usable
    text = " ".join(report.render().split())
    assert named(fault, text), text
    convert(directory, tmp_path / "out")
    good = Fault(title="good", subject="", words=(), tensors=fault.means)
    convert(good.write(tmp_path / "good"), tmp_path / "expected")
    found = TensorDirectory(tmp_path / "out")
    expected = TensorDirectory(tmp_path / "expected")
    assert found.entries.keys() == expected.entries.keys()
    for name in expected.entries:
        if "reciprocal" in fault.title and name.endswith(".scale"):  # inverted twice: two roundings
            np.testing.assert_allclose(found.array(name), expected.array(name), rtol=2**-23)
        else:
            assert np.array_equal(found.array(name), expected.array(name)), name


@pytest.mark.parametrize("which", ["w1", "w2", "w3"])
def test_a_dead_expert_is_a_warning(which, tmp_path):
    weight = f"{MOE}experts.6.{which}.weight"
    fault = Fault(title="dead", subject=weight, words=(), tensors=put(weight, np.zeros_like))
    report = inspect(fault.write(tmp_path / "checkpoint"), check_values=True)
    assert report.usable
    (finding,) = [finding for finding in report.findings if finding.kind == "dead expert"]
    assert "expert 6 of layer 1 is dead: 1 of its 3 weights are all zero" in finding.message


def test_the_documentation_has_one_row_for_each_fault_and_says_what_shows_it():
    text = (Path(__file__).parents[1] / "docs" / "faults.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ")
    ]
    documented = [(row[0], row[1]) for row in rows if row[0] not in ("fault", "what")]
    assert documented == [
        (fault.title, "values" if fault.values else "headers") for fault in (*FAULTS, *HANDLED)
    ]


def test_reciprocal_scales_give_the_same_expert_norms(tmp_path):
    reciprocal = next(fault for fault in HANDLED if fault.title == "every scale is a reciprocal")
    found = [
        inspect(one.write(tmp_path / one.title), check_values=True).values
        for one in (reciprocal, GOOD)
    ]
    assert [values.convention for values in found] == ["reciprocal", "multiplier"]
    np.testing.assert_allclose(found[0].expert_norms, found[1].expert_norms, rtol=1e-6)
