"""The server as the official openai client and curl see it, over a real tiny model where the point is the model."""

import asyncio

import openai
import pytest

from neuron_minimax.backends import load
from neuron_minimax.generation.generate import answer
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.served import MODEL, serving
from tests.tiny_traced import write_traced

HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp("served"), seq_len=192)


@pytest.fixture(scope="module")
def reference(traced):
    """A second copy of the model, which computes what the server should answer, one request at a time."""
    backend = load(traced)
    tokenizer = TextTokenizer.from_dir(backend.model_directory)

    def run(content, new_tokens):
        ids = tokenizer.encode(tokenizer.render_chat([{"role": "user", "content": content}]))
        return answer(
            backend, ids, tokenizer=tokenizer, stop_token_ids=tokenizer.stop_token_ids, max_new_tokens=new_tokens
        )

    return run


@pytest.fixture(scope="module")
def server(traced):
    with serving(load(traced)) as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def ask(client, content="Hello", **options):
    options = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(messages=[{"role": "user", "content": content}], **options)


def text_of(message):
    return (getattr(message, "reasoning_content", None) or "") + (message.content or "")


def test_a_greedy_chat_answer_is_what_the_model_says_alone(client, reference):
    wanted = reference("Hello", 12)
    response = ask(client)
    assert text_of(response.choices[0].message) == wanted.text
    assert response.choices[0].finish_reason == wanted.finish_reason
    assert response.usage.completion_tokens == len(wanted.token_ids)
    assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens


def test_the_streamed_answer_is_the_whole_answer(client, reference):
    chunks = list(ask(client, "Stream", stream=True, stream_options={"include_usage": True}))
    assert "".join(text_of(chunk.choices[0].delta) for chunk in chunks[:-1]) == reference("Stream", 12).text
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 12


def test_sixty_four_clients_at_once_each_get_what_they_would_get_alone(server, reference):
    contents = [f"Question {number} " + "x" * (number % 17) for number in range(64)]
    lengths = [4 + number % 9 for number in range(64)]

    async def all_answers():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(ask(client, content, max_tokens=length) for content, length in zip(contents, lengths, strict=True))
            )

    responses = asyncio.run(all_answers())
    for content, length, response in zip(contents, lengths, responses, strict=True):
        assert text_of(response.choices[0].message) == reference(content, length).text
