"""Clients whose prompts begin alike, as agents' do: the time to the first token with what the slots
hold and without it, where each request has a scope of its own; what looking up and copying take.

python -m benchmarks.prefixes [--clients 8] [--prefix 4096] [--rounds 3]
"""

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.shared import compiled, parser_of
from benchmarks.synthetic import SMALL, real_layers
from benchmarks.table import Goal, Row, render, row
from neuron_minimax.backends import load
from neuron_minimax.backends.base import Backend
from neuron_minimax.generation.engine import Engine, NewToken, Request
from neuron_minimax.generation.prefix_cache import PrefixCache
from neuron_minimax.generation.sampling import GREEDY

VOCABULARY = 1280
BUCKETS = (64, 256)
OWN = 100  # tokens of a turn that no other client has
ANSWER = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Clients at once, each with a slot; tokens that all their prompts begin with; rounds."""

    clients: int = 8
    prefix: int = 4096
    rounds: int = 3


@dataclass(kw_only=True)
class Answered:
    """The tokens of each client's answer, and the seconds to the first of them."""

    tokens: list[list[int]]
    seconds: list[float] = field(default_factory=list)


def turn(engine: Engine, prompts: list[list[int]], reuse: bool) -> Answered:
    """Answer all prompts, which come at once."""
    requests = [
        Request(
            prompt_ids=prompt,
            params=GREEDY,
            max_new_tokens=ANSWER,
            cache_scope=None if reuse else object(),
        )
        for prompt in prompts
    ]
    answers: dict[Request, list[int]] = {request: [] for request in requests}
    answered = Answered(tokens=list(answers.values()))
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    while engine.occupied:
        for update in engine.step():
            assert isinstance(update, NewToken), update.error
            if not answers[update.request]:
                answered.seconds.append(time.perf_counter() - started)
            answers[update.request].append(update.token)
    return answered


def conversations(backend: Backend, setting: Setting, seed: int) -> list[tuple[Answered, Answered]]:
    """Return two turns of every client with reuse, and the same without."""
    chance = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [chance.randrange(VOCABULARY) for _ in range(count)]

    shared = tokens(setting.prefix)
    prompts = [shared + tokens(OWN) for _ in range(setting.clients)]
    follow_ups = [tokens(OWN) for _ in prompts]
    found = []
    for reuse in (True, False):
        engine = Engine(backend)
        first = turn(engine, prompts, reuse)
        longer = [
            [*prompt, *answer, *own]
            for prompt, answer, own in zip(prompts, first.tokens, follow_ups, strict=True)
        ]
        found.append((first, turn(engine, longer, reuse)))
    return found


def seconds_of(work: Callable[[], object], repeats: int = 20) -> float:
    """Return the median seconds of a call."""
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def mechanism_rows(backend: Backend, setting: Setting) -> list[Row]:
    """Return what looking up takes beside a round, and copying beside encoding."""
    slots = range(setting.clients)
    prompt = [place % VOCABULARY for place in range(setting.prefix + OWN)]
    caches = PrefixCache(backend)
    for slot in slots:
        caches.append(caches.take([slot], prompt, None, whole=False), prompt[:-1])
    looking = seconds_of(lambda: caches.take(slots, prompt, None, whole=False))
    every = torch.ones(setting.clients, dtype=torch.int64)
    stepping = seconds_of(lambda: backend.step(every, every * setting.prefix, every.bool()))
    piece = prompt[: BUCKETS[-1]]
    encoding = seconds_of(lambda: backend.encode(0, piece))
    copying = seconds_of(lambda: backend.copy(0, 1, 0, len(piece)))
    return [
        row(
            f"look up {len(prompt):,} tokens in {setting.clients} slots",
            [1000 * looking],
            "ms",
            less_is_better=True,
            peer=("one step of all", [1000 * stepping]),
        ),
        row(
            f"copy {len(piece)} tokens between slots",
            [len(piece) / copying],
            "tokens/s",
            peer=("encoding them", [len(piece) / encoding]),
        ),
    ]


def rows(directory: Path, **options: Any) -> list[Row]:
    """Return the wait for the first token in two turns, and what its parts take.

    `options` are those of Setting. Raises RuntimeError when a greedy token is another with reuse.
    """
    setting = Setting(**options)
    seq_len = setting.prefix + 2 * (OWN + ANSWER)
    traced = compiled(
        directory,
        "serving",
        real_layers(layers=4, experts=16, vocabulary=VOCABULARY) | SMALL,
        f"{setting.clients}-slots-of-{seq_len}",
        slots=setting.clients,
        seq_len=seq_len,
        buckets=BUCKETS,
    )
    backend = load(traced)
    turns: dict[str, list[tuple[float, float]]] = {"first": [], "second": []}
    for seed in range(setting.rounds):
        with_reuse, without = conversations(backend, setting, seed)
        for name, ours, others in zip(turns, with_reuse, without, strict=True):
            if ours.tokens != others.tokens:
                raise RuntimeError(f"the {name} turn's greedy tokens are others with reuse")
            turns[name].append((statistics.median(ours.seconds), statistics.median(others.seconds)))
    table = []
    for name, rounds in turns.items():
        table.append(
            row(
                f"{name} turn, {setting.clients} clients, {setting.prefix:,} tokens shared, "
                "first token",
                [mine for mine, _ in rounds],
                "s",
                less_is_better=True,
                peer=("without reuse", [other for _, other in rounds]),
                goal=Goal(figure="ratio", value=5),
            )
        )
    return table + mechanism_rows(backend, setting)


def main(argv: list[str] | None = None) -> int:
    default = Setting()
    parser = parser_of(__doc__)
    parser.add_argument("--clients", type=int, default=default.clients)
    parser.add_argument("--prefix", type=int, default=default.prefix)
    parser.add_argument("--rounds", type=int, default=default.rounds)
    arguments = vars(parser.parse_args(argv))
    print(render(rows(arguments.pop("directory"), **arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
