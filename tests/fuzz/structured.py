"""Inputs by hypothesis: documents with drawn values at drawn places, safetensors files from drawn
headers, and rows of drawn messages. A fault comes shrunk.
"""

import json
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky

NUMBERS = (
    st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**9, 10**400])
    | st.floats()
)
ANY_JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
DTYPES = (
    "F8_E4M3", "F8_E5M2", "BF16", "F16", "F32", "F64", "I8", "U8", "I16", "I32", "I64", "BOOL",
)  # fmt: skip
ODD_DTYPES = ("U16", "U32", "U64", "F4", "F6_E2M3", "F8_E8M0", "C64", "f32", "", "F32 ")
BYTES = {"F8": 1, "BF": 2, "F1": 2, "F3": 4, "F6": 8, "I8": 1, "U8": 1, "I1": 2, "I3": 4, "I6": 8}
MOST_PLACES = 400


def documents(pristine: bytes) -> st.SearchStrategy[bytes]:
    """The document with one to three values replaced."""
    places = _places(json.loads(pristine))
    if len(places) > MOST_PLACES:
        places = random.Random(0).sample(places, MOST_PLACES)
    edits = st.lists(st.tuples(st.sampled_from(places), ANY_JSON), min_size=1, max_size=3)

    def edited(drawn: list[tuple[tuple[Any, ...], Any]]) -> bytes:
        document = json.loads(pristine)
        for path, value in drawn:
            _put(document, path, value)
        return json.dumps(document).encode()

    return st.builds(edited, edits)


def _places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    if not isinstance(document, dict | list):
        return [path]
    items = document.items() if isinstance(document, dict) else enumerate(document)
    inner = [place for key, value in items for place in _places(value, (*path, key))]
    return [path, *inner] if path else inner


def _put(document: Any, path: tuple[Any, ...], value: Any) -> None:
    """Put a value at a place, where that is still there after earlier edits."""
    with suppress(KeyError, IndexError, TypeError):
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value


@st.composite
def safetensors_files(draw: Callable[[Any], Any]) -> bytes:
    """A small file whose header is right, or not quite."""
    header: dict[str, Any] = {}
    position = 0
    sizes = st.integers(0, 4) | st.sampled_from([1, 1, 2**32, 2**63, -1])
    for _ in range(draw(st.integers(0, 3))):
        dtype = draw(st.sampled_from(DTYPES) | st.sampled_from(ODD_DTYPES))
        shape = draw(st.lists(sizes, max_size=3))
        nbytes = BYTES.get(dtype[:2], 1)
        for size in shape:
            nbytes *= size
        if not 0 <= nbytes < 10**6:
            nbytes = draw(st.integers(0, 64))
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
        header[draw(st.text(max_size=4))] = entry
    if draw(st.booleans()):
        header["__metadata__"] = draw(
            st.dictionaries(st.text(max_size=3), st.text(max_size=3)) | ANY_JSON
        )
    for _ in range(draw(st.integers(0, 2)) if header else 0):
        name = draw(st.sampled_from(sorted(header)))
        if isinstance(header[name], dict) and header[name] and draw(st.integers(0, 3)):
            key = draw(st.sampled_from(sorted(header[name])))
            header[name][key] = draw(_near(header[name][key]))
    text = json.dumps(header).encode() + b" " * draw(st.integers(0, 9))
    data = bytes(max(0, min(10**6, position + draw(st.sampled_from([0, 0, 0, 0, 1, -1, 8])))))
    length = len(text) + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -1]))
    return length.to_bytes(8, "little") + text + data


def _near(value: Any) -> st.SearchStrategy[Any]:
    """Anything, or a value with one of its numbers written or chosen otherwise."""
    if not isinstance(value, list) or not value:
        return ANY_JSON
    change = st.sampled_from([float, str, bool, lambda n: n + 1, lambda n: n - 1, lambda n: [n]])

    def at(place: int, how: Callable[[Any], Any]) -> list[Any]:
        old = value[place]
        new = how(old) if isinstance(old, int) else old
        return [*value[:place], new, *value[place + 1 :]]

    return ANY_JSON | st.builds(at, st.integers(0, len(value) - 1), change)


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]) | ANY_JSON},
    optional={
        "content": st.text(max_size=9) | ANY_JSON,
        "reasoning_content": ANY_JSON,
        "tool_calls": ANY_JSON,
    },
)
ROW = (
    st.fixed_dictionaries({"text": st.text(max_size=20) | ANY_JSON})
    | st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, max_size=3) | ANY_JSON}, optional={"tools": ANY_JSON}
    )
    | ANY_JSON
)


def rows() -> st.SearchStrategy[bytes]:
    """Lines of training data."""

    def written(drawn: list[Any]) -> bytes:
        return b"".join(json.dumps(row).encode() + b"\n" for row in drawn)

    return st.builds(written, st.lists(ROW, max_size=3))


def explore(
    strategy: st.SearchStrategy[bytes],
    check: Callable[[bytes], str | None],
    examples: int,
    number: int,
) -> tuple[int, bytes, str] | tuple[int, None, None]:
    """Check so many drawn inputs, in the order that `number` decides.

    Returns how many ran, and the smallest input that was found at fault, with its fault.
    """
    ran = 0
    smallest: tuple[bytes, str] | None = None

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(strategy)
    def examine(data: bytes) -> None:
        nonlocal ran, smallest
        ran += 1
        fault = check(data)
        if fault:
            smallest = (data, fault)
            raise AssertionError(fault)

    try:
        examine()
    except (AssertionError, Flaky):
        assert smallest is not None
        return ran, *smallest
    return ran, None, None
