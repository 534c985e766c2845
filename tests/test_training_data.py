"""The demo's conversations: the split, the answers, and the masks of what is learned."""

import contextlib
import io
import random
import re
from collections import Counter

import pytest

from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError
from neuron_minimax.training.data.conversations import (
    KINDS,
    Conversation,
    demo_conversation,
    held_out,
    is_held_out,
)
from neuron_minimax.training.data.encoding import Encoder, micro_batches
from neuron_minimax.training.data.questions import GENERATORS, Question
from neuron_minimax.training.data.sources import DemoSource
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.data.world import COUNTRIES

TRAINED = 6000


@pytest.fixture(scope="module")
def trained() -> list[Conversation]:
    return [demo_conversation(0, index) for index in range(TRAINED)]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(DEMO), 512)


def asked(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "user"]


def drawn(kind: str, count: int = 300) -> list[Question]:
    rng = random.Random(kind)
    return [GENERATORS[kind](rng) for _ in range(count)]


def test_no_key_of_a_training_conversation_is_held_out(trained: list[Conversation]) -> None:
    greetings = {
        c.key for c in trained if c.kind == "small talk"
    }  # fixed phrases, never asked as a test
    assert len(greetings) < 10
    assert not [key for c in trained for key in c.keys if is_held_out(key) and key not in greetings]


def test_no_held_out_question_is_asked_in_training_in_the_same_words(
    trained: list[Conversation],
) -> None:
    trained_texts = {text for conversation in trained for text in asked(conversation)}
    single = [c for c in held_out(500, 2026) if c.kind not in ("chat", "tool answer")]
    assert len(single) > 400
    assert not [text for c in single for text in asked(c) if text in trained_texts]


def test_no_held_out_follow_up_is_trained_after_the_same_turn(trained: list[Conversation]) -> None:
    def turns(messages: list[dict]) -> set[tuple[str, ...]]:
        contents = [message["content"] for message in messages]
        return {tuple(contents[start : start + 3]) for start in range(0, len(contents) - 3, 2)}

    seen = set().union(*(turns(c.messages) for c in trained))
    chats = [c for c in held_out(500, 2026) if c.kind == "chat"]
    assert len(chats) > 30
    assert not [c for c in chats if tuple(m["content"] for m in c.messages[-4:-1]) in seen]


def test_no_sum_of_a_held_out_pair_is_trained_in_either_order(trained: list[Conversation]) -> None:
    def pairs(conversations: list[Conversation]) -> set[tuple[int, ...]]:
        replies = [
            m["content"] for c in conversations for m in c.messages if m["role"] == "assistant"
        ]
        found = (re.fullmatch(r"(\d+) \+ (\d+) = \d+\.", reply) for reply in replies)
        return {tuple(sorted(map(int, match.groups()))) for match in found if match}

    tested = pairs([c for c in held_out(500, 2026) if c.kind == "sum"])
    assert len(tested) > 30
    assert not tested & pairs(trained)


def test_a_focus_makes_half_of_the_conversations_of_its_kinds_and_none_of_them_held_out() -> None:
    conversations = [
        demo_conversation(0, index, focus=("python", "tool answer")) for index in range(1000)
    ]
    focused = [c for c in conversations if c.kind in ("python", "tool answer")]
    assert 470 < len(focused) < 600
    assert not any(is_held_out(key) for c in focused for key in c.keys)
    with pytest.raises(TrainingError, match="no kind of question 'sums'; expected capital"):
        demo_conversation(0, 0, focus=("sums",))


def test_held_out_questions_are_distinct_and_of_all_kinds_in_equal_shares() -> None:
    conversations = held_out(500, 2026)
    counts = Counter(c.kind for c in conversations)
    assert set(counts) == set(KINDS)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert len({c.key for c in conversations}) == 500
    assert all(is_held_out(c.key) for c in conversations)


def test_every_fact_is_trained_in_some_phrasing(trained: list[Conversation]) -> None:
    replies = {message["content"] for c in trained for message in c.messages}
    for country in COUNTRIES:
        assert f"The capital of {country.name} is {country.capital}." in replies
        assert f"The currency of {country.name} is the {country.currency}." in replies


def test_a_conversation_depends_on_seed_and_index_alone() -> None:
    later = demo_conversation(3, 17)
    assert later == demo_conversation(3, 17)
    assert later != demo_conversation(4, 17)
    assert held_out(40, 1) == held_out(40, 1)


@pytest.mark.parametrize("kind", ["sum", "difference"])
def test_sums_and_differences_and_their_steps_are_right(kind: str) -> None:
    for question in drawn(kind):
        terms, result = question.answer.rstrip(".").split(" = ")
        assert eval(terms) == int(result)
        numbers = sorted(re.findall(r"\d+", question.text))
        assert numbers == sorted(re.findall(r"\d+", terms))
        for step in question.reasoning.splitlines():
            left, right = step.split("=")
            assert eval(left) == int(right)


def test_sorted_and_reversed_lists_are_right() -> None:
    for question in drawn("sort"):
        items = re.findall(r"\d", question.text)
        found = question.answer.removeprefix("Sorted: ").split()
        downwards = "descending" in question.text or "largest to smallest" in question.text
        assert found == sorted(items, reverse=downwards)
    for question in drawn("reverse"):
        count = len(question.answer.split()) - 1
        assert question.answer.split()[1:] == question.text.split()[-count:][::-1]


