"""Headers of safetensors files, judged as the safetensors library judges them: what it refuses is
refused, and what it takes is read as it reads it, or refused for one of the stated reasons.
"""

import json
import os
import random
import re
import socket

import pytest
from safetensors import SafetensorError, deserialize

from neuron_minimax.checkpoint.header import (
    HEADER_LIMIT,
    MOST_DIMENSIONS,
    NAME_LIMIT,
    STORED_DTYPES,
    read_header,
)
from neuron_minimax.errors import CheckpointError

DATA = bytes(range(100))
HEADER = {
    "__metadata__": {"format": "pt"},
    "first": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "second": {"dtype": "U8", "shape": [4, 4, 3], "data_offsets": [24, 72]},
    "none": {"dtype": "BF16", "shape": [0, 7], "data_offsets": [72, 72]},
    "third": {"dtype": "F8_E4M3", "shape": [28], "data_offsets": [72, 100]},
}
# What the library takes and `read_header` does not, as its docstring has it.
STATED_REASONS = re.compile(
    rf"has dtype .*expected one of {', '.join(STORED_DTYPES)}"
    r"|Unexpected keyword argument"  # another field
    r"|Input should be an object"  # a tensor as a list
    rf"|at most {MOST_DIMENSIONS} items"
    r"|stands twice in one object"
    r"|as no array can be"
    rf"|no plain text .* up to {NAME_LIMIT} printable characters"
)


def file_of(text: bytes, data: bytes = DATA) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def edited(*path: object, value: object) -> bytes:
    """A file whose header has another value at one place."""
    header = json.loads(json.dumps(HEADER))
    place = header
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return file_of(json.dumps(header).encode())


def replaced(old: str, new: str) -> bytes:
    text = json.dumps(HEADER)
    assert old in text
    return file_of(text.replace(old, new, 1).encode("utf-8", "surrogatepass"))


def judge(path, contents):
    """Compare both readers on one file; return what ours refuses it for, or None."""
    path.write_bytes(contents)
    try:
        wanted = {
            name: (fields["dtype"], tuple(fields["shape"]), bytes(fields["data"]))
            for name, fields in deserialize(contents)
        }
    except SafetensorError:
        wanted = None
    refusal = None
    try:
        found = {
            entry.name: (entry.dtype, entry.shape, contents[entry.start : entry.end])
            for entry in read_header(path)
        }
    except CheckpointError as refused:
        refusal = str(refused)
    if refusal is None:
        assert found == wanted, "the library refuses it, or reads it otherwise"
    else:
        assert str(path) in refusal
        assert wanted is None or STATED_REASONS.search(refusal), refusal
    return refusal


