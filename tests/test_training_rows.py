"""Rows of training data: the forms that people publish come out as one, and what is no row is named
by its line.
"""

import gzip
import hashlib
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from neuron_minimax.errors import TrainingError
from neuron_minimax.training.data.rows import parse_row
from neuron_minimax.training.data.sources import JsonLines

ROW = '{"text": "灰色"}\n'
CALL = {"name": "sky", "arguments": {"city": "Oslo"}}
OPENAI_CALL = {"type": "function", "function": CALL}
TOOL = {"type": "function", "function": {"name": "sky", "parameters": {}}}
# One chat, and how it looks in each form.
CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "天气怎么样?"},
        {"role": "assistant", "content": "", "tool_calls": [OPENAI_CALL]},
        {"role": "tool", "content": "grey"},
        {"role": "assistant", "content": "Grey.", "reasoning_content": "It said grey."},
    ],
    "tools": [TOOL],
}
FORMS: dict[str, dict[str, Any]] = {
    "messages": CHAT,
    "messages with JSON in strings": {
        "messages": [
            *CHAT["messages"][:2],
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "id": "call_1",
                        "type": "function",
                        "function": {"name": "sky", "arguments": '{"city": "Oslo"}'},
                    }
                ],
            },
            *CHAT["messages"][3:],
        ],
        "tools": json.dumps([TOOL]),
    },
    "ShareGPT": {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "天气怎么样?"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "grey"},
            {"from": "gpt", "value": "Grey.", "reasoning_content": "It said grey."},
        ],
        "tools": json.dumps([TOOL]),
    },
    "MiniMind": {
        "conversations": [
            {"role": "system", "content": "Be brief.", "tools": json.dumps([TOOL])},
            {"role": "user", "content": "天气怎么样?"},
            {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
            {"role": "tool", "content": "grey"},
            {"role": "assistant", "content": "Grey.", "reasoning_content": "It said grey."},
        ]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_chat_is_read_as_the_same_messages(form: str) -> None:
    assert parse_row(FORMS[form], "here") == CHAT


@pytest.mark.parametrize("text", ["", "从前有座山,山上有座庙。🏔️", "  a\n\nb "])
def test_a_text_is_read_as_it_is(text: str) -> None:
    assert parse_row({"text": text}, "here") == {"text": text}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "has neither 'text' nor 'messages' nor 'conversations' .*: prompt"),
        ({"text": 1}, "'text' that is none"),
        ({"conversations": "x"}, "'conversations' that are none"),
        ({"conversations": [{"from": "bard", "value": "x"}]}, "a turn from 'bard'; .*human.*gpt"),
        ({"conversations": [{"value": "x"}]}, "a turn from None"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "role 'wizard'; expected system, dev"),
        ({"conversations": [{"from": "gpt", "value": 1}]}, "'conversations' that are none"),
        ({"conversations": [{"from": "function_call", "value": "sky()"}]}, "'function_call' of"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": "[}"}, "'tools' of here"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [1]}, "'tools' that are none"),
        (
            {"messages": [{"role": "tool", "content": "", "tool_calls": [1]}]},
            "'tool_calls' that are",
        ),
        (
            {
                "messages": [
                    {
                        "role": "tool",
                        "content": "",
                        "tool_calls": [{"name": "f", "arguments": "[]"}],
                    }
                ]
            },
            "'arguments' that are none",
        ),
    ],
)
def test_what_is_no_row_is_told_with_what_was_expected(row: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        parse_row(row, "here")


def test_fields_that_nothing_reads_are_counted(tmp_path: Path) -> None:
    rows = [
        {"text": "a", "id": 1, "source": "web"},
        {"text": "b", "id": None},
        {"conversations": [{"from": "human", "value": "c", "weight": 0}], "id": 3},
        {"messages": [{"role": "user", "content": "d"}], "text": "also"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = JsonLines.read(path)
    assert source.unused == {"id": 2, "source": 1, "conversations.weight": 1, "text": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 cannot be used"),
        ('{"prompt": "x"}', "line 2 has neither"),
        ("[]", "line 2 cannot be used"),
    ],
)
def test_a_bad_row_is_named_by_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(TrainingError, match=message):
        JsonLines.read(path)
    path.write_text("")
    with pytest.raises(TrainingError, match="no rows"):
        JsonLines.read(path)


def write_texts(path: Path, texts: list[str]) -> JsonLines:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return JsonLines.read(path)


def test_the_held_out_share_is_disjoint_and_hangs_on_content_alone(tmp_path: Path) -> None:
    texts = [f"text {number % 90}" for number in range(100)]  # ten of them stand twice
    source = write_texts(tmp_path / "rows.jsonl", texts)
    trained, held = ({row["text"] for row in part.rows} for part in source.split(0.1))
    assert not trained & held
    assert trained | held == set(texts)
    assert 8 <= len(held) <= 12
    shuffled = write_texts(tmp_path / "other.jsonl", texts[::-1])
    assert {row["text"] for row in shuffled.split(0.1)[1].rows} == held
    part = source.split(0.1)[1]
    assert all(
        source.rows[line - 1] == row for line, row in zip(part.lines, part.rows, strict=True)
    )
    assert part.where(0).endswith(f"line {part.lines[0]}")
    assert "held out" in part.name


@pytest.mark.parametrize("texts", [["one"], ["the same"] * 9])
def test_a_file_of_which_nothing_can_be_held_out_is_refused(tmp_path: Path, texts) -> None:
    source = write_texts(tmp_path / "rows.jsonl", texts)
    with pytest.raises(TrainingError, match=r"has 1 different row, of which a share of 0\.5 can"):
        source.split(0.5)
    with pytest.raises(TrainingError, match=r"held-out share is 1\.5"):
        source.split(1.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW.encode("utf-16"), "is UTF-16; expected text in UTF-8: iconv -f UTF-16 -t UTF-8 "),
        (ROW.encode("utf-16-le"), "is UTF-16 without its mark; .* iconv -f UTF-16LE -t UTF-8 "),
        (ROW.encode("utf-16-be"), "is UTF-16 without its mark; .* iconv -f UTF-16BE -t UTF-8 "),
        (ROW.encode("utf-32"), "is UTF-32; "),
        (gzip.compress(ROW.encode()), "is compressed by gzip; .*: gunzip --keep "),
    ],
    ids=["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gzip"],
)
def test_a_file_that_is_no_utf_8_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "my rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=message) as refused:
        JsonLines.read(path)
    command = str(refused.value).split(": ")[-1]
    if command.startswith("iconv"):
        subprocess.run(command, shell=True, check=True)
        assert JsonLines.read(tmp_path / "my rows.utf8.jsonl").rows == ({"text": "灰色"},)


def test_a_byte_order_mark_of_utf_8_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(ROW.encode("utf-8-sig"))
    found = JsonLines.read(path)
    assert found.rows == ({"text": "灰色"},)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes("\ufeff".encode())
    with pytest.raises(TrainingError, match="has no rows"):
        JsonLines.read(path)
