"""What prompt look-up could gain: what a pass over drafted tokens costs beside a step of one, and
how many of the tokens that are looked up are right.

python -m benchmarks.speculation [--rounds 15]

The drafts are the tokens that followed the last three the time before, in the prompt or the answer
so far. Each counts as right when it is the answer's next token, whatever a model would have said:
the texts are a module of this project that is written again with a few changes, as agents do, and
the page that explains it. A token here is a word or a mark, as large vocabularies have them.

The cost is measured with 64 experts, and for the published model's 256 it is that of the bytes that
are read, which `benchmarks.decoding` finds to be what a step takes.
"""

import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding import SEQ_LEN, bytes_per_step, distinct_experts
from benchmarks.shared import REAL, compiled, parser_of
from benchmarks.sides import FILLED, prompt_ids
from benchmarks.synthetic import real_layers
from benchmarks.table import Row, render, row
from neuron_minimax.backends import load
from neuron_minimax.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
MODULE = ROOT / "neuron_minimax" / "backends" / "base.py"
PAGE = ROOT / "docs" / "cache.md"
NGRAM = 3
DRAFTED = (1, 3, 7)
PASSES = (1, *(1 + drafted for drafted in DRAFTED))  # tokens of a pass
PUBLISHED = real_layers(layers=62, experts=256, vocabulary=200064)
# What is changed in the module: names, as when something is renamed, and nothing else.
RENAMED = {"slot": "lane", "bucket": "step_size", "capabilities": "limits"}


def tokens_of(text: str) -> list[str]:
    """Split a text into words with the space before them, runs of space, and single marks."""
    return re.findall(r" ?\w+|\s+|[^\w\s]", text)


def drafts_right(prompt: Sequence[str], answer: Sequence[str], most: int) -> list[tuple[int, int]]:
    """Return for each pass how many tokens were drafted, and how many of these were right."""
    seen: dict[tuple[str, ...], int] = {}
    text = list(prompt)
    for end in range(NGRAM, len(text)):
        seen[tuple(text[end - NGRAM : end])] = end
    passes = []
    place = 0
    while place < len(answer):
        after = seen.get(tuple(text[-NGRAM:]), len(text))
        draft = text[after : after + most]
        wanted = answer[place : place + len(draft)]
        agreeing = [a == b for a, b in zip(draft, wanted, strict=False)]
        right = agreeing.index(False) if False in agreeing else len(agreeing)
        passes.append((len(draft), right))
        for token in answer[place : place + right + 1]:
            seen[tuple(text[-NGRAM:])] = len(text)
            text.append(token)
        place += right + 1
    return passes


def texts() -> dict[str, tuple[list[str], list[str]]]:
    """Return (prompt, answer) by what the answer is."""
    module = MODULE.read_text(encoding="utf-8")
    changed = module
    for name, other in RENAMED.items():
        changed = changed.replace(name, other)
    page = PAGE.read_text(encoding="utf-8")
    return {
        "a module written again with other names": (tokens_of(module), tokens_of(changed)),
        "a page about a module": (tokens_of(module), tokens_of(page)),
    }


def pass_seconds(traced: Path, rounds: int) -> dict[int, list[float]]:
    """Return the seconds of a pass in every round, by its tokens: in turns, with a step for one."""
    backend = load(traced)
    ids = prompt_ids(backend.capabilities.vocab_size, SEQ_LEN)
    backend.encode(0, ids[:FILLED])
    found: dict[int, list[float]] = {tokens: [] for tokens in PASSES}

    def timed(work: Callable[[int], object]) -> float:
        taken = []
        # Other tokens each time, which choose other experts.
        for place in range(FILLED, FILLED + 80, 8):
            started = time.perf_counter()
            work(place)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def step(place: int) -> None:
        backend.step(torch.tensor(ids[place : place + 1]), torch.tensor([place]), torch.ones(1) > 0)

    for _ in range(rounds + 1):
        found[1].append(timed(step))
        for tokens in PASSES[1:]:

            def verify(place: int, tokens: int = tokens) -> None:
                backend.encode(0, ids[place : place + tokens], place)

            found[tokens].append(timed(verify))
    return {tokens: seconds[1:] for tokens, seconds in found.items()}  # the first warms up


def cost_of_bytes(config: ModelConfig) -> dict[int, float]:
    """Return what passes of so many tokens read, one token's being 1."""
    read = {tokens: bytes_per_step(config, distinct_experts(config, tokens)) for tokens in PASSES}
    return {tokens: each / read[1] for tokens, each in read.items()}


def speed(passes: Sequence[tuple[int, int]], cost: dict[int, float]) -> float:
    """Return the tokens in the time of a step; a shorter draft costs what the next longer does."""
    tokens = sum(1 + right for _, right in passes)
    return tokens / sum(cost[min(at for at in cost if at > drafted)] for drafted, _ in passes)


def rows(directory: Path, rounds: int = 15) -> list[Row]:
    buckets = PASSES[1:]
    traced = compiled(directory, *REAL, "drafts", slots=1, seq_len=SEQ_LEN, buckets=buckets)
    seconds = pass_seconds(traced, rounds)
    table = [
        row(
            f"a pass over {tokens} tokens, per token",
            [1000 * each / tokens for each in seconds[tokens]],
            "ms",
            less_is_better=True,
            peer=("a step of one", [1000 * each for each in seconds[1]]),
        )
        for tokens in buckets
    ]
    measured = {
        tokens: statistics.median(a / b for a, b in zip(each, seconds[1], strict=True))
        for tokens, each in seconds.items()
    }
    costs = {
        "64 experts": measured,
        "256 experts by bytes": cost_of_bytes(ModelConfig.from_dict(PUBLISHED)),
    }
    for (what, (prompt, answer)), most in product(texts().items(), DRAFTED):
        passes = drafts_right(prompt, answer, most)
        table += [
            row(
                f"{what}, up to {most} drafted, {experts}",
                [speed(passes, cost)],
                "tokens a step",
                peer=("without drafts", [1.0]),
            )
            for experts, cost in costs.items()
        ]
    return table


def main(argv: list[str] | None = None) -> int:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    arguments: dict[str, Any] = vars(parser.parse_args(argv))
    print(render(rows(arguments.pop("directory"), **arguments)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