OFFSETS = ("second", "data_offsets")
ACCEPTED = {
    "the header as it is": file_of(json.dumps(HEADER).encode()),
    "spaces behind it": file_of(json.dumps(HEADER).encode() + b"  \n\t"),
    "no metadata": edited("__metadata__", value=None),
    "empty metadata": edited("__metadata__", value={}),
    "tensors in another order": file_of(json.dumps(dict(reversed(HEADER.items()))).encode()),
    "a scalar": file_of(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}', b"1234"),
    "no tensor": file_of(b"{}", b""),
    "a dtype that no model here has": edited("second", "dtype", value="F8_E8M0"),
    "a dtype that is not read": edited("first", "dtype", value="U32"),
    "a dtype of half bytes": edited(
        "first", value={"dtype": "F4", "shape": [48], "data_offsets": [0, 24]}
    ),
    "a name with an escape": replaced('"first"', '"f\\u0069rst"'),
}
REFUSED = {
    "nothing": b"",
    "a length alone": bytes(8),
    "a length beyond the file": (1000).to_bytes(8, "little") + b"{}",
    "a length beyond the limit": (HEADER_LIMIT + 1).to_bytes(8, "little") + b"{}",
    "a length of 64 bits": b"\xff" * 8 + b"{}",
    "no JSON": file_of(b"{" * 20),
    "a list": file_of(b"[]"),
    "a text of another encoding": file_of(json.dumps(HEADER).encode("utf-16")),
    "bytes that are no UTF-8": file_of(json.dumps(HEADER).encode().replace(b"first", b"f\xffrst")),
    "a lone surrogate": replaced('"first"', '"f\\ud800rst"'),
    "deep lists": file_of(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "something behind it": file_of(json.dumps(HEADER).encode() + b"x"),
    "a trailing comma": replaced("}}", "},}"),
    "offsets that are no integers": edited(*OFFSETS, value=[24.0, 72.0]),
    "an offset that is true": edited(*OFFSETS, value=[True, 72]),
    "an offset that is a text": edited(*OFFSETS, value=["24", 72]),
    "a negative offset": edited("first", "data_offsets", value=[-1, 23]),
    "an offset beyond 64 bits": edited(*OFFSETS, value=[24, 2**64 + 72]),
    "an offset of a thousand digits": edited(*OFFSETS, value=[24, 10**1000]),
    "one offset": edited(*OFFSETS, value=[24]),
    "three offsets": edited(*OFFSETS, value=[24, 72, 72]),
    "offsets that are no list": edited(*OFFSETS, value={"begin": 24}),
    "offsets backwards": edited(*OFFSETS, value=[72, 24]),
    "a hole": edited("third", "data_offsets", value=[80, 100]),
    "an overlap": edited(*OFFSETS, value=[16, 64]),
    "data that do not begin at once": edited("first", "data_offsets", value=[8, 24]),
    "the same data twice": edited("third", value=HEADER["second"]),
    "a size that is true": edited("third", "shape", value=[28, True]),
    "a size that is no integer": edited("third", "shape", value=[28.0]),
    "a negative size": edited("third", "shape", value=[-28]),
    "a size of minus zero": replaced("[0, 7]", "[-0, 7]"),
    "two negative sizes": edited("third", "shape", value=[-4, -7]),
    "a size that is infinite": replaced("[28]", "[Infinity]"),
    "a size beyond 64 bits": edited("third", "shape", value=[28, 2**64]),
    "sizes whose product overflows on its way to 0": edited(
        "none", "shape", value=[2**40, 2**40, 0]
    ),
    "a shape that is a number": edited("third", "shape", value=28),
    "a shape that is null": edited("third", "shape", value=None),
    "half a byte": edited("first", value={"dtype": "F4", "shape": [47], "data_offsets": [0, 24]}),
    "another shape": edited("third", "shape", value=[27]),
    "a dtype of another size": edited("third", "dtype", value="BF16"),
    "a dtype that does not exist": edited("third", "dtype", value="F9"),
    "a dtype that is a number": edited("third", "dtype", value=8),
    "no dtype": edited("third", value={"shape": [28], "data_offsets": [72, 100]}),
    "a tensor that is a text": edited("third", value="F8_E4M3"),
    "a tensor that is null": edited("third", value=None),
    "a tensor that is empty": edited("third", value={}),
    "a field twice": replaced('"shape": [28]', '"shape": [1], "shape": [28]'),
    "the metadata twice": replaced('{"__metadata__"', '{"__metadata__": {}, "__metadata__"'),
    "metadata with a number": edited("__metadata__", "format", value=1),
    "metadata with a null": edited("__metadata__", "format", value=None),
    "metadata that are a list": edited("__metadata__", value=["pt"]),
    "metadata that are a tensor": edited("__metadata__", value=HEADER["third"]),
    "too little data": file_of(json.dumps(HEADER).encode(), DATA[:-1]),
    "too much data": file_of(json.dumps(HEADER).encode(), DATA + b"x"),
}
REFUSED_FOR_A_REASON = {
    "an empty tensor beyond what numpy holds": edited("none", "shape", value=[0, 2**63]),
    "a tensor as a list": edited("third", value=["F8_E4M3", [28], [72, 100]]),
    "a field that means nothing": edited("third", "note", value="x"),
    "more dimensions than numpy has": edited("third", "shape", value=[28] + [1] * MOST_DIMENSIONS),
    "a name twice": replaced(
        '{"__metadata__"',
        '{"third": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "__metadata__"',
    ),
    "a name that moves the cursor": replaced('"first"', '"\\u001b[2Jfirst"'),
    "a name of two lines": replaced('"first"', '"first\\nsecond"'),
    "a name that turns the line around": replaced('"first"', '"\\u202efirst"'),
    "a name without a character": replaced('"first"', '""'),
    "a name without end": replaced('"first"', f'"{"n" * 10**6}"'),
}


@pytest.mark.parametrize("title", ACCEPTED)
def test_what_the_library_reads_is_read_as_it_reads_it(title, tmp_path):
    assert judge(tmp_path / "x.safetensors", ACCEPTED[title]) is None


@pytest.mark.parametrize("title", REFUSED)
def test_what_the_library_refuses_is_refused(title, tmp_path):
    with pytest.raises(SafetensorError):
        deserialize(REFUSED[title])
    message = judge(tmp_path / "x.safetensors", REFUSED[title])
    assert message
    assert len(message) < 1000


@pytest.mark.parametrize("title", REFUSED_FOR_A_REASON)
def test_what_is_refused_beyond_that_is_refused_for_a_stated_reason(title, tmp_path):
    deserialize(REFUSED_FOR_A_REASON[title])
    message = judge(tmp_path / "x.safetensors", REFUSED_FOR_A_REASON[title])
    assert message
    assert message.replace("\n", "").isprintable()
    assert len(message) < 1500


VALUES = (
    0,
    1,
    -1,
    3,
    24,
    72,
    100,
    2**63,
    2**64,
    1e3,
    24.0,
    True,
    False,
    None,
    "24",
    [],
    [1],
    {},
    "U8",
)


def mutated(random_numbers: random.Random) -> bytes:
    """A file with one to three changes: of values, keys, bytes, or its length."""
    header = json.loads(json.dumps(HEADER))
    for _ in range(random_numbers.choice((0, 1, 1, 2))):
        fields = header[random_numbers.choice([name for name in header if name != "__metadata__"])]
        name = random_numbers.choice(("dtype", "shape", "data_offsets"))
        match random_numbers.randrange(4):
            case 0:
                fields[name] = random_numbers.choice((*VALUES, *STORED_DTYPES))
            case 1:
                place = fields.get("data_offsets")
                if isinstance(place, list) and place:
                    place[random_numbers.randrange(len(place))] = random_numbers.choice(VALUES)
            case 2:
                place = fields.get("shape")
                if isinstance(place, list) and place:
                    place[random_numbers.randrange(len(place))] = random_numbers.choice(VALUES)
            case _:
                fields.pop(name, None)
    contents = bytearray(file_of(json.dumps(header).encode()))
    for _ in range(random_numbers.choice((0, 0, 1, 2))):
        position = random_numbers.randrange(len(contents))
        match random_numbers.randrange(3):
            case 0:
                contents[position] ^= 1 << random_numbers.randrange(8)
            case 1:
                del contents[position]
            case _:
                contents.insert(position, random_numbers.randrange(256))
    return bytes(contents)


def test_a_thousand_mutated_headers_are_judged_as_the_library_judges_them(tmp_path):
    random_numbers = random.Random(34)
    path = tmp_path / "x.safetensors"
    messages = [judge(path, mutated(random_numbers)) for _ in range(1000)]
    accepted = messages.count(None)
    assert 100 < accepted < 900, "the mutations are too tame or too wild to say anything"


def test_a_header_of_a_hundred_megabytes_of_empty_lists_is_refused_unread(tmp_path):
    path = tmp_path / "x.safetensors"
    text = b'{"a":[' + b"[]," * (HEADER_LIMIT // 3 - 10) + b"[]]}"
    path.write_bytes(file_of(text, b""))
    with pytest.raises(CheckpointError, match="more than 3000000 values"):
        read_header(path)


def test_only_a_regular_file_has_a_header(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        for name in ("pipe", "zero", "socket"):
            with pytest.raises(CheckpointError, match=rf"{name} cannot be read"):
                read_header(tmp_path / name)


def test_a_link_to_a_file_has_its_header(tmp_path):
    (tmp_path / "blob").write_bytes(ACCEPTED["the header as it is"])
    (tmp_path / "x.safetensors").symlink_to("blob")
    assert [entry.name for entry in read_header(tmp_path / "x.safetensors")] == [
        "first",
        "second",
        "none",
        "third",
    ]
