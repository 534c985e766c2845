"""Qwen's and MiniMind's output formats: the streaming parser against a slow one of the whole text,
against the chat templates, and against itself on any split.
"""

import itertools
import json
import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from neuron_minimax.generation.chat_formats import CHAT_FORMATS
from neuron_minimax.generation.chat_formats.hermes import parse
from neuron_minimax.generation.chat_formats.json_stream import MAX_DEPTH, MAX_NUMBER, JsonStream
from neuron_minimax.generation.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Reasoning,
    ReasoningEnd,
    ToolCall,
)
from neuron_minimax.generation.template import render
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.test_minimax_format import joined
from tests.tiny_chats import write_chat_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather"}}]
OBJECT = '{"name": "weather", "arguments": {"city": "Oslo", "days": 7}}'
CALL = f"<tool_call>\n{OBJECT}\n</tool_call>"
ARGUMENTS = '{"city": "Oslo", "days": 7}'


def streamed(pieces, *, form="qwen3", in_reasoning=False, tools=TOOLS):
    parser = CHAT_FORMATS[form].parser(in_reasoning=in_reasoning, tools=tools)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


def refuse(constant):
    raise ValueError(constant)


def finite(digits):
    return float(digits) if math.isfinite(float(digits)) else digits


def readable(value):
    """A value that JSON has, with U+FFFD for halves of surrogate pairs."""
    spelled = json.dumps(value, allow_nan=False, ensure_ascii=False)
    return json.loads(re.sub("[\ud800-\udfff]", "\ufffd", spelled))


def slowly(text, *, form="qwen3", in_reasoning=False, tools=TOOLS):
    """Reasoning, content and calls of a whole output, by regular expressions and json."""
    reasoning = ""
    if in_reasoning or form != "qwen2":
        opening = re.match(r"\s*<think>\n?", text)
        text = text[opening.end() :] if opening else text
        if opening or in_reasoning:
            reasoning, text = [*re.split(r"\n?</think>\n{0,2}", text, maxsplit=1), ""][:2]
    content = ""
    calls = []
    while tools is not None and (tag := re.search(r"\n?<tool_call>(?=\s*\{)", text)):
        rest = text[tag.end() :].lstrip()
        found = slow_call(rest)
        if found is None:
            content += text[: tag.end()]
            text = text[tag.end() :]
        else:
            content += text[: tag.start()]
            text = found[2].lstrip("\n")
            calls.append(found[:2])
    return reasoning, content + text, calls


def slow_call(text):
    """The name and arguments of a call, and the text behind it; None when it is no call."""
    try:
        members, end = json.JSONDecoder(object_pairs_hook=list, strict=False).raw_decode(text)
        reading = {"parse_constant": str, "parse_float": finite, "strict": False}
        call = json.loads(text[:end], **reading)
        name = readable(call["name"])
        arguments = readable(call["arguments"])
        if isinstance(arguments, str):
            arguments = readable(json.loads(arguments, **reading))
    except (ValueError, KeyError, TypeError):
        return None
    rest = text[end:].lstrip()
    closed = rest.startswith("</tool_call>")
    if not closed and not "</tool_call>".startswith(rest):
        return None
    if not (name and isinstance(name, str) and isinstance(arguments, dict)):
        return None
    if len({readable(key) for key, _ in members}) < len(members):
        return None
    return name, arguments, rest[len("</tool_call>") :]


def found(events):
    """What a client has in hand: reasoning, content and calls, as `slowly` gives them."""
    calls = {}
    for event in events:
        match event:
            case CallBegin(index, name):
                calls[index] = [name, ""]
            case CallArguments(index, text):
                calls[index][1] += text
            case CallEnd(index, complete) if not complete:
                del calls[index]
    return (
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        "".join(event.text for event in events if isinstance(event, Content)),
        [(name, json.loads(text)) for name, text in calls.values()],
    )


