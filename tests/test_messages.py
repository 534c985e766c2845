"""/v1/messages as Anthropic's official client sees it."""

import itertools
import json
import re

import anthropic
import pytest

from neuron_minimax.serving.messages_api import answers
from tests.agent_server import PARAMETERS, holding, weather_script
from tests.served import MODEL, ScriptedBackend, serving, web, with_field
from tests.tiny_tokenizer import write_tokenizer
from tests.waiting import WAIT, wait_until

TOOL = {"name": "get_weather", "description": "The weather", "input_schema": PARAMETERS}
QUESTION = [{"role": "user", "content": "Weather?"}]


def open_anthropic(served, **options):
    patient = {"base_url": served.url, "api_key": "none", "max_retries": 0, "timeout": WAIT}
    return anthropic.Anthropic(**patient | options)


@pytest.fixture(scope="module")
def backend(tokenizer_directory):
    return ScriptedBackend(tokenizer_directory, weather_script)


@pytest.fixture(scope="module")
def served(backend):
    with serving(backend) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    return open_anthropic(served)


def answer(client, stream=False, **options):
    """A message, of a stream too as the client puts it together."""
    options = {"model": MODEL, "max_tokens": 500, "messages": QUESTION, "tools": [TOOL]} | options
    if not stream:
        return client.messages.create(**options)
    with client.messages.stream(**options) as events:
        return events.get_final_message()


def without_ids(message):
    return [block.model_dump(exclude={"id"}, exclude_none=True) for block in message.content]


def refusal(served, **fields):
    body = {"model": MODEL, "max_tokens": 500, "messages": QUESTION} | fields
    return web.post(f"{served.url}/v1/messages", json=body)


@pytest.mark.parametrize("stream", [False, True])
def test_an_agent_goes_several_turns_and_the_prompt_is_that_of_the_same_chat(
    served, backend, client, stream
):
    messages = list(QUESTION)
    chat = [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": "Weather?"},
    ]
    system = [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "Be kind."},
    ]
    for turn in range(3):
        message = answer(client, stream, messages=messages, system=system)
        calls = [block for block in message.content if block.type == "tool_use"]
        messages.append({"role": "assistant", "content": message.content})
        if turn == 2:
            break
        assert message.stop_reason == "tool_use"
        assert [block.type for block in message.content[:2]] == ["thinking", "text"]
        results = [
            {
                "type": "tool_result",
                "tool_use_id": call.id,
                "content": [{"type": "text", "text": f"rain in {call.input['city']}"}],
                "is_error": call.input["city"] == "São Paulo",
            }
            for call in calls
        ]
        messages.append({"role": "user", "content": results})
        chat.append(
            {
                "role": "assistant",
                "content": "On it.",
                "reasoning_content": message.content[0].thinking,
                "tool_calls": [
                    {
                        "id": call.id,
                        "type": "function",
                        "function": {"name": call.name, "arguments": json.dumps(call.input)},
                    }
                    for call in calls
                ],
            }
        )
        chat += [
            {
                "role": "tool",
                "tool_call_id": result["tool_use_id"],
                "content": "Error: " * result["is_error"] + result["content"][0]["text"],
            }
            for result in results
        ]
    assert without_ids(message)[1] == {"type": "text", "text": "It is rain in Rome."}
    assert message.stop_reason == "end_turn"
    tool = {
        "name": TOOL["name"],
        "description": TOOL["description"],
        "parameters": TOOL["input_schema"],
    }
    tools = [{"type": "function", "function": tool}]
    rendered = web.post(f"{served.url}/tokenize", json={"messages": chat, "tools": tools}).json()
    prompt = backend.tokenizer.spell(rendered["tokens"])
    assert "Error: rain in São Paulo" in prompt
    assert backend.prompt == rendered["tokens"]
    counted = client.messages.count_tokens(
        model=MODEL, messages=messages[:-1], system=system, tools=[TOOL]
    )
    assert counted.input_tokens == rendered["count"]
    usage = message.usage
    assert usage.input_tokens + usage.cache_read_input_tokens == rendered["count"]
    assert usage.cache_read_input_tokens > 0


def test_the_streamed_message_is_the_whole_message(client):
    whole = answer(client)
    streamed = answer(client, stream=True)
    assert without_ids(whole) == without_ids(streamed)
    assert whole.stop_reason == streamed.stop_reason
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    ids = [block.id for block in whole.content if block.type == "tool_use"]
    assert len(set(ids)) == 2