def test_comparisons_are_right() -> None:
    questions = drawn("compare")
    of_lists = [question for question in questions if "list" in question.text]
    of_numbers = [question for question in questions if "list" not in question.text]
    assert min(len(of_lists), len(of_numbers)) > 50
    for question in of_lists:
        lists = [[int(n) for n in re.findall(r"\d", part)] for part in question.text.split(" or ")]
        measure = max if "maximum" in question.text else len
        winner = "first" if measure(lists[0]) > measure(lists[1]) else "second"
        assert question.answer.startswith(f"The {winner} list")
    for question in of_numbers:
        numbers = [int(n) for n in re.findall(r"\d+", question.text)]
        best = max(numbers) if "larger" in question.text else min(numbers)
        assert question.answer.startswith(f"{best} is ")


def test_letter_counts_are_right() -> None:
    for question in drawn("count"):
        letter, word = re.fullmatch(r"count: (\w) (\w+)", question.key).groups()  # type: ignore[union-attr]
        assert " ".join(word) in question.text
        assert f" {letter} " in question.answer
        assert int(re.findall(r"\d+", question.answer)[0]) == word.count(letter)


def test_python_one_liners_run_and_print_what_was_asked() -> None:
    checked = set()
    for question in drawn("python"):
        if "random" in question.answer:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(question.answer)
        output = printed.getvalue().strip()
        task = question.key
        number = int((re.findall(r"\d+", task) or ["0"])[0])
        word = (re.findall(r"the word (\w+)", task) or [""])[0]
        assert output
        wanted = {
            "squares": str([x**2 for x in range(number)]),
            "the sum of": str(number * (number - 1) // 2),
            "backwards": "".join(reversed(word)),
            "length": str(len(word)),
            "capital letters": word.upper(),
        }
        for phrase in [phrase for phrase in wanted if phrase in task]:
            assert output == wanted[phrase]
            checked.add(phrase)
    assert checked == {"squares", "the sum of", "backwards", "length", "capital letters"}


def test_tool_calls_name_an_offered_tool_with_arguments_of_its_schema() -> None:
    types = {"string": str, "integer": int}
    conversations = [c for c in held_out(260, 5) if c.reply.get("tool_calls")]
    assert len(conversations) == 20
    for conversation in conversations:
        for call in conversation.reply["tool_calls"]:
            schemas = {
                tool["function"]["name"]: tool["function"]["parameters"]
                for tool in conversation.tools
            }
            properties = schemas[call["function"]["name"]]["properties"]
            arguments = call["function"]["arguments"]
            assert list(arguments) == list(properties)
            assert all(
                isinstance(value, types[properties[name]["type"]])
                for name, value in arguments.items()
            )
            request = conversation.messages[0]["content"]
            assert all(str(value) in request for value in arguments.values())


def test_the_assistants_replies_and_nothing_else_are_learned(encoder: Encoder) -> None:
    conversation = held_out(26, 3)[12]
    assert conversation.kind == "tool answer"
    example = encoder({"messages": conversation.messages, "tools": conversation.tools})
    learned = [
        token for token, is_learned in zip(example.ids, example.learned, strict=True) if is_learned
    ]
    call, reply = (message for message in conversation.messages if message["role"] == "assistant")
    name, arguments = (call["tool_calls"][0]["function"][key] for key in ("name", "arguments"))
    values = "".join(
        f'<parameter name="{key}">{value}</parameter>\n' for key, value in arguments.items()
    )
    assert encoder.tokenizer.decode(learned) == (
        f"{call['reasoning_content']}\n</think>\n\n"
        f'<minimax:tool_call>\n<invoke name="{name}">\n{values}</invoke>\n</minimax:tool_call>[e~['
        f"{reply['reasoning_content']}\n</think>\n\n{reply['content']}[e~["
    )


def test_earlier_replies_without_reasoning_are_context_only(encoder: Encoder) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    last = {"role": "assistant", "content": "Yes.", "reasoning_content": "agree"}
    example = encoder({"messages": [*turns, {"role": "user", "content": "Well?"}, last]})
    learned = [
        token for token, is_learned in zip(example.ids, example.learned, strict=True) if is_learned
    ]
    assert encoder.tokenizer.decode(learned) == "agree\n</think>\n\nYes.[e~["


def test_a_text_is_learned_whole_and_an_empty_one_has_no_tokens(encoder: Encoder) -> None:
    example = encoder({"text": "Paris 47"})
    assert encoder.tokenizer.decode(example.ids) == "Paris 47[e~["
    assert all(example.learned)
    assert encoder({"text": ""}).ids == []
    assert len(Encoder(encoder.tokenizer, 3)({"text": "one two three four five"}).ids) == 3


def test_micro_batches_hold_every_token_once_within_the_limit(encoder: Encoder) -> None:
    examples = [encoder(DemoSource(1).row(index)) for index in range(40)] + [encoder({"text": ""})]
    batches = list(micro_batches(examples, 600))
    assert all(batch.ids_BT.numel() <= 600 or len(batch.ids_BT) == 1 for batch in batches)
    rows = [
        row[real].tolist() for b in batches for row, real in zip(b.ids_BT, b.real_BT, strict=True)
    ]
    assert sorted(rows) == sorted(example.ids for example in examples if example.ids)
    assert not any(bool((batch.learned_BT & ~batch.real_BT).any()) for batch in batches)
