"""LLM, as a program uses it: whole replies, streams, several conversations, and abandoned ones."""

import json
from contextlib import closing

import pytest

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.chat import Chat
from neuron_minimax.generation.conversation import Turn
from neuron_minimax.generation.events import Content, Reasoning, collect
from neuron_minimax.generation.llm import LLM
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from tests.served import ScriptedBackend
from tests.tiny_tokenizer import write_tokenizer
from tests.tiny_traced import (
    VOCAB,
    answer_alone,
    with_another_checkpoint,
    write_traced,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp("llm"), slots=2, seq_len=256)


@pytest.fixture(scope="module")
def llm(traced):
    return LLM(traced)


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Make an LLM over a backend that says what a test tells it to say."""

    def make(script, **options):
        backend = ScriptedBackend(write_tokenizer(tmp_path / "tokenizer"), script, **options)
        monkeypatch.setattr("neuron_minimax.generation.llm.load", lambda traced, progress: backend)
        return LLM("anywhere")

    (tmp_path / "tokenizer").mkdir()
    return make


def test_a_completion_is_that_of_the_decoding_loop(llm):
    prompt = [5, 80, 17, 230, 99, 3, 41]
    pieces = []
    answer = llm.generate(prompt, GREEDY, max_new_tokens=9, on_text=pieces.append)
    alone = answer_alone(
        llm.backend,
        prompt,
        llm.tokenizer,
        stop_token_ids=llm.tokenizer.stop_token_ids,
        max_new_tokens=9,
        slot=1,
    )
    assert answer == alone
    assert "".join(pieces) == answer.text
    text = "one two"
    assert llm.generate(text, GREEDY, max_new_tokens=4) == llm.generate(
        llm.tokenizer.encode(text), GREEDY, max_new_tokens=4
    )


def test_a_reply_is_that_of_a_conversation(llm):
    chat = Chat(llm, params=GREEDY)
    said = collect(chat.say("hello", max_new_tokens=12))
    fresh = LLM(llm.backend.model_directory.parent)
    reply = fresh.chat("hello", GREEDY, max_new_tokens=12)
    assert (reply.reasoning, reply.text) == (said.reasoning, said.content)
    assert reply == chat.last
    assert reply.finish_reason == "length"
    streamed = collect(fresh.stream("hello", GREEDY, max_new_tokens=12))
    assert streamed == said
    assert chat.messages == [{"role": "user", "content": "hello"}, reply.as_message()]


def test_without_parameters_the_checkpoints_own_apply(traced, llm, tmp_path):
    def ask_for_the_best_token(checkpoint):
        (checkpoint / "generation_config.json").write_text(json.dumps({"do_sample": False}))

    assert llm.sampling == llm.tokenizer.sampling == SamplingParams(top_p=0.95, top_k=40)
    greedy = LLM(with_another_checkpoint(traced, tmp_path / "greedy", ask_for_the_best_token))
    reply = greedy.chat("hello", max_new_tokens=8)
    assert greedy.sampling == GREEDY
    assert reply == llm.chat("hello", GREEDY, max_new_tokens=8)


def test_a_reply_has_its_reasoning_its_text_and_its_calls_apart(scripted):
    call = '<minimax:tool_call>\n<invoke name="add">\n</invoke>\n</minimax:tool_call>'
    llm = scripted(lambda prompt: f"Think.\n</think>\n\nLet me see.\n{call}")
    reply = llm.chat("1 + 1?", tools=[TOOL])
    assert (reply.reasoning, reply.text, reply.finish_reason) == ("Think.", "Let me see.", "stop")
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("add", "{}")]
    (called,) = reply.as_message()["tool_calls"]
    assert called["function"] == {"name": "add", "arguments": {}}
    plain = llm.chat("1 + 1?")
    assert plain.tool_calls == ()
    assert plain.text.endswith("</minimax:tool_call>")


def test_several_conversations_go_on_in_turns(scripted):
    llm = scripted(lambda prompt: prompt.rpartition("user\n")[2][:3] + "\n</think>\n\nyes", slots=3)
    streams = {name: llm.stream(name, GREEDY) for name in ("one", "two", "six")}
    found = {name: [] for name in streams}
    waiting = list(streams)
    while waiting:
        for name in list(waiting):
            event = next(streams[name], None)
            if event is None:
                waiting.remove(name)
            else:
                found[name].append(event)
    for name, events in found.items():
        assert collect(events).reasoning == name
        assert collect(events).content == "yes"
    assert any(call == "step 3" for call in llm.backend.calls)


def test_a_stream_that_is_abandoned_frees_its_slot(scripted):
    llm = scripted(lambda prompt: "word " * 400, slots=1)
    with closing(llm.stream("a story", GREEDY)) as events:
        assert isinstance(next(events), Reasoning)
        with pytest.raises(GenerationError, match="1 slot taken, none is free"):
            llm.chat("another", GREEDY)
    assert llm.chat("another", GREEDY, max_new_tokens=2).finish_reason == "length"
    next(llm.stream("a story", GREEDY))  # dropped, not closed
    assert llm.chat("another", GREEDY, max_new_tokens=2).finish_reason == "length"
    calls = len(llm.backend.calls)
    llm.stream("never begun", GREEDY)
    assert len(llm.backend.calls) == calls


def test_text_appears_while_the_answer_is_being_made(scripted):
    llm = scripted(lambda prompt: "hm\n</think>\n\none two three four five six")
    events = llm.stream("count", GREEDY)
    first = next(event for event in events if isinstance(event, Content))
    calls = len(llm.backend.calls)
    rest = collect(events).content
    assert (first.text + rest).strip() == "one two three four five six"
    assert len(llm.backend.calls) > calls


def test_a_prompt_that_goes_on_from_an_earlier_one_is_not_encoded_again(scripted):
    llm = scripted(lambda prompt: "hm\n</think>\n\nyes")
    messages = [{"role": "user", "content": "a long question " * 10}]
    reply = llm.chat(messages, GREEDY)
    before = len(llm.backend.calls)
    messages += [reply.as_message(), {"role": "user", "content": "and?"}]
    llm.chat(messages, GREEDY)
    encoded = [int(call.split()[1]) for call in llm.backend.calls[before:] if "encode" in call]
    whole = len(Turn.after(messages, llm.tokenizer).prompt_ids)
    assert sum(encoded) < whole / 2


def test_a_fault_of_the_backend_is_raised_and_the_next_call_starts_afresh(scripted):
    llm = scripted(lambda prompt: "hm\n</think>\n\nfine")
    other = llm.stream("first", GREEDY)
    next(other)

    def burst():
        raise RuntimeError("a fault of the device")

    llm.backend.before_call = burst
    with pytest.raises(RuntimeError, match="a fault of the device"):
        llm.chat("second", GREEDY)
    llm.backend.before_call = lambda: None
    with pytest.raises(RuntimeError, match="a fault of the device"):
        list(other)
    assert llm.chat("third", GREEDY).text == "fine"


def test_what_does_not_fit_is_refused_at_once(llm):
    for refused in (
        lambda: llm.stream("long " * 300),
        lambda: llm.chat("long " * 300),
        lambda: llm.generate([1] * 300),
    ):
        with pytest.raises(GenerationError, match="at most 256"):
            refused()
    with pytest.raises(GenerationError, match=f"token {VOCAB}"):
        llm.generate([VOCAB])


def test_tokens_need_no_tokenizer(traced, llm, tmp_path):
    bare = LLM(
        with_another_checkpoint(
            traced, tmp_path / "bare", lambda checkpoint: (checkpoint / "tokenizer.json").unlink()
        )
    )
    answer = bare.generate([5, 80, 17], GREEDY, max_new_tokens=3)
    with pytest.raises(GenerationError, match=r"no tokenizer\.json"):
        bare.chat("hello")
    assert answer.text == ""
    assert answer.token_ids == llm.generate([5, 80, 17], GREEDY, max_new_tokens=3).token_ids
