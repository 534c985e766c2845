"""A conversation: what is remembered is what the next prompt holds."""

import dataclasses
import json

import pytest

from neuron_minimax.api import read_tools
from neuron_minimax.backends import load
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.chat import Chat
from neuron_minimax.generation.events import Content, Reasoning, collect
from neuron_minimax.generation.llm import LLM
from neuron_minimax.generation.sampling import GREEDY
from tests.tiny_traced import answer_alone

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def llm(traced):
    return LLM(traced)


@pytest.fixture(scope="module")
def oracle(traced):
    """The same model, loaded for itself."""
    return load(traced)


def test_a_turn_is_the_answer_to_the_rendered_history(llm, oracle):
    chat = Chat(llm, system="Be brief.", params=GREEDY)
    tokenizer = llm.tokenizer
    for text in ("hello", "and Paris?"):
        history = [
            {"role": "system", "content": "Be brief."},
            *chat.messages,
            {"role": "user", "content": text},
        ]
        prompt = tokenizer.encode(tokenizer.render_chat(history))
        expected = answer_alone(
            oracle, prompt, stop_token_ids=tokenizer.stop_token_ids, max_new_tokens=12
        )
        said = collect(chat.say(text, max_new_tokens=12))
        assert list(chat.last.token_ids) == expected.token_ids
        assert (chat.last.reasoning, chat.last.text) == (said.reasoning, said.content)
        assert chat.last.finish_reason == expected.finish_reason
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    chat.reset()
    assert chat.messages == []


def test_a_later_turn_starts_from_what_the_cache_holds(llm):
    chat = Chat(llm, params=GREEDY)
    collect(chat.say("hello", max_new_tokens=4))
    before = dataclasses.replace(llm.engine.counters)
    collect(chat.say("and Paris?", max_new_tokens=4))
    new = llm.engine.counters.prompt_tokens - before.prompt_tokens
    cached = llm.engine.counters.cached_tokens - before.cached_tokens
    assert 0 < new - cached < new / 2


def test_reasoning_stays_in_the_history_and_apart_from_the_text(llm):
    chat = Chat(llm, params=GREEDY)
    events = list(chat.say("hello", max_new_tokens=6))
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    entry = chat.messages[-1]
    assert (entry.get("reasoning_content", ""), entry["content"]) == (reasoning, content)
    assert reasoning or content


def test_a_turn_that_does_not_fit_is_refused_and_not_remembered(llm):
    chat = Chat(llm, params=GREEDY)
    with pytest.raises(GenerationError, match="at most 256"):
        list(chat.say("long " * 300))
    assert chat.messages == []


def test_an_answer_goes_to_the_end_of_the_context_and_no_further(llm, oracle):
    chat = Chat(llm, params=GREEDY)
    collect(chat.say("hello", max_new_tokens=100_000))
    prompt = llm.tokenizer.encode(llm.tokenizer.render_chat([chat.messages[0]]))
    alone = answer_alone(oracle, prompt, stop_token_ids=llm.tokenizer.stop_token_ids)
    assert list(chat.last.token_ids) == alone.token_ids


@pytest.mark.parametrize("ending", ["stopped", "closed", "interrupted"])
def test_what_was_said_before_a_turn_was_stopped_stays(llm, ending):
    whole = Chat(llm, params=GREEDY)
    list(whole.say("hello", max_new_tokens=40))
    chat = Chat(llm, params=GREEDY)
    heard = []
    events = chat.say("hello", 40, lambda: ending == "stopped" and len(heard) >= 5)
    for event in events:
        heard.append(event)
        if len(heard) == 5 and ending == "closed":
            events.close()
        if len(heard) == 5 and ending == "interrupted":
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt)
    said = chat.last.token_ids
    assert 0 < len(said) < 40
    assert said == whole.last.token_ids[: len(said)]
    assert chat.last.finish_reason == "stopped"
    assert collect(heard).reasoning + collect(heard).content in (
        chat.last.reasoning + chat.last.text
    )
    assert chat.messages == [{"role": "user", "content": "hello"}, chat.last.as_message()]
    list(chat.say("and Paris?", max_new_tokens=4))  # its slot is free
    assert len(chat.messages) == 4


def test_a_turn_that_is_stopped_before_its_first_token_leaves_no_trace(llm):
    chat = Chat(llm, params=GREEDY)
    assert list(chat.say("hello", 40, lambda: True)) == []
    assert (chat.messages, chat.last.token_ids) == ([], ())


def test_an_answer_can_be_given_again_in_the_place_of_the_first(llm):
    chat = Chat(llm, params=GREEDY)
    with pytest.raises(GenerationError, match="nothing was said yet"):
        list(chat.answer_again())
    list(chat.say("hello", max_new_tokens=4))
    list(chat.say("and Paris?", max_new_tokens=4))
    before = [dict(message) for message in chat.messages]
    list(chat.answer_again(max_new_tokens=8))
    assert chat.messages[:3] == before[:3]
    assert len(chat.messages) == 4
    assert len(chat.last.token_ids) == 8


def test_calls_and_results_are_sent_with_the_numbers_that_join_them(llm):
    chat = Chat(llm, tools=[TOOL])
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": "é"}}}
    chat.messages = [
        {"role": "user", "content": "1 + 1, 2 + 2?"},
        {"role": "assistant", "content": "", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "6"},
    ]
    sent = chat.as_request()["messages"]
    ids = [[call["id"] for call in message.get("tool_calls", [])] for message in sent]
    assert ids == [[], ["call_0", "call_1"], [], [], ["call_2"], []]
    assert [message.get("tool_call_id") for message in sent] == [
        *(None, None),
        *("call_0", "call_1"),
        *(None, "call_2"),
    ]
    (function,) = {json.dumps(call["function"]) for call in sent[1]["tool_calls"]}
    assert json.loads(json.loads(function)["arguments"]) == {"a": "é"}
    assert chat.as_request()["tools"] == [TOOL]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "does not exist"),
        ("[", "cannot be used"),
        ("[]", "holds no tool"),
        ("{}", "list"),
        ('[{"type": "function"}]', "function"),
        ('[{"type": "function", "function": {"name": "a b"}}]', "name"),
        ('[{"type": "function", "function": {"name": "f", "parameters": {"type": 1}}}]', "type"),
    ],
)
def test_tools_that_the_server_would_refuse_are_refused_naming_the_file(tmp_path, text, words):
    path = tmp_path / "tools.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(GenerationError, match=r"tools\.json") as refused:
        read_tools(path)
    assert words in str(refused.value)
    assert "expected a list of tools" in str(refused.value)


def test_good_tools_are_read_as_they_are(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TOOL]))
    assert read_tools(tmp_path / "tools.json") == [TOOL]