def test_a_stream_opens_and_closes_each_block_in_turn(client):
    events = client.messages.create(
        model=MODEL, max_tokens=500, messages=QUESTION, tools=[TOOL], stream=True
    )
    told = []
    for event in events:
        name = event.type
        if name == "content_block_start":
            name = f"{name} {event.index} {event.content_block.type}"
        elif name == "content_block_delta":
            name = f"{name} {event.index} {event.delta.type}"
        elif name == "content_block_stop":
            name = f"{name} {event.index}"
        told.append(name)
    wanted = ["message_start"]
    kinds = [
        ("thinking", ["thinking_delta", "signature_delta"]),
        ("text", ["text_delta"]),
        ("tool_use", ["input_json_delta"]),
        ("tool_use", ["input_json_delta"]),
    ]
    for index, (kind, deltas) in enumerate(kinds):
        wanted.append(f"content_block_start {index} {kind}")
        wanted += [f"content_block_delta {index} {delta}" for delta in deltas]
        wanted.append(f"content_block_stop {index}")
    wanted += ["message_delta", "message_stop"]
    assert [name for name, _ in itertools.groupby(told)] == wanted
    assert told.count("content_block_delta 2 input_json_delta") > 3


def test_tool_choice_is_auto_any_one_tool_or_none(tmp_path):
    silent = ScriptedBackend(write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\nNo.")
    flag = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
    tools = [TOOL, {"name": "set", "input_schema": flag}]
    with serving(silent) as served:
        client = open_anthropic(served)
        for choice, words in (("auto", 1), ("none", 1)):
            message = answer(client, tools=tools, tool_choice={"type": choice})
            assert [block.type for block in message.content][words:] == ["text"]
        named = {"type": "tool", "name": "set"}
        message = answer(client, tools=tools, tool_choice=named)
        assert message.stop_reason == "tool_use"
        assert message.content[-1].name == "set"
        assert set(message.content[-1].input) == {"on"}
        one = {"type": "any", "disable_parallel_tool_use": True}
        message = answer(client, tools=tools[1:], tool_choice=one)
        assert [block.type for block in message.content] == ["thinking", "tool_use"]
        message = answer(client, tools=tools, tool_choice=one | {"type": "auto"})
        assert message.content[-1].text == "No."


def test_disabled_parallel_use_ends_the_message_with_its_first_call(client):
    message = answer(client, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_says_why_it_has_ended(client, stream):
    message = answer(client, stream, stop_sequences=["zzz", "it"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "it")
    assert message.content[-1].text == "On "
    message = answer(client, stream, max_tokens=3)
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 3
    assert message.usage.output_tokens_details.thinking_tokens == 3


def test_more_tokens_than_fit_may_be_asked_for_and_end_with_the_context(tmp_path):
    endless = ScriptedBackend(
        write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\n" + "word " * 300, seq_len=128
    )
    with serving(endless) as served:
        message = answer(open_anthropic(served), max_tokens=32_000, tools=[])
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.usage.input_tokens + message.usage.output_tokens == 129


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_is_cut_off_is_in_the_text_behind_it(client, backend, stream):
    said = weather_script("").partition("Paulo")[0]
    limit = len(backend.tokenizer.encode(said))
    message = answer(client, stream, max_tokens=limit)
    assert message.stop_reason == "max_tokens"
    assert message.content[-1].text == '<invoke name="get_weather">\n<parameter name="city">São '
    calls = [block.input for block in message.content if block.type == "tool_use"]
    assert calls[0] == {"city": "Oslo", "days": 2}
    assert len(calls) == 1 + stream  # a stream has begun with it


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_that_is_not_shown_comes_back_in_its_signature(client, backend, stream):
    omitted = {"type": "adaptive", "display": "omitted"}
    message = answer(client, stream, thinking=omitted)
    assert message.content[0].thinking == ""
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": "sun"}
        for block in message.content[2:]
    ]
    said = [{"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    answer(client, messages=QUESTION + said)
    prompt = backend.tokenizer.spell(backend.prompt)
    assert "<think>\nLook 0.\n</think>" in prompt


def test_an_answer_has_the_form_that_is_asked_for(tmp_path):
    chatty = ScriptedBackend(write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\nno json")
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    with serving(chatty) as served:
        message = answer(
            open_anthropic(served),
            tools=[],
            output_config={"format": {"type": "json_schema", "schema": schema}, "effort": "low"},
        )
    assert set(json.loads(message.content[-1].text)) == {"ok"}


def test_what_a_coding_agent_sends_beside_it_is_taken(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, weather_script)
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    body = {
        "model": MODEL,
        "max_tokens": 4,
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Hi", "citations": None}]},
            {"role": "user", "content": [{"type": "text", "text": "there", **cached}]},
        ],
        "system": [{"type": "text", "text": "You are an agent.", **cached}],
        "tools": [TOOL | {"type": "custom", "eager_input_streaming": True, **cached}],
        "metadata": {"user_id": "user_1"},
        "thinking": {"type": "enabled", "budget_tokens": 31_999},
        "output_config": {"effort": "high"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "service_tier": "auto",
        "mcp_servers": [],
        "container": None,
        "temperature": 1,
        "stream": False,
    }
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14",
    }
    with serving(backend) as served:
        response = web.post(f"{served.url}/v1/messages?beta=true", json=body, headers=headers)
    assert response.status_code == 200, response.text
    assert response.headers["request-id"] == response.headers["x-request-id"]
    prompt = backend.tokenizer.spell(backend.prompt)
    assert "]~b]user\nHi\nthere[e~[" in prompt  # consecutive messages are one turn


# What the schemas of Claude Code's tools are made of.
NESTED = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 99, "description": "Where"},
        "days": {"type": "integer", "exclusiveMinimum": 0, "maximum": 9, "default": 2},
        "parts": {
            "type": "array",
            "maxItems": 4,
            "items": {
                "type": "object",
                "properties": {
                    "kind": {"type": "string", "enum": ["rain", "sun"]},
                    "at": {"anyOf": [{"type": "string", "format": "date"}, {"const": "now"}]},
                    "marks": {
                        "type": "object",
                        "propertyNames": {"type": "string", "pattern": "^[a-z]+$"},
                        "additionalProperties": {"type": "number"},
                    },
                },
                "required": ["kind"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["city"],
    "additionalProperties": False,
}


def test_a_conversation_of_claude_code_is_answered_and_goes_on_from_its_prefix(
    tokenizer_directory,
):
    """The form of what version 2.1.197 has sent to this server."""
    backend = ScriptedBackend(tokenizer_directory, weather_script, seq_len=4096)
    cached = {"cache_control": {"type": "ephemeral"}}
    betas = ("claude-code-20250219", "interleaved-thinking-2025-05-14", "effort-2025-11-24")
    betas += ("context-management-2025-06-27", "mid-conversation-system-2026-04-07")
    headers = {
        "authorization": "Bearer none",
        "anthropic-version": "2023-06-01",
        "anthropic-beta": ",".join(betas),
        "x-app": "cli",
        "x-stainless-timeout": "600",
    }
    asked = [{"type": "text", "text": "You may use tools."}, {"type": "text", "text": "Weather?"}]
    messages = [
        {"role": "user", "content": [asked[0], asked[1] | cached]},
        {"role": "system", "content": "The day is the first."},
    ]
    body = {
        "model": MODEL,
        "messages": messages,
        "system": [
            {"type": "text", "text": "You are an agent."},
            {"type": "text", "text": "Be brief.", **cached},
        ],
        "tools": [{"name": "get_weather", "description": "The weather", "input_schema": NESTED}],
        "metadata": {"user_id": json.dumps({"device_id": "d", "session_id": "s"})},
        "max_tokens": 32_000,
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "stream": True,
    }
    with serving(backend) as served:
        client = open_anthropic(served, api_key=None, auth_token="none")
        counts = []
        for turn in range(3):
            counted = web.post(
                f"{served.url}/v1/messages/count_tokens?beta=true", json=body, headers=headers
            )
            counts.append(counted.json()["input_tokens"])
            given = {name: value for name, value in body.items() if name != "stream"}
            with client.beta.messages.stream(**given, betas=list(betas)) as events:
                message = events.get_final_message()
            usage = message.usage
            assert usage.input_tokens + usage.cache_read_input_tokens == counts[turn]
            if turn:
                assert usage.cache_read_input_tokens > counts[turn - 1]
            content = [block.model_dump(exclude_none=True) for block in message.content]
            calls = [block for block in message.content if block.type == "tool_use"]
            results = [
                {
                    "tool_use_id": call.id,
                    "type": "tool_result",
                    "content": f"rain in {call.input['city']}",
                    "is_error": False,
                }
                for call in calls
            ]
            messages.append({"role": "assistant", "content": content})
            messages += [{"role": "user", "content": [result]} for result in results]
    assert (message.stop_reason, message.content[-1].text) == ("end_turn", "It is rain in Rome.")
    prompt = backend.tokenizer.spell(backend.prompt)
    assert "]~b]system\nYou are an agent.\nBe brief.\n\nThe day is the first." in prompt


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"container": "c"}, "container: it is not supported here"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers: it is not supported here"),
        ({"speed": "fast"}, "speed: "),
        ({"max_tokens": 0}, "max_tokens: "),
        ({"max_tokens": None}, "max_tokens: "),
        ({"temperature": -1}, "temperature "),
        ({"top_k": -5}, "top_k: "),
        ({"stop_sequences": [""]}, "stop_sequences takes"),
        ({"messages": []}, "messages: "),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: "),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content: "),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages.0.content.0.type: found 'image'; expected text, tool_result",
        ),
        (
            {"messages": [*QUESTION, {"role": "assistant", "content": "It is"}]},
            "messages.1: the conversation ends with an assistant message",
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "text", "text": "x"},
                            {"type": "tool_result", "tool_use_id": "t"},
                        ],
                    }
                ]
            },
            "messages.0.content.1: a tool_result comes behind text",
        ),
        (
            {
                "messages": [
                    *QUESTION,
                    {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
                    *QUESTION,
                ]
            },
            "messages.1.content.0.type: found 'redacted_thinking'",
        ),
        (
            {
                "messages": [
                    *QUESTION,
                    {
                        "role": "assistant",
                        "content": [{"type": "thinking", "thinking": "", "signature": "eA=="}],
                    },
                    *QUESTION,
                ]
            },
            "messages.1.content.0: the thinking is sealed",
        ),
        ({"system": [{"type": "image"}]}, "system.0.type: found 'image'"),
        ({"seed": 1}, "seed is not supported"),
        ({"n": 2}, "n is not supported"),
        ({"stop": ["x"]}, "stop is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format is not supported"),
        ({"logit_bias": {"1": 5}}, "logit_bias is not supported"),
        ({"context_management": {"edits": [{"type": "x"}]}}, "context_management.edits.0.type: "),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: found"),
        ({"tools": [TOOL | {"name": "a b"}]}, "tools.0.name: "),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools.0.defer_loading: it is not supported"),
        (
            {"tools": [TOOL | {"input_schema": {"type": 5}}]},
            "tools.0.input_schema.type: expected",
        ),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice.name: expected"),
        (
            {"tool_choice": {"type": "tool", "name": "x"}, "tools": [TOOL]},
            "tool_choice: no tool is named 'x'",
        ),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "color"}}}},
            "output_config.format.schema: the JSON schema cannot be enforced",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(served, fields, words):
    response = refusal(served, **fields)
    body = response.json()
    assert (response.status_code, body["type"]) == (400, "error")
    assert body["error"]["type"] == "invalid_request_error"
    assert body["error"]["message"].startswith(words)
    assert body["request_id"] == response.headers["request-id"]


