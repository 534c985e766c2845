"""What happens when clients leave, the queue is full, time is up, or the server is told to stop."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from tests.served import ScriptedBackend, ask, open_client, serving


@pytest.fixture
def slow(tokenizer_directory):
    """One slot, a few milliseconds per token, an answer of some hundred tokens."""
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 300, slots=1)
    backend.before_call = lambda: time.sleep(0.005)
    with serving(backend, max_waiting=1) as served:
        yield served, open_client(served)


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def running(served):
    return served.service.model.engine.occupied


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_slot(slow, stream):
    served, _ = slow
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
    wait_until(lambda: running(served) == 0)
    backend = served.service.model.backend
    calls = len(backend.calls)
    time.sleep(0.1)
    assert len(backend.calls) <= calls + 1


def test_a_full_queue_answers_429_with_retry_after(slow):
    served, client = slow
    with ask(client, max_tokens=1000, stream=True):
        wait_until(lambda: running(served) == 1)
        with (
            ask(client, max_tokens=1000, stream=True),
            pytest.raises(openai.RateLimitError) as refused,
        ):
            ask(client)
        assert refused.value.response.headers["retry-after"] == "1"


def test_a_draining_server_finishes_what_runs_and_answers_503_to_the_rest(slow):
    served, client = slow
    answering = ask(client, max_tokens=60, stream=True)
    wait_until(lambda: running(served) == 1)
    drained = threading.Thread(target=served.service.drain)
    drained.start()
    wait_until(lambda: not served.service.ready)
    with pytest.raises(openai.InternalServerError) as refused:
        ask(client)
    assert refused.value.status_code == 503
    assert httpx.get(f"{served.url}/health/ready").status_code == 503
    assert httpx.get(f"{served.url}/health/live").status_code == 200
    assert [chunk.choices[0].finish_reason for chunk in answering][-1] == "length"
    drained.join()


def test_a_request_past_its_deadline_is_504_or_an_error_in_the_stream(tokenizer_directory):
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 300)
    backend.before_call = lambda: time.sleep(0.01)
    with serving(backend, request_timeout=0.2) as served:
        client = open_client(served)
        with pytest.raises(openai.InternalServerError) as late:
            ask(client, max_tokens=1000)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match="longer than the server allows"):
            list(ask(client, max_tokens=1000, stream=True))
