"""The embedded demo model behind the server: it answers in words, with reasoning apart, to the
official client.
"""

import json

import openai
import pytest

from neuron_minimax.backends import load
from neuron_minimax.serving.server import demo_model
from tests.served import MODEL, ask, open_client, serving


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return demo_model(tmp_path_factory.mktemp("demo"), options={"slots": 3, "engine": "eager"})


@pytest.fixture(scope="module")
def client(traced):
    with serving(load(traced)) as served:
        yield open_client(served)


def test_the_demo_model_reasons_and_answers(client):
    choice = ask(client, "What is the capital of France?", max_tokens=200).choices[0]
    assert "Paris" in choice.message.content
    assert choice.message.reasoning_content
    assert choice.finish_reason == "stop"
    assert "<think>" not in choice.message.content


def test_the_demo_model_is_streamed_word_by_word(client):
    chunks = list(ask(client, "What is the capital of France?", max_tokens=200, stream=True))
    content = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert len(content) > 1
    assert "Paris" in "".join(content)
    assert isinstance(chunks[0], openai.types.chat.ChatCompletionChunk)


def test_a_demo_that_was_made_before_is_recognized(traced):
    before = (traced / "manifest.json").stat().st_mtime_ns
    assert demo_model(traced.parent, options={"slots": 3, "engine": "eager"}) == traced
    assert (traced / "manifest.json").stat().st_mtime_ns == before


def test_the_demo_model_calls_a_tool_and_answers_from_its_result(client):
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {
        "type": "function",
        "function": {"name": "get_weather", "description": "Get the weather", "parameters": city},
    }
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    options = {"model": MODEL, "tools": [tool], "temperature": 0, "max_tokens": 200}
    first = client.chat.completions.create(messages=messages, **options).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == (
        "get_weather",
        {"city": "Paris"},
    )
    messages.append(first.message.model_dump(exclude_none=True))
    messages.append(
        {
            "role": "tool",
            "tool_call_id": call.id,
            "content": '{"temperature": 21, "condition": "sunny"}',
        }
    )
    second = client.chat.completions.create(messages=messages, **options).choices[0]
    assert second.finish_reason == "stop"
    assert "21" in second.message.content
