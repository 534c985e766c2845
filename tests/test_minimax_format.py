"""MiniMax's output format: the streaming parser against the chat template and against itself on any
split.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import neuron_minimax
from neuron_minimax.generation.chat_formats.argument_types import (
    TYPE_OF_PYTHON,
    allowed_types,
    parameter_schema,
    typed_value,
)
from neuron_minimax.generation.chat_formats.minimax_m2 import (
    MiniMaxM2Format,
    MiniMaxM2Parser,
    parse,
)
from neuron_minimax.generation.events import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Reasoning,
    ToolCall,
    collect,
)
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.tiny_tokenizer import write_tokenizer

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "scale": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "wind": {"type": ["number", "null"]},
        "wet": {"type": "boolean"},
        "where": {"$ref": "#/$defs/place"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "unit": {"anyOf": [{"$ref": "#/$defs/unit"}, {"const": "ft"}]},
    },
    "$defs": {
        "place": {"type": "object", "properties": {"latitude": {"type": "number"}}},
        "unit": {"type": "string", "enum": ["km", "mi"]},
    },
}
TOOL_LIST = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {
        "type": "function",
        "function": {"name": "now", "parameters": {"type": "object", "properties": {}}},
    },
]
CALL = (
    '<minimax:tool_call>\n<invoke name="weather">\n<parameter '
    'name="city">Oslo</parameter>\n</invoke>\n'
    "</minimax:tool_call>"
)
OSLO = {"city": "Oslo"}
IN_REASONING: dict[str, Any] = {"in_reasoning": True, "tools": TOOL_LIST}


@pytest.fixture(scope="module", params=["test", "demo"])
def tokenizer(request, tmp_path_factory):
    demo = Path(neuron_minimax.__file__).parent / "demo"
    return TextTokenizer.from_dir(
        demo if request.param == "demo" else write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    )


def joined(events):
    """Events with neighbours of one kind joined: what a client has in hand after any stream."""
    result = []
    for event in events:
        last = result[-1] if result else None
        same = type(last) is type(event) and getattr(last, "index", None) == getattr(
            event, "index", None
        )
        if same and isinstance(event, Reasoning | Content):
            result[-1] = type(event)(last.text + event.text)
        elif same and isinstance(event, CallArguments):
            result[-1] = CallArguments(event.index, last.text + event.text)
        else:
            result.append(event)
    return result


def streamed(pieces, **options):
    parser = MiniMaxM2Parser(**options)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return joined(events + parser.finish())


def test_reasoning_that_the_prompt_opened_is_split_from_the_answer():
    message = parse("Let me think.\n</think>\n\nParis.", in_reasoning=True)
    assert (message.reasoning, message.content) == ("Let me think.", "Paris.")


def test_explicit_reasoning_is_accepted_whether_or_not_the_prompt_opened_it():
    for in_reasoning in (True, False):
        message = parse("<think>\nHm.\n</think>\n\nYes.", in_reasoning=in_reasoning)
        assert (message.reasoning, message.content) == ("Hm.", "Yes.")


def test_reasoning_cut_off_stays_reasoning():
    message = parse("I wonder </thi", in_reasoning=True)
    assert (message.reasoning, message.content) == ("I wonder </thi", "")


@pytest.mark.parametrize("end", ["", "\n", "\n</think>", "\n</think>\n\n", "\n</thi"])
def test_a_turn_that_ends_with_its_reasoning_has_made_the_calls_in_it(end):
    message = parse(f"Look it up.\n{CALL}{end}", in_reasoning=True, tools=TOOL_LIST)
    assert message.tool_calls == [ToolCall("weather", '{"city": "Oslo"}')]
    assert message.reasoning.removesuffix("</thi") == "Look it up."
    assert message.content == ""


@pytest.mark.parametrize("quoted", [f"`{CALL}`", f"\n```\n{CALL}\n```\n", CALL, CALL + CALL])
@pytest.mark.parametrize("answer", ["No call needed.", "Hm.\n" + CALL])
def test_a_call_that_reasoning_quotes_before_an_answer_is_text(quoted, answer):
    text = f"I could say {quoted} but won't."
    parsed = parse(f"{text}\n</think>\n\n{answer}", in_reasoning=True, tools=TOOL_LIST)
    assert parsed.reasoning == text
    assert parsed == collect(streamed(f"{text}\n</think>\n\n{answer}", **IN_REASONING))
    real = answer.endswith(CALL)
    assert parsed.content == answer.removesuffix("\n" + CALL)
    assert parsed.tool_calls == ([ToolCall("weather", '{"city": "Oslo"}')] if real else [])


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ("<invoke name='weather'>|<parameter name='city'>Oslo</parameter>|</invoke>", OSLO),
        ('<invoke name="weather" id="1">|<parameter name="city">Oslo</parameter>|</invoke>', OSLO),
        ('<invoke id="1" name="weather">|<parameter type="string" name="city">Oslo</parameter>|'
         "</invoke>", OSLO),
        ("<invoke name=weather>|<parameter name=city>Oslo</parameter>|</invoke>", OSLO),
        ("<invoke=weather>|<parameter = 'city' >Oslo</parameter>|</invoke>", OSLO),
        ('<invoke  name = "weather" >|<parameter name="city" >Oslo</parameter>|</invoke >', None),
        ('<invoke name="weather">|<parameter name="city">Oslo|</invoke>', OSLO),
        ('<invoke name="weather">|<parameter name="city">Oslo</invoke>', OSLO),
        ('<invoke name="weather">|<parameter name="city">Oslo</parameter>|', OSLO),
        ('<invoke name="weather">|<parameter name="city">Oslo', OSLO),
        ('<invoke name="weather">|<parameter name="days">3|<parameter name="city">Oslo|</invoke>',
         {"days": 3, "city": "Oslo"}),
        ('<invoke name="weather">|<parameter name="city">Oslo</parameter>|'
         '<parameter name="city">Rome</parameter>|</invoke>', OSLO),
        ('<invoke name="weather">|<parameter name="city">a|<parameter name="x">b</parameter>|'
         "</invoke>", {"city": 'a\n<parameter name="x">b'}),
        ('<invoke name="weather">|<parameter name="scale">|K|</parameter>|</invoke>',
         {"scale": "\nK\n"}),
        ('<invoke name="weather">|<parameter name="unit">|km|</parameter>|</invoke>',
         {"unit": "km"}),
        ('<invoke name="weather">|<parameter name="wet">|true|</parameter>|</invoke>',
         {"wet": True}),
        ('<invoke name="weather">|<parameter name="tags">["\\ud83d", "\\ud83d\\ude00"]</parameter>|'
         "</invoke>", {"tags": ["\ufffd", "😀"]}),
        ('<invoke name="weather">|<parameter name="days">1e999</parameter>|</invoke>',
         {"days": "1e999"}),
        ('<invoke name="weather">|<parameter name="wind">-1e999</parameter>|</invoke>',
         {"wind": "-1e999"}),
        ('<invoke name="weather">|<parameter name="tags">[NaN]</parameter>|</invoke>',
         {"tags": "[NaN]"}),
        ('<invoke name="weather">|<parameter name="tags">DEEP</parameter>|</invoke>',
         {"tags": "[" * 5000 + "]" * 5000}),
        ('<invoke name="weather">|<parameter name="days">' + "9" * 5000 + "</parameter>|</invoke>",
         {"days": "9" * 5000}),
    ],
)  # fmt: skip
def test_a_call_is_read_however_its_tags_and_values_are_spelled(body, arguments):
    body = body.replace("|", "\n").replace("DEEP", "[" * 5000 + "]" * 5000)
    text = f"<minimax:tool_call>\n{body}\n</minimax:tool_call>"
    message = parse(text, tools=TOOL_LIST)
    assert message == collect(streamed(text, in_reasoning=False, tools=TOOL_LIST))
    if arguments is None:
        return
    (call,) = message.tool_calls
    pairs = json.loads(call.arguments, object_pairs_hook=list)
    assert (call.name, dict(pairs), len(pairs)) == ("weather", arguments, len(arguments))
    assert json.loads(call.arguments.encode(), parse_constant=pytest.fail) == arguments
    assert message.content == ""


def test_parameters_are_found_through_references_and_alternatives():
    point = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
    name = {"properties": {"x": {"type": "string"}, "y": {"type": "boolean"}}}
    roots = [
        ({"$ref": "#/$defs/P", "$defs": {"P": point}}, {"type": "integer"}),
        ({"anyOf": [point, {"type": "null"}]}, {"type": "integer"}),
        ({"anyOf": [point, name]}, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
        ({"allOf": [name, {"$ref": "#/$defs/P"}], "$defs": {"P": point}},
         {"allOf": [{"type": "string"}, {"type": "integer"}]}),
        ({"$ref": "#/$defs/P", "$defs": {"P": {"$ref": "#"}}}, {}),
    ]  # fmt: skip
    for parameters, schema in roots:
        assert parameter_schema(parameters, "x") == schema


def test_several_calls_of_one_turn_keep_their_order_and_types():
    text = (
        "Two things.\n<minimax:tool_call>\n"
        '<invoke name="weather">\n<parameter name="city">Oslo "N"\n</parameter>\n<parameter '
        'name="days">3</parameter>\n'
        '<parameter name="scale">null</parameter>\n<parameter name="wind">1.5</parameter>\n'
        '<parameter name="wet">true</parameter>\n<parameter name="where">{"latitude": '
        "59}</parameter>\n"
        '<parameter name="tags">["a", "b"]</parameter>\n</invoke>\n<invoke '
        'name="now">\n</invoke>\n</minimax:tool_call>'
    )
    message = parse(text, tools=TOOL_LIST)
    assert message.content == "Two things."
    assert [call.name for call in message.tool_calls] == ["weather", "now"]
    assert json.loads(message.tool_calls[0].arguments) == {
        "city": 'Oslo "N"\n',
        "days": 3,
        "scale": None,
        "wind": 1.5,
        "wet": True,
        "where": {"latitude": 59},
        "tags": ["a", "b"],
    }
    assert message.tool_calls[1].arguments == "{}"


def test_the_name_arrives_before_the_arguments_and_a_string_arrives_in_pieces():
    parser = MiniMaxM2Parser(in_reasoning=False, tools=TOOL_LIST)
    assert parser.feed('<minimax:tool_call>\n<invoke name="weather">') == [CallBegin(0, "weather")]
    first = parser.feed('\n<parameter name="city">San ')
    assert "".join(event.text for event in first) == '{"city": "San '
    assert parser.feed("Francisco") == [CallArguments(0, "Francisco")]
    rest = parser.feed("</parameter>\n</invoke>\n</minimax:tool_call>")
    assert rest[-1] == CallEnd(0, True)


@pytest.mark.parametrize(
    "text",
    [
        "Write <minimax:tool_call> around it.",
        "a < b, <invoke> and </invoke> and <parameter name=",
        "<minimax:tool_call>\nnothing to invoke\n</minimax:tool_call>",
        "A stray </think> in an answer, and <think> too.",
        'ends in <minimax:tool_call>\n<invoke name="weather',
        '<minimax:tool_call>\n<invoke name="' + "x" * 400 + '">',
        "\n\n<",
        "",
    ],
)
def test_text_that_merely_looks_like_a_tag_survives(text):
    message = parse(text, tools=TOOL_LIST)
    assert (message.content, message.reasoning, message.tool_calls) == (text, "", [])


def test_tags_are_text_when_the_request_has_no_tools():
    assert parse(CALL, tools=None).content == CALL


def test_a_closing_tag_inside_a_value_is_part_of_the_value():
    text = CALL.replace("Oslo", "a </parameter> b </invoke> c")
    assert json.loads(parse(text, tools=TOOL_LIST).tool_calls[0].arguments) == {
        "city": "a </parameter> b </invoke> c"
    }


@pytest.mark.parametrize("length", range(len(CALL)))
def test_a_call_cut_off_anywhere_ends_as_text(length):
    message = parse("Hi.\n" + CALL[:length], tools=TOOL_LIST)
    complete = "</invoke>" in CALL[:length]
    assert message.tool_calls == ([ToolCall("weather", '{"city": "Oslo"}')] if complete else [])
    if not complete:
        assert message.content.rstrip("\n") == ("Hi.\n" + CALL[:length]).rstrip("\n")


FRAGMENTS = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        '<invoke name="weather">',
        '<invoke name="now">',
        "</invoke>",
        '<parameter name="city">',
        '<parameter name="days">',
        "</parameter>",
        "\n",
        " ",
        "<",
        "</",
        '">',
        "Oslo",
        "7",
        '"\\',
        "é🙂",
    ]
)


@settings(max_examples=400, deadline=None)
@given(
    st.one_of(
        st.lists(FRAGMENTS, max_size=25).map("".join),
        st.tuples(
            st.lists(FRAGMENTS, max_size=6).map("".join),
            st.lists(FRAGMENTS, max_size=6).map("".join),
        ).map(lambda ends: ends[0] + CALL + ends[1]),
    ),
    st.lists(st.integers(0, 300), max_size=12),
    st.booleans(),
    st.booleans(),
)
@example(CALL, list(range(200)), False, True)
@example('<minimax:tool_call><invoke name="now"></invoke>\nx', list(range(60)), False, True)
@example("x\n</think>\n\n\n" + CALL + "\n", list(range(200)), True, True)
def test_any_split_of_the_stream_gives_the_result_of_the_whole(
    text, cuts, in_reasoning, with_tools
):
    options = {"in_reasoning": in_reasoning, "tools": TOOL_LIST if with_tools else None}
    bounds = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    pieces = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert (
        streamed(pieces, **options)
        == streamed([text], **options)
        == streamed(list(text), **options)
    )


PLAIN = st.text(
    st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30
).filter(str.strip)
VALUES = {
    "city": st.text(st.characters(codec="utf-8"), max_size=20),
    "days": st.integers(-(10**12), 10**12),
    "scale": st.one_of(st.none(), PLAIN.filter(lambda text: text != "null")),
    "wind": st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)),
    "wet": st.booleans(),
    "where": st.fixed_dictionaries({"latitude": st.floats(-90, 90)}),
    "tags": st.lists(st.text(st.characters(codec="utf-8"), max_size=5), max_size=3),
}
ARGUMENTS = st.fixed_dictionaries({}, optional=VALUES)
CALLS = st.lists(
    st.one_of(ARGUMENTS.map(lambda arguments: ("weather", arguments)), st.just(("now", {}))),
    max_size=3,
)


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.just(""), PLAIN), st.one_of(st.just(""), PLAIN), CALLS)
def test_what_the_chat_template_renders_parses_back(tokenizer, reasoning, content, calls):
    turn = {"role": "assistant", "content": content, "reasoning_content": reasoning}
    turn["tool_calls"] = [
        {"type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments in calls
    ]
    prompt = [{"role": "user", "content": "?"}]
    before = tokenizer.hugging_face.apply_chat_template(prompt, tools=TOOL_LIST, tokenize=False)
    whole = tokenizer.hugging_face.apply_chat_template(
        [*prompt, turn], tools=TOOL_LIST, tokenize=False
    )
    output = whole[len(before) + len("]~b]ai\n") :].removesuffix("[e~[\n")
    message = parse(output, tools=TOOL_LIST)
    assert (message.reasoning, message.content) == (reasoning, content)
    assert [(call.name, json.loads(call.arguments)) for call in message.tool_calls] == calls


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({}, "12", "12"),
        ({"type": "string"}, "12", "12"),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "12.0", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "number"}, "1", 1),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "object"}, '{"a": [1, null]}', {"a": [1, None]}),
        ({"type": "string", "nullable": True}, "null", None),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "5", 5),
        ({"anyOf": [{"type": "integer"}, {"type": "string"}]}, "five", "five"),
        ({"oneOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}, "4", 4),
        ({"allOf": [{"type": ["integer", "string"]}, {"type": "string"}]}, "4", "4"),
        ({"enum": [1, 2]}, "2", 2),
        ({"enum": ["1", "2"]}, "2", "2"),
        ({"const": None}, "null", None),
        ({"properties": {}}, "{}", {}),
        ({"items": {}}, "[1]", [1]),
        ({"$ref": "#/$defs/loop"}, "1", "1"),
    ],
)
def test_arguments_are_typed_by_their_schema(schema, text, value):
    root = {"$defs": {"n": {"type": "integer"}, "loop": {"$ref": "#/$defs/loop"}}}
    typed = typed_value(text, allowed_types(schema, root))
    assert (typed, type(typed)) == (value, type(value))


@pytest.mark.parametrize(
    ("parameters", "schema"),
    [
        ({"properties": {"a": {"type": "integer"}}}, {"type": "integer"}),
        ({"properties": {"b": {"type": "integer"}}}, {}),
        ({"additionalProperties": {"type": "null"}}, {"type": "null"}),
        ({"properties": {"a": {}}, "additionalProperties": {"type": "null"}}, {}),
        ({"properties": {"b": {}}, "additionalProperties": {"type": "null"}}, {"type": "null"}),
        ({"additionalProperties": False}, {}),
        (
            {"$ref": "#/$defs/p", "$defs": {"p": {"properties": {"a": {"enum": [1]}}}}},
            {"enum": [1]},
        ),
        ({"properties": ["a"]}, {}),
        ("not a schema", {}),
    ],
)
def test_the_schema_of_a_parameter_is_its_own_or_that_of_all_others(parameters, schema):
    assert parameter_schema(parameters, "a") == schema


KINDS = {
    "boolean": st.booleans(),
    "integer": st.integers(),
    "number": st.floats(allow_nan=False, allow_infinity=False),
    "null": st.none(),
    "array": st.lists(st.integers() | st.text()),
    "object": st.dictionaries(st.text(), st.booleans()),
}
TYPES = st.frozensets(st.sampled_from([*KINDS, "string"]))


@given(st.data(), st.sampled_from([*KINDS]), TYPES)
def test_json_of_an_allowed_type_is_read_as_that_value(data, kind, others):
    value = data.draw(KINDS[kind])
    typed = typed_value(json.dumps(value), others | {kind})
    assert (typed, type(typed)) == (value, type(value))


@given(st.text() | st.from_type(float).map(repr), TYPES)
def test_text_that_spells_no_allowed_type_stays_as_it_is(text, types):
    typed = typed_value(text, types)
    kinds = {TYPE_OF_PYTHON[type(typed)]} | ({"number"} if type(typed) is int else set())
    assert typed == text or kinds & types


def test_events_join_to_a_message_without_the_calls_that_were_cut_off():
    events = [
        CallBegin(0, "f"),
        CallArguments(0, "{"),
        CallEnd(0, False),
        Content("<invoke"),
        CallBegin(1, "g"),
    ]
    message = collect([*events, CallArguments(1, "{}"), CallEnd(1, True)])
    assert (message.content, message.tool_calls) == ("<invoke", [ToolCall("g", "{}")])


def test_the_prompt_tells_whether_the_output_starts_inside_the_reasoning(tokenizer):
    prompt = tokenizer.render_chat([{"role": "user", "content": "hi"}])
    opens_reasoning = MiniMaxM2Format().opens_reasoning
    assert opens_reasoning(prompt)
    assert not opens_reasoning("<think>\nover\n</think>\n")
