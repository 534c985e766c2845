"""Whatever JSON is sent, the server answers it or refuses it by name; it never fails."""

import json

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from neuron_minimax.generation.chat_formats.minimax_m2 import parse
from neuron_minimax.serving.protocol import ChatRequest, CompletionRequest
from tests.served import ScriptedBackend, serving
from tests.waiting import WAIT

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "developer", "user", "assistant", "tool"]),
        "content": st.text(max_size=20),
    },
    optional={"tool_calls": ANY_JSON, "reasoning_content": ANY_JSON, "tool_call_id": ANY_JSON},
)
SCHEMA = st.recursive(
    st.sampled_from(
        [
            {"type": "string"},
            {"type": "integer"},
            {"type": ["null", "number"]},
            {"enum": ["a", 1]},
            {},
        ]
    ),
    lambda inner: (
        st.builds(
            lambda a, b: {"type": "object", "properties": {"a": a, "b": b}, "required": ["a"]},
            inner,
            inner,
        )
        | st.builds(lambda items: {"type": "array", "items": items, "maxItems": 2}, inner)
        | st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner)
    ),
    max_leaves=5,
)
# Keywords of JSON schema with values of any kind, also within one another.
WILD_SCHEMA = st.recursive(
    ANY_JSON,
    lambda inner: st.dictionaries(
        st.sampled_from(
            [
                *("type", "properties", "required", "enum", "const", "anyOf", "oneOf", "allOf"),
                *("items", "prefixItems", "additionalProperties", "$ref", "$defs", "nullable"),
                *("pattern", "minLength", "maxItems", "multipleOf", "not", "description"),
            ]
        ),
        inner
        | st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["a", "b", "$ref"]), inner, max_size=2)
        | st.sampled_from(["#", "#/properties/a", "#/$defs/a/b", "object", "^(a|b)*$", 10**9]),
        max_size=4,
    ),
    max_leaves=6,
).filter(lambda schema: isinstance(schema, dict))
TOOLS = st.lists(
    st.builds(
        lambda name, schema: {"type": "function", "function": {"name": name, "parameters": schema}},
        st.sampled_from(["f", "g", "a.b-c"]),
        SCHEMA | WILD_SCHEMA,
    ),
    max_size=2,
)
FIELDS = dict.fromkeys(
    {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"messages", "model"}, ANY_JSON
)


@pytest.fixture(scope="module")
def client(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "x\n</think>\n\nyes")
    with (
        serving(backend) as served,
        httpx.Client(base_url=served.url, timeout=WAIT) as client,
    ):
        yield client


def is_well_formed(response):
    """Say whether a response is an answer, a whole stream, or a refusal that gives a reason."""
    if response.status_code == 400:
        return bool(response.json()["error"]["message"])
    if "text/event-stream" in response.headers["content-type"]:
        return response.status_code == 200 and response.text.endswith("data: [DONE]\n\n")
    return response.status_code == 200 and bool({"choices", "tokens"} & response.json().keys())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=3) | ANY_JSON}, optional=FIELDS)
    | st.fixed_dictionaries(
        {"messages": st.lists(MESSAGE, min_size=1, max_size=3), "max_tokens": st.integers(1, 30)},
        optional={
            "tools": TOOLS,
            "tool_choice": st.sampled_from(["auto", "none", "required"]),
            "response_format": st.builds(
                lambda schema: {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": schema},
                },
                SCHEMA | WILD_SCHEMA,
            ),
            "temperature": st.floats(0, 2),
            "stream": st.booleans(),
            "n": st.integers(1, 3),
            "stop": st.text(max_size=3),
        },
    ),
    st.sampled_from(["/v1/chat/completions", "/v1/completions", "/tokenize"]),
)
@example({"messages": [{"role": "user", "content": "\ud800"}]}, "/v1/chat/completions")
@example({"messages": [{"role": "user", "content": "a"}], "seed": 2**63}, "/v1/chat/completions")
@example({"messages": [{"role": "user", "content": "a"}], "stream": True}, "/v1/chat/completions")
@example({"messages": [{"role": "user", "content": "a"}]}, "/v1/chat/completions")
@example({"prompt": [[]]}, "/v1/completions")
@example({"prompt": [True]}, "/v1/completions")
def test_no_request_makes_the_server_fail(client, body, path):
    response = client.post(
        path, content=json.dumps(body), headers={"content-type": "application/json"}
    )
    assert is_well_formed(response), response.text


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    WILD_SCHEMA, st.sampled_from(["1e999", "[1e999]", "-1", "null", '"x"', "{}", "9" * 5000, "é"])
)
@example({"properties": {"a": {"type": [{}]}}}, "1")
@example({"properties": {"a": {"type": "integer"}}}, "1e999")
@example({"properties": {"a": {"type": "number"}}}, "[1e999]")
@example({"properties": {"a": {"anyOf": [{"$ref": "#/properties/a"}] * 10}}}, "1")
@example({"$ref": "#", "properties": [], "additionalProperties": {"$ref": "#/properties/0"}}, "1")
def test_no_tool_schema_keeps_a_call_from_being_read(schema, value):
    """Also schemas that the server refuses: the library reads answers with them."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    text = (
        f'<minimax:tool_call>\n<invoke name="f">\n<parameter name="a">{value}</parameter>\n'
        "</invoke>\n</minimax:tool_call>"
    )
    (call,) = parse(text, tools=tools).tool_calls
    found = json.loads(call.arguments, parse_constant=lambda name: pytest.fail(f"{name}: no JSON"))
    assert list(found) == ["a"]
