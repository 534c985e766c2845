"""What the server does with clients that are too many, too slow, or silent, and that others do not
notice.
"""

import json
import os
import resource
import signal
import socket
import threading
from asyncio import constants
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from itertools import pairwise

import pytest

from tests.served import ScriptedBackend, ask, open_client, serving, web
from tests.waiting import WAIT, wait_until

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


def connect(served, **options):
    connection = socket.socket()
    for name, value in options.items():
        connection.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    connection.settimeout(WAIT)
    connection.connect(("127.0.0.1", served.port))
    return connection


def post(body, path="/v1/chat/completions"):
    """The bytes of a request."""
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload


def answer(connection):
    """Status and body of one response."""
    response = HTTPResponse(connection)
    response.begin()
    return response.status, response.read()


def answer_after(connection, request):
    connection.sendall(request)
    return answer(connection)


def read_all(connection):
    """What comes until the server ends the connection, however it does."""
    found = b""
    try:
        while piece := connection.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def chat(**options):
    return {"messages": [{"role": "user", "content": "Hello"}], **options}


def is_error(response, status, kind):
    head, _, body = response.partition(b"\r\n\r\n")
    return (
        head.startswith(f"HTTP/1.1 {status} ".encode())
        and b"connection: close" in head
        and json.loads(body)["error"]["type"] == kind
    )


def errors(served, kind):
    return served.service.metrics.errors.labels(kind)._value.get()


def asked(served):
    """How many requests the engine and its queue have."""
    waiting = served.service.metrics.waiting._value.get()
    return served.service.model.engine.occupied + waiting


@pytest.fixture
def gate():
    """What the backend of `gated` waits for before each call."""
    return threading.Event()


@pytest.fixture
def gated(tokenizer_directory, gate):
    """A server, with settings."""
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 3, slots=8)
    backend.before_call = gate.wait

    @contextmanager
    def serve(**settings):
        with serving(backend, **settings) as served:
            try:
                yield served
            finally:
                gate.set()

    return serve


def test_with_all_connections_answering_the_next_is_told_so_and_those_lose_nothing(gated, gate):
    with gated(max_connections=3) as served, ExitStack() as stack:
        busy = [stack.enter_context(connect(served)) for _ in range(3)]
        for connection in busy:
            connection.sendall(post(chat(max_tokens=5)))
        wait_until(lambda: asked(served) == 3)
        for _ in range(30):  # far more than there are spare ones, and none of them leaves
            refused = stack.enter_context(connect(served))
            assert is_error(read_all(refused), 503, "connection_limit")
        gate.set()
        for connection in busy:
            assert answer(connection)[0] == 200
        assert web.get(f"{served.url}/health").status_code == 200


def test_the_connection_that_has_waited_longest_makes_room_for_a_new_one(gated, gate):
    with gated(max_connections=3) as served, ExitStack() as stack:
        first, second, third = (stack.enter_context(connect(served)) for _ in range(3))
        for connection in (first, second, third):
            connection.sendall(HEALTH)
            assert answer(connection)[0] == 200
        first.sendall(HEALTH)  # now it is the second that has waited longest
        assert answer(first)[0] == 200
        third.sendall(post(chat(max_tokens=5)))  # and the third does not wait
        wait_until(lambda: asked(served) == 1)
        for closed in (second, first):
            new = stack.enter_context(connect(served))
            new.sendall(post(chat(max_tokens=5)))
            assert read_all(closed) == b""
        wait_until(lambda: asked(served) == 3)
        gate.set()
        assert answer(third)[0] == 200
        assert answer(new)[0] == 200


@pytest.mark.parametrize(
    "begun", [b"GET /health HT", post(chat(max_tokens=5))[:-1]], ids=["in its head", "in its body"]
)
def test_a_request_that_does_not_come_to_its_end_is_408_however_it_trickles(gated, begun):
    with gated(client_timeout=1.0) as served, connect(served) as connection:
        connection.sendall(begun[:-3])
        done = threading.Event()

        def trickle():
            with suppress(OSError):  # a slow machine may come to it after the end
                for byte in begun[-3:]:
                    done.wait(0.1)
                    connection.sendall(bytes([byte]))

        thread = threading.Thread(target=trickle)
        thread.start()
        assert is_error(read_all(connection), 408, "client_timeout")
        thread.join()
        wait_until(lambda: errors(served, "client_timeout") == 1)


