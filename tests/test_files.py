"""Files from outside: what is opened, what is parsed, and when a file is another than recorded."""

import os
import socket
from dataclasses import dataclass

import pytest
from pydantic import ConfigDict

from neuron_minimax.errors import CheckpointError, printable
from neuron_minimax.files import (
    JSON_VALUES,
    differences,
    is_plain_name,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    stamps,
)


@dataclass(frozen=True, kw_only=True)
class Thing:
    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    count: int
    share: float = 1.0
    names: tuple[str, ...] = ()


def parse(text: bytes) -> Thing:
    return parse_json(text, Thing, "thing.json", CheckpointError, "make it again")


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "socket"))
        for path in (tmp_path / "pipe", tmp_path / "socket", tmp_path, "/dev/zero"):
            with pytest.raises(OSError, match=r"regular|directory|address"):
                open_regular(path)


def test_a_link_to_a_regular_file_is_opened(tmp_path):
    (tmp_path / "blob").write_bytes(b"content")
    (tmp_path / "name").symlink_to("blob")
    assert read_bytes(tmp_path / "name") == b"content"


def test_a_file_beyond_the_limit_is_refused(tmp_path):
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(OSError, match=f"{1 << 40} bytes, at most 100 "):
        read_bytes(tmp_path / "large", 100)


def test_json_becomes_the_declared_type():
    assert parse(b'{"count": 3, "names": ["a"]}') == Thing(count=3, names=("a",))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b'{"count": "3"}',
        b'{"count": true}',
        b'{"count": 3.0}',
        b'{"count": 1, "share": NaN}',
        b'{"count": 1, "share": 1e999}',
        b'{"count": ' + b"9" * 10_000 + b"}",
        b'{"count": 1, "extra": 2}',
        b'{"count": 1, "names": ["\\ud800"]}',
        b'{"count": 1, "names": ["\xed\xa0\x80"]}',
        b'{"count": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_json_of_another_kind_is_one_message(text):
    with pytest.raises(
        CheckpointError, match=r"^thing\.json cannot be used \(.+\); make it again$"
    ):
        parse(text)


def test_more_values_than_fit_into_memory_are_refused_before_they_are_made():
    with pytest.raises(CheckpointError, match=f"more than {JSON_VALUES} values"):
        parse(b"[" + b"[]," * JSON_VALUES + b"[]]")


def test_a_missing_file_is_left_to_the_caller_and_another_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none", Thing, CheckpointError, "make it again")
    with pytest.raises(CheckpointError, match=r"cannot be read \(Is a directory\); make it again"):
        read_json(tmp_path, Thing, CheckpointError, "make it again")


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/x", "a/b", "a/", "a\0b"])
def test_a_path_is_no_plain_name(name):
    assert not is_plain_name(name)


def test_stamps_tell_what_changed(tmp_path):
    for name in ("same", "gone", "longer", "rewritten", "pipe"):
        (tmp_path / name).write_bytes(b"content")
    recorded = stamps(tmp_path, sorted(path.name for path in tmp_path.iterdir()))
    assert differences(tmp_path, recorded) == {}
    (tmp_path / "gone").unlink()
    (tmp_path / "longer").write_bytes(b"contents")
    os.utime(tmp_path / "rewritten", ns=(1, 1))
    (tmp_path / "pipe").unlink()
    os.mkfifo(tmp_path / "pipe")
    assert differences(tmp_path, recorded) == {
        "gone": "is missing",
        "longer": "has 8 bytes, not 7",
        "rewritten": "was modified",
        "pipe": "cannot be used (it is no regular file)",
    }


def test_a_message_cannot_command_a_terminal():
    named = "a\x1b[2Jb\x9bc\u202ed\ud800e\u2028f\r日本\ng"
    assert printable(named) == "a\\x1b[2Jb\\x9bc\\u202ed\\ud800e\\u2028f\\r日本\ng"
    assert str(CheckpointError(named)) == printable(named)
