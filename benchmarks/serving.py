"""Load on `neuron-minimax serve` and, where they are, on `transformers serve`, `llama-server` and
vLLM's CPU build: one model, the same requests, one run.

python -m benchmarks.serving [--clients 1,8,32] [--new-tokens 32] [--rounds 3] [--only small]
                             [--continuous-batching]
python -m benchmarks.serving --soak-minutes 10
"""

import asyncio
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import llama, servers
from benchmarks.clients import load
from benchmarks.processes import cpu_seconds_of_tree
from benchmarks.servers import COMPUTE, LLAMA, OURS, TRANSFORMERS, VLLM_CPU, Model, Server
from benchmarks.shared import empty_scratch, parser_of
from benchmarks.soak import soak
from benchmarks.synthetic import SMALL, as_qwen3, real_layers
from benchmarks.table import Goal, Row, render, row
from neuron_minimax.errors import counted


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
    only: str = ""


@dataclass(frozen=True)
class Comparison:
    """A model, the peers that serve it beside ours, and what each row of it says behind `serve`."""

    name: str
    config_json: dict
    peers: tuple[str, ...]
    what: str = ""


SMALL_LAYERS = real_layers(layers=4, experts=16, vocabulary=1280) | SMALL
LARGE_LAYERS = real_layers(vocabulary=1280)  # of the demo's tokenizer: no head to speak of
COMPARISONS = (
    # 70 MB in FP8, 280 MB in float32.
    Comparison("small", SMALL_LAYERS, (TRANSFORMERS, LLAMA)),
    Comparison("large", LARGE_LAYERS, (LLAMA,), "real layers, "),
    # vLLM's experts on a CPU know no other router than softmax, so that it is of another family.
    Comparison("qwen3", as_qwen3(SMALL_LAYERS), (VLLM_CPU,), "Qwen3, "),
    Comparison("large-qwen3", as_qwen3(LARGE_LAYERS), (VLLM_CPU,), "Qwen3, real layers, "),
)


@dataclass(frozen=True, kw_only=True)
class Goals:
    """The least ratios beside a peer: of tokens/s with more than one client, and of the first
    token's 95th percentile with one and with more.
    """

    rate: float
    first_of_one: float = 1
    first_of_many: float | None = 1


GOALS = {
    TRANSFORMERS: Goals(rate=3, first_of_many=None),
    LLAMA: Goals(rate=1.5),
    VLLM_CPU: Goals(rate=1.5),
}
Results = dict[tuple[str, int], list[dict[str, float]]]


def missing(peer: str) -> str:
    """Return why a peer cannot be started, or nothing."""
    reasons: dict[str, Callable[[], str]] = {LLAMA: llama.missing, VLLM_CPU: servers.missing_vllm}
    return reasons[peer]() if peer in reasons else ""


def our_server(directory: Path, setting: Setting) -> Server:
    """Return ours alone, over the small model."""
    model = Model(directory, "serving-small", SMALL_LAYERS)
    return servers.ours(model.compiled(setting.slots, setting.engine, COMPUTE[OURS]))


def servers_of(model: Model, peers: Sequence[str], setting: Setting) -> list[Server]:
    make: dict[str, Callable[[], Server]] = {
        TRANSFORMERS: lambda: servers.transformers(model, setting.continuous_batching),
        LLAMA: lambda: servers.llama_server(model, setting.slots, max(setting.clients)),
        VLLM_CPU: lambda: servers.vllm(model, setting.slots),
    }
    ours = [
        servers.ours(model.compiled(setting.slots, setting.engine, compute), name)
        for name, compute in COMPUTE.items()
    ]
    return ours + [make[peer]() for peer in peers]


def compare(directory: Path, compared: Sequence[Server], setting: Setting) -> Results:
    """Return what clients saw in each round, by server and number of clients.

    The other servers idle while one answers. No prompt comes twice to a server, which may remember
    what it has answered.
    """
    work = empty_scratch(directory)
    results: Results = defaultdict(list)
    with ExitStack() as stack:
        running = [
            (server, *stack.enter_context(server.running(work / f"{number}.log")))
            for number, server in enumerate(compared)
        ]
        stack.enter_context(servers.clients_apart())
        for server, url, _ in running:
            for clients in setting.clients:
                asyncio.run(load(url, server.model, clients, 1, 8, f"warm up {clients}"))
        for turn, clients, (server, url, pid) in product(
            range(setting.rounds), setting.clients, running
        ):
            before = cpu_seconds_of_tree(pid)
            each = max(1, setting.requests // clients)
            seed = f"{turn} {clients}"
            found = asyncio.run(load(url, server.model, clients, each, setting.new_tokens, seed))
            found["cpu_per_token"] = 1000 * (cpu_seconds_of_tree(pid) - before) / found["tokens"]
            results[server.name, clients].append(found)
    return results


def rows(directory: Path, **options: Any) -> list[Row]:
    """Return rate, wait for the first token and CPU time per token by number of clients.

    `options` are those of Setting.
    """
    setting = Setting(**options)
    table = []
    for each in COMPARISONS:
        if setting.only not in ("", each.name):
            continue
        reasons = {peer: missing(peer) for peer in each.peers}
        there = [peer for peer, reason in reasons.items() if not reason]
        table += [
            Row(what=f"serve {each.what}beside {peer}", skipped=reason)
            for peer, reason in reasons.items()
            if reason
        ]
        if there:
            model = Model(directory, f"serving-{each.name}", each.config_json)
            results = compare(directory, servers_of(model, there, setting), setting)
            for clients, peer, name in product(setting.clients, there, COMPUTE):
                if peer == TRANSFORMERS and name != OURS:  # which computes in float32
                    continue
                what = f"serve {each.what}{counted(clients, 'client')}{name.removeprefix(OURS)}"
                found = results[name, clients], results[peer, clients]
                table += rows_of(what, peer, *found, clients > 1)
    return table


def rows_of(
    what: str,
    peer: str,
    ours: list[dict[str, float]],
    theirs: list[dict[str, float]],
    many: bool,
) -> list[Row]:
    """Return the rows beside one peer."""
    goals = GOALS[peer]
    first = goals.first_of_many if many else goals.first_of_one
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
            ("", "tokens_per_second", "tokens/s", goals.rate if many else None),
            (", first token, median", "first_token_median", "s", None),
            (", first token, p95", "first_token_p95", "s", first),
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
    names = [each.name for each in COMPARISONS]
    parser.add_argument("--only", default="", choices=names, help="of the models; default: all")
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
    server = our_server(directory, setting)
    with server.running(empty_scratch(directory) / "soak.log") as running, servers.clients_apart():
        return 0 if asyncio.run(soak(*running, minutes)) else 1


if __name__ == "__main__":
    sys.exit(main())
