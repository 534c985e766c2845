"""`neuron-minimax serve` as a process: what it refuses, how it starts, and how SIGTERM ends it."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import httpx
import pytest
import uvicorn

from neuron_minimax.errors import BackendError
from neuron_minimax.serving.server import LOOPBACK, ServerOptions, listen
from tests.tiny_traced import write_traced

COMMAND = [sys.executable, "-m", "neuron_minimax", "serve"]


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return write_traced(tmp_path_factory.mktemp("served"), seq_len=500)


def run(*arguments):
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


def test_it_serves_until_sigterm_which_lets_a_running_answer_finish(traced):
    process = subprocess.Popen([*COMMAND, traced, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+", process.stderr.readline()).group()
        rest = []
        reader = threading.Thread(target=lambda: rest.extend(process.stderr))
        reader.start()
        while (
            httpx.get(f"{url}/health/live").status_code == 200
            and httpx.get(f"{url}/health").status_code == 503
        ):
            time.sleep(0.05)
        body = {
            "messages": [{"role": "user", "content": "secret words"}],
            "max_tokens": 300,
            "ignore": None,
        }
        assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 400
        del body["ignore"]
        with httpx.stream(
            "POST", f"{url}/v1/chat/completions", json=body | {"stream": True}, timeout=60
        ) as response:
            events = response.iter_lines()
            next(events)
            process.send_signal(signal.SIGTERM)
            while httpx.get(f"{url}/health").status_code != 503:
                time.sleep(0.01)
            assert httpx.post(f"{url}/v1/chat/completions", json=body).status_code == 503
            data = [line for line in events if line]
        assert data[-1] == "data: [DONE]"
        assert json.loads(data[-2].removeprefix("data: "))["choices"][0]["finish_reason"] in (
            "length",
            "stop",
        )
        assert process.wait(30) == 0
        reader.join()
    finally:
        process.kill()
    lines = [json.loads(line) for line in rest]
    assert {"request_id", "path", "status", "seconds"} <= set(lines[0])
    assert [line["event"] for line in lines].count("draining") == 1
    assert "secret words" not in "".join(rest)


def test_another_address_than_loopback_needs_a_key_or_a_clear_word(traced, tmp_path):
    refused = run(traced, "--host", "0.0.0.0")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "--api-key-file" in refused.stderr
    assert "--allow-anonymous" in refused.stderr
    (tmp_path / "keys").write_text("# nothing\n\n")
    empty = run(traced, "--host", "0.0.0.0", "--api-key-file", tmp_path / "keys")
    assert empty.returncode == 1
    assert "holds no API key" in empty.stderr


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


def test_a_directory_that_cannot_be_served_is_one_message_and_exit_code_1(tmp_path):
    result = run(tmp_path / "nothing", "--port", "0")
    assert result.returncode == 1
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "does not exist" in errors[0]
    assert "Traceback" not in result.stderr


def test_what_is_written_is_sent_at_once():
    """Without TCP_NODELAY each answer on a connection that is kept open waits up to 40 ms for an
    acknowledgement.
    """

    async def option():
        found = asyncio.get_running_loop().create_future()
        listener = listen(uvicorn.Config(None, host="127.0.0.1", port=0))

        def connected(_, writer):
            found.set_result(
                writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            )
            writer.close()

        async with await asyncio.start_server(connected, sock=listener):
            _, writer = await asyncio.open_connection(*listener.getsockname())
            writer.close()
            return await found

    assert asyncio.run(option()) != 0


def test_a_port_in_use_is_one_message_and_exit_code_1(traced):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = run(traced, "--port", taken.getsockname()[1])
    assert result.returncode == 1
    assert re.search("port .* cannot be used", result.stderr)
