"""What others notice while somebody is hostile: one server, with and without each attack in turn.

python -m benchmarks.attacks [--seconds 6] [--attackers 4] [--only WORD]

Beside an attack it asks for /health all the time, reads one stream after the other, and watches the
memory of the server's processes.
"""

import asyncio
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.clients import WORDS, requests_of
from benchmarks.payloads import ANSWERED, REFUSED, Attack
from benchmarks.processes import Side
from benchmarks.servers import clients_apart
from benchmarks.serving import Setting, our_server
from benchmarks.shared import empty_scratch, parser_of
from benchmarks.table import Goal, Row, render, row

ATTACKS = REFUSED | ANSWERED
HEADERS = {"content-type": "application/json"}


@dataclass(kw_only=True)
class Noticed:
    """Seconds that /health took, seconds between two pieces of a stream, resident bytes."""

    health: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def health_p99(self) -> float:
        return sorted(self.health)[int(0.99 * len(self.health))]


def resident_bytes(pid: int) -> int:
    """Return the resident bytes of a process and its children; each counts shared pages by its
    share of them.
    """
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [
            int(child) for task in tasks for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError, PermissionError):  # it has just ended
        return 0
    own = next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return own + sum(map(resident_bytes, children))


async def notice(url: str, pid: int, seconds: float) -> Noticed:
    """Use a server as others do for some seconds.

    The stream has a piece for each token, and a neighbour sends prompts of a whole bucket: they
    delay it by one chunk, as any prompt may.
    """
    found = Noticed()
    end = time.monotonic() + seconds
    request = requests_of(0, 1, 256)[0] | {"logprobs": True}
    chance = random.Random(0)
    async with httpx.AsyncClient(base_url=url, timeout=120) as http:

        async def health() -> None:
            while time.monotonic() < end:
                start = time.perf_counter()
                (await http.get("/health")).raise_for_status()
                found.health.append(time.perf_counter() - start)
                await asyncio.sleep(0.02)

        async def stream() -> None:
            while time.monotonic() < end:
                async with http.stream("POST", "/v1/chat/completions", json=request) as response:
                    response.raise_for_status()
                    last = None
                    async for line in response.aiter_lines():
                        if not line.startswith("data: "):
                            continue
                        now = time.perf_counter()
                        if last is not None:
                            found.gaps.append(now - last)
                        last = now
                        if time.monotonic() > end:
                            break

        async def prompts() -> None:
            while time.monotonic() < end:
                words = " ".join(chance.choices(WORDS, k=110))
                await http.post(
                    "/v1/completions", json={"prompt": words, "max_tokens": 1, "temperature": 0}
                )
                await asyncio.sleep(0.5)

        async def memory() -> None:
            while time.monotonic() < end:
                found.memory.append(await asyncio.to_thread(resident_bytes, pid))
                await asyncio.sleep(0.2)

        await asyncio.gather(health(), stream(), prompts(), memory())
    return found


def attackers(url: str, attack: Attack, count: int) -> Iterator[dict[str, Any]]:
    """Attack from this process: the first value comes when it has begun, the second, the answers by
    status, when it has ended.
    """
    path, body = attack
    statuses: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    stop = False

    async def one(http: httpx.AsyncClient) -> None:
        while not stop:
            try:
                response = await http.post(path, content=body, headers=HEADERS)
            except httpx.HTTPError as error:
                statuses[type(error).__name__] += 1
                continue
            statuses[str(response.status_code)] += 1
            if response.status_code >= 400:
                reasons[response.json()["error"]["message"][:150]] += 1

    async def all_of_them() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=600) as http:
            await asyncio.gather(*(one(http) for _ in range(count)))

    thread = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    thread.start()
    yield {}
    stop = True
    thread.join()
    yield {"statuses": dict(statuses), "reasons": dict(reasons)}


def measure(url: str, pid: int, attack: Attack, seconds: float, count: int) -> dict[str, Any]:
    """Return what others notice just before an attack and during it, and what it was answered."""
    before = asyncio.run(notice(url, pid, seconds))
    with Side(attackers, url, attack, count) as hostile:
        during = asyncio.run(notice(url, pid, seconds))
        answers = hostile.measure()
    return {"before": before, "during": during, **answers}


def rows_of(name: str, found: dict[str, Any]) -> list[Row]:
    before: Noticed = found["before"]
    during: Noticed = found["during"]
    peer = "without it"
    return [
        row(
            f"{name}: /health p99",
            [during.health_p99()],
            "s",
            less_is_better=True,
            peer=(peer, [before.health_p99()]),
            goal=Goal(figure="ours", value=0.25, at_most=True),
        ),
        row(
            f"{name}: worst gap of a stream",
            [max(during.gaps)],
            "s",
            less_is_better=True,
            peer=(peer, [max(before.gaps)]),
            goal=Goal(figure="ratio", value=1 / 3),
        ),
        row(
            f"{name}: memory",
            [max(during.memory) / 1e6],
            "MB",
            less_is_better=True,
            peer=(peer, [max(before.memory) / 1e6]),
            goal=Goal(figure="ratio", value=1 / 1.2),
        ),
    ]


def rows(directory: Path, *, seconds: float = 6, attackers: int = 4, only: str = "") -> list[Row]:
    """Return three rows per attack whose name holds `only`."""
    log = empty_scratch(directory) / "attacked.log"
    table = []
    with our_server(directory, Setting()).running(log) as (url, pid), clients_apart():
        asyncio.run(notice(url, pid, 2))  # warm up
        for name, attack in ATTACKS.items():
            if only in name:
                found = measure(url, pid, attack, seconds, attackers)
                print(f"{name}: {found['statuses']} {found['reasons']}", file=sys.stderr)
                table += rows_of(name, found)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--seconds", type=float, default=6, help="with, and as many without")
    parser.add_argument("--attackers", type=int, default=4, help="connections that attack at once")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    print(render(rows(**vars(parser.parse_args(argv)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
