"""The embedded demo model: its tokenizer and template, its files, and that it answers held-out
questions rightly.
"""

import json
from pathlib import Path

import pytest
import torch

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.demo import DEMO
from neuron_minimax.generation.chat_formats.minimax_m2 import parse
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.studies.answering import answer_all, is_right
from neuron_minimax.studies.quality import (
    HELD_OUT_SEED,
    VARIANTS,
    Variant,
    long_chat,
    measure_lengths,
    measure_quality,
    perplexities,
)
from neuron_minimax.training.data.conversations import KINDS, demo_conversation, held_out
from neuron_minimax.training.data.encoding import Encoder
from neuron_minimax.training.data.tokenizer import STYLES, load_tokenizer, write_demo_tokenizer
from tests.opened import inspect

NAMES = [variant.name for variant in VARIANTS]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def model() -> Decoder:
    checkpoint = Checkpoint(DEMO)
    published = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    return Variant(name="stored").model(published, checkpoint.config)


def test_the_committed_tokenizer_is_the_one_that_the_code_makes(tmp_path: Path) -> None:
    write_demo_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_text() == (DEMO / name).read_text()


def test_any_text_survives_the_tokenizer(tokenizer) -> None:
    for text in ("What is 47 + 38?", "naïve 漢字 🙂\n\t x", '{"a": [1, 2]}', "]~b]ai\n<think>\n"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_and_every_special_token_is_one_token(tokenizer) -> None:
    assert len(tokenizer.encode("0123456789", add_special_tokens=False)) == 10
    assert [
        tokenizer.decode([token]) for token in tokenizer.encode(" 407", add_special_tokens=False)
    ] == list(" 407")
    for token in (*STYLES["minimax_m2"].control, *STYLES["minimax_m2"].tags):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("]~!b[", "[e~[")


def test_decoding_without_special_tokens_keeps_reasoning_and_tool_calls(tokenizer) -> None:
    text = "]~b]ai\n<think>\nx\n</think>\n\n<minimax:tool_call>\n</minimax:tool_call>[e~["
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text[len("]~b]") : -len("[e~[")]


def test_the_template_renders_minimax_format(tokenizer) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": {"city": "Oslo", "count": 2, "deep": {"a": None}}},
    }
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Go."},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "call f",
            "tool_calls": [call, call],
        },
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "<think>\nsum\n</think>\n\nDone."},
        {"role": "user", "content": "Thanks."},
    ]
    invoke = (
        '<invoke name="f">\n<parameter name="city">Oslo</parameter>\n<parameter '
        'name="count">2</parameter>\n'
        '<parameter name="deep">{"a": null}</parameter>\n</invoke>\n'
    )
    assert tokenizer.apply_chat_template(
        messages, tools=[tool], tokenize=False, add_generation_prompt=True
    ) == (
        "]~!b[]~b]system\nBe brief.\n\n# Tools\n<tools>\n"
        '<tool>{"name": "f", "parameters": {"type": "object"}}</tool>\n</tools>[e~[\n'
        "]~b]user\nGo.[e~[\n"
        "]~b]ai\n<think>\ncall "
        f"f\n</think>\n\n<minimax:tool_call>\n{invoke}{invoke}</minimax:tool_call>[e~[\n"
        "]~b]tool\n<response>1</response>\n<response>2</response>[e~[\n"
        "]~b]ai\n<think>\nsum\n</think>\n\nDone.[e~[\n"
        "]~b]user\nThanks.[e~[\n"
        "]~b]ai\n<think>\n"
    )


def test_rendered_tool_calls_parse_back_to_the_same_calls(tokenizer) -> None:
    for conversation in (c for c in held_out(130, 8) if c.kind == "tool call"):
        text = tokenizer.apply_chat_template(
            conversation.messages, tools=conversation.tools, tokenize=False
        )
        reply = text.split("]~b]ai\n<think>\n")[-1].removesuffix("[e~[\n")
        (call,) = parse(reply, in_reasoning=True, tools=conversation.tools).tool_calls
        assert (
            json.loads(call.arguments)
            == conversation.reply["tool_calls"][0]["function"]["arguments"]
        )
        assert is_right(conversation, reply)
        assert not is_right(conversation, reply.replace(call.name, "other"))