FRAGMENTS = st.sampled_from(
    [
        *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_call>{", "<", "</", "\n"),
        *(
            "{",
            "}",
            "[",
            "]",
            ",",
            ":",
            '"',
            "\\",
            " ",
            "\t",
            "\u2003",
            "\\u00e9",
            "\\ud800",
            "\\n",
        ),
        *('"name"', '"arguments"', '"weather"', '"name": "now"', '"arguments": {}', '"id": 1'),
        *("\\ude00", "\\ud83d", "\x01", "-Infinity", "Infinity", "-1e999"),
        *(
            "1",
            "-1.5e3",
            "01",
            "1e999",
            "NaN",
            "true",
            "nul",
            "Oslo",
            "é🙂",
            '"{}"',
            '"{\\"a\\": 1}"',
        ),
        *(ARGUMENTS, OBJECT, CALL, f"\n{CALL}", '{"arguments": {"a": [1]}, "name": "now"}'),
    ]
)
JOINED = st.lists(FRAGMENTS, max_size=12).map("".join)


@st.composite
def damaged_calls(draw):
    """A call, or several, with something put in, taken out or exchanged."""
    text = draw(
        st.sampled_from([CALL, f"Hm.\n{CALL}\n{CALL}", f"<think>\nHm.\n</think>\n\n{CALL}"])
    )
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(text)))
        dropped = draw(st.sampled_from([0, 0, 1, 2, 12]))
        text = text[:place] + draw(st.one_of(st.just(""), FRAGMENTS)) + text[place + dropped :]
    return text


TEXTS = st.one_of(JOINED, damaged_calls(), st.tuples(JOINED, damaged_calls()).map("".join))
OPTIONS = st.fixed_dictionaries(
    {
        "form": st.sampled_from(["qwen3", "qwen2", "minimind"]),
        "in_reasoning": st.booleans(),
        "tools": st.sampled_from([TOOLS, TOOLS, TOOLS, None]),
    }
)
HERE = {"form": "qwen3", "in_reasoning": False, "tools": TOOLS}


@settings(max_examples=300, deadline=None)
@given(TEXTS, OPTIONS)
@example(f"{CALL}\n\n{CALL} \nDone.", HERE)
@example(f"{CALL}\n\n\nDone.", HERE)
@example(f'<tool_call>{{"a<tool_call>{OBJECT}</tool_call>', HERE)
@example('<tool_call>{"name": "a", "arguments": "{\\"a\\": 1}"}', HERE)
@example('<tool_call>{"name": "a", "arguments": {"a": 1e999}}</tool_call>', HERE)
@example('<tool_call>{"name": "a", "name": "b", "arguments": {}}</tool_call>', HERE)
@example('<tool_call>{"name": "a", "arguments": {}, "arguments": {}}</tool_call>', HERE)
def test_the_stream_gives_what_a_slow_parser_of_the_whole_text_gives(text, options):
    assert found(streamed(list(text), **options)) == slowly(text, **options)


@settings(max_examples=200, deadline=None)
@given(TEXTS, OPTIONS, st.lists(st.integers(0, 300), max_size=12))
def test_any_split_of_the_stream_gives_the_events_of_the_whole(text, options, cuts):
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    whole = streamed([text], **options)
    assert streamed(pieces, **options) == whole
    assert streamed(list(text), **options) == whole


def test_the_name_arrives_before_the_arguments_and_these_arrive_in_pieces():
    parser = CHAT_FORMATS["qwen3"].parser(in_reasoning=False, tools=TOOLS)
    assert parser.feed('<tool_call>\n{"name": "weather", "arguments": ') == []
    assert parser.feed('{"ci') == [CallBegin(0, "weather"), CallArguments(0, '{"ci')]
    assert parser.feed('ty": "San ') == [CallArguments(0, 'ty": "San ')]
    assert parser.feed('Francisco"}') == [CallArguments(0, 'Francisco"}')]
    assert parser.feed("}\n") == []
    assert parser.feed("</tool_call>") == [CallEnd(0, True)]


def test_what_the_model_reasons_about_a_call_is_reasoning():
    text = f"<think>\nI could say {CALL}.\n</think>\n\nNo."
    assert streamed([text]) == [
        Reasoning(f"I could say {CALL}."),
        ReasoningEnd(),
        Content("No."),
    ]


def test_only_formats_with_reasoning_take_a_tag_for_its_beginning():
    text = "<think>\nHm.\n</think>\n\nYes."
    assert parse(text).reasoning == "Hm."
    assert streamed([text], form="qwen2") == [Content(text)]
    assert found(streamed(["Hm.\n</think>\n\nYes."], form="qwen2", in_reasoning=True)) == (
        "Hm.",
        "Yes.",
        [],
    )


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        (OBJECT, ARGUMENTS),
        (f'{{"arguments": {ARGUMENTS}, "name": "weather"}}', ARGUMENTS),
        (f'{{"id": [1], "name": "weather" ,\n"arguments":{ARGUMENTS}}}', ARGUMENTS),
        (f'{{"name": "weather", "arguments": {json.dumps(ARGUMENTS)}}}', ARGUMENTS),
        ('{"name": "weather", "arguments": {}}', "{}"),
        (
            '{"name": "weather", "arguments": {"a": "</tool_call> \\" }"}}',
            '{"a": "</tool_call> \\" }"}',
        ),
    ],
)
def test_a_call_is_found_however_its_object_is_written(written, arguments):
    text = f"Look.\n<tool_call>\n{written}\n</tool_call>"
    message = parse(text, tools=TOOLS)
    assert (message.content, message.tool_calls) == ("Look.", [ToolCall("weather", arguments)])