def test_time_that_the_server_takes_is_not_held_against_a_client(gated, gate):
    with gated(client_timeout=1.0) as served, connect(served) as connection:
        connection.sendall(post(chat(max_tokens=5)))
        wait_until(lambda: asked(served) == 1)
        with connect(served) as silent:
            assert read_all(silent) == b""  # by then time would be over for the other, too
        gate.set()
        assert answer(connection)[0] == 200


def test_a_client_that_stops_reading_loses_its_slot_and_another_notices_nothing(
    tokenizer_directory,
):
    """The engine pauses after 600 tokens of 900 for each; they are far more than fits into the
    buffers on the way.
    """
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 1000, slots=2)
    gate = threading.Event()
    backend.before_call = lambda: len(backend.calls) < 600 or gate.wait()
    request = post(chat(max_tokens=900, stream=True, stream_options={"include_usage": True}))
    with (
        serving(backend, client_timeout=2.0, send_buffer=4096) as served,
        connect(served, SO_RCVBUF=4096) as stalled,
        connect(served) as reading,
        ThreadPoolExecutor() as pool,
    ):
        stalled.sendall(request)
        reading.sendall(request)
        read = pool.submit(answer, reading)
        wait_until(lambda: errors(served, "client_timeout") == 1)
        gate.set()
        status, body = read.result()
        assert status == 200
        assert b'"completion_tokens": 900' in body
        assert body.endswith(b"data: [DONE]\n\n")
        assert b"[DONE]" not in read_all(stalled)
        engine = served.service.model.engine
        assert engine.occupied == 0
        assert served.service.metrics.output_tokens._value.get() < 700 + 900


@pytest.mark.parametrize("signals", [1, 2], ids=["time is over", "second signal"])
def test_what_a_drain_leaves_ends_with_an_error_however_long_the_step_takes(
    tokenizer_directory, signals, caplog
):
    """The engine is in a step that ends after all else. Nobody's time is short: of the drain there
    is none, or no end, and to read there are minutes.
    """
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 1000, slots=2)
    gate = threading.Event()
    backend.before_call = lambda: len(backend.calls) < 20 or gate.wait()
    settings = {"drain_timeout": 0 if signals == 1 else 10 * WAIT, "exit_timeout": 2 * WAIT}
    with serving(backend, **settings) as served, ExitStack() as stack:
        stack.callback(gate.set)
        streamed, whole, waiting = (stack.enter_context(connect(served)) for _ in range(3))
        for connection in (streamed, whole, waiting):
            stream = connection is not whole
            connection.sendall(post(chat(max_tokens=1900, stream=stream)))
        wait_until(lambda: len(backend.calls) >= 20 and asked(served) == 3)
        served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: served.service.model.engine.draining)
        if signals == 2:
            served.service.give_up()  # what the second signal does before it cuts connections
        for connection in (streamed, waiting):
            status, body = answer(connection)
            *_, error, done = body.removesuffix(b"\n\n").split(b"\n\n")
            assert status == 200
            assert json.loads(error.removeprefix(b"data: "))["error"]["type"] == "shutdown"
            assert done == b"data: [DONE]"
        status, body = answer(whole)
        assert (status, json.loads(body)["error"]["type"]) == (503, "shutdown")
        assert errors(served, "shutdown") == 3
        if signals == 2:
            served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: not served.connections.open)
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.parametrize("signals", [1, 2], ids=["time is over", "second signal"])
def test_a_client_that_does_not_read_holds_the_end_of_the_server_up_for_its_time_alone(
    tokenizer_directory, signals, caplog
):
    """Its answer, which comes before the signal, is far longer than the buffers on the way."""
    backend = ScriptedBackend(tokenizer_directory, lambda prompt: "word " * 1000, slots=1)
    gate = threading.Event()
    backend.before_call = lambda: len(backend.calls) < 600 or gate.wait()
    exit_timeout = 1.0 if signals == 1 else 20 * WAIT
    settings = {"drain_timeout": 0, "exit_timeout": exit_timeout, "client_timeout": 10 * WAIT}
    with (
        serving(backend, send_buffer=4096, **settings) as served,
        connect(served, SO_RCVBUF=4096) as stalled,
        ExitStack() as stack,
    ):
        stack.callback(gate.set)
        stalled.sendall(post(chat(max_tokens=1900, stream=True)))
        wait_until(lambda: len(backend.calls) >= 600)
        for _ in range(signals):
            served.server.handle_exit(signal.SIGTERM, None)
        wait_until(lambda: not served.connections.open)
        found = read_all(stalled)
        assert b"data: " in found
        assert b"shutdown" not in found
    assert not [record for record in caplog.records if record.exc_info]