def test_an_answer_is_right_only_when_it_is_exact() -> None:
    conversation = next(c for c in held_out(26, 8) if c.kind == "sum")
    answer = conversation.reply["content"]
    assert is_right(conversation, f"any steps\n</think>\n\n{answer}")
    assert not is_right(conversation, f"any steps\n</think>\n\n{answer[:-1]}")
    assert not is_right(conversation, answer)  # never left the reasoning


def test_at_most_one_training_conversation_in_500_is_longer_than_the_model(tokenizer) -> None:
    encoder = Encoder(tokenizer, 100_000)
    limit = json.loads((DEMO / "config.json").read_text())["max_position_embeddings"]
    rows = [
        {"messages": c.messages, "tools": c.tools}
        for c in (demo_conversation(0, index) for index in range(2000))
    ]
    longer = [row for row in rows if len(encoder(row).ids) > limit]
    assert len(longer) <= 4


def test_the_embedded_checkpoint_is_whole_in_fp8_and_small() -> None:
    Checkpoint(DEMO).require_usable()
    assert inspect(DEMO).usable
    assert (
        sum(entry.nbytes for entry in Checkpoint(DEMO).entries.values() if entry.dtype == "F8_E4M3")
        > 4_000_000
    )
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 8_000_000


def test_the_embedded_checkpoint_answers_held_out_questions_as_well_as_its_model_card_says(
    model, tokenizer
) -> None:
    graded = answer_all(model, tokenizer, held_out(130, HELD_OUT_SEED + 1))
    assert {g.conversation.kind for g in graded} == set(KINDS)
    assert sum(g.right for g in graded) / len(graded) >= 0.95


def test_the_halved_conversion_answers_as_stored_and_the_literal_reciprocal_not_at_all() -> None:
    chosen = [
        VARIANTS[NAMES.index(name)]
        for name in NAMES
        if "stored" in name or "halved" in name or "1 /" in name
    ]
    stored, halved, reciprocal = measure_quality(DEMO, questions=13, variants=chosen).scores
    assert stored.logit_error == 0.0
    assert stored.same_replies == 1.0
    assert halved.logit_error < 1e-5
    assert abs(halved.accuracy - stored.accuracy) <= 0.01
    assert reciprocal.accuracy == 0.0


def test_lossy_variants_change_the_weights_as_much_as_their_rounding_does() -> None:
    checkpoint = Checkpoint(DEMO)
    published = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    name = "model.layers.0.self_attn.q_proj.weight"
    target = "layers.0.self_attn.qkv_proj.q_proj"

    def weight(variant: Variant) -> torch.Tensor:
        state = variant.model(published, checkpoint.config).state_dict()
        values = state[f"{target}.weight"].float()
        scale = state.get(f"{target}.scale")
        return (
            values
            if scale is None
            else values * scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        )

    exact = published[name].float() * published[name + "_scale_inv"].repeat_interleave(
        128, 0
    ).repeat_interleave(128, 1)
    errors = {
        v.name: float((weight(v) - exact).norm() / exact.norm())
        for v in VARIANTS
        if "1 /" not in v.name
    }
    assert errors["FP8 as stored"] == 0.0
    assert errors["converted (codes halved, scales doubled)"] < 1e-5
    assert 0.02 < errors["rescaled by 240/448 (rounds again)"] < 0.035
    assert 0.02 < errors["one scale per row (rounds again)"] < 0.035
    assert errors["attention in BF16"] < 0.003


def test_perplexity_by_length_is_that_of_the_positions_in_between(model, tokenizer) -> None:
    example = long_chat(Encoder(tokenizer, 300), seed=1)
    assert len(example.ids) == 300
    halves = perplexities(model, [example], (150, 300))
    learned = torch.tensor(example.learned)[1:]
    with torch.inference_mode():
        chances = model(torch.tensor([example.ids]))[0][0, :-1].softmax(-1)
    chosen = chances[torch.arange(299), torch.tensor(example.ids[1:])].log()
    first = [float(chosen[i]) for i in range(149) if learned[i]]
    second = [float(chosen[i]) for i in range(149, 299) if learned[i]]
    wanted = [float(torch.tensor(part).mean().neg().exp()) for part in (first, second)]
    assert halves == pytest.approx(wanted, rel=1e-5)


def test_the_length_table_has_each_rope_setting() -> None:
    report = measure_lengths(DEMO, chats=1, bounds=(128, 256))
    assert list(report.rows) == ["as trained", "linear, factor 4", "YaRN, factor 4"]
    assert len({row[1] for row in report.rows.values()}) == 3
    assert "| 128 to 256 |" in report.render()
