"""Seeded mutations of bytes, of JSON, of lines of JSON, and of safetensors files.

A case is a target and a seed; each edit draws from a seed of its own, so that a case is made
smaller by leaving edits out.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeAlias

Random: TypeAlias = random.Random
Edit = Callable[[Random, bytes], bytes]
MOST_EDITS = 4


class Kind(Enum):
    """What a file holds, which decides how it is mutated."""

    JSON = "json"
    LINES = "lines"
    SAFETENSORS = "safetensors"
    TEXT = "text"
    BYTES = "bytes"


@dataclass(frozen=True)
class Raw:
    """JSON text that stands for itself: what no Python value is written as."""

    text: str


DEEP = 200_000
# What readers trip over, as JSON text.
INTERESTING = (
    "null",
    "true",
    "false",
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "0.5",
    "1.0",
    "1e3",
    "1e999",
    "-1e999",
    "1e-999",
    "NaN",
    "Infinity",
    "-Infinity",
    str(2**31),
    str(2**53 + 1),
    str(2**63),
    str(-(2**63)),
    str(2**64),
    "1" + "0" * 400,
    "9" * 5000,
    '""',
    '"0"',
    '"a"',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J\\u001b]0;owned\\u0007"',
    '"\x1b[31mred"',
    '"\\u202egnp.exe"',
    '"\\u009b31m"',
    '"a\\nerror: b\\rc"',
    '"../../outside/planted"',
    '"/proc/self/environ"',
    '"."',
    '".."',
    '"a/b"',
    '"(a+)+$"',
    '"' + "x" * 100_000 + '"',
    "[]",
    "{}",
    "[[]]",
    "[null]",
    "[1]",
    "[1,2]",
    '{"a":1}',
    '{"__proto__":null}',
    "[" * DEEP + "]" * DEEP,
    '{"a":' * DEEP + "1" + "}" * DEEP,
    "[" * 600 + "]" * 600,
    "[" + "0," * 100_000 + "0]",
)
INTERESTING_BYTES = (
    b"\x00",
    b"\xff",
    b"\x1b[2J",
    b"\x1b]0;x\x07",
    b"\xed\xa0\x80",  # a lone surrogate, as UTF-8 does not allow it
    b"\xef\xbb\xbf",
    b"\xfe\xff",
    b"\r",
    b"\n",
    b"\\u0000",
    b"\\ud800",
    b"NaN",
    b"1e999",
    b"-1",
    b"{",
    b"}",
    b"[",
    b'"',
    b"/*",
    b"A" * 100_000,
)


def mutate(kind: Kind, data: bytes, seed: str, edits: Sequence[int] | None = None) -> bytes:
    """Return the data with the edits of a seed, or with these of them."""
    for number in range(edit_count(seed)) if edits is None else edits:
        rng = random.Random(f"{seed}:{number}")
        data = EDITS[kind](rng, data)
    return data


def edit_count(seed: str) -> int:
    """Return how many edits a seed makes: mostly one."""
    return random.Random(seed).choice((1, 1, 1, 2, 2, MOST_EDITS))


# Bytes.
def _flip(rng: Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _set(rng: Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + rng.choice((b"\x00", b"\xff", rng.randbytes(1))) + data[place + 1 :]


def _insert(rng: Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    new = rng.choice((rng.choice(INTERESTING_BYTES), rng.randbytes(rng.randint(1, 8))))
    return data[:place] + new + data[place:]


def _span(rng: Random, data: bytes) -> tuple[int, int]:
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.choice((1, 2, 8, 64, 4096)))


def _delete(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def _duplicate(rng: Random, data: bytes) -> bytes:
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * rng.choice((1, 1, 2, 50)) + data[end:]


def _truncate(rng: Random, data: bytes) -> bytes:
    return data[
        : rng.choice((0, 1, 7, 8, 9, len(data) // 2, len(data) - 1, rng.randrange(len(data))))
    ]


def _splice(rng: Random, data: bytes) -> bytes:
    """Put one stretch in the place of another."""
    start, end = _span(rng, data)
    place = rng.randrange(len(data))
    return data[:place] + data[start:end] + data[place + end - start :]


def _append(rng: Random, data: bytes) -> bytes:
    return data + rng.choice((b"\x00", b"\n", b"}", b"x", b" " * 4096, rng.randbytes(16)))


BYTE_EDITS: tuple[Edit, ...] = (
    _flip, _flip, _set, _insert, _delete, _duplicate, _truncate, _splice, _append,
)  # fmt: skip


def edit_bytes(rng: Random, data: bytes) -> bytes:
    """One edit of bytes as such."""
    if not data:
        return rng.choice(INTERESTING_BYTES)
    return rng.choice(BYTE_EDITS)(rng, data)


# JSON. Objects are lists of pairs while they are edited: a key may come twice.
class Pairs(list[tuple[Any, Any]]):
    pass


def edit_json(rng: Random, data: bytes) -> bytes:
    """One edit of a key or a value at any place; one of bytes now and then, and where the data is
    no JSON.
    """
    if rng.random() < 0.15:
        return edit_bytes(rng, data)
    try:
        document = json.loads(data, object_pairs_hook=Pairs)
        return written(_edited(rng, document)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, OverflowError):
        return edit_bytes(rng, data)


def written(value: Any) -> str:
    """Return JSON text, objects from pairs and `Raw` as it is."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{written(key)}:{written(inner)}" for key, inner in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(written(inner) for inner in value) + "]"
    return json.dumps(value)


