"""What happens when clients leave, the queue is full, time is up, or the server is told to stop."""

import json
import socket
import threading
import time

import openai
import pytest

from tests.served import ScriptedBackend, ask, open_client, serving, web
from tests.waiting import wait_until


@pytest.fixture
def gate():
    """What the backend of `slow` waits for before each call, as long as it is not set."""
    event = threading.Event()
    event.set()
    return event


@pytest.fixture
def slow(tokenizer_directory, gate):
    """One slot, an answer of some hundred tokens."""
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 300, slots=1)
    backend.before_call = gate.wait
    with serving(backend, max_waiting=1) as served:
        yield served, open_client(served)
        gate.set()


def running(served):
    return served.service.model.engine.occupied


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(slow, gate, stream):
    served, client = slow
    gate.clear()
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1000,
        "stream": stream,
    }
    address = ("127.0.0.1", served.port)
    with socket.create_connection(address) as connection:
        payload = json.dumps(body).encode()
        headers = ("Host: x", "Content-Type: application/json", f"Content-Length: {len(payload)}")
        head = "\r\n".join(("POST /v1/chat/completions HTTP/1.1", *headers, "", ""))
        connection.sendall(head.encode() + payload)
        wait_until(lambda: running(served) == 1)
        if stream:
            assert connection.recv(100)
    (gone,) = served.service.model.engine._running.values()
    wait_until(lambda: gone.cancelled)
    gate.set()
    ask(client, max_tokens=2)
    calls = served.service.model.backend.calls
    assert calls.count("step 1") <= 2  # of the round in which it left, and of the next answer


def test_a_full_queue_answers_429_with_retry_after(slow, gate):
    served, client = slow
    gate.clear()
    with ask(client, max_tokens=1000, stream=True):
        wait_until(lambda: running(served) == 1)
        with (
            ask(client, max_tokens=1000, stream=True),
            pytest.raises(openai.RateLimitError) as refused,
        ):
            ask(client)
        assert refused.value.response.headers["retry-after"] == "1"
        gate.set()


def test_a_draining_server_finishes_what_runs_and_answers_503_to_the_rest(slow, gate):
    served, client = slow
    gate.clear()
    answering = ask(client, max_tokens=60, stream=True)
    wait_until(lambda: running(served) == 1)
    drained = threading.Thread(target=served.service.drain)
    drained.start()
    wait_until(lambda: not served.service.ready)
    with pytest.raises(openai.InternalServerError) as refused:
        ask(client)
    assert refused.value.status_code == 503
    assert web.get(f"{served.url}/health/ready").status_code == 503
    assert web.get(f"{served.url}/health/live").status_code == 200
    gate.set()
    assert [chunk.choices[0].finish_reason for chunk in answering][-1] == "length"
    drained.join()


def test_a_request_past_its_deadline_is_504_or_an_error_in_the_stream(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 300)
    backend.before_call = lambda: time.sleep(0.01)
    with serving(backend, request_timeout=0.5) as served:
        client = open_client(served)
        prepared = {"url": f"{served.url}/tokenize", "json": {"prompt": "a"}}
        wait_until(lambda: web.post(**prepared).status_code == 200)  # its processes are ready
        before = errors_of(served).get("timeout", 0)
        with pytest.raises(openai.InternalServerError) as late:
            ask(client, max_tokens=1000)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(ask(client, max_tokens=1000, stream=True))
        assert errors_of(served) == {"timeout": before + 2}


def test_each_refusal_counts_once(slow):
    served, _ = slow
    assert web.get(f"{served.url}/nowhere").status_code == 404
    assert web.get(f"{served.url}/v1/completions").status_code == 405
    assert web.post(f"{served.url}/v1/completions", json={"odd": 1}).status_code == 400
    assert errors_of(served) == {"invalid_request_error": 3}


def test_a_key_may_have_any_letters(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word")
    key = "schlüssel-à".encode()
    with serving(backend, api_keys=(key,)) as served:
        for given, status in ((key, 200), (key[:-1], 401)):
            headers = {"authorization": b"Bearer " + given}
            assert web.get(f"{served.url}/v1/models", headers=headers).status_code == status


def errors_of(served):
    """Return request_errors_total by kind."""
    (family,) = served.service.metrics.errors.collect()
    return {
        sample.labels["kind"]: sample.value
        for sample in family.samples
        if sample.name.endswith("_total")
    }
