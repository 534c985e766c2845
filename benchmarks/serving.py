"""Load on `neuron-minimax serve` and on `transformers serve`: the same model, requests and machine in one run.

python -m benchmarks.serving [--clients 1,8,32] [--new-tokens 48] [--continuous-batching]
python -m benchmarks.serving --soak-minutes 10
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.shared import checkpoint, compiled, empty_scratch, parser_of
from benchmarks.synthetic import real_layers
from neuron_minimax.checkpoint.fp32_cache import build_cache

DEMO = Path(__file__).resolve().parent.parent / "neuron_minimax" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# 4 layers of 16 experts, a sixteenth of the real width: 70 MB in FP8, 280 MB in the peer's float32.
SMALL = {
    "hidden_size": 768,
    "intermediate_size": 384,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 4,
}
SEQ_LEN, BUCKETS = 512, (64, 128, 192, 256)
WORDS = ["the", "harbour", "keeps", "seven", "red", "lamps", "above", "an", "old", "market", "and", "counts", "them"]


def make_models(directory: Path, engine: str, slots: int) -> tuple[Path, Path]:
    """(compiled directory, the peer's float32 checkpoint) of one seeded model."""
    model = "serving", real_layers(layers=4, experts=16, vocabulary=1280) | SMALL
    source, cache = checkpoint(directory, *model), directory / "caches" / "serving-float32"
    build_cache(source, cache, "float32")
    for name in TOKENIZER_FILES:
        shutil.copyfile(DEMO / name, source / name)
        shutil.copyfile(DEMO / name, cache / name)
    options = {"slots": slots, "seq_len": SEQ_LEN, "buckets": BUCKETS, "engine": engine}
    return compiled(directory, *model, f"{slots}-slots-{engine}", **options), cache


@contextmanager
def process(command: list[str], pattern: str, log: Path) -> Iterator[tuple[str, int]]:
    """Run a server until the block ends; gives its URL and process id once `pattern` is in its log."""
    with log.open("w") as file:
        child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while not (found := re.search(pattern, log.read_text(errors="replace"))):
            if child.poll() is not None:
                raise SystemExit(f"{' '.join(command)} ended:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.1)
        url = found.group(1)
        while httpx.get(f"{url}/health").status_code != 200:
            time.sleep(0.1)
        yield url, child.pid
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(30)


def requests_of(client: int, count: int, new_tokens: int) -> list[dict[str, Any]]:
    """A client's requests: prompts of 5 to 60 words, the same for both servers."""
    chance = random.Random(client)
    return [
        {
            "messages": [{"role": "user", "content": " ".join(chance.choices(WORDS, k=chance.randint(5, 60)))}],
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


async def ask(http: httpx.AsyncClient, model: str, request: dict[str, Any]) -> tuple[float, int]:
    """(seconds to the first text, completion tokens) of one streamed answer."""
    start, first, tokens = time.perf_counter(), None, 0
    async with http.stream("POST", "/v1/chat/completions", json={"model": model, **request}) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            texts = [
                choice["delta"].get(key) for choice in event["choices"] for key in ("content", "reasoning_content")
            ]
            if first is None and any(texts):
                first = time.perf_counter() - start
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return (first if first is not None else time.perf_counter() - start), tokens


async def load(url: str, model: str, clients: int, requests: int, new_tokens: int) -> dict[str, float]:
    """All clients at once, each with its requests one after the other."""
    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def one(client: int) -> list[tuple[float, int]]:
            return [await ask(http, model, request) for request in requests_of(client, requests, new_tokens)]

        start = time.perf_counter()
        results = [result for done in await asyncio.gather(*map(one, range(clients))) for result in done]
        seconds = time.perf_counter() - start
    firsts = sorted(first for first, _ in results)
    tokens = sum(count for _, count in results)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first_token_median": statistics.median(firsts),
        "first_token_p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
    }


def compare(arguments: argparse.Namespace) -> None:
    """Print one table, the peer's rows under ours."""
    traced, cache = make_models(arguments.directory, arguments.engine, arguments.slots)
    work = empty_scratch(arguments.directory)
    ours = [sys.executable, "-m", "neuron_minimax.cli", "serve", str(traced), "--port", "0"]
    ours += ["--served-model-name", "model"]
    peer = [str(Path(sys.executable).with_name("transformers")), "serve", str(cache), "--device", "cpu"]
    peer += ["--dtype", "float32", "--port", "8799", *(["--continuous-batching"] * arguments.continuous_batching)]
    servers = (
        ("neuron-minimax", ours, r"listening on (http://\S+)", "model"),
        ("transformers", peer, r"running on (http://\S+)", str(cache)),
    )
    results: dict[tuple[str, int], dict[str, float]] = {}
    for name, command, pattern, model in servers:
        with process(command, pattern, work / f"{name}.log") as (url, pid):
            asyncio.run(load(url, model, 1, 1, 8))  # warm up
            for clients in arguments.clients:
                requests, before = max(1, arguments.requests // clients), cpu_seconds(pid)
                row = asyncio.run(load(url, model, clients, requests, arguments.new_tokens))
                row["cpu_per_token"] = 1000 * (cpu_seconds(pid) - before) / row["tokens"]
                results[name, clients] = row
    print(f"{'server':16} {'clients':>7} {'tokens/s':>9} {'first token':>12} {'p95':>8} {'CPU per token':>14}")
    for clients in arguments.clients:
        for name, *_ in servers:
            row = results[name, clients]
            print(
                f"{name:16} {clients:7} {row['tokens_per_second']:9.1f} {row['first_token_median']:10.3f} s "
                f"{row['first_token_p95']:6.3f} s {row['cpu_per_token']:11.1f} ms"
            )
        mine, other = results["neuron-minimax", clients], results["transformers", clients]
        rate = mine["tokens_per_second"] / other["tokens_per_second"]
        wait = mine["first_token_p95"] / other["first_token_p95"]
        work_ratio = mine["cpu_per_token"] / other["cpu_per_token"]
        print(f"{'':16} {clients:7} {rate:8.2f}x {'':12} {wait:6.2f}x {work_ratio:12.2f}x")


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its threads: what it costs, whatever else the machine does."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


async def disturb(http: httpx.AsyncClient, chance: random.Random, counts: dict[str, int]) -> None:
    """One request of a random kind: good, cancelled midway, bad, or read slowly."""
    kind = chance.choices(("good", "cancelled", "bad", "slow"), (5, 2, 2, 1))[0]
    request = requests_of(chance.randint(0, 10**6), 1, chance.randint(1, 60))[0]
    if kind == "bad":
        body = chance.choice(
            [{"messages": []}, {"nonsense": 1}, {**request, "top_p": 9}, {**request, "max_tokens": 10**6}]
        )
        response = await http.post("/v1/chat/completions", json=body)
        counts["wrong"] += response.status_code != 400
    elif kind == "good":
        _, tokens = await ask(http, "model", request)
        counts["wrong"] += tokens == 0
    else:
        async with http.stream("POST", "/v1/chat/completions", json={"model": "model", **request}) as response:
            number = 0
            async for _ in response.aiter_lines():
                number += 1
                if kind == "cancelled" and number > 4:
                    break
                await asyncio.sleep(0.05 if kind == "slow" else 0)
    counts[kind] += 1


async def soak(url: str, pid: int, minutes: float) -> bool:
    """Random load for some minutes; whether memory stayed flat, every request was answered and no slot is stuck."""
    counts = {"good": 0, "cancelled": 0, "bad": 0, "slow": 0, "wrong": 0}
    start, end, memory = time.monotonic(), time.monotonic() + 60 * minutes, []
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)) as http:

        async def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < end:
                await disturb(http, chance, counts)

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(min(5, 60 * minutes / 20))
                memory.append((time.monotonic() - start, resident_megabytes(pid)))

        await asyncio.gather(watch(), *map(client, range(40)))
        await asyncio.sleep(2)
        lines = (await http.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    left = sum(float(values[f"neuron_minimax_num_requests_{state}"]) for state in ("running", "waiting"))
    warm = statistics.median(value for at, value in memory if 0.15 <= at / (60 * minutes) <= 0.3)
    last = statistics.median(value for at, value in memory if at / (60 * minutes) >= 0.85)
    print(", ".join(f"{kind} {count}" for kind, count in counts.items()))
    print(f"anonymous memory {warm:.1f} MB after warming up, {last:.1f} MB at the end ({last / warm - 1:+.1%})")
    print(f"requests still running or waiting afterwards: {left:.0f}")
    return last <= 1.05 * warm and not left and not counts["wrong"]


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--clients", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=32, help="in total, at every number of clients")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--slots", type=int, default=8, help="of our server; more clients than that wait in its queue")
    parser.add_argument("--engine", default="compiled", choices=("compiled", "eager"))
    parser.add_argument("--continuous-batching", action="store_true", help="the peer's own")
    parser.add_argument("--soak-minutes", type=float, default=0)
    arguments = parser.parse_args(argv)
    if not arguments.soak_minutes:
        compare(arguments)
        return 0
    traced, _ = make_models(arguments.directory, arguments.engine, arguments.slots)
    command = [sys.executable, "-m", "neuron_minimax.cli", "serve", str(traced), "--port", "0"]
    command += ["--served-model-name", "model"]
    with process(command, r"listening on (http://\S+)", empty_scratch(arguments.directory) / "soak.log") as (url, pid):
        return 0 if asyncio.run(soak(url, pid, arguments.soak_minutes)) else 1


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
