"""Grammars: whatever a model would like to say, what comes out is JSON of the schema, or a call
that parses.
"""

import json

import pytest
import torch

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.events import collect
from neuron_minimax.generation.sampling import Sampler, SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.constraints import Constraint, Endings
from neuron_minimax.serving.grammars import Grammars, Wish
from neuron_minimax.serving.preparation import ANY_OBJECT
from tests.tiny_chats import write_chat_tokenizer
from tests.tiny_tokenizer import write_tokenizer

VOCAB = 384
TOOL_LIST = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "class": {"type": "string", "enum": ["first", "second"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "note": {"type": "string"},
                    "seat": {"$ref": "#/$defs/seat"},
                },
                "required": ["city", "class", "days", "seat"],
                "$defs": {
                    "seat": {
                        "type": "object",
                        "properties": {"row": {"type": "integer", "maximum": 50}},
                    }
                },
            },
        },
    },
    {"type": "function", "function": {"name": "stop"}},
]


IN_JSON = ("qwen3", "markers are plain tokens")
FORMATS = [
    ("minimax_m2", "markers are plain tokens"),
    ("minimax_m2", "markers are special tokens"),
    ("qwen3_coder", "markers are special tokens"),
    IN_JSON,
]


@pytest.fixture(scope="module", params=FORMATS, ids=" ".join)
def tokenizer(request, tmp_path_factory):
    family, markers = request.param
    directory = tmp_path_factory.mktemp("tokenizer")
    if family == "minimax_m2":
        write_tokenizer(directory)
    else:
        write_chat_tokenizer(directory, family)
    path = directory / "tokenizer.json"
    contents = json.loads(path.read_text())
    for token in contents["added_tokens"]:
        token["special"] |= "special" in markers
    path.write_text(json.dumps(contents))
    return TextTokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer.hugging_face, tokenizer.chat_format, tokenizer.stop_token_ids, VOCAB)


def constraint(tokenizer, grammars, wish):
    return Constraint(grammars.matcher(grammars.make(wish)), Endings(tokenizer))


def parse(tokenizer, text, tools):
    parser = tokenizer.chat_format.parser(in_reasoning=False, tools=tools)
    return collect(parser.feed(text) + parser.finish())


def babble(tokenizer, rule, seed, tokens=400):
    """What a model with random logits says under a constraint; ends of texts become likelier with
    every token.
    """
    random = torch.Generator().manual_seed(seed)
    sampler = Sampler(SamplingParams(seed=seed))
    said = []
    for step in range(tokens):
        logits = torch.randn(VOCAB, generator=random)
        for closing in ('"', "}", "]", "</parameter>", "\n</parameter>"):
            spoken = max(
                size
                for size in range(len(closing))
                if tokenizer.decode(said).endswith(closing[:size])
            )
            logits[tokenizer.encode(closing[spoken:])[0]] += 0.2 * step
        token = sampler.choose(rule.mask(logits))
        if token in tokenizer.stop_token_ids:
            return tokenizer.decode(said)
        rule.advance(token)
        said.append(token)
    raise AssertionError(f"the grammar never ended: {tokenizer.decode(said)}")


@pytest.mark.parametrize("seed", range(3))
def test_random_logits_still_give_json_of_the_schema(tokenizer, grammars, seed):
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "maximum": 150},
        },
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    found = json.loads(
        babble(tokenizer, constraint(tokenizer, grammars, Wish(schema=schema)), seed)
    )
    assert set(found) == {"name", "age"}
    assert isinstance(found["name"], str)
    assert found["age"] <= 150


