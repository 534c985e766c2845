"""A conversation: what is remembered is what the next prompt holds."""

import pytest

from neuron_minimax.backends import load
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.conversation import Chat
from neuron_minimax.generation.events import Content, Reasoning, collect
from neuron_minimax.generation.sampling import GREEDY
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.tiny_traced import answer_alone


@pytest.fixture(scope="module")
def model(traced):
    backend = load(traced)
    return backend, TextTokenizer.from_dir(backend.model_directory)


def test_a_turn_is_the_answer_to_the_rendered_history(model):
    backend, tokenizer = model
    chat = Chat(backend, tokenizer, params=GREEDY)
    for text in ("hello", "and Paris?"):
        history = [*chat.messages, {"role": "user", "content": text}]
        prompt = tokenizer.encode(tokenizer.render_chat(history))
        expected = answer_alone(
            backend, prompt, stop_token_ids=tokenizer.stop_token_ids, max_new_tokens=12
        )
        said = collect(chat.say(text, max_new_tokens=12))
        assert chat.token_ids == expected.token_ids
        assert said == chat.last
    assert [message["role"] for message in chat.messages] == [
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    chat.reset()
    assert chat.messages == []


def test_reasoning_stays_in_the_history_and_apart_from_the_text(model):
    backend, tokenizer = model
    chat = Chat(backend, tokenizer, params=GREEDY)
    events = list(chat.say("hello", max_new_tokens=6))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    entry = chat.messages[-1]
    assert (entry.get("reasoning_content", ""), entry["content"]) == (reasoning, content)
    assert reasoning or content


def test_a_turn_that_does_not_fit_is_refused_and_not_remembered(model):
    backend, tokenizer = model
    chat = Chat(backend, tokenizer, params=GREEDY)
    with pytest.raises(GenerationError, match="at most 256"):
        list(chat.say("long " * 300))
    assert chat.messages == []
