"""While somebody is hostile the server refuses him, and others get what they asked for."""

import asyncio
import json
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import pytest

from benchmarks.payloads import ANSWERED, REFUSED, chat, objects_of, tool
from neuron_minimax.generation.engine import TokenLogprobs, Update
from neuron_minimax.generation.events import Content
from neuron_minimax.serving import desks
from neuron_minimax.serving.responses import ChatChoice, TextChoice
from tests.served import ScriptedBackend, ask, open_client, serving, text_of
from tests.test_server_limits import wait_until
from tests.tiny_tokenizer import write_tokenizer

HEADERS = {"content-type": "application/json"}
SAID = "word " * 30
# They take seconds of processor time until they are over the limit; test_limited has such work.
SLOW = ("4,000 optional properties", "multiples of a large number")
# A template that does not end for one message; for all others it is a plain one.
ENDLESS = """
{%- for message in messages %}{% if message.content == "loop" %}
{%- for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{%- elif message.content == "grow" %}{{ "a" * 10 ** 10 }}
{%- endif %}{{ message.content }}{% endfor %}"""


def post(served, attack):
    path, body = attack
    return httpx.post(served.url + path, content=body, headers=HEADERS, timeout=300)


@pytest.fixture(scope="module")
def served(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: SAID, slots=4, seq_len=2048)
    with serving(backend) as served:
        yield served


@pytest.mark.parametrize("name", REFUSED)
def test_an_attack_is_refused_while_a_stream_goes_on(served, name):
    """The stream gets its last tokens when the attack has been answered, and not before."""
    answered = threading.Event()
    backend = served.service.model.backend
    backend.before_call = lambda: len(backend.calls) < first_calls or answered.wait(300)
    first_calls = len(backend.calls) + 20
    with ask(open_client(served), max_tokens=200, stream=True) as stream:
        first = next(iter(stream))
        response = post(served, REFUSED[name])
        answered.set()
        assert response.status_code == 400, response.text[:300]
        assert 10 < len(response.json()["error"]["message"]) < 1000
        assert len(response.content) < 8000
        said = "".join(text_of(chunk.choices[0].delta) for chunk in [first, *stream])
        assert said == SAID


@pytest.mark.parametrize("name", [name for name in ANSWERED if name not in SLOW])
def test_what_only_looks_hostile_is_answered_or_refused(served, name):
    assert post(served, ANSWERED[name]).status_code in (200, 400)


@pytest.fixture
def endless(tmp_path, monkeypatch):
    """A server whose template may not end, its limit, and all processes for short texts."""
    directory = write_tokenizer(tmp_path)
    (directory / "chat_template.jinja").write_text(ENDLESS)

    def serve(cpu_seconds, **settings):
        limits = replace(desks.SHORT_LIMITS, cpu_seconds=cpu_seconds)
        monkeypatch.setattr(desks, "SHORT_LIMITS", limits)
        return serving(ScriptedBackend(directory, lambda prompt: SAID), **settings)

    return serve


@pytest.mark.parametrize("content", ["loop", "grow"])
def test_a_template_that_takes_too_much_is_400_and_the_next_chat_is_answered(endless, content):
    with endless(0.5) as served:
        attack = chat(messages=[{"role": "user", "content": content}])
        with ThreadPoolExecutor() as pool:
            answers = list(pool.map(lambda _: post(served, attack), range(3)))
        assert [answer.status_code for answer in answers] == [400] * 3
        assert "processor time" in answers[0].json()["error"]["message"]
        assert text_of(ask(open_client(served)).choices[0].message)


def test_held_processes_keep_neither_health_nor_streams_nor_the_end_of_the_server(endless):
    """With a limit that nothing reaches: the server gives the work up when it is told to stop."""
    with endless(10_000) as served:
        attack = chat(messages=[{"role": "user", "content": "loop"}])
        long = chat(messages=[{"role": "user", "content": "good" * 20_000}])
        with ask(open_client(served), max_tokens=200, stream=True) as stream:
            next(iter(stream))
            with ThreadPoolExecutor() as pool:
                held = [pool.submit(post, served, attack) for _ in range(3)]
                short = served.service.model.desks.for_text(1)
                wait_until(lambda: short._present == 3)
                assert httpx.get(f"{served.url}/health").status_code == 200
                assert post(served, long).status_code == 400  # it does not wait for short ones
                assert [chunk.choices[0].finish_reason for chunk in stream][-1]
                assert not any(each.done() for each in held)
                drained = threading.Thread(target=served.service.drain)
                drained.start()
                assert [each.result().status_code for each in held] == [503] * 3
                drained.join()


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/tokenize"])
def test_the_time_of_a_request_covers_what_comes_before_the_engine(endless, route):
    with endless(10_000, request_timeout=0.5) as served:
        messages = [{"role": "user", "content": "loop"}]
        late = post(served, (route, json.dumps({"messages": messages}).encode()))
        assert late.status_code == 504
        assert late.json()["error"]["type"] == "timeout"


