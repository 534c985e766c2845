"""Reasoning, tools, JSON and stop strings through the server, as the official openai client sees
them.
"""

import json

import pytest

from tests.served import MODEL, ScriptedBackend, ask, open_client, serving
from tests.tiny_tokenizer import write_tokenizer

WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}


def weather_script(prompt):
    """Calls the tool for two cities, then answers from what the tool said."""
    if "<response>" in prompt:
        said = prompt.rpartition("<response>")[2].partition("</response>")[0]
        return f"They say {said}.\n</think>\n\nIt is {said}."
    call = (
        '<invoke name="get_weather">\n<parameter name="city">{}</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n'
    )
    calls = "".join(call.format(city) for city in ("Oslo", "São Paulo"))
    return f"I should look.\n</think>\n\nLooking.\n<minimax:tool_call>\n{calls}</minimax:tool_call>"


@pytest.fixture(scope="module")
def weather(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, weather_script)
    with serving(backend) as served:
        yield open_client(served), backend


def test_a_round_trip_through_tools_with_reasoning_kept_in_the_prompt(weather):
    client, backend = weather
    messages = [{"role": "user", "content": "Weather?"}]
    first = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER_TOOL]
    ).choices[0]
    assert first.finish_reason == "tool_calls"
    assert (first.message.reasoning_content, first.message.content) == (
        "I should look.",
        "Looking.",
    )
    calls = first.message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [
        {"city": "Oslo", "days": 2},
        {"city": "São Paulo", "days": 2},
    ]
    assert len({call.id for call in calls}) == 2
    messages.append(first.message.model_dump(exclude_none=True))
    messages += [{"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in calls]
    second = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER_TOOL]
    ).choices[0]
    assert (second.message.reasoning_content, second.message.content) == (
        "They say sunny.",
        "It is sunny.",
    )
    prompt = backend.tokenizer.spell(backend.prompt)
    assert "<think>\nI should look.\n</think>" in prompt
    assert (
        '<parameter name="city">São Paulo</parameter>\n<parameter name="days">2</parameter>'
        in prompt
    )


def test_a_streamed_call_brings_its_name_first_and_then_its_arguments_in_pieces(weather):
    client, _ = weather
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Weather?"}],
        tools=[WEATHER_TOOL],
        stream=True,
    )
    names = {}
    arguments = {}
    reasoning = ""
    content = ""
    reasons = []
    for chunk in stream:
        delta = chunk.choices[0].delta
        reasoning += getattr(delta, "reasoning_content", None) or ""
        content += delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
        for call in delta.tool_calls or ():
            if call.function.name:
                assert call.id
                assert call.index not in names
                names[call.index] = call.function.name
            elif call.function.arguments:
                assert call.index in names
                arguments.setdefault(call.index, []).append(call.function.arguments)
    assert (reasoning, content) == ("I should look.", "Looking.")
    assert names == {0: "get_weather", 1: "get_weather"}
    assert len(arguments[0]) > 3
    assert json.loads("".join(arguments[1])) == {"city": "São Paulo", "days": 2}
    assert reasons[-1] == "tool_calls"
    assert not any(reasons[:-1])


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_off_by_the_limit_ends_as_text_with_reason_length(weather, stream):
    client, backend = weather
    script = weather_script("").partition("São")[0]
    limit = len(backend.tokenizer.encode(script))
    options = {"model": MODEL, "tools": [WEATHER_TOOL], "max_tokens": limit, "stream": stream}
    response = client.chat.completions.create(
        messages=[{"role": "user", "content": "Weather?"}], **options
    )
    if stream:
        chunks = list(response)
        content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        content = response.choices[0].message.content
        reason = response.choices[0].finish_reason
        assert [call.function.name for call in response.choices[0].message.tool_calls] == [
            "get_weather"
        ]
    assert reason == "length"
    assert content == 'Looking.<invoke name="get_weather">\n<parameter name="city">'


def test_tool_choice_none_leaves_tags_as_text_and_one_call_can_be_the_limit(weather):
    client, backend = weather
    messages = [{"role": "user", "content": "Weather?"}]
    none = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER_TOOL], tool_choice="none"
    )
    assert none.choices[0].message.tool_calls is None
    assert "<minimax:tool_call>" in none.choices[0].message.content
    assert "get_weather" not in backend.tokenizer.spell(backend.prompt)
    one = client.chat.completions.create(
        model=MODEL, messages=messages, tools=[WEATHER_TOOL], parallel_tool_calls=False
    )
    assert len(one.choices[0].message.tool_calls) == 1
    assert one.choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_forced_call_is_made_whatever_the_model_wants_to_say(tmp_path, choice):
    backend = ScriptedBackend(
        write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\nI will not call anything."
    )
    numbers = {name: {"type": "integer", "maximum": 9} for name in "ab"}
    add = {
        "name": "add",
        "parameters": {"type": "object", "properties": numbers, "required": ["a", "b"]},
    }
    tools = (
        [WEATHER_TOOL, {"type": "function", "function": add}]
        if choice != "required"
        else [{"type": "function", "function": add}]
    )
    with serving(backend) as served:
        client = open_client(served)
        response = ask(
            client,
            tools=tools,
            tool_choice=choice,
            parallel_tool_calls=False,
            max_tokens=300,
            temperature=1,
        )
    (call,) = response.choices[0].message.tool_calls
    assert call.function.name == "add"
    assert set(json.loads(call.function.arguments)) == {"a", "b"}
    assert response.choices[0].message.reasoning_content == "Hm."
    assert response.choices[0].finish_reason == "tool_calls"


def test_stop_strings_end_the_answer_and_are_not_part_of_it(weather):
    client, _ = weather
    for stream in (False, True):
        response = ask(client, "Weather?", max_tokens=200, stop=["king", "zzz"], stream=stream)
        choices = [chunk.choices[0] for chunk in response] if stream else response.choices
        parts = [choice.delta if stream else choice.message for choice in choices]
        assert "".join(part.content or "" for part in parts) == "Loo"
        assert choices[-1].finish_reason == "stop"


def test_reasoning_can_be_left_in_the_content_with_its_tags(tmp_path):
    backend = ScriptedBackend(
        write_tokenizer(tmp_path), lambda prompt: "Why not.\n</think>\n\nYes."
    )
    with serving(backend, split_reasoning=False) as served:
        client = open_client(served)
        whole = ask(client, max_tokens=50).choices[0].message
        assert whole.content == "<think>\nWhy not.\n</think>\n\nYes."
        assert not hasattr(whole, "reasoning_content")
        streamed = "".join(
            chunk.choices[0].delta.content or ""
            for chunk in ask(client, max_tokens=50, stream=True)
        )
        assert streamed == whole.content


def test_an_answer_that_can_only_be_json_is_json(tmp_path):
    backend = ScriptedBackend(
        write_tokenizer(tmp_path), lambda prompt: "Hm.\n</think>\n\nnot json at all"
    )
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2]}},
        "required": ["ok", "size"],
        "additionalProperties": False,
    }
    with serving(backend) as served:
        client = open_client(served)
        json_schema = {"name": "answer", "schema": schema, "strict": True}
        choice = ask(
            client,
            max_tokens=100,
            response_format={"type": "json_schema", "json_schema": json_schema},
        ).choices[0]
        assert choice.message.reasoning_content == "Hm."
        found = json.loads(choice.message.content)
        assert set(found) == {"ok", "size"}
        assert choice.finish_reason == "stop"
