"""Qwen3-Coder's output format: against regular expressions over the whole text, against the chat
template, and against itself on any split.
"""

import itertools
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuron_minimax.generation.chat_formats import CHAT_FORMATS
from neuron_minimax.generation.events import CallArguments, CallBegin, ToolCall, collect
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.test_minimax_format import ARGUMENTS, TOOL_LIST, joined
from tests.tiny_chats import write_chat_tokenizer

FORM = CHAT_FORMATS["qwen3_coder"]
CALL = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n"
    "<parameter=days>\n7\n</parameter>\n</function>\n</tool_call>"
)
CALLED = ToolCall("weather", '{"city": "Oslo", "days": 7}')


def streamed(pieces, tools=TOOL_LIST):
    parser = FORM.parser(in_reasoning=False, tools=tools)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


def parse(text, tools=TOOL_LIST):
    return collect(streamed([text], tools))


@pytest.mark.parametrize("length", range(len(CALL) + 1))
def test_a_call_cut_off_anywhere_ends_as_text(length):
    message = parse("Hi.\n" + CALL[:length])
    if "</function>" in CALL[:length]:
        assert (message.content.strip(), message.tool_calls) == ("Hi.", [CALLED])
    else:
        assert message.tool_calls == []
        assert message.content.rstrip("\n") == ("Hi.\n" + CALL[:length]).rstrip("\n")


@pytest.mark.parametrize("value", ["", "a\n", "\na\n\n", "a\nb", "</parameter> b", "<", "7"])
def test_a_string_is_what_stands_between_the_two_line_breaks(value):
    (call,) = parse(CALL.replace("Oslo", value)).tool_calls
    assert json.loads(call.arguments) == {"city": value, "days": 7}


@pytest.mark.parametrize(
    "text",
    [
        "Write <tool_call> around it.",
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>',
        "<function=weather>\n</function>",
        "<think>\nHm.\n</think>\n\nYes.",
    ],
)
def test_text_that_merely_looks_like_a_call_survives(text):
    message = parse(text)
    assert (message.content, message.reasoning, message.tool_calls) == (text, "", [])


def test_the_name_arrives_first_and_a_string_arrives_in_pieces():
    parser = FORM.parser(in_reasoning=False, tools=TOOL_LIST)
    assert parser.feed("<tool_call>\n<function=weather>") == [CallBegin(0, "weather")]
    first = parser.feed("\n<parameter=city>\nSan ")
    assert "".join(event.text for event in first) == '{"city": "San '
    assert parser.feed("Francisco\n") == [CallArguments(0, "Francisco")]


FRAGMENTS = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "<function=weather>", "</function>", "<parameter=city>"),
        *("</parameter>", "\n</parameter>", "<parameter=days>\n", "\n", " ", "<", "</", ">", "=7"),
        *("Oslo", "7", "é🙂", CALL, "<think>", "</think>"),
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(FRAGMENTS, max_size=12).map("".join),
    st.lists(st.integers(0, 300), max_size=12),
    st.sampled_from([TOOL_LIST, None]),
)
@example("x\n" + CALL + "\n" + CALL + "\ny", list(range(200)), TOOL_LIST)
def test_any_split_of_the_stream_gives_the_result_of_the_whole(text, cuts, tools):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    whole = streamed([text], tools)
    assert streamed(pieces, tools) == whole
    assert streamed(list(text), tools) == whole


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TextTokenizer.from_dir(
        write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"), "qwen3_coder")
    )


def test_the_template_of_a_qwen3_checkpoint_tells_which_calls_it_writes(tokenizer, tmp_path):
    assert tokenizer.chat_format is not CHAT_FORMATS["qwen3"]
    assert type(tokenizer.chat_format) is type(FORM)
    other = TextTokenizer.from_dir(write_chat_tokenizer(tmp_path, "qwen3"))
    assert other.chat_format is CHAT_FORMATS["qwen3"]


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30)
TEXT = PLAIN.filter(lambda text: text.strip() and text == text.strip("\n"))
# The template writes None as Python does, which is a text where texts are allowed.
WRITTEN = ARGUMENTS.filter(lambda arguments: arguments.get("scale", "") is not None)
CALLS = st.lists(
    st.one_of(WRITTEN.map(lambda arguments: ("weather", arguments)), st.just(("now", {}))),
    max_size=3,
)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.just(""), TEXT), CALLS)
def test_what_the_chat_template_renders_parses_back_as_slow_expressions_say(
    tokenizer, content, calls
):
    turn = {"role": "assistant", "content": content}
    turn["tool_calls"] = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    prompt = [{"role": "user", "content": "?"}]
    apply = tokenizer.hugging_face.apply_chat_template
    before = apply(prompt, tools=TOOL_LIST, tokenize=False)
    whole = apply([*prompt, turn], tools=TOOL_LIST, tokenize=False)
    output = whole[len(before) + len("<|im_start|>assistant\n") :].removesuffix("<|im_end|>\n")
    message = parse(output)
    assert message.content == content
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls
    names = re.findall(r"<tool_call>\n<function=(\w+)>", output)
    assert [call.name for call in message.tool_calls] == names