def test_unfinished_requests_hold_only_so_much_and_the_oldest_makes_room(gated, gate):
    gate.set()
    request = post(chat(max_tokens=5, user="x" * 100_000))
    with gated() as served, ExitStack() as stack:
        served.connections.most_unfinished = 3 * len(request)
        opened = [stack.enter_context(connect(served)) for _ in range(5)]
        for number, connection in enumerate(opened, 1):
            connection.sendall(request[:-1])
            wanted = min(number, 3) * (len(request) - 1)
            wait_until(lambda wanted=wanted: served.connections.unfinished == wanted)
        for connection in opened[:2]:
            assert is_error(read_all(connection), 503, "connection_limit")
        for connection in opened[2:]:
            connection.sendall(request[-1:])
            assert answer(connection)[0] == 200
        assert served.connections.unfinished == 0
        opened[2].sendall(b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1000001\r\n\r\n")
        assert answer(opened[2])[0] == 200
        opened[2].sendall(b"x" * 1_000_000)  # the answer was here first: nothing of this is kept
        assert answer_after(opened[3], HEALTH)[0] == 200
        assert served.connections.unfinished == 0


@pytest.mark.parametrize(("count", "padding"), [(300, 10), (12, 100_000)], ids=["short", "long"])
def test_bodies_that_do_not_come_to_their_end_take_nobody_s_place_in_a_line(
    gated, gate, count, padding
):
    gate.set()
    request = post(chat(max_tokens=5, user="x" * padding))
    with gated() as served, ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(connect(served)).sendall(request[:-1])
        wait_until(lambda: served.connections.unfinished == count * (len(request) - 1))
        with connect(served) as connection:
            assert answer_after(connection, request)[0] == 200


def test_a_lack_of_descriptors_is_one_line_of_the_log_and_a_pause(gated, gate, caplog):
    with gated() as served, ExitStack() as stack:
        connection = stack.enter_context(socket.socket())
        connection.settimeout(WAIT)
        with ExitStack() as hoard:
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            hoard.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            highest = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
            with suppress(OSError):
                while True:
                    hoard.enter_context(open(os.devnull))
            connection.connect(("127.0.0.1", served.port))
            wait_until(lambda: len(caplog.records) >= 2)
        connection.sendall(HEALTH)
        assert answer(connection)[0] == 200
    lines = [record for record in caplog.records if "out of system" in record.getMessage()]
    pauses = [after.created - before.created for before, after in pairwise(lines)]
    assert pauses
    assert min(pauses) > constants.ACCEPT_RETRY_DELAY / 2


def test_bad_http_is_refused_in_openai_form_and_nothing_is_reset(gated):
    with gated() as served:
        for bad in (b"\0\1\2\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000):
            with connect(served) as connection:
                connection.sendall(bad)
                response = b"".join(iter(lambda: connection.recv(1 << 16), b""))
                assert is_error(response, 400, "invalid_http")


def test_a_request_that_arrives_as_its_idle_connection_is_to_be_closed_is_answered(gated, gate):
    """The server's clock and the client's request at the same moment, made certain."""
    gate.set()
    with gated() as served, connect(served) as connection:
        connection.sendall(HEALTH)
        assert answer(connection)[0] == 200
        (open_one,) = served.connections.open
        asked = threading.Event()

        def at_the_same_moment():
            connection.sendall(post(chat(max_tokens=5)))
            while not open_one.unread:
                pass
            open_one.timeout_keep_alive_handler()
            asked.set()

        open_one.loop.call_soon_threadsafe(at_the_same_moment)
        assert asked.wait(WAIT)
        assert answer(connection)[0] == 200
        connection.sendall(HEALTH)
        assert answer(connection)[0] == 200


def test_answers_of_a_server_with_room_go_on_over_one_connection(gated, gate):
    gate.set()
    with gated(max_connections=1) as served:
        client = open_client(served)
        for _ in range(3):
            assert ask(client).choices[0].finish_reason == "length"
        assert len(served.connections.open) == 1
