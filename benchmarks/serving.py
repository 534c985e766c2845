"""Load on `neuron-minimax serve`, `transformers serve` and, where it is built, `llama-server`: one
model, the same requests, one run.

python -m benchmarks.serving [--clients 1,8,32] [--new-tokens 32] [--rounds 3]
                             [--continuous-batching]
python -m benchmarks.serving --soak-minutes 10
"""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import httpx

from benchmarks import llama
from benchmarks.clients import load
from benchmarks.processes import run_apart
from benchmarks.shared import checkpoint, compiled, empty_scratch, parser_of
from benchmarks.soak import soak
from benchmarks.synthetic import real_layers
from benchmarks.table import Goal, Row, render, row
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.cache import build_cache
from neuron_minimax.demo import DEMO

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# 4 layers of 16 experts, a sixteenth of the real width: 70 MB in FP8, 280 MB in the peer's float32.
SMALL = {
    "hidden_size": 768,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
}
SEQ_LEN = 512
BUCKETS = (64, 128, 192, 256)


def make_models(directory: Path, engine: str, slots: int) -> tuple[Path, Path]:
    """Make one seeded model; return its compiled directory and the peer's float32 checkpoint."""
    model = "serving", real_layers(layers=4, experts=16, vocabulary=1280) | SMALL
    source = checkpoint(directory, *model)
    cache = directory / "caches" / "serving-float32"
    build_cache(Checkpoint.open(source), cache, "float32")
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, source / name)
        shutil.copyfile(DEMO / name, cache / name)
    suffix = f"{slots}-slots-{engine}"
    traced = compiled(
        directory, *model, suffix, slots=slots, seq_len=SEQ_LEN, buckets=BUCKETS, engine=engine
    )
    return traced, cache


@contextmanager
def process(command: list[str], pattern: str, log: Path) -> Iterator[tuple[str, int]]:
    """Run a server until the block ends; yield its URL and process id.

    The server is up once `pattern`, whose group is the URL, is in its log.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # of two cores the clients need one
    with log.open("w") as file:
        child = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        while not (found := re.search(pattern, log.read_text(errors="replace"))):
            if child.poll() is not None:
                raise RuntimeError(
                    f"{' '.join(command)} ended:\n{log.read_text(errors='replace')[-2000:]}"
                )
            time.sleep(0.1)
        url = found.group(1)
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.1)
        yield url, child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its threads, which other load hardly changes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One comparison: clients at once, requests of a round, tokens per answer, our slots."""

    clients: tuple[int, ...] = (1, 8, 32)
    rounds: int = 3
    requests: int = 16
    new_tokens: int = 32
    slots: int = 8
    engine: str = "compiled"
    continuous_batching: bool = False


def our_command(traced: Path) -> list[str]:
    command = [sys.executable, "-m", "neuron_minimax", "serve", str(traced), "--port", "0"]
    return [*command, "--served-model-name", "model"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def transformers_command(cache: Path, continuous_batching: bool) -> list[str]:
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(cache)]
    command += ["--device", "cpu", "--dtype", "float32", "--port", str(free_port())]
    return [*command, *(["--continuous-batching"] * continuous_batching)]


def llama_command(gguf: Path, slots: int, clients: int) -> list[str]:
    """A connection has a thread of the server's to itself, else it may be closed while it waits."""
    command = [str(llama.SERVER), "--model", str(gguf), "--port", str(free_port())]
    command += ["--parallel", str(slots), "--ctx-size", str(slots * SEQ_LEN)]
    command += ["--threads-http", str(clients + 4), "--alias", "model"]
    return [*command, "--threads", "1", "--threads-batch", "1"]


OURS = "ours"
TRANSFORMERS = "transformers serve"
LLAMA = "llama-server Q8_0"


