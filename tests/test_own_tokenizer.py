"""Tokenizers of one's own: nothing is lost through them, in any language; transformers, the trainer
and the chat formats of every family take them; a corpus that is too small is named.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from neuron_minimax.cli import main
from neuron_minimax.errors import TrainingError
from neuron_minimax.families import FAMILIES
from neuron_minimax.generation.chat_formats import CHAT_FORMATS
from neuron_minimax.generation.events import collect
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.training.data.corpus import CorpusSource, in_chinese, write_corpus
from neuron_minimax.training.data.encoding import Encoder
from neuron_minimax.training.data.sources import DemoSource, JsonLines
from neuron_minimax.training.data.tokenizer import STYLES, load_tokenizer, make_tokenizer
from neuron_minimax.training.data.windows import Example

FORMATS = sorted({family.chat_format for family in FAMILIES.values()})
VOCAB_SIZE = 400
ASKED = {"role": "user", "content": "天气怎么样?"}
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"city": "奥斯陆"}}}
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and chats in English and Chinese."""
    directory = tmp_path_factory.mktemp("corpus")
    rows: list[dict[str, Any]] = [
        {"text": "从前有座山,山上有座庙,庙里有个老和尚在讲故事。🏔️"},
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好!"}]},
        *(DemoSource(0).row(index) for index in range(150)),
    ]
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer of each chat format, which is named as a family is."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in FORMATS:
        report = make_tokenizer(root / name, [corpus], name, VOCAB_SIZE)
        assert report.tokens == VOCAB_SIZE
    return {name: root / name for name in FORMATS}


def test_every_family_s_chat_format_has_a_style() -> None:
    assert sorted(STYLES) == FORMATS


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=60), st.sampled_from(FORMATS))
@example("从前有座山 🏔️👩‍👩‍👧 e\u0301 \r\n\t \u00a0\u2028 ﷽ 47.11", "minimind")
@example("<|im_end|> <think></think>]~b]", "qwen3")
@example("  two  spaces , and a stop .  ", "minimax_m2")
def test_every_text_comes_back_as_it_was(made: dict[str, Path], text: str, name: str) -> None:
    tokenizer = loaded(made[name])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert all(0 <= token < VOCAB_SIZE for token in ids)


LOADED: dict[Path, Any] = {}


def loaded(directory: Path) -> Any:
    return LOADED.setdefault(directory, load_tokenizer(directory))


@pytest.mark.parametrize("name", FORMATS)
def test_control_tokens_and_tags_are_one_token_each_where_the_family_has_them(made, name) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(made[name]))
    style = STYLES[name]
    numbers = tokenizer.convert_tokens_to_ids([*style.control, *style.tags])
    first = 0 if style.control_first else VOCAB_SIZE - len(numbers)
    assert numbers[: len(style.control)] == list(range(first, first + len(style.control)))
    assert numbers[len(style.control) :] == list(range(VOCAB_SIZE - len(style.tags), VOCAB_SIZE))
    chat_format = CHAT_FORMATS[name]
    assert tokenizer.eos_token == chat_format.end_of_turn
    if name == "minimind":  # MiniMind publishes these numbers
        assert tokenizer.eos_token_id == chat_format.end_of_turn_id == 2
        assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (1, 0)
    assert tokenizer.decode(numbers, skip_special_tokens=True) == "".join(style.tags)


@pytest.mark.parametrize("name", FORMATS)
def test_generation_stops_at_the_end_of_turn_whatever_config_json_says(
    made, name, tmp_path
) -> None:
    for path in made[name].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    # As the trainer leaves it beside a model of this family: numbers of another vocabulary.
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "eos_token_id": 77}))
    text = TextTokenizer.from_dir(tmp_path)
    assert text.stop_token_ids[0] == loaded(made[name]).eos_token_id != 77
    assert text.chat_format is CHAT_FORMATS[name] or name == "minimind"


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("reasoning", ["", "It said so."])
def test_what_the_template_writes_the_chat_format_reads(made, name: str, reasoning: str) -> None:
    tokenizer = loaded(made[name])
    reply = {"role": "assistant", "content": "灰色。", "tool_calls": [CALL]}
    if reasoning:
        reply["reasoning_content"] = reasoning
    example = Encoder(tokenizer, 1000).encode({"messages": [ASKED, reply], "tools": TOOLS})
    [written] = example.examples
    prompt, answer = halves(tokenizer, written)
    chat_format = CHAT_FORMATS[name]
    parser = chat_format.parser(in_reasoning=chat_format.opens_reasoning(prompt), tools=TOOLS)
    end = chat_format.end_of_turn
    message = collect(parser.feed(answer.removesuffix(end)) + parser.finish())
    assert answer.endswith(end)
    assert message.content == "灰色。"
    assert message.reasoning == (reasoning if name != "qwen2" else "")  # which has none
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == [
        ("sky", {"city": "奥斯陆"})
    ]
    assert '"sky"' in prompt  # the tool is offered


def halves(tokenizer: Any, example: Example) -> tuple[str, str]:
    """What stands before the first learned token, and what is learned."""
    first = example.learned.index(True)
    learned = [t for t, is_learned in zip(example.ids, example.learned, strict=True) if is_learned]
    return tokenizer.decode(example.ids[:first]), tokenizer.decode(learned)


