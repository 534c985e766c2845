"""The embedded demo model behind the server: it answers in words, with reasoning apart, to the official client."""

from pathlib import Path

import openai
import pytest

import neuron_minimax
from neuron_minimax.backends import compile_model, load
from neuron_minimax.convert.run import convert
from tests.served import ask, open_client, serving

DEMO = Path(neuron_minimax.__file__).parent / "demo"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    convert(DEMO, directory / "converted")
    options = {"slots": 3, "engine": "eager"}
    compile_model(directory / "converted", directory / "traced", options=options)
    with serving(load(directory / "traced")) as served:
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
