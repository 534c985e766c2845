"""Attention at length, over keys and values in float32, BF16 and FP8, and prompts in chunks.

python -m benchmarks.length [--directory DIR] [--rounds N]

Decoding is one layer of the real size, 8 key/value heads of 128 with 6 query heads each, beside
summing the bytes of the same cache. Prompts are the last 512 tokens of 32,768 beside the first 512,
with what attention itself takes, measured alone, subtracted from both.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.processes import Side
from benchmarks.shared import compiled, parser_of
from benchmarks.sides import prompt_ids, seconds_of
from benchmarks.synthetic import REAL_LAYER, real_layers
from benchmarks.table import Goal, Row, render, row

POSITIONS = (32768, 131072)
CACHED = 2048  # positions that stay in the processor's caches: how fast is it without memory?
CHUNK = 512
# What the cache is in, and what queries are.
KINDS = {"float32": "float32", "bfloat16": "bfloat16", "fp8": "bfloat16"}
CACHE_READ = Goal(figure="share", value=1 / 1.15)
# One layer of the real size with a quarter of the experts, and room for 32,768 positions.
LONG = ("1-layer-16-experts-long", real_layers(1, 16) | {"max_position_embeddings": POSITIONS[0]})
REPEATS = 5


def decode(kind: str, positions: int) -> Iterator[dict[str, Any]]:
    """Measure bytes per second of attention over a cache ("ours") and of summing it ("read")."""
    import torch

    from neuron_minimax.kernels.cpu import library, operators
    from neuron_minimax.kernels.reference import KV_CACHE_DTYPES, as_cached

    library.load_built()
    heads = REAL_LAYER["num_key_value_heads"]
    size = REAL_LAYER["head_dim"]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 1, REAL_LAYER["num_attention_heads"], size, generator=generator)
    query = query.to(getattr(torch, KINDS[kind]))
    keys, values = (
        as_cached(torch.randn(1, 1, positions, size, generator=generator), KV_CACHE_DTYPES[kind])
        .repeat(1, heads, 1, 1)
        .contiguous()
        for _ in "kv"
    )
    last = torch.tensor([[positions - 1]])
    words = [each.flatten().view(torch.int64) for each in (keys, values)]
    operators.attend(query, keys, values, last)
    yield {}
    while True:
        found = [
            (
                seconds_of(lambda: [each.sum() for each in words]),
                seconds_of(operators.attend, query, keys, values, last),
            )
            for _ in range(REPEATS)
        ]
        nbytes = keys.nbytes + values.nbytes
        read, ours = (nbytes / median(seconds) for seconds in zip(*found, strict=True))
        yield {"ours": ours, "read": read}


def encode(traced: Path) -> Iterator[dict[str, Any]]:
    """Measure seconds of the "first" and the "last" chunk without attention, and with it."""
    import torch

    from neuron_minimax.backends import load
    from neuron_minimax.backends.cpu.backend import CompiledBackend
    from neuron_minimax.kernels.cpu import operators

    backend = load(traced)
    assert isinstance(backend, CompiledBackend)
    config = backend.config
    ids = prompt_ids(config.vocab_size, CHUNK)
    query = torch.randn(1, CHUNK, config.num_attention_heads, config.head_dim)
    keys = backend.cache.keys[0]
    starts = {"first": 0, "last": POSITIONS[0] - CHUNK}

    def attend(start: int) -> None:
        filled = start + CHUNK
        rows = keys[:1, :, :filled]
        operators.attend(query, rows, rows, torch.arange(start, filled)[None])

    for start in starts.values():
        backend.encode(0, ids, start=start)
    yield {}
    while True:
        found: dict[str, float] = {}
        for name, start in starts.items():
            whole = median([seconds_of(backend.encode, 0, ids, start) for _ in range(3)])
            own = median([seconds_of(attend, start) for _ in range(3)]) * config.num_hidden_layers
            found |= {name: whole - own, f"{name} whole": whole}
        yield found


def decode_rows(rounds: int) -> list[Row]:
    table = []
    for positions in (CACHED, *POSITIONS):
        for kind in KINDS:
            with Side(decode, kind, positions) as side:
                found = [side.measure() for _ in range(rounds)]
            table.append(
                row(
                    f"decode over {positions:,} positions in {kind}",
                    [each["ours"] / 1e9 for each in found],
                    "GB/s",
                    limit=("reading the cache", [each["read"] / 1e9 for each in found]),
                    goal=None if positions == CACHED else CACHE_READ,
                )
            )
    return table


def encode_rows(directory: Path, rounds: int) -> list[Row]:
    table = []
    for kind in ("float32", "bfloat16"):
        traced = compiled(
            directory,
            *LONG,
            kind,
            slots=1,
            seq_len=POSITIONS[0],
            buckets=(CHUNK,),
            kv_cache_dtype=kind,
        )
        with Side(encode, traced) as side:
            found = [side.measure() for _ in range(rounds)]
        for what, suffix, goal in (
            ("without attention", "", Goal(figure="ratio", value=0.8)),
            ("with it", " whole", None),
        ):
            table.append(
                row(
                    f"encode the last {CHUNK} of {POSITIONS[0]:,} tokens, {kind}, {what}",
                    [CHUNK / each["last" + suffix] for each in found],
                    "tokens/s",
                    peer=(f"the first {CHUNK}", [CHUNK / each["first" + suffix] for each in found]),
                    goal=goal,
                )
            )
    return table


def rows(directory: Path, rounds: int = 5) -> list[Row]:
    return [*decode_rows(rounds), *encode_rows(directory, rounds)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    print(render(rows(arguments.directory, arguments.rounds)))


if __name__ == "__main__":
    main()