def test_the_templates_close_or_open_the_reasoning_as_their_families_do(made) -> None:
    def prompt(name: str, **more: Any) -> str:
        text = loaded(made[name]).apply_chat_template(
            [ASKED], tokenize=False, add_generation_prompt=True, **more
        )
        return re.split(r"<\|im_start\|>assistant\n", text)[1]

    closed = "<think>\n\n</think>\n\n"
    assert [prompt("qwen2"), prompt("qwen3"), prompt("minimind")] == ["", "", closed]
    assert prompt("qwen3", enable_thinking=False) == closed
    assert prompt("minimind", open_thinking=True) == "<think>\n"


def test_the_same_texts_give_the_same_bytes_and_are_recognized(made, corpus, tmp_path, capsys):
    arguments = ["--data", str(corpus), "--vocab-size", str(VOCAB_SIZE), "--family", "qwen3"]
    assert main(["tokenizer", str(tmp_path / "out"), *arguments]) == 0
    assert "out written: 400 tokens from" in capsys.readouterr().out
    for path in (tmp_path / "out").iterdir():
        assert path.read_bytes() == (made["qwen3"] / path.name).read_bytes(), path.name
    assert main(["tokenizer", str(tmp_path / "out"), *arguments]) == 0
    assert "out is up to date" in capsys.readouterr().out
    assert main(["tokenizer", str(tmp_path / "out"), *arguments[:-1], "minimind"]) == 1
    assert "out holds another tokenizer" in capsys.readouterr().err


def test_lines_of_text_are_a_corpus_too(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text("从前有座山\n山上有座庙\n" * 20)
    report = make_tokenizer(tmp_path / "out", [path], "minimind", 275)
    assert report.texts == 40
    ids = loaded(tmp_path / "out").encode("从前有座山", add_special_tokens=False)
    assert len(ids) < 8  # of 15 bytes


@pytest.mark.parametrize(
    ("content", "vocab_size", "family", "message"),
    [
        ("", 400, "minimind", r"rows\.txt has no text in it; expected lines of text, or rows"),
        (" \n\t\n", 400, "minimind", r"rows\.txt has no text in it"),
        ("ab\n", 400, "minimind", r"enough for 263 tokens, not for 400: .*; expected more text$"),
        ("one\n".encode("utf-16"), 400, "qwen3", r"rows\.txt is UTF-16; .* UTF-8: iconv -f UTF-16"),
        ("one two three\n", 6400, "minimind", r"rows\.txt has enough for \d+ tokens, not for 6400"),
        ("one\n", 263, "minimind", "vocabulary's size is 263; expected more than 263"),
        ("one\n", 400, "gpt2", "no family 'gpt2'; expected minimax_m2, .*minimind"),
        (b"\xff\n", 400, "qwen3", r"rows\.txt line 1 is no UTF-8"),
    ],
)
def test_a_corpus_that_is_too_small_and_the_like_are_named(
    tmp_path: Path, content: str | bytes, vocab_size: int, family: str, message: str
) -> None:
    path = tmp_path / "rows.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TrainingError, match=message):
        make_tokenizer(tmp_path / "out", [path], family, vocab_size)
    assert not (tmp_path / "out").exists()


def test_the_size_that_a_refusal_names_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt"
    path.write_text("one two three one two three\n" * 3)
    with pytest.raises(TrainingError) as refused:
        make_tokenizer(tmp_path / "out", [path], "minimind", 6400)
    [size] = re.findall(r"--vocab-size (\d+)", str(refused.value))
    assert make_tokenizer(tmp_path / "out", [path], "minimind", int(size)).tokens == int(size)


def test_files_of_ones_own_are_not_replaced_by_the_corpus(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(TrainingError, match=r"texts\.jsonl is there already, and is another"):
        write_corpus(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["texts.jsonl"]
    assert (tmp_path / "texts.jsonl").read_text() == '{"text": "mine"}\n'
    write_corpus(tmp_path / "corpus", 20)
    write_corpus(tmp_path / "corpus", 20)  # the same again


def test_the_project_s_corpus_is_decided_by_its_seed_and_has_every_kind_of_row(
    made, tmp_path: Path, capsys
) -> None:
    assert main(["corpus", str(tmp_path), "--rows", "300", "--seed", "3"]) == 0
    texts, chats = (JsonLines.read(tmp_path / name) for name in ("texts.jsonl", "chats.jsonl"))
    assert 60 < len(texts.rows) < 120
    assert len(texts.rows) + len(chats.rows) == 300
    again = [CorpusSource(3).row(index) for index in range(300)]
    assert [row["text"] for row in texts.rows] == [row["text"] for row in again if "text" in row]
    written = write_corpus(tmp_path / "other", 300, seed=4)
    assert written.rows != {"texts.jsonl": len(texts.rows), "chats.jsonl": len(chats.rows)}
    replies = [m for row in chats.rows for m in row["messages"] if m["role"] == "assistant"]
    with_reasoning = sum("reasoning_content" in reply for reply in replies)
    assert 0.1 < with_reasoning / len(replies) < 0.4
    assert any(re.search("[一-龥]", reply["content"]) for reply in replies)
    assert not any("MiniMax" in reply["content"] for reply in replies)
    encoder = Encoder(loaded(made["minimind"]), 1000)
    for row in (*texts.rows, *chats.rows):
        assert encoder.encode(row).examples


def test_numbers_are_spelled_in_chinese_as_they_are_said() -> None:
    spelled = {
        0: "零", 7: "七", 10: "十", 11: "十一", 20: "二十", 99: "九十九", 100: "一百",
        101: "一百零一", 110: "一百一十", 115: "一百一十五", 150: "一百五十", 198: "一百九十八",
    }  # fmt: skip
    assert {number: in_chinese(number) for number in spelled} == spelled
    assert len({in_chinese(number) for number in range(200)}) == 200
