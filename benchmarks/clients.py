"""Clients of an OpenAI-compatible server: seeded requests, streamed answers, many at once."""

import asyncio
import json
import random
import statistics
import time
from typing import Any

import httpx

WORDS = [
    "the",
    "harbour",
    "keeps",
    "seven",
    "red",
    "lamps",
    "above",
    "an",
    "old",
    "market",
    "and",
    "counts",
    "them",
]


def requests_of(client: int, count: int, new_tokens: int, seed: str = "") -> list[dict[str, Any]]:
    """Return a client's requests: prompts of 5 to 60 words, the same for every server."""
    chance = random.Random(f"{seed} {client}")
    return [
        {
            "messages": [
                {
                    "role": "user",
                    "content": " ".join(chance.choices(WORDS, k=chance.randint(5, 60))),
                }
            ],
            "max_tokens": new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(count)
    ]


async def ask(http: httpx.AsyncClient, model: str, request: dict[str, Any]) -> tuple[float, int]:
    """Return the seconds to the first text and the completion tokens of one streamed answer."""
    start = time.perf_counter()
    first = None
    tokens = 0
    async with http.stream(
        "POST", "/v1/chat/completions", json={"model": model, **request}
    ) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            texts = [
                choice["delta"].get(key)
                for choice in event["choices"]
                for key in ("content", "reasoning_content")
            ]
            if first is None and any(texts):
                first = time.perf_counter() - start
            tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
    return (first if first is not None else time.perf_counter() - start), tokens


async def load(
    url: str, model: str, clients: int, requests: int, new_tokens: int, seed: str = ""
) -> dict[str, float]:
    """Run all clients at once, each with its requests one after the other."""
    # A connection for each request: llama-server closes one now and then as it is used again.
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:

        async def one(client: int) -> list[tuple[float, int]]:
            return [
                await ask(http, model, request)
                for request in requests_of(client, requests, new_tokens, seed)
            ]

        start = time.perf_counter()
        results = [
            result for done in await asyncio.gather(*map(one, range(clients))) for result in done
        ]
        seconds = time.perf_counter() - start
    firsts = sorted(first for first, _ in results)
    tokens = sum(count for _, count in results)
    return {
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "first_token_median": statistics.median(firsts),
        "first_token_p95": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
    }