def test_what_chat_completions_alone_have_may_ask_for_nothing(served):
    nothing = {"n": 1, "seed": None, "logit_bias": {}, "response_format": {"type": "text"}}
    assert refusal(served, **nothing).status_code == 200
    count = f"{served.url}/v1/messages/count_tokens"
    body = {"messages": QUESTION, "max_tokens": 5, "temperature": 0.5}
    assert web.post(count, json=body).status_code == 200
    response = web.post(count, json=body | {"chat_template": "x"})
    assert response.json()["error"]["message"] == "chat_template is not supported"


@pytest.mark.parametrize("content", [{}, 0, False, 5], ids=str)
def test_a_result_that_is_neither_text_nor_blocks_is_refused(served, content):
    said = conversation()["messages"][:2]
    result = {"type": "tool_result", "tool_use_id": "t", "content": content}
    response = refusal(served, messages=[*said, {"role": "user", "content": [result]}])
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message == "messages.2.content.0.content: expected a text or a list of blocks"


def conversation():
    """A body that has every kind of block, and a tool."""
    called = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Oslo"}}
    result = {"type": "text", "text": "rain"}
    return {
        "model": MODEL,
        "max_tokens": 4,
        "system": [{"type": "text", "text": "Be brief."}],
        "tools": [TOOL],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm."}, called]},
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "t", "content": [result]}],
            },
        ],
    }


