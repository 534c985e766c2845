"""A server on a free loopback port inside the test's process, and a backend that says what a test
tells it to say.
"""

import copy
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import torch

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.serving.connections import Connections
from neuron_minimax.serving.engine_thread import Metrics
from neuron_minimax.serving.server import WebServer, bind, configure
from neuron_minimax.serving.service import Service, Settings
from tests.waiting import WAIT, wait_until

MODEL = "tiny"
# A client with patience, and with a connection of its own for each request.
web = httpx.Client(timeout=WAIT, limits=httpx.Limits(max_keepalive_connections=0))


def around(app: Any) -> Any:
    """Return what is served of a server's application; tests/vllm/recording.py puts more there."""
    return app


class ScriptedBackend(Backend):
    """The backend contract without a model: after a prompt it says `script(prompt text)`, then
    stops.

    For tests whose point is the format, the protocol or the schedule. `before_call` runs before
    each encode and step.
    """

    def __init__(
        self, directory: Path, script: Callable[[str], str], slots: int = 4, seq_len: int = 2048
    ) -> None:
        self.model_directory = directory
        self.tokenizer = TextTokenizer.from_dir(directory)
        self.capabilities = Capabilities(
            slots=slots,
            seq_len=seq_len,
            buckets=(32, 64),
            vocab_size=384,
            chunked_encoding=True,
            all_position_logits=False,
            slot_copies=True,
        )
        self.script = script
        self.before_call: Callable[[], None] = lambda: None
        self.held: list[list[int]] = [[] for _ in range(slots)]
        self.answers: list[list[int]] = [[] for _ in range(slots)]
        self.prompt_lengths = [0] * slots
        self.prompt: list[int] = []  # encoded last; slots hold those of earlier requests beside it
        self.calls: list[str] = []

    def reset(self, slot: int) -> None:
        self._check_slot(slot)

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        assert start <= len(self.held[target]), "copy goes on where the slot holds nothing"
        assert end <= len(self.held[source]), "copy reads where the slot holds nothing"
        self.held[target] = self.held[target][:start] + self.held[source][start:end]
        self.calls.append(f"copy {end - start}")

    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        self.before_call()
        assert start <= len(self.held[slot]), "encode goes on where the slot holds nothing"
        self.held[slot] = self.held[slot][:start] + ids
        self.prompt_lengths[slot] = len(self.held[slot])
        self.prompt = list(self.held[slot])
        answer = self.script(self.tokenizer.spell(self.prompt))
        self.answers[slot] = [*self.tokenizer.encode(answer), self.tokenizer.stop_token_ids[0]]
        self.calls.append(f"encode {len(ids)}")
        return self._logits(slot)

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        self.before_call()
        logits = torch.zeros(self.capabilities.slots, self.capabilities.vocab_size)
        for slot in active.nonzero().flatten().tolist():
            assert int(positions[slot]) <= len(self.held[slot]), (
                "step goes on where the slot holds nothing"
            )
            self.held[slot] = [*self.held[slot][: int(positions[slot])], int(tokens[slot])]
            logits[slot] = self._logits(slot)
        self.calls.append(f"step {int(active.sum())}")
        return logits

    def _logits(self, slot: int) -> torch.Tensor:
        answer = self.answers[slot]
        place = min(len(self.held[slot]) - self.prompt_lengths[slot], len(answer) - 1)
        logits = torch.zeros(self.capabilities.vocab_size)
        logits[answer[place]] = 100.0
        return logits


def with_field(body: Any, place: Sequence[str | int], name: str) -> Any:
    """Return a copy of a request's body with one more field at a place."""
    body = copy.deepcopy(body)
    part = body
    for step in place:
        part = part[step]
    part[name] = "good"
    return body


@dataclass
class Served:
    """A running server."""

    url: str
    service: Service
    server: WebServer

    @property
    def connections(self) -> Connections:
        return self.server.config.connections

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def serving(backend: Backend, *, send_buffer: int = 0, **settings: Any) -> Iterator[Served]:
    """Serve a backend until the block ends; with a small buffer for each connection if one is
    given, in bytes.
    """
    settings = {"model_name": MODEL, "exit_timeout": 2.0} | settings
    service = Service(Settings(**settings), Metrics())
    config = configure(service, host="127.0.0.1", port=0)
    config.app = around(config.app)
    listener = bind(config)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    server = WebServer(config, service)
    server.ended.set()  # the test's process is not for the server to end
    service.use(backend)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", service, server)
    finally:
        server.should_exit = True
        thread.join()
        service.stop()


def open_client(served: Served, **options: Any) -> openai.OpenAI:
    """The official client, without retries, and with patience: its own is 5 s to connect."""
    patient = {"max_retries": 0, "timeout": WAIT}
    return openai.OpenAI(**{"base_url": f"{served.url}/v1", "api_key": "none"} | patient | options)


def ask(client: Any, content: str = "Hello", **options: Any) -> Any:
    """One greedy chat request of at most 12 tokens, unless `options` say otherwise."""
    options = {"model": MODEL, "temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(
        messages=[{"role": "user", "content": content}], **options
    )


def text_of(message: Any) -> str:
    """Reasoning and content of a message or delta."""
    return (getattr(message, "reasoning_content", None) or "") + (message.content or "")