@pytest.mark.parametrize(
    "body",
    [
        *('{"name": "weather"}', '{"arguments": {}}', '{"name": 1, "arguments": {}}', "{}"),
        *('{"name": "", "arguments": {}}', f'{{"name": "{"x" * 300}", "arguments": {{}}}}'),
        *('{"name": "a", "arguments": []}', '{"name": "a", "arguments": "[]"}', '["a"]', "a"),
        *('{"name": "a", "arguments": {},}', "{'name': 'a', 'arguments': {}}", '{"name": "a"'),
        *('{"name": "a", "arguments": {"a": 1,}}', '{"name": "a", "arguments": {"a": "\\u00e"}}'),
        '{"name": "a", "arguments": {"a": ' + "[" * MAX_DEPTH + "]" * MAX_DEPTH + "}}",
        '{"name": "a", "arguments": {"a": ' + "1" * (MAX_NUMBER + 1) + "}}",
        '{"name": "a", "arguments": {}} and more',
    ],
)
def test_what_only_looks_like_a_call_is_text(body):
    text = f"So.\n<tool_call>\n{body}\n</tool_call> \nThat."
    message = parse(text, tools=TOOLS)
    assert (message.content, message.tool_calls) == (text, [])


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ('"\\ud800"', "\ufffd"),
        ('"\\ude00 \\ud83d\\ude00 \\ud83d\\ud83d\\ude00"', "\ufffd 😀 \ufffd😀"),
        ('"\\ud83d\\n"', "\ufffd\n"),
        ('{"\\ud83d": ["\\ud83d"]}', {"\ufffd": ["\ufffd"]}),
        ("1e999", "1e999"),
        ("[-1e999, 1e-999, 1.5]", ["-1e999", 0.0, 1.5]),
        ("NaN", "NaN"),
        ("[Infinity, -Infinity]", ["Infinity", "-Infinity"]),
        pytest.param("1" * 400, int("1" * 400), id="400 digits"),
        ('"two\nlines\t\x01"', "two\nlines\t\x01"),
    ],
)
@pytest.mark.parametrize("form", ["arguments last", "arguments first", "arguments as text"])
def test_arguments_are_valid_json_whatever_the_model_writes(written, value, form):
    arguments = f'{{"a": {written}}}'
    body = {
        "arguments last": f'{{"name": "weather", "arguments": {arguments}}}',
        "arguments first": f'{{"arguments": {arguments}, "name": "weather"}}',
        "arguments as text": f'{{"name": "weather", "arguments": {json.dumps(arguments)}}}',
    }[form]
    text = f"<tool_call>\n{body}\n</tool_call>"
    for pieces in ([text], list(text)):
        reasoning, content, calls = found(streamed(pieces))
        assert (reasoning, content, calls) == ("", "", [("weather", {"a": value})])
    (call,) = parse(text, tools=TOOLS).tool_calls
    call.arguments.encode()
    assert json.loads(call.arguments, parse_constant=refuse) == {"a": value}


def test_tags_are_text_when_the_request_has_no_tools():
    assert parse(CALL, tools=None).content == CALL


@pytest.mark.parametrize("length", range(len(CALL)))
def test_a_call_cut_off_in_its_object_ends_as_text(length):
    message = parse("Hi.\n" + CALL[:length], tools=TOOLS)
    if OBJECT in CALL[:length]:
        assert (message.content, message.tool_calls) == ("Hi.", [ToolCall("weather", ARGUMENTS)])
    else:
        assert message.tool_calls == []
        assert message.content == "Hi.\n" + CALL[:length]


def test_long_outputs_of_tags_take_time_in_proportion(monkeypatch):
    """Each tag within a string is looked at once more, not each by each."""
    text = '<tool_call>{"' + '<tool_call>{": 1, "' * 3000
    reads = []
    original = JsonStream.feed

    def counted(self, piece):
        reads.append(original(self, piece))
        return reads[-1]

    monkeypatch.setattr(JsonStream, "feed", counted)
    assert parse(text, tools=TOOLS).content == text
    assert sum(reads) < 4 * len(text)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
