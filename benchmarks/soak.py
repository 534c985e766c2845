"""A server under random load for some minutes (`serving --soak-minutes`)."""

import asyncio
import random
import statistics
import time
from pathlib import Path

import httpx

from benchmarks.clients import ask, requests_of

SETTLING_SECONDS = 60


def resident_megabytes(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


async def disturb(http: httpx.AsyncClient, chance: random.Random, counts: dict[str, int]) -> None:
    """Send one request of a random kind: good, cancelled midway, bad, or read slowly."""
    kind = chance.choices(("good", "cancelled", "bad", "slow"), (5, 2, 2, 1))[0]
    request = requests_of(chance.randint(0, 10**6), 1, chance.randint(1, 60))[0]
    if kind == "bad":
        body = chance.choice(
            [
                {"messages": []},
                {"nonsense": 1},
                {**request, "top_p": 9},
                {**request, "max_tokens": 10**6},
            ]
        )
        response = await http.post("/v1/chat/completions", json=body)
        counts["wrong"] += response.status_code != 400
    elif kind == "good":
        _, tokens = await ask(http, "model", request)
        counts["wrong"] += tokens == 0
    else:
        async with http.stream(
            "POST", "/v1/chat/completions", json={"model": "model", **request}
        ) as response:
            number = 0
            async for _ in response.aiter_lines():
                number += 1
                if kind == "cancelled" and number > 4:
                    break
                await asyncio.sleep(0.05 if kind == "slow" else 0)
    counts[kind] += 1


async def unfinished(http: httpx.AsyncClient) -> float:
    """Return the number of requests that a server has running or waiting."""
    lines = (await http.get("/metrics")).text.splitlines()
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    states = ("running", "waiting")
    return sum(float(values[f"neuron_minimax_num_requests_{state}"]) for state in states)


async def soak(url: str, pid: int, minutes: float) -> bool:
    """Load a server for some minutes.

    Returns True when memory stayed flat, every request was answered and no slot is stuck. A reset
    is a request whose connection ended without an answer, or within one.
    """
    counts = {"good": 0, "cancelled": 0, "bad": 0, "slow": 0, "wrong": 0, "reset": 0}
    start = time.monotonic()
    end = time.monotonic() + 60 * minutes
    memory = []
    async with httpx.AsyncClient(
        base_url=url, timeout=600, limits=httpx.Limits(max_connections=64)
    ) as http:

        async def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < end:
                try:
                    await disturb(http, chance, counts)
                except httpx.TransportError as error:
                    counts["reset"] += 1
                    print(f"after {time.monotonic() - start:.1f} s: {error!r}")

        async def watch() -> None:
            while time.monotonic() < end:
                await asyncio.sleep(min(5, 60 * minutes / 20))
                memory.append((time.monotonic() - start, resident_megabytes(pid)))

        await asyncio.gather(watch(), *map(client, range(40)))
        for _ in range(SETTLING_SECONDS):  # those whose clients have just left
            if not (left := await unfinished(http)):
                break
            await asyncio.sleep(1)
    warm = statistics.median(value for at, value in memory if 0.15 <= at / (60 * minutes) <= 0.3)
    last = statistics.median(value for at, value in memory if at / (60 * minutes) >= 0.85)
    print(", ".join(f"{kind} {count}" for kind, count in counts.items()))
    print(
        f"anonymous memory {warm:.1f} MB after warming up, {last:.1f} MB at the end "
        f"({last / warm - 1:+.1%})"
    )
    print(f"requests still running or waiting afterwards: {left:.0f}")
    return last <= 1.05 * warm and not left and not counts["wrong"] and not counts["reset"]