def _places(document: Any) -> list[tuple[Any, int]]:
    """Return every (container, number of its item)."""
    found = []
    waiting = [document]
    while waiting:
        container = waiting.pop()
        for number, item in enumerate(container):
            found.append((container, number))
            value = item[1] if isinstance(container, Pairs) else item
            if isinstance(value, list):
                waiting.append(value)
    return found


def _edited(rng: Random, document: Any) -> Any:
    places = _places(document) if isinstance(document, list) else []
    if not places or rng.random() < 0.03:
        return Raw(rng.choice(INTERESTING))
    container, number = _drawn(rng, places)
    in_object = isinstance(container, Pairs)
    item = container[number]
    value = item[1] if in_object else item
    action = rng.randrange(10)
    if action < 5:
        new = _other_value(rng, value, places)
        container[number] = (item[0], new) if in_object else new
    elif action == 5:
        del container[number]
    elif action == 6:
        twin = _other_value(rng, value, places) if rng.random() < 0.5 else value
        place = rng.choice((number, number + 1, len(container)))
        container.insert(place, (item[0], twin) if in_object else twin)
    elif action == 7 and in_object:
        container[number] = (rng.choice((Raw(_text(rng)), rng.choice("abc"), item[0] + "x")), value)
    elif action == 8:
        new = Raw(rng.choice(INTERESTING))
        container.insert(number, (Raw(_text(rng)), new) if in_object else new)
    else:
        _swap(rng, container, number, places)
    return document


def _drawn(rng: Random, places: list[tuple[Any, int]]) -> tuple[Any, int]:
    """Draw a place, those in small containers more often: a header has one list for a thousand
    entries of the same kind.
    """
    drawn = [rng.choice(places) for _ in range(3)]
    if rng.random() < 0.5:
        return drawn[0]
    return min(drawn, key=lambda place: len(place[0]))


def _text(rng: Random) -> str:
    return rng.choice([text for text in INTERESTING if text.startswith('"')])


def _other_value(rng: Random, value: Any, places: list[tuple[Any, int]]) -> Any:
    """Draw an interesting value, one near this one, or one from elsewhere in the document."""
    draw = rng.random()
    if draw < 0.5:
        return Raw(rng.choice(INTERESTING))
    if draw < 0.65:
        return _value_at(*rng.choice(places))
    if isinstance(value, bool):
        return rng.choice((int(value), not value, str(value)))
    if isinstance(value, int):
        return rng.choice(
            (value + 1, value - 1, value * 2, -value, float(value), str(value), [value])
        )
    if isinstance(value, float):
        return rng.choice((-value, value * 1e300, value / 1e300, str(value), [value]))
    if isinstance(value, str):
        return rng.choice((value + " ", value.upper(), value[:-1], [value], None))
    if isinstance(value, Pairs):
        return rng.choice(([inner for _, inner in value], [value], None))
    if isinstance(value, list):
        return rng.choice((value[::-1], value + value, value[:-1], [value], None))
    return rng.choice((0, "", False))


def _value_at(container: Any, number: int) -> Any:
    """Return a copy: a value that is put into itself has no end."""
    item = container[number]
    return copy.deepcopy(item[1] if isinstance(container, Pairs) else item)


def _swap(rng: Random, container: Any, number: int, places: list[tuple[Any, int]]) -> None:
    """Exchange a value with one elsewhere in the document."""
    other, there = rng.choice(places)
    mine = _value_at(container, number)
    theirs = _value_at(other, there)
    for target, place, value in ((container, number, theirs), (other, there, mine)):
        target[place] = (target[place][0], value) if isinstance(target, Pairs) else value


# Files made of JSON.
def edit_lines(rng: Random, data: bytes) -> bytes:
    """One edit of one line of JSON, or of all bytes."""
    lines = data.split(b"\n")
    if rng.random() < 0.2:
        return edit_bytes(rng, data)
    place = rng.randrange(len(lines))
    return b"\n".join([*lines[:place], edit_json(rng, lines[place]), *lines[place + 1 :]])


def edit_safetensors(rng: Random, data: bytes) -> bytes:
    """One edit of the header as JSON (its length goes with it), of the length, of the data, or of
    all bytes.
    """
    length = int.from_bytes(data[:8], "little")
    draw = rng.random()
    if len(data) < 8 + length or draw < 0.1:
        return edit_bytes(rng, data)
    text = data[8 : 8 + length]
    rest = data[8 + length :]
    if draw < 0.2:
        return edit_bytes(rng, data[:8])[:8].ljust(8, b"\0") + data[8:]
    if draw < 0.3:
        return data[: 8 + length] + edit_bytes(rng, rest)
    text = edit_json(rng, text)
    return len(text).to_bytes(8, "little") + text + rest


EDITS: dict[Kind, Edit] = {
    Kind.JSON: edit_json,
    Kind.LINES: edit_lines,
    Kind.SAFETENSORS: edit_safetensors,
    Kind.TEXT: edit_bytes,
    Kind.BYTES: edit_bytes,
}
