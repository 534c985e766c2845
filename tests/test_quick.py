"""`make quick` leaves out what it says it does, and every other module is in it."""

import re

import pytest

from tests.conftest import BROWSES, COMPILES, HERE, LONGEST, NOT_QUICK, SERVES

# How a module that may not be in it is known by its text.
SIGNS = {
    BROWSES: r"^from tests\.webdriver import",
    SERVES: r"^from tests\.served import .*\bserving\b",
    COMPILES: r'^from neuron_minimax\.kernels\.cpu\b|"(compiled|exported)"',
}


def test_what_is_left_out_or_starts_first_is_there():
    assert [name for name in (*NOT_QUICK, *LONGEST) if not (HERE / name).exists()] == []


@pytest.mark.parametrize("reason", SIGNS)
def test_a_module_that_is_slow_by_what_it_imports_is_left_out(reason):
    texts = {path.name: path.read_text() for path in HERE.glob("test_*.py")}
    found = {name for name, text in texts.items() if re.search(SIGNS[reason], text, re.MULTILINE)}
    assert found, "no module is known by this sign: it looks for the wrong thing"
    assert found - NOT_QUICK.keys() == set()