JSONS = st.builds(
    lambda value, ascii, indent: json.dumps(value, ensure_ascii=ascii, indent=indent),
    VALUES,
    st.booleans(),
    st.sampled_from([None, 1]),
)
PIECES = st.sampled_from([*'{}[],:"\\0123-.eE+ \n\x00xu', "tru", "null", "\\u", "00e9", "1.5"])


@settings(max_examples=250, deadline=None)
@given(
    st.one_of(
        JSONS,
        st.lists(PIECES, max_size=10).map("".join),
        st.tuples(JSONS, st.integers(0, 40), PIECES).map(
            lambda parts: parts[0][: parts[1]] + parts[2] + parts[0][parts[1] :]
        ),
    ),
    st.lists(st.integers(0, 60), max_size=4),
)
@example('{"a": 1,}', [])
@example('"\\u00e" ', [])
def test_a_value_of_json_ends_where_the_json_module_says(text, cuts):
    stream = JsonStream()
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    read = sum(stream.feed(text[start:end]) for start, end in itertools.pairwise(bounds))
    stream.feed("!")  # what is behind it ends a number
    start = len(text) - len(text.lstrip(" \n\t\r"))
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text + "!", start)
    except ValueError:
        end = None
    word_goes_on = end is not None and re.match(r"[-+.0-9A-Za-z]", (text + "!")[end:])
    scalar = text[start : start + 1] not in ("{", "[", '"')
    if end is None or (scalar and word_goes_on):
        assert not stream.ended or stream.failed
    else:
        assert (stream.ended, stream.failed, read) == (True, False, end)
        reading = {"parse_constant": str, "parse_float": finite, "strict": False}
        assert json.loads(stream.written(), parse_constant=refuse) == readable(
            json.loads(text[start:end], **reading)
        )


@pytest.fixture(scope="module", params=["qwen3", "qwen2", "minimind"])
def tokenizer(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    return TextTokenizer.from_dir(write_chat_tokenizer(directory, request.param))


PLAIN = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30)
TEXT = PLAIN.filter(lambda text: text.strip() and text == text.strip("\n"))
CALLS = st.lists(
    st.tuples(
        st.sampled_from(["weather", "now"]),
        st.dictionaries(st.text(max_size=5), VALUES.filter(lambda value: "inf" not in str(value))),
    ),
    max_size=3,
)


@settings(max_examples=40, deadline=None)
@given(st.one_of(st.just(""), TEXT), st.one_of(st.just(""), TEXT), CALLS)
def test_a_turn_that_the_template_renders_parses_back_and_renders_again(
    tokenizer, reasoning, content, calls
):
    form = tokenizer.chat_format
    if not form.model_opens_reasoning:
        reasoning = ""
    prompt = [{"role": "user", "content": "?"}]

    def spelled(reasoning, content, calls):
        turn = {"role": "assistant", "content": content, "reasoning_content": reasoning}
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}}
            for name, arguments in calls
        ]
        apply = tokenizer.hugging_face.apply_chat_template
        before = apply(prompt, tools=TOOLS, tokenize=False)
        whole = apply([*prompt, turn], tools=TOOLS, tokenize=False)
        opening = "<|im_start|>assistant\n"
        return whole[len(before) + len(opening) :].removesuffix("<|im_end|>\n")

    output = spelled(reasoning, content, calls)
    parser = form.parser(in_reasoning=False, tools=TOOLS)
    events = parser.feed(output) + parser.finish()
    assert found(events) == (reasoning, content, calls)
    assert spelled(*found(events)) == output


def test_the_prompt_tells_whether_there_will_be_reasoning(tokenizer):
    form = tokenizer.chat_format
    messages = [{"role": "user", "content": "<think>"}]
    opens = {
        asked: (form.opens_reasoning(prompt), form.closes_reasoning(prompt))
        for asked in (True, False)
        if form.model_opens_reasoning
        and (prompt := render(tokenizer.hugging_face, messages, None, {"enable_thinking": asked}))
    }
    without = render(tokenizer.hugging_face, messages, None)
    default = (form.opens_reasoning(without), form.closes_reasoning(without))
    expected = {
        151645: {True: (False, False), False: (False, True)},
        2: {True: (True, False), False: (False, True)},
    }
    if form.model_opens_reasoning:
        assert opens == expected[form.end_of_turn_id]
    assert default == (False, form.end_of_turn_id == 2)
