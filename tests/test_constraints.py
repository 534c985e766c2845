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
from neuron_minimax.serving.constraints import Constraint
from neuron_minimax.serving.grammars import Grammars
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


def constraint(grammars, grammar):
    return Constraint(grammars.matcher(grammar))


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
    found = json.loads(babble(tokenizer, constraint(grammars, grammars.json(schema)), seed))
    assert set(found) == {"name", "age"}
    assert isinstance(found["name"], str)
    assert found["age"] <= 150


@pytest.mark.parametrize("seed", range(3))
def test_json_object_mode_gives_an_object(tokenizer, grammars, seed):
    assert isinstance(
        json.loads(babble(tokenizer, constraint(grammars, grammars.json(ANY_OBJECT)), seed)), dict
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_parses_with_all_its_required_arguments(tokenizer, grammars, seed):
    grammar = grammars.tool_calls(TOOL_LIST[:1], several=False)
    said = babble(tokenizer, constraint(grammars, grammar), seed)
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
    grammar = grammars.tool_calls([{"type": "function", "function": function}])

    def accepts(arguments):
        call = f'{{"name": "f", "arguments": {json.dumps(arguments)}}}'
        matcher = grammars.matcher(grammar)
        tokens = tokenizer.encode(f"<tool_call>\n{call}\n</tool_call>")
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    assert accepts(taken)
    assert not accepts(refused)


def test_the_model_may_think_before_what_a_grammar_asks_for(tokenizer, grammars):
    opening = tokenizer.encode("<think>")[0]
    grammar = grammars.json({"type": "integer"})
    everything = torch.zeros(VOCAB)
    assert constraint(grammars, grammar).mask(everything)[opening] == -torch.inf
    rule = Constraint(grammars.matcher(grammar), opening)
    assert rule.mask(everything)[opening] == 0
    rule.advance(opening)
    assert rule.mask(everything)[opening] == -torch.inf
    rule.advance(tokenizer.encode("1")[0])
    rule = Constraint(grammars.matcher(grammar), opening)
    rule.advance(tokenizer.encode("1")[0])
    assert rule.mask(everything)[opening] == -torch.inf


def test_a_grammar_takes_what_the_chat_template_renders(tokenizer, grammars):
    rule = constraint(grammars, grammars.tool_calls(TOOL_LIST))
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
    said = text.partition("\n")[2].removesuffix(end).rpartition("</think>\n\n")[2]
    for token in tokenizer.encode(said):
        assert rule.mask(torch.zeros(VOCAB))[token] == 0, tokenizer.token_text(token)
        rule.advance(token)
    assert rule.mask(torch.zeros(VOCAB))[tokenizer.stop_token_ids[0]] == 0


@pytest.mark.parametrize(
    "schema", [{"type": "color"}, {"not": {"type": "string"}}, {"$ref": "#/$defs/missing"}]
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars, schema):
    with pytest.raises(GenerationError, match="cannot be enforced"):
        grammars.json({"type": "object", "properties": {"a": schema}})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead and look-behind, is not supported"),
        ({"type": "string", "format": "foo: bar"}, "Unknown format: foo: bar"),
    ],
)
def test_a_refusal_keeps_its_reason_and_no_place_in_our_grammar(grammars, schema, reason):
    with pytest.raises(GenerationError) as refused:
        grammars.json(schema)
    assert str(refused.value).endswith(reason)
    assert "cannot be enforced: failed" in str(refused.value)


def test_a_token_outside_of_the_grammar_is_an_error(tokenizer, grammars):
    rule = constraint(grammars, grammars.json({"type": "integer"}))
    with pytest.raises(GenerationError, match="grammar"):
        rule.advance(tokenizer.encode("x")[0])