@pytest.mark.parametrize("seed", range(3))
def test_json_object_mode_gives_an_object(tokenizer, grammars, seed):
    assert isinstance(
        json.loads(
            babble(tokenizer, constraint(tokenizer, grammars, Wish(schema=ANY_OBJECT)), seed)
        ),
        dict,
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_parses_with_all_its_required_arguments(tokenizer, grammars, seed):
    wish = Wish(tools=TOOL_LIST[:1], several=False)
    said = babble(tokenizer, constraint(tokenizer, grammars, wish), seed)
    message = parse(tokenizer, said, TOOL_LIST)
    (call,) = message.tool_calls
    arguments = json.loads(call.arguments)
    assert call.name == "book"
    assert {"city", "class", "days", "seat"} <= set(arguments)
    assert isinstance(arguments["city"], str)
    assert arguments["class"] in ("first", "second")
    assert 1 <= arguments["days"] <= 9
    assert isinstance(arguments["seat"], dict)
    assert message.content.strip() == ""


PLACE = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


@pytest.mark.parametrize(
    ("parameters", "taken", "refused"),
    [
        (None, {}, {"x": 1}),
        (PLACE, {"x": 1}, {"x": 1, "y": 2}),
        (PLACE, {"x": 1}, {}),
        (PLACE | {"additionalProperties": True}, {"x": 1, "y": 2}, {"x": "1"}),
        ({"$ref": "#/$defs/p", "$defs": {"p": PLACE}}, {"x": 1}, {"x": "1"}),
        ({"anyOf": [PLACE]}, {"x": 1}, {"x": "1"}),
        ({"type": "string"}, {}, None),
    ],
)
@pytest.mark.parametrize("tokenizer", [IN_JSON], indirect=True, ids=" ".join)
def test_arguments_in_json_follow_the_schema_of_the_tool(
    tokenizer, grammars, parameters, taken, refused
):
    function = {"name": "f"} if parameters is None else {"name": "f", "parameters": parameters}
    grammar = grammars.make(Wish(tools=[{"type": "function", "function": function}]))

    def accepts(arguments):
        call = f'{{"name": "f", "arguments": {json.dumps(arguments)}}}'
        matcher = grammars.matcher(grammar)
        tokens = tokenizer.encode(f"<tool_call>\n{call}\n</tool_call>")
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    assert accepts(taken)
    assert not accepts(refused)


def follow(tokenizer, rule, text):
    """Say a text under a constraint; return how much of it is allowed."""
    said = []
    for token in tokenizer.encode(text):
        if rule.mask(torch.zeros(VOCAB))[token] != 0:
            break
        rule.advance(token)
        said.append(token)
    return tokenizer.decode(said)


def stop_is_allowed(tokenizer, rule):
    return bool(rule.mask(torch.zeros(VOCAB))[tokenizer.stop_token_ids[0]] == 0)


def test_the_model_may_think_before_what_a_grammar_asks_for(tokenizer, grammars):
    schema = {"type": "integer"}
    for reasoning, text in (
        ("open", "Hm. <b> 1\n</think>\n\n1"),
        ("open", "</think>1"),
        ("possible", "<think>\nHm.\n</think>\n\n1"),
        ("possible", "1"),
        ("none", "1"),
    ):
        rule = constraint(tokenizer, grammars, Wish(schema=schema, reasoning=reasoning))
        assert not stop_is_allowed(tokenizer, rule)
        assert follow(tokenizer, rule, text) == text
        assert stop_is_allowed(tokenizer, rule)
    rule = constraint(tokenizer, grammars, Wish(schema=schema, reasoning="open"))
    assert follow(tokenizer, rule, "Hm.</think>\n\nNo") == "Hm.</think>\n\n"
    rule = constraint(tokenizer, grammars, Wish(schema=schema))
    assert follow(tokenizer, rule, "<think>") == ""


READ = {
    "name": "read",
    "parameters": {
        "$ref": "#/$defs/P",
        "$defs": {"P": {"properties": {"path": {"type": "string"}}, "required": ["path"]}},
    },
}


@pytest.mark.parametrize("tokenizer", FORMATS[:2], indirect=True, ids=" ".join)
def test_calls_within_the_reasoning_follow_the_grammar_too(tokenizer, grammars):
    wish = Wish(tools=[{"type": "function", "function": READ}], reasoning="open")
    call = (
        '<minimax:tool_call>\n<invoke name="{}">\n<parameter name="path">/</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    )
    good = call.format("read")
    for text in (f"Hm.\n{good}", f"Hm: `{good}`.\n</think>\n\n{good}", f"</think>{good}"):
        rule = constraint(tokenizer, grammars, wish)
        assert follow(tokenizer, rule, text) == text
        assert stop_is_allowed(tokenizer, rule)
    for start in ("Hm.\n", "Hm.</think>\n\n"):
        rule = constraint(tokenizer, grammars, wish)
        said = follow(tokenizer, rule, start + call.format("delete"))
        assert said == f'{start}<minimax:tool_call>\n<invoke name="'
        assert not stop_is_allowed(tokenizer, rule)
    rule = constraint(tokenizer, grammars, wish)
    without = '</think><minimax:tool_call>\n<invoke name="read">\n'
    assert follow(tokenizer, rule, without + "</invoke>") == without


@pytest.mark.parametrize("tokenizer", FORMATS[:3], indirect=True, ids=" ".join)
def test_a_model_that_only_wants_to_stop_is_led_to_the_end(tokenizer, grammars):
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string"}, "n": {"type": "integer"}, "l": {"type": "array"}},
        "required": ["s", "n", "l"],
        "additionalProperties": False,
    }
    function = {"name": "f", "parameters": schema}
    logits = torch.zeros(VOCAB)
    logits[tokenizer.stop_token_ids[0]] = 9.0
    reasoning = "none" if tokenizer.chat_format.end_of_turn == "<|im_end|>" else "open"
    for wish in (
        Wish(schema=schema, reasoning=reasoning),
        Wish(tools=[{"type": "function", "function": function}], reasoning=reasoning),
    ):
        rule = constraint(tokenizer, grammars, wish)
        said = []
        while (token := int(rule.mask(logits).argmax())) not in tokenizer.stop_token_ids:
            rule.advance(token)
            said.append(token)
            assert len(said) < 200, tokenizer.decode(said)
        parser = tokenizer.chat_format.parser(
            in_reasoning=reasoning == "open",
            tools=[{"type": "function", "function": function}] if wish.tools else None,
        )
        message = collect(parser.feed(tokenizer.decode(said)) + parser.finish())
        text = message.tool_calls[0].arguments if wish.tools else message.content
        assert set(json.loads(text)) == {"s", "n", "l"}


ROOTS = [
    {"$ref": "#/$defs/P", "$defs": {"P": {"type": "object", **READ["parameters"]["$defs"]["P"]}}},
    {"allOf": [{"properties": {"path": {"type": "string"}}}, {"required": ["path"]}]},
    {"type": "object", "required": ["path"]},
    {
        "anyOf": [
            {"properties": {"path": {"type": "string"}}, "required": ["path"]},
            {"properties": {"path": {"const": "/"}, "n": {}}, "required": ["path", "n"]},
        ]
    },
]


@pytest.mark.parametrize("parameters", ROOTS)
@pytest.mark.parametrize("tokenizer", FORMATS[:1], indirect=True, ids=" ".join)
def test_required_parameters_are_found_through_references_and_alternatives(
    tokenizer, grammars, parameters
):
    wish = Wish(tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}])
    opening = '<minimax:tool_call>\n<invoke name="f">\n'
    end = "</invoke>\n</minimax:tool_call>"
    given = '<parameter name="path">/</parameter>\n'
    rule = constraint(tokenizer, grammars, wish)
    assert follow(tokenizer, rule, opening + end) == opening
    rule = constraint(tokenizer, grammars, wish)
    assert follow(tokenizer, rule, opening + given + end) == opening + given + end