def test_a_line_is_only_so_long(endless, monkeypatch):
    with endless(10_000) as served:
        short = served.service.model.desks.for_text(1)
        monkeypatch.setattr(short, "_line", 2)
        attack = chat(messages=[{"role": "user", "content": "loop"}])
        with ThreadPoolExecutor() as pool:
            held = [pool.submit(post, served, attack) for _ in range(2)]
            wait_until(lambda: short._present == 2)
            refused = post(served, attack)
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            served.service.drain()
            assert [each.result().status_code for each in held] == [503] * 2


def test_only_so_many_answers_follow_a_grammar_at_once(served, monkeypatch):
    monkeypatch.setattr("neuron_minimax.serving.service.MAX_CONSTRAINED", 2)
    schema = objects_of({"type": "integer"})
    asked = {"tools": tool(schema), "tool_choice": "required"}
    assert post(served, chat(**asked, n=3)).status_code == 429
    assert post(served, chat(**asked, n=2)).status_code == 200
    assert post(served, chat(**asked, n=2)).status_code == 200


def test_answers_whose_grammar_is_being_made_count_too(served, monkeypatch):
    """Both are at the desk for grammars at once, whose process does not begin."""
    monkeypatch.setattr("neuron_minimax.serving.service.MAX_CONSTRAINED", 2)
    asked = {"tools": tool(objects_of({"type": "integer"})), "tool_choice": "required", "n": 2}
    grammars = served.service.model.desks.grammars
    go_on = threading.Event()
    work = grammars.work

    async def held(*arguments):
        await asyncio.to_thread(go_on.wait, 300)
        return await work(*arguments)

    monkeypatch.setattr(grammars, "work", held)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(post, served, chat(**asked))
        wait_until(lambda: grammars._present == 1)
        second = pool.submit(post, served, chat(**asked))
        wait_until(lambda: second.done() or grammars._present == 2)
        go_on.set()
        assert [first.result().status_code, second.result().status_code] == [200, 429]
    unfit = tool(objects_of({"type": "array", "uniqueItems": True}))
    assert post(served, chat(**asked | {"tools": unfit})).status_code == 400
    assert post(served, chat(**asked)).status_code == 200


@pytest.mark.parametrize(
    ("parameters", "place"),
    [
        ({"type": [{"type": "string"}]}, "parameters.type"),
        ({"type": 5}, "parameters.type"),
        ({"properties": []}, "parameters.properties"),
        ({"properties": {"a": 5}}, "parameters.properties.a"),
        ({"properties": {"a": {"anyOf": {}}}}, "parameters.properties.a.anyOf"),
        ({"properties": {"a": {"enum": "x"}}}, "parameters.properties.a.enum"),
        ({"required": {"a": 1}}, "parameters.required"),
        ({"required": [["a"]]}, "parameters.required"),
        ({"$defs": {"a": {"$ref": 5}}}, "parameters.$defs.a.$ref"),
        ({"items": {"additionalProperties": "x"}}, "parameters.items.additionalProperties"),
    ],
)
def test_a_schema_of_the_wrong_shape_is_refused_by_its_place(served, parameters, place):
    for choice in ("auto", "required"):
        refused = post(served, chat(tools=tool(parameters), tool_choice=choice))
        assert refused.status_code == 400
        assert refused.json()["error"]["message"].startswith(f"tools.0.function.{place}: expected")


def test_more_log_probabilities_than_a_response_holds_are_refused_unless_streamed(
    served, monkeypatch
):
    monkeypatch.setattr("neuron_minimax.serving.responses.MAX_LOGPROBS", 100)
    many = {"logprobs": True, "top_logprobs": 9, "max_tokens": 11}
    error = post(served, chat(**many)).json()["error"]
    assert error["param"] == "logprobs"
    assert error["message"].endswith("lower top_logprobs, max_tokens or n, or stream")
    assert post(served, chat(**many, stream=True)).status_code == 200
    assert post(served, chat(**many | {"max_tokens": 10})).status_code == 200


@pytest.mark.parametrize("streamed", [False, True])
def test_a_stream_keeps_nothing_of_what_it_has_sent(served, streamed):
    tokenizer = served.service.model.tokenizer
    update = Update(
        request=None,
        events=[Content("a")],
        logprobs=TokenLogprobs(token=1, logprob=-0.5, top=[(1, -0.5)]),
    )
    for choice in (
        ChatChoice(0, tokenizer, streamed=streamed),
        TextChoice(0, tokenizer, streamed=streamed),
    ):
        before = len(pickle.dumps((choice._events, choice._logprobs)))
        assert choice.add(update)
        assert (len(pickle.dumps((choice._events, choice._logprobs))) == before) == streamed
