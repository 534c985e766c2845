"""`neuron-minimax serve` as a process: what it refuses, how it starts, and how SIGTERM ends it."""

import asyncio
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from contextlib import ExitStack, suppress
from dataclasses import replace
from types import SimpleNamespace

import pytest

from neuron_minimax.backends import load, verify_compiled
from neuron_minimax.cli import main
from neuron_minimax.errors import BackendError, GenerationError
from neuron_minimax.limited import Limits
from neuron_minimax.serving import desks, server, service
from neuron_minimax.serving.connections import Config, Connections
from neuron_minimax.serving.engine_thread import Metrics
from neuron_minimax.serving.server import LOOPBACK, ServerOptions, bind, serve
from tests.damaged import flip
from tests.heard import Heard
from tests.served import web
from tests.tiny_traced import with_another_checkpoint, write_traced
from tests.waiting import WAIT, wait_until

COMMAND = [sys.executable, "-m", "neuron_minimax", "serve"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp("served"), seq_len=500)


def test_it_serves_until_sigterm_which_lets_a_running_answer_finish(traced):
    process = subprocess.Popen([*COMMAND, traced, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline() == f"loading {traced}\n"
        url = re.fullmatch(r"listening on (http://\S+)\n", process.stderr.readline()).group(1)
        rest = []
        reader = threading.Thread(target=lambda: rest.extend(process.stderr))
        reader.start()
        for path in ("/health/live", "/health", "/metrics"):  # ready, as it has just said
            assert web.get(f"{url}{path}").status_code == 200
        body = {
            "messages": [{"role": "user", "content": "secret words"}],
            "max_tokens": 300,
        }
        refused = body | {"logit_bias": {"1": 5}}
        assert web.post(f"{url}/v1/chat/completions", json=refused).status_code == 400
        with web.stream(
            "POST", f"{url}/v1/chat/completions", json=body | {"stream": True}
        ) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            data = [line for line in events if line]
        assert data[-1] == "data: [DONE]"
        assert json.loads(data[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in (
            "length",
            "stop",
        )
        assert process.wait(WAIT) == 0
        reader.join()
    finally:
        process.kill()
    lines = [json.loads(line) for line in rest]
    assert {"request_id", "path", "status", "seconds"} <= set(lines[0])
    assert {line.get("path") for line in lines} == {"/v1/chat/completions", None}  # no probes
    assert [line["event"] for line in lines].count("draining") == 1
    assert "secret words" not in "".join(rest)


def test_with_64_descriptors_120_silent_connections_and_bad_requests_a_good_one_is_answered(
    traced,
):
    """And every line of the log is JSON, and there are few."""
    command = [sys.executable, "-W", "always", *COMMAND[1:]]
    with tempfile.TemporaryFile("w+") as log, ExitStack() as stack:
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command, traced, "--port", "0"],
            stderr=log,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)

        def lines():
            log.seek(0)
            return log.read().splitlines()

        wait_until(lambda: process.poll() is not None or len(lines()) == 2)
        url = re.search(r"http://\S+", lines()[1]).group()
        address = ("127.0.0.1", int(url.rpartition(":")[2]))
        silent = [stack.enter_context(socket.create_connection(address)) for _ in range(120)]
        for bad in (b"\0\1\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 50_000, b"GET / HT"):
            for _ in range(20):
                connection = stack.enter_context(socket.create_connection(address))
                with suppress(ConnectionError):  # a refused one may be closed before it is done
                    connection.sendall(bad)
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
        for number in range(40):
            options = {"best_of": 2} if number % 2 else {}
            response = web.post(f"{url}/v1/chat/completions", json=body | options)
            assert response.status_code == (400 if number % 2 else 200)
        assert any(connection.fileno() != -1 for connection in silent)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT) == 0
        found = [json.loads(line) for line in lines()[2:]]
    events = Counter(line["event"] for line in found)
    assert events["a waiting connection is closed: all connections are in use"] > 0
    assert events["Invalid HTTP request received."] > 0
    assert len(found) < 1000


STUCK = """
import asyncio, sys, threading
from neuron_minimax.serving import server
from neuron_minimax.serving.engine_thread import Metrics
from neuron_minimax.serving.log import json_log
from neuron_minimax.serving.service import Service, Settings

class Stuck(server.WebServer):
    async def startup(self, sockets=None):
        await super().startup(sockets)
        asyncio.get_running_loop().run_in_executor(None, threading.Event().wait)
        print("started", flush=True)

service = Service(Settings(model_name="none", drain_timeout=0, exit_timeout=0), Metrics())
config = server.configure(service, host="127.0.0.1", port=0)
with json_log(sys.stderr):
    Stuck(config, service).run(sockets=[server.bind(config)])
"""


def test_a_thread_that_never_ends_does_not_keep_the_process_after_sigterm():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "started\n"
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    assert process.returncode == 1
    events = [json.loads(line)["event"] for line in log.splitlines()]
    assert events == ["draining", "the server does not end; the process is ended"]


def port_taken():
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


def unreached(*arguments, **options):
    pytest.fail("what is behind the refusal was reached")


@pytest.fixture
def refused(capsys, monkeypatch):
    """What a refusal says: one message, before anything else is said or made."""

    def refused(code, *arguments):
        monkeypatch.setattr(server, "compile_model", unreached)
        monkeypatch.setattr(server.WebServer, "run", unreached)
        capsys.readouterr()
        assert main(["serve", *map(str, arguments)]) == code
        out, said = capsys.readouterr()
        assert out == ""
        if code == 1:
            assert said.startswith("error: ")
            assert said.count("\n") == 1
        else:
            assert said.startswith("Usage: ")
        return " ".join(said.split())

    return refused


def test_another_address_than_loopback_needs_a_key_or_a_clear_word(traced, tmp_path, refused):
    for said in (refused(2, traced, "--host", "0.0.0.0"), refused(2, "--host", "0.0.0.0")):
        assert "--api-key-file" in said
        assert "--allow-anonymous" in said
    (tmp_path / "keys").write_text("# nothing\n\n")
    keys = ("--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")
    assert "holds no API key" in refused(1, traced, *keys)
    assert "cannot be read" in refused(1, "--api-key-file", tmp_path / "none")


def test_an_option_out_of_its_range_is_refused_by_its_name(traced, refused):
    assert "'separate', 'none'" in refused(2, traced, "--reasoning-format", "both")
    assert "--exit-timeout" in refused(2, traced, "--exit-timeout", "-1")


def test_a_port_that_cannot_be_had_is_refused_before_a_demo_is_made(traced, refused):
    with port_taken() as taken:
        port = taken.getsockname()[1]
        for directory in ([traced], []):
            assert f"port {port} of 127.0.0.1 cannot be used" in refused(
                1, *directory, "--port", port
            )


def test_a_directory_that_cannot_be_served_is_refused(traced, tmp_path, refused):
    assert "does not exist" in refused(1, tmp_path / "nothing", "--port", "0")
    converted = traced.parent / "converted"
    said = refused(1, converted, "--port", "0")
    assert "is a converted directory" in said
    assert f"`neuron-minimax compile {converted} TRACED`" in said


def test_a_tokenizer_that_is_broken_or_fails_in_its_limited_process_is_refused(
    traced, tmp_path, refused, monkeypatch
):
    def break_it(checkpoint):
        path = checkpoint / "tokenizer.json"
        path.unlink()
        path.write_text('{"model": {}}')  # what a conversion can see is whole

    monkeypatch.setattr(desks, "SHORT_LIMITS", Limits(cpu_seconds=1e-4, memory=1 << 20))
    monkeypatch.setattr(desks, "PROBE", "word " * (1 << 20))  # five times that memory
    said = refused(1, traced, "--port", "0")
    assert "works in this process, but not in the limited ones" in said
    monkeypatch.undo()
    broken = with_another_checkpoint(traced, tmp_path / "broken", break_it)
    words = f"the tokenizer in {broken / 'model'} cannot be loaded"
    assert words in refused(1, broken, "--port", "0")
    heard = Heard()
    with pytest.raises(GenerationError, match=re.escape(words)):
        serve(broken, ServerOptions(port=0), progress=heard)
    heard.named(f"opening {broken / 'model'}")


def test_a_tokenizer_that_fails_without_a_word_is_refused_by_the_kind_of_its_error(monkeypatch):
    def fail(*arguments):
        raise ConnectionResetError

    monkeypatch.setattr(desks.LimitedProcess, "call", fail)
    tokenizer = SimpleNamespace(hugging_face=SimpleNamespace(name_or_path="silent"))
    with pytest.raises(GenerationError, match=r"silent works .*: ConnectionResetError$"):
        desks.check_tokenizer(tokenizer)


def test_keys_and_hosts_given_as_options_stand_beside_those_of_the_file_and_the_address(tmp_path):
    given = ServerOptions(host="0.0.0.0", api_keys=(b"given",), hosts=frozenset({"Proxy.example"}))
    settled = given.settled(tmp_path)  # not refused: a key is needed
    assert settled.api_keys == (b"given",)
    assert settled.hosts == LOOPBACK | {"0.0.0.0", "proxy.example"}
    (tmp_path / "keys").write_text("from-file\n")
    both = replace(given, api_key_file=tmp_path / "keys", allowed_hosts=("other.example",))
    assert both.settled(tmp_path).api_keys == (b"given", b"from-file")
    assert both.settled(tmp_path).hosts == settled.hosts | {"other.example"}
    with pytest.raises(BackendError, match="needs --api-key-file"):
        ServerOptions(host="0.0.0.0").settled(tmp_path)


def test_with_verify_a_byte_that_a_disk_has_turned_is_found_before_anybody_can_ask(
    traced, tmp_path
):
    copy = shutil.copytree(traced.parent, tmp_path / "copy") / traced.name
    shard = max(copy.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    verify_compiled(copy)
    flip(shard, silently=True)
    with pytest.raises(BackendError, match=shard.name):
        serve(copy, ServerOptions(port=0, verify=True), on_listening=pytest.fail)


def test_the_port_refuses_connections_until_it_answers_and_is_lost_to_one_that_listens_first(
    traced, monkeypatch
):
    """Otherwise connections would wait, and a probe would take the server for one that is up."""
    with port_taken() as taken:
        port = taken.getsockname()[1]
    with ExitStack() as stack:

        def verify(directory, progress):
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
            other = stack.enter_context(socket.socket())
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()

        monkeypatch.setattr(server, "verify_compiled", verify)
        monkeypatch.setattr(server.WebServer, "run", unreached)
        with pytest.raises(BackendError, match=f"port {port} of 127.0.0.1 cannot be used"):
            serve(traced, ServerOptions(port=port, verify=True))


@pytest.mark.parametrize("end", ["drain", "give_up", "stop"])
def test_a_model_that_is_loaded_after_the_stop_starts_nothing(traced, monkeypatch, end):
    stopped = service.Service(service.Settings(model_name="late"), Metrics())

    def late(directory):
        backend = load(directory)
        getattr(stopped, end)()
        return backend

    monkeypatch.setattr(service, "load", late)
    for started in ("Desks", "EngineThread"):
        monkeypatch.setattr(service, started, pytest.fail)
    stopped.load_in_background(traced, pytest.fail, pytest.fail)
    for thread in threading.enumerate():
        if thread.name == "load":
            thread.join(WAIT)
    assert stopped.failure is None
    assert not stopped.ready


@pytest.mark.parametrize(
    ("level", "name"),
    [(socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_KEEPALIVE)],
    ids=["sent at once", "dead peers"],
)
def test_a_connection_sends_what_is_written_at_once_and_finds_out_that_its_peer_is_gone(
    level, name
):
    """Without TCP_NODELAY each answer on a connection that is kept open waits up to 40 ms for an
    acknowledgement.
    """

    async def option():
        found = asyncio.get_running_loop().create_future()
        connections = Connections(1, client_timeout=1, on_error=print)
        listener = bind(Config(None, connections, host="127.0.0.1", port=0))

        def connected(_, writer):
            found.set_result(writer.get_extra_info("socket").getsockopt(level, name))
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    assert asyncio.run(option()) != 0
