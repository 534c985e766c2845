"""Grammars: whatever a model would like to say, what comes out is JSON of the schema, or a call
that parses.
"""

import json

import pytest
import torch

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.chat_formats.minimax_m2 import parse
from neuron_minimax.generation.sampling import Sampler, SamplingParams
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.constraints import ANY_OBJECT, Grammars
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


@pytest.fixture(scope="module", params=["markers are plain tokens", "markers are special tokens"])
def tokenizer(request, tmp_path_factory):
    directory = write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    path = directory / "tokenizer.json"
    contents = json.loads(path.read_text())
    for token in contents["added_tokens"]:
        token["special"] |= "special" in request.param
    path.write_text(json.dumps(contents))
    return TextTokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def grammars(tokenizer):
    return Grammars(tokenizer, VOCAB)


def babble(tokenizer, constraint, seed, tokens=400):
    """What a model with random logits says under a constraint; ends of texts become likelier with
    every token.
    """
    random = torch.Generator().manual_seed(seed)
    sampler = Sampler(SamplingParams(seed=seed))
    said = []
    for step in range(tokens):
        logits = torch.randn(VOCAB, generator=random)
        for closing in ('"', "}", "]", "</parameter>"):
            spoken = max(
                size
                for size in range(len(closing))
                if tokenizer.decode(said).endswith(closing[:size])
            )
            logits[tokenizer.encode(closing[spoken:])[0]] += 0.2 * step
        token = sampler.choose(constraint.mask(logits))
        if token in tokenizer.stop_token_ids:
            return tokenizer.decode(said)
        constraint.advance(token)
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
    found = json.loads(babble(tokenizer, grammars.constraint(grammars.json(schema)), seed))
    assert set(found) == {"name", "age"}
    assert isinstance(found["name"], str)
    assert found["age"] <= 150


@pytest.mark.parametrize("seed", range(3))
def test_json_object_mode_gives_an_object(tokenizer, grammars, seed):
    assert isinstance(
        json.loads(babble(tokenizer, grammars.constraint(grammars.json(ANY_OBJECT)), seed)), dict
    )


@pytest.mark.parametrize("seed", range(3))
def test_a_forced_call_parses_with_all_its_required_arguments(tokenizer, grammars, seed):
    grammar = grammars.tool_calls(TOOL_LIST[:1], several=False)
    message = parse(babble(tokenizer, grammars.constraint(grammar), seed), tools=TOOL_LIST)
    (call,) = message.tool_calls
    arguments = json.loads(call.arguments)
    assert call.name == "book"
    assert {"city", "class", "days", "seat"} <= set(arguments)
    assert isinstance(arguments["city"], str)
    assert arguments["class"] in ("first", "second")
    assert 1 <= arguments["days"] <= 9
    assert isinstance(arguments["seat"], dict)
    assert message.content.strip() == ""


def test_a_grammar_takes_what_the_chat_template_renders(tokenizer, grammars):
    constraint = grammars.constraint(grammars.tool_calls(TOOL_LIST))
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
    text = template([*prompt, turn], tokenize=False)[
        len(template(prompt, tokenize=False)) + len("]~b]ai\n") :
    ]
    for token in tokenizer.encode(text.removesuffix("[e~[\n")):
        assert constraint.mask(torch.zeros(VOCAB))[token] == 0, tokenizer.token_text(token)
        constraint.advance(token)
    assert constraint.mask(torch.zeros(VOCAB))[tokenizer.stop_token_ids[0]] == 0


@pytest.mark.parametrize(
    "schema", [{"type": "color"}, {"not": {"type": "string"}}, {"$ref": "#/$defs/missing"}]
)
def test_a_schema_that_cannot_be_enforced_is_refused(grammars, schema):
    with pytest.raises(GenerationError, match="cannot be enforced"):
        grammars.json({"type": "object", "properties": {"a": schema}})


def test_a_token_outside_of_the_grammar_is_an_error(tokenizer, grammars):
    constraint = grammars.constraint(grammars.json({"type": "integer"}))
    with pytest.raises(GenerationError, match="grammar"):
        constraint.advance(tokenizer.encode("x")[0])