PLACES = [
    ("system", 0),
    ("tools", 0),
    ("messages", 0),
    ("messages", 0, "content", 0),
    ("messages", 1, "content", 0),
    ("messages", 1, "content", 1),
    ("messages", 2, "content", 0),
    ("messages", 2, "content", 0, "content", 0),
]


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
def test_only_a_strict_server_refuses_what_nobody_knows_wherever_it_stands(
    tokenizer_directory, caplog, path
):
    caplog.set_level("DEBUG", "neuron_minimax.serving")
    bodies = [with_field(conversation(), place, "mood") for place in PLACES]
    whole = conversation()
    for place in PLACES:
        whole = with_field(whole, place, f"mood_of_{'_'.join(map(str, place))}")
    with serving(ScriptedBackend(tokenizer_directory, weather_script)) as served:
        assert web.post(f"{served.url}{path}", json=whole).status_code == 200
    (said,) = (message for message in caplog.messages if "without effect" in message)
    assert {*re.findall(r"mood_of_(\w+)", said)} == {"_".join(map(str, place)) for place in PLACES}
    with serving(ScriptedBackend(tokenizer_directory, weather_script), strict=True) as served:
        assert web.post(f"{served.url}{path}", json=conversation()).status_code == 200
        responses = [web.post(f"{served.url}{path}", json=body) for body in bodies]
    assert [response.status_code for response in responses] == [400] * len(PLACES)
    assert [response.json()["error"]["message"] for response in responses] == [
        f"{'.'.join(map(str, place))}.mood is not supported" for place in PLACES
    ]