def compare(directory: Path, setting: Setting) -> dict[tuple[str, int], list[dict[str, float]]]:
    """Return what clients saw in each round, by server and number of clients.

    The other servers idle while one answers.
    """
    traced, cache = make_models(directory, setting.engine, setting.slots)
    commands = {
        OURS: (our_command(traced), r"listening on (http://\S+)", "model"),
        TRANSFORMERS: (
            transformers_command(cache, setting.continuous_batching),
            r"running on (http://\S+)",
            str(cache),
        ),
    }
    if not llama.missing():
        source = directory / "checkpoints" / "serving"
        gguf = run_apart(llama.gguf_of, directory, "serving", source)
        commands[LLAMA] = (
            llama_command(gguf, setting.slots, max(setting.clients)),
            r"listening on (http://\S+)",
            "model",
        )
    work = empty_scratch(directory)
    results: dict[tuple[str, int], list[dict[str, float]]] = defaultdict(list)
    with ExitStack() as stack:
        servers = [
            (name, *stack.enter_context(process(command, pattern, work / f"{number}.log")), model)
            for number, (name, (command, pattern, model)) in enumerate(commands.items())
        ]
        for _, url, _, model in servers:
            asyncio.run(load(url, model, 1, 1, 8))  # warm up
        for _, clients, (name, url, pid, model) in product(
            range(setting.rounds), setting.clients, servers
        ):
            before = cpu_seconds(pid)
            found = asyncio.run(
                load(url, model, clients, max(1, setting.requests // clients), setting.new_tokens)
            )
            found["cpu_per_token"] = 1000 * (cpu_seconds(pid) - before) / found["tokens"]
            results[name, clients].append(found)
    return results


def rows(directory: Path, **options: Any) -> list[Row]:
    """Return rate, wait for the first token and CPU time per token by number of clients.

    `options` are those of Setting.
    """
    setting = Setting(**options)
    results = compare(directory, setting)
    table = []
    for clients in setting.clients:
        many = clients > 1
        goals = {
            TRANSFORMERS: (3 if many else None, None if many else 1),
            LLAMA: (1.5 if many else None, 1),
        }
        for peer, (rate, last) in goals.items():
            if results[peer, clients]:
                found = results[OURS, clients], results[peer, clients]
                table += rows_of(clients, peer, *found, rate, last)
    if reason := llama.missing():
        table.append(Row(what="serve, beside llama-server", skipped=reason))
    return table


def rows_of(
    clients: int,
    peer: str,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    rate: float | None,
    last: float | None,
) -> list[Row]:
    """Return the rows beside one peer; `rate` and `last` are the goals of tokens/s and p95."""
    what = f"serve {clients} {'client' if clients == 1 else 'clients'}"
    return [
        row(
            what + name,
            [found[key] for found in ours],
            unit,
            less_is_better=unit != "tokens/s",
            peer=(peer, [found[key] for found in theirs]),
            goal=None if goal is None else Goal(figure="ratio", value=goal),
        )
        for name, key, unit, goal in (
            ("", "tokens_per_second", "tokens/s", rate),
            (", first token, median", "first_token_median", "s", None),
            (", first token, p95", "first_token_p95", "s", last),
            (", CPU per token", "cpu_per_token", "ms", None),
        )
    ]


def main(argv: list[str] | None = None) -> int:
    default = Setting()
    parser = parser_of(__doc__)
    parser.add_argument(
        "--clients",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        default=default.clients,
    )
    parser.add_argument("--rounds", type=int, default=default.rounds)
    parser.add_argument(
        "--requests",
        type=int,
        default=default.requests,
        help="of a round, at every number of clients, or one of each",
    )
    parser.add_argument("--new-tokens", type=int, default=default.new_tokens)
    parser.add_argument(
        "--slots", type=int, default=default.slots, help="more clients than that wait in the queue"
    )
    parser.add_argument("--engine", default=default.engine, choices=("compiled", "eager"))
    parser.add_argument("--continuous-batching", action="store_true", help="the peer's own")
    parser.add_argument("--soak-minutes", type=float, default=0)
    arguments = vars(parser.parse_args(argv))
    directory = arguments.pop("directory")
    minutes = arguments.pop("soak_minutes")
    if not minutes:
        print(render(rows(directory, **arguments)))
        return 0
    setting = Setting(**arguments)
    traced, _ = make_models(directory, setting.engine, setting.slots)
    with process(
        our_command(traced), r"listening on (http://\S+)", empty_scratch(directory) / "soak.log"
    ) as server:
        return 0 if asyncio.run(soak(*server, minutes)) else 1


if __name__ == "__main__":
    sys.exit(main())
