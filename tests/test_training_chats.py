"""What is learned of a chat, under the chat templates of every family: each reply as the model has
to write it behind the generation prompt.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from neuron_minimax.cli import main
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError
from neuron_minimax.training.data.encoding import Encoded, Encoder
from neuron_minimax.training.data.sequences import DataOptions, encode_rows
from neuron_minimax.training.data.sources import JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from tests.tiny_chats import write_chat_tokenizer
from tests.tiny_tokenizer import write_tokenizer

FAMILIES = ("minimax_m2", "qwen3", "qwen2", "minimind")
ASKED = {"role": "user", "content": "Hi?"}
HELLO = {"role": "assistant", "content": "Hello."}
AGAIN = {"role": "user", "content": "你好吗?"}
GOOD = {"role": "assistant", "content": "很好 🙂"}
THOUGHT = {**HELLO, "reasoning_content": "A greeting."}
THOUGHT_TOO = {**GOOD, "reasoning_content": "Chinese."}
EMPTY_THINK = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, PreTrainedTokenizerBase]:
    found = {"minimax_m2": load_tokenizer(DEMO)}
    for family in FAMILIES[1:]:
        found[family] = load_tokenizer(
            write_chat_tokenizer(tmp_path_factory.mktemp(family), family)
        )
    return found


def encoded(tokenizer: PreTrainedTokenizerBase, *messages: dict[str, Any], **more: Any) -> Encoded:
    return Encoder(tokenizer, 512).encode({"messages": list(messages), **more})


def learned(tokenizer: PreTrainedTokenizerBase, found: Encoded) -> list[list[str]]:
    """Each stretch of learned tokens of each example."""
    stretches = []
    for example in found.examples:
        texts = []
        start = 0
        for place in range(len(example.ids) + 1):
            inside = place < len(example.ids) and example.learned[place]
            if not inside and start < place:
                texts.append(tokenizer.decode(example.ids[start:place]))
            start = start if inside else place + 1
        stretches.append(texts)
    return stretches


def contexts(tokenizer: PreTrainedTokenizerBase, found: Encoded) -> list[str]:
    """What stands before the last learned stretch of each example."""
    texts = []
    for example in found.examples:
        last = max(place for place, is_learned in enumerate(example.learned) if is_learned)
        first = max(place for place in range(last) if not example.learned[place])
        texts.append(tokenizer.decode(example.ids[: first + 1]))
    return texts


# What is learned of two replies without reasoning, sequence by sequence.
PLAIN = {
    "minimax_m2": [["\n</think>\n\nHello.[e~["], ["\n</think>\n\n很好 🙂[e~["]],
    # Its template leaves the empty reasoning of the first out when there is a second.
    "qwen3": [[f"{EMPTY_THINK}很好 🙂<|im_end|>"], [f"{EMPTY_THINK}Hello.<|im_end|>"]],
    "qwen2": [["Hello.<|im_end|>", "很好 🙂<|im_end|>"]],
    "minimind": [["Hello.<|im_end|>", "很好 🙂<|im_end|>"]],
}
# And of two with reasoning. Qwen3's template drops that of the first when there is a second.
REASONED = {
    "minimax_m2": [["A greeting.\n</think>\n\nHello.[e~[", "Chinese.\n</think>\n\n很好 🙂[e~["]],
    "qwen3": [
        ["<think>\nChinese.\n</think>\n\n很好 🙂<|im_end|>"],
        ["<think>\nA greeting.\n</think>\n\nHello.<|im_end|>"],
    ],
    "minimind": [
        ["A greeting.\n</think>\n\nHello.<|im_end|>", "Chinese.\n</think>\n\n很好 🙂<|im_end|>"]
    ],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_replies_without_reasoning_are_learned_behind_the_generation_prompt(
    tokenizers, family: str
) -> None:
    tokenizer = tokenizers[family]
    found = encoded(tokenizer, ASKED, HELLO, AGAIN, GOOD)
    assert learned(tokenizer, found) == PLAIN[family]
    assert (found.replies, found.unanswering, found.without_reasoning, found.lost) == (2, 0, 0, 0)
    # The last reply stands behind the very prompt that the model will be given for it.
    prompt = tokenizer.apply_chat_template(
        [ASKED, HELLO, AGAIN], tokenize=False, add_generation_prompt=True
    )
    assert prompt in contexts(tokenizer, found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("reply", [HELLO, THOUGHT], ids=["plain", "reasoned"])
@pytest.mark.parametrize("later", [GOOD, THOUGHT_TOO], ids=["plain later", "reasoned later"])
def test_a_reply_is_learned_alike_alone_and_with_messages_behind_it(
    tokenizers, family: str, reply: dict[str, Any], later: dict[str, Any]
) -> None:
    tokenizer = tokenizers[family]
    alone = set(itertools.chain(*learned(tokenizer, encoded(tokenizer, ASKED, reply))))
    found = encoded(tokenizer, ASKED, reply, AGAIN, later)
    stretches = {*itertools.chain(*learned(tokenizer, found))}
    first = {stretch for stretch in stretches if "Hello." in stretch}
    assert first == (set() if found.without_reasoning and reply is HELLO else alone)


@pytest.mark.parametrize("family", REASONED)
def test_reasoning_is_learned_with_its_reply_wherever_the_template_leaves_it_out(
    tokenizers, family: str
) -> None:
    tokenizer = tokenizers[family]
    found = encoded(tokenizer, ASKED, THOUGHT, AGAIN, THOUGHT_TOO)
    assert learned(tokenizer, found) == REASONED[family]
    inside = [{**THOUGHT, "content": "<think>\nA greeting.\n</think>\n\nHello."}]
    inside[0].pop("reasoning_content")
    if family == "minimax_m2":  # its template finds the reasoning in the text
        assert learned(tokenizer, encoded(tokenizer, ASKED, *inside)) == [
            ["A greeting.\n</think>\n\nHello.[e~["]
        ]


def test_reasoning_that_a_template_never_writes_is_counted(tokenizers) -> None:
    found = encoded(tokenizers["qwen2"], ASKED, THOUGHT, AGAIN, THOUGHT_TOO)
    assert learned(tokenizers["qwen2"], found) == PLAIN["qwen2"]
    assert (found.replies, found.unwritten) == (2, 2)
    assert encoded(tokenizers["qwen3"], ASKED, THOUGHT, AGAIN, THOUGHT_TOO).unwritten == 0


def test_the_tokens_of_a_reply_begin_where_the_prompt_s_end(tokenizers) -> None:
    tokenizer = tokenizers["minimax_m2"]
    found = encoded(tokenizer, ASKED, HELLO)
    prompt = tokenizer.apply_chat_template([ASKED], tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    assert found.examples[0].ids[: len(ids)] == ids
    assert found.examples[0].learned[: len(ids) + 1] == [False] * len(ids) + [True]


# What is learned of a chat whose second reply alone reasons, or whose first alone, and how many
# replies are context. MiniMind's prompt closes the reasoning; Qwen2's template writes none.
MIXED = {
    "minimax_m2": (
        [["Chinese.\n</think>\n\n很好 🙂[e~["]],
        [["A greeting.\n</think>\n\nHello.[e~["]],
        1,
    ),
    "qwen3": (
        [["<think>\nChinese.\n</think>\n\n很好 🙂<|im_end|>"]],
        [["<think>\nA greeting.\n</think>\n\nHello.<|im_end|>"]],
        1,
    ),
    "qwen2": (PLAIN["qwen2"], PLAIN["qwen2"], 0),
    "minimind": (
        [["Hello.<|im_end|>", "Chinese.\n</think>\n\n很好 🙂<|im_end|>"]],
        [["A greeting.\n</think>\n\nHello.<|im_end|>", "很好 🙂<|im_end|>"]],
        0,
    ),
}


@pytest.mark.parametrize("family", MIXED)
def test_a_reply_without_reasoning_beside_others_with_it_is_context_that_is_told(
    tokenizers, family: str
) -> None:
    tokenizer = tokenizers[family]
    second_reasons, first_reasons, context = MIXED[family]
    found = encoded(tokenizer, ASKED, HELLO, AGAIN, THOUGHT_TOO)
    assert learned(tokenizer, found) == second_reasons
    assert (found.replies, found.without_reasoning) == (2, context)
    found = encoded(tokenizer, ASKED, THOUGHT, AGAIN, GOOD)
    assert learned(tokenizer, found) == first_reasons
    assert (found.replies, found.without_reasoning) == (2, context)


def test_reasoning_within_the_text_makes_context_of_replies_without_it(tokenizers) -> None:
    tokenizer = tokenizers["qwen2"]
    inside = {**GOOD, "content": "<think>\nChinese.\n</think>\n\n很好 🙂"}
    found = encoded(tokenizer, ASKED, HELLO, AGAIN, inside)
    assert learned(tokenizer, found) == [[f"{inside['content']}<|im_end|>"]]
    assert (found.without_reasoning, found.unwritten) == (1, 0)


def test_a_reply_to_nobody_is_context_that_is_told(tokenizers) -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    found = encoded(tokenizers["qwen2"], greeting, ASKED, HELLO)
    assert learned(tokenizers["qwen2"], found) == [["Hello.<|im_end|>"]]
    assert (found.replies, found.unanswering) == (2, 1)
    alone = encoded(tokenizers["qwen2"], greeting)
    assert (alone.examples, alone.cause) == ((), "its replies answer no message")


def test_a_tool_call_is_learned_and_the_tool_s_answer_is_not(tokenizers) -> None:
    call = {"type": "function", "function": {"name": "sky", "arguments": {"city": "Oslo"}}}
    called = {"role": "assistant", "content": "", "tool_calls": [call]}
    result = {"role": "tool", "content": "grey"}
    tools = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]
    written = '<tool_call>\n{"name": "sky", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>'
    for family in ("qwen2", "minimind"):
        found = encoded(tokenizers[family], ASKED, called, result, HELLO, tools=tools)
        assert learned(tokenizers[family], found) == [[written, "Hello.<|im_end|>"]]


def test_the_mask_is_transformers_own_where_a_template_marks_its_generations(tokenizers) -> None:
    tokenizer = tokenizers["qwen2"]
    marked = (
        "{% for message in messages %}{% if message.role == 'assistant' %}"
        "{{ '<|im_start|>assistant\n' }}{% generation %}{{ message.content ~ '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' ~ message.role ~ '\n' ~ message.content ~ '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [{"role": "system", "content": "Be brief."}, ASKED, HELLO, AGAIN, GOOD]
    before = tokenizer.chat_template
    tokenizer.chat_template = marked
    try:
        [example] = encoded(tokenizer, *messages).examples
        wanted = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    finally:
        tokenizer.chat_template = before
    assert example.ids == wanted["input_ids"]
    assert example.learned == [bool(flag) for flag in wanted["assistant_masks"]]


def test_a_template_that_does_not_end_its_replies_is_refused(tokenizers) -> None:
    tokenizer = tokenizers["qwen2"]
    before = tokenizer.chat_template
    tokenizer.chat_template = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '\n' }}"
    tokenizer.chat_template += "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    try:
        with pytest.raises(TrainingError, match=r"ends no reply with '<\|im_end\|>'.* eos_token"):
            encoded(tokenizer, ASKED, HELLO)
    finally:
        tokenizer.chat_template = before


def test_a_long_chat_is_cut_and_what_is_lost_is_counted(tokenizers) -> None:
    tokenizer = tokenizers["qwen2"]
    row = {"messages": [ASKED, HELLO, AGAIN, GOOD]}
    [whole] = Encoder(tokenizer, 512).encode(row).examples
    size = whole.learned.index(True) + 3
    found = Encoder(tokenizer, size).encode(row)
    assert [example.ids for example in found.examples] == [whole.ids[:size]]
    assert found.lost == sum(whole.learned[size:]) > 0
    nothing = Encoder(tokenizer, size - 3).encode(row)
    assert nothing.examples == ()
    assert nothing.cause == f"its prompt of {size - 3} tokens fills the {size - 3} of a sequence"


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A tokenizer with MiniMax's template, which opens the reasoning in its prompt."""
    return write_tokenizer(tmp_path / "inputs")