def test_errors_have_the_protocols_statuses_and_kinds(served, client):
    with pytest.raises(anthropic.NotFoundError) as missing:
        answer(client, model="claude")
    assert missing.value.body["error"]["type"] == "not_found_error"
    assert missing.value.request_id == missing.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
        answer(client, messages=[{"role": "user", "content": "word " * 3000}])
    response = web.post(f"{served.url}/v1/messages", content=b"x")
    assert (response.status_code, response.json()["type"]) == (415, "error")
    response = web.get(f"{served.url}/v1/messages/batches")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="claude", messages=QUESTION)


def test_a_key_may_come_as_either_client_sends_it(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, weather_script)
    with serving(backend, api_keys=(b"secret",), max_body=100_000) as served:
        assert answer(open_anthropic(served, api_key="secret")).stop_reason == "tool_use"
        bearer = open_anthropic(served, api_key=None, auth_token="secret")
        assert answer(bearer).stop_reason == "tool_use"
        models = f"{served.url}/v1/models"
        assert web.get(models, headers={"x-api-key": "secret"}).status_code == 200
        assert web.get(models, headers={"x-api-key": "Bearer secret"}).status_code == 401
        for options in ({"api_key": "wrong"}, {"api_key": None, "auth_token": "wrong"}):
            with pytest.raises(anthropic.AuthenticationError) as refused:
                answer(open_anthropic(served, **options))
            assert refused.value.body["error"]["type"] == "authentication_error"
        with pytest.raises(anthropic.APIStatusError) as large:
            answer(open_anthropic(served, api_key="secret"), system="x" * 200_000)
        assert large.value.status_code == 413
        assert large.value.body["error"]["type"] == "request_too_large"
        served.service.drain()
        with pytest.raises(anthropic.APIStatusError) as draining:
            answer(open_anthropic(served, api_key="secret"))
        assert draining.value.status_code == 529
        assert draining.value.body["error"]["type"] == "overloaded_error"


@pytest.fixture
def held(tokenizer_directory):
    with holding(tokenizer_directory) as held:
        yield held


def test_a_client_that_leaves_in_the_midst_frees_the_slot(held):
    served, gate = held
    engine = served.service.model.engine
    with open_anthropic(served).messages.stream(
        model=MODEL, max_tokens=1000, messages=QUESTION
    ) as events:
        assert next(iter(events)).type == "message_start"
        wait_until(lambda: engine.occupied == 1)
    (gone,) = engine._running.values()
    wait_until(lambda: gone.cancelled)
    gate.set()
    wait_until(lambda: engine.occupied == 0)
    assert served.service.model.backend.calls.count("step 1") <= 1


def test_a_silent_stream_is_kept_alive_and_ends_with_an_error_that_says_why(held, monkeypatch):
    served, _ = held
    monkeypatch.setattr(answers, "PING_SECONDS", 0.01)
    body = {"model": MODEL, "max_tokens": 1000, "messages": QUESTION, "stream": True}
    with web.stream("POST", f"{served.url}/v1/messages", json=body) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: "))
        events = (json.loads(line.removeprefix("data: ")) for line in lines)
        assert [next(events)["type"] for _ in range(4)] == ["message_start", *["ping"] * 3]
        served.service.give_up()
        last = [event for event in events if event["type"] != "ping"]
    assert [event["type"] for event in last] == ["error"]
    assert last[0]["error"]["type"] == "overloaded_error"
