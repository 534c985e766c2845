"""A small corpus to train a model from nothing that talks afterwards: texts and chats about the
demo's closed world, without an end, decided by seed and index alone.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.writer import make_directory, replacing, require_place
from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.training.data.conversations import (
    Conversation,
    held_out,
    is_held_out,
    training_conversation,
)
from neuron_minimax.training.data.questions import addition, comparison, subtraction
from neuron_minimax.training.data.rows import Row
from neuron_minimax.training.data.world import COUNTRIES, NAMES, SKIES, WORDS, Country

TEXTS_NAME = "texts.jsonl"
CHATS_NAME = "chats.jsonl"
TEXT_SHARE = 0.3  # of the rows; the rest are chats
CHINESE_SHARE = 0.1  # of either
REASONING_SHARE = 0.25  # of the chats: a model has to be able to answer with and without
OF_THE_DEMO = " in the MiniMax-M2 format"
DIGITS = "零一二三四五六七八九"


class CorpusSource:
    """Rows of the corpus: texts to learn words and facts from, and chats to learn to answer.

    Most chats are without reasoning, as most people ask. No held-out question is in them.
    """

    name = "corpus"

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def row(self, index: int) -> Row:
        """Return row `index`, which depends on the seed and the index alone."""
        rng = random.Random(f"corpus {self.seed}:{index}")
        return {"text": text(rng)} if rng.random() < TEXT_SHARE else chat(rng)

    def held_out(self, count: int) -> list[Row]:
        """Return `count` chats whose questions are never trained."""
        return [
            _as_row(conversation, reasoning=False) for conversation in held_out(count, self.seed)
        ]


def text(rng: random.Random) -> str:
    """Draw a text of a few sentences."""
    if rng.random() < CHINESE_SHARE:
        return "".join(f"{sum_in_chinese(rng)[1]}" for _ in range(rng.randint(1, 4)))
    country = rng.choice(COUNTRIES)
    kinds = [_of_country, _of_a_walk, _of_numbers]
    return " ".join(rng.choice(kinds)(rng, country) for _ in range(rng.randint(1, 3)))


def chat(rng: random.Random) -> Row:
    """Draw a chat of one turn or several."""
    if rng.random() < CHINESE_SHARE:
        question, answer = sum_in_chinese(rng)
        asked = {"role": "user", "content": question}
        return {"messages": [asked, {"role": "assistant", "content": answer}], "tools": []}
    return _as_row(training_conversation(rng), reasoning=rng.random() < REASONING_SHARE)


def _as_row(conversation: Conversation, reasoning: bool) -> Row:
    left_out = () if reasoning else ("reasoning_content",)
    messages = [
        {name: value for name, value in message.items() if name not in left_out}
        for message in conversation.messages
    ]
    for message in messages:
        # The demo says of itself which format it has; a model of this corpus has its family's.
        message["content"] = message["content"].replace(OF_THE_DEMO, "")
    return {"messages": messages, "tools": conversation.tools}


def _of_country(rng: random.Random, country: Country) -> str:
    name = country.name
    facts = [
        f"The capital of {name} is {country.capital}.",
        f"{country.capital} is the capital of {name}.",
        f"People in {name} pay with the {country.currency}.",
        f"The currency of {name} is the {country.currency}.",
        f"{name[0].upper()}{name[1:]} is in {country.continent}.",
    ]
    rng.shuffle(facts)
    return " ".join(facts[: rng.randint(2, 4)])


def _of_a_walk(rng: random.Random, country: Country) -> str:
    first, second = rng.sample(NAMES, 2)
    thing, other = rng.sample(WORDS, 2)
    return rng.choice(
        (
            f"{first} and {second} live in {country.capital}. Today it is {rng.choice(SKIES)}.",
            f"{first} has a {thing}, and {second} has a {other}.",
            f'"Where is the {thing}?" asked {first}. "Beside the {other}," said {second}.',
            f"{first} travels to {country.name} with a {thing} and a {other}.",
        )
    )


def _of_numbers(rng: random.Random, country: Country) -> str:
    question = rng.choice((addition, subtraction, comparison))(rng)
    while is_held_out(question.key):
        question = addition(rng)
    return question.answer


def sum_in_chinese(rng: random.Random) -> tuple[str, str]:
    """Draw a sum of numbers up to 99 in Chinese, and its answer."""
    one = rng.randint(1, 99)
    other = rng.randint(1, 99)
    asked = f"{in_chinese(one)}加{in_chinese(other)}"
    return f"{asked}等于几?", f"{asked}等于{in_chinese(one + other)}。"


def in_chinese(number: int) -> str:
    """Spell a number from 0 to 199."""
    hundreds, rest = divmod(number, 100)
    tens, ones = divmod(rest, 10)
    if hundreds:
        joint = "零" if not tens and ones else ""
        return f"{DIGITS[hundreds]}百{joint}" + (in_chinese_tens(tens, ones, "一") if rest else "")
    return in_chinese_tens(tens, ones, "") if rest else DIGITS[0]


def in_chinese_tens(tens: int, ones: int, one_ten: str) -> str:
    """Spell tens and ones; `one_ten` is said before a single ten."""
    counted = one_ten if tens == 1 else DIGITS[tens]
    return (f"{counted}十" if tens else "") + (DIGITS[ones] if ones else "")


def corpus_words(seed: int, rows: int) -> Iterator[str]:
    """Yield the texts of the first rows, and what is said in their chats, for a tokenizer."""
    source = CorpusSource(seed)
    for index in range(rows):
        yield from words_of(source.row(index))


def words_of(row: Row) -> Iterator[str]:
    """Yield everything that a row has in words: its text, or what is said, thought and called."""
    if row.get("text") is not None:
        yield row["text"]
        return
    for tool in row.get("tools") or ():
        yield json.dumps(tool, ensure_ascii=False)
    for message in row["messages"]:
        yield f"{message['role']}\n"
        yield from _texts_in(message.get("content"))
        if message.get("reasoning_content"):
            yield f"\n{message['reasoning_content']}\n"
        for call in message.get("tool_calls") or ():
            yield json.dumps(call["function"], ensure_ascii=False)


def _texts_in(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


@dataclass(frozen=True, kw_only=True)
class CorpusReport(Rendered):
    """A corpus that was written: how many rows are in which file."""

    output: Path
    rows: dict[str, int]

    def render(self) -> str:
        files = (f"{name} with {counted(rows, 'row')}" for name, rows in self.rows.items())
        return f"{self.output}: {', '.join(files)}"


def write_corpus(directory: Path, rows: int, seed: int = 0) -> CorpusReport:
    """Write the first rows of the corpus as texts.jsonl and chats.jsonl.

    Raises TrainingError when other files of these names are there, OSError when they cannot be
    written.
    """
    require_place(directory, TrainingError)
    source = CorpusSource(seed)
    found: dict[str, list[Row]] = {TEXTS_NAME: [], CHATS_NAME: []}
    for index in range(rows):
        row = source.row(index)
        found[TEXTS_NAME if "text" in row else CHATS_NAME].append(row)
    contents = {
        name: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in of_kind).encode()
        for name, of_kind in found.items()
    }
    make_directory(directory)
    for name, content in contents.items():
        path = directory / name
        if path.exists() and path.read_bytes() != content:
            raise TrainingError(
                f"{path} is there already, and is another; choose another directory"
            )
    for name, content in contents.items():
        with replacing(directory / name) as file:
            file.write(content)
    counts = {name: len(of_kind) for name, of_kind in found.items()}
    return CorpusReport(output=directory, rows=counts)