def test_a_call_or_the_json_can_be_asked_for_together(tokenizer, grammars):
    wish = Wish(schema={"type": "integer"}, tools=TOOL_LIST[1:])
    tags = tokenizer.chat_format.calls_tag
    rule = constraint(tokenizer, grammars, wish)
    assert follow(tokenizer, rule, "1") == "1"
    assert stop_is_allowed(tokenizer, rule)
    assert follow(tokenizer, constraint(tokenizer, grammars, wish), tags) == tags
    assert follow(tokenizer, constraint(tokenizer, grammars, wish), "No") == ""


def test_a_grammar_takes_what_the_chat_template_renders(tokenizer, grammars):
    rule = constraint(tokenizer, grammars, Wish(tools=TOOL_LIST))
    calls = [
        {
            "function": {
                "name": "book",
                "arguments": {"city": "Å <b>", "class": "first", "days": 3, "seat": {"row": 7}},
            }
        },
        {"function": {"name": "stop", "arguments": {}}},
    ]
    turn = {"role": "assistant", "content": "", "tool_calls": calls}
    prompt = [{"role": "user", "content": "?"}]
    template = tokenizer.hugging_face.apply_chat_template
    end = tokenizer.chat_format.end_of_turn + "\n"
    text = template([*prompt, turn], tokenize=False)[len(template(prompt, tokenize=False)) :]
    said = text.partition("\n")[2].removesuffix(end).rpartition("</think>\n\n")[2].lstrip("\n")
    for token in tokenizer.encode(said):
        assert rule.mask(torch.zeros(VOCAB))[token] == 0, tokenizer.token_text(token)
        rule.advance(token)
    assert rule.mask(torch.zeros(VOCAB))[tokenizer.stop_token_ids[0]] == 0


@pytest.mark.parametrize(
    "schema", [{"type": "color"}, {"not": {"type": "string"}}, {"$ref": "#/$defs/missing"}]
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars, schema):
    with pytest.raises(GenerationError, match="cannot be enforced"):
        grammars.make(Wish(schema={"type": "object", "properties": {"a": schema}}))


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
        ({"type": "string", "format": "foo: bar"}, "Unknown format: foo: bar"),
    ],
)
def test_a_refusal_keeps_its_reason_and_no_place_in_our_grammar(grammars, schema, reason):
    with pytest.raises(GenerationError) as refused:
        grammars.make(Wish(schema=schema))
    assert str(refused.value).endswith(reason)
    assert "cannot be enforced: failed" in str(refused.value)


def test_a_token_outside_of_the_grammar_is_an_error(tokenizer, grammars):
    rule = constraint(tokenizer, grammars, Wish(schema={"type": "integer"}))
    with pytest.raises(GenerationError, match="grammar"):
        rule.advance(tokenizer.encode("x")[0])