@pytest.mark.slow
def test_chats_without_reasoning_train_a_model_under_minimax_s_template(
    inputs: Path, tmp_path: Path, capsys
) -> None:
    from tests.test_training_endings import SMALL
    from tests.tiny import tiny_config

    (inputs / "config.json").write_text(json.dumps(tiny_config(**SMALL)))
    rows = inputs / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": [ASKED, HELLO]}) + "\n" for _ in range(3)))
    arguments = ["--data", rows, "--config", inputs, "--tokenizer", inputs, "--epochs", "1"]
    assert main(["train", str(tmp_path / "out"), *map(str, arguments)]) == 0
    assert "3 rows (0 texts, 3 chats), 3 sequences of" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/training.json").read_text())["losses"][0] > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reply_that_spells_control_tokens_is_learned_whole_and_ends_with_the_template_s_own(
    tokenizers, family: str
) -> None:
    tokenizer = tokenizers[family]
    end = tokenizer.eos_token
    asked = {"role": "user", "content": f"What is {end}?"}
    words = f"A {end} and ]~b]user or <|im_start|>user end it {end}"
    told = {"role": "assistant", "content": words}
    found = encoded(tokenizer, asked, told)
    [[stretch]] = learned(tokenizer, found)
    assert stretch.endswith(words + end)
    [example] = found.examples
    # None but the control tokens of the same chat about nothing are in it.
    plain = encoded(tokenizer, ASKED, HELLO).examples[0]
    special = {*tokenizer.all_special_ids}
    assert [t for t in example.ids if t in special] == [t for t in plain.ids if t in special]
    assert end in found.control
    # A text has the control tokens that it spells.
    text = Encoder(tokenizer, 512).encode({"text": f"one{end}"})
    assert text.examples[0].ids.count(tokenizer.eos_token_id) == 2
    assert text.control == (end,)


def test_spelled_control_tokens_are_told_and_where_a_tokenizer_cannot_keep_them_apart_refused(
    tokenizers, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [ASKED, {**HELLO, "content": "A <|im_end|>."}]}, {"text": "<|im_end|>"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers["qwen2"]
    source = JsonLines.read(path)
    line = encode_rows(source, Encoder(tokenizer, 512), DataOptions()).counts.line()
    assert "control tokens in texts, learned as such: <|im_end|> (1)" in line
    assert "spelled like control tokens in chats, encoded as words: <|im_end|> (1)" in line
    escaping = write_chat_tokenizer(tmp_path / "escaping", "qwen2")
    template = escaping / "chat_template.jinja"
    template.write_text(
        template.read_text().replace(
            "message.content ~ calls", "(message.content | tojson(ensure_ascii=True)) ~ calls"
        )
    )
    with pytest.raises(TrainingError, match=r"rows\.jsonl line 1: a message spells <\|im_end\|>"):
        encode_rows(source, Encoder(load_tokenizer(escaping), 512), DataOptions())
