"""The sides of the decoding benchmarks: a compiled model of ours, and transformers.

Both have the same checkpoint.

Each side is a generator for processes.Side: after loading and warming up, every turn decodes some
tokens and, if asked, encodes a prompt. Random tokens from one seed, the same for both.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

FILLED = 64  # positions in front of the decoded ones
STEPS_BETWEEN = 6  # two readings
MATRIX = (512, 3072)  # of the GEMM whose rate limits context encoding: tokens by hidden size


def ours(
    traced: Path, steps: int, prompt: int = 0, dtype_name: str = ""
) -> Iterator[dict[str, Any]]:
    """Measure seconds per step of all slots ("step") and per prompt of `prompt` tokens ("encode").

    The first value has the seconds of "load" and the "logits" of the prompt's last position. With
    a dtype each turn also measures bytes per second of reading ("read") and FLOP/s of a GEMM
    ("flops").
    """
    import torch

    from neuron_minimax.backends import load

    started = time.perf_counter()
    backend = load(traced)
    loaded = time.perf_counter() - started
    slots = backend.capabilities.slots
    vocabulary = backend.capabilities.vocab_size
    ids = random_ids(vocabulary, FILLED + steps, slots)
    active = torch.ones(slots, dtype=torch.bool)

    def step(position: int) -> None:
        backend.step(ids[position], torch.full((slots,), position), active)

    for position in range(FILLED):
        step(position)
    logits = backend.encode(0, prompt_ids(vocabulary, prompt)).numpy() if prompt else None
    yield {"load": loaded, "logits": logits}
    while True:
        if dtype_name:
            found = step_beside_reading(step, steps) | {
                "flops": gemm_rate(getattr(torch, dtype_name))
            }
        else:
            found = {"step": median_seconds(step, range(FILLED, FILLED + steps))}
        if prompt:
            found["encode"] = median_seconds(
                lambda _: backend.encode(0, prompt_ids(vocabulary, prompt)), range(3)
            )
        yield found


def transformers(
    checkpoint: Path, dtype_name: str, steps: int, prompt: int = 0
) -> Iterator[dict[str, Any]]:
    """Measure the same of transformers' model, dequantized as it loads; one sequence."""
    import torch
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, dtype_name)
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(dtype)
    loaded = time.perf_counter() - started
    vocabulary = model.config.vocab_size
    ids = random_ids(vocabulary, FILLED + steps, 1)

    @torch.inference_mode()
    def turn() -> float:
        cache = model(ids[:FILLED].T, use_cache=True).cache
        return median_seconds(
            lambda at: model(ids[at : at + 1], cache=cache, use_cache=True),
            range(FILLED, FILLED + steps),
        )

    @torch.inference_mode()
    def encode() -> Any:
        answer = model(
            torch.tensor([prompt_ids(vocabulary, prompt)]), use_cache=True, logits_to_keep=1
        )
        return answer.logits[0, -1].float().numpy()

    logits = encode() if prompt else None
    turn()
    yield {"load": loaded, "logits": logits}
    while True:
        yield {
            "step": turn(),
            **({"encode": median_seconds(lambda _: encode(), range(3))} if prompt else {}),
        }


def random_ids(vocabulary: int, count: int, slots: int) -> Any:
    import torch

    return torch.randint(0, vocabulary, (count, slots), generator=torch.Generator().manual_seed(0))


def prompt_ids(vocabulary: int, count: int) -> list[int]:
    return random_ids(vocabulary, count, 1)[:, 0].tolist()


def seconds_of(work: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def median_seconds(work: Any, arguments: range) -> float:
    return median([seconds_of(work, argument) for argument in arguments])


def limits() -> Iterator[dict[str, float]]:
    """Measure bytes per second of summing 256 MB ("read"), and FLOP/s of a GEMM ("float32",
    "bfloat16").
    """
    import torch

    data = torch.ones(1 << 25, dtype=torch.int64)
    yield {}
    while True:
        yield {
            "read": data.nbytes / median_seconds(lambda _: data.sum(), range(9)),
            "float32": gemm_rate(torch.float32),
            "bfloat16": gemm_rate(torch.bfloat16),
        }


def step_beside_reading(step: Callable[[int], None], steps: int) -> dict[str, float]:
    """Return medians of seconds per step and of bytes per second of summing 256 MB.

    The reading is done between every few steps, as a virtual machine's speed of memory changes
    within a second (README.md).
    """
    import torch

    data = torch.ones(1 << 25, dtype=torch.int64)
    seconds = []
    reads = []
    for first in range(FILLED, FILLED + steps, STEPS_BETWEEN):
        reads.append(seconds_of(data.sum))
        seconds += [
            seconds_of(step, position)
            for position in range(first, min(first + STEPS_BETWEEN, FILLED + steps))
        ]
    return {"step": median(seconds), "read": data.nbytes / median(reads)}


def gemm_rate(dtype: Any) -> float:
    """Return the FLOP/s of one matrix product: the best of five."""
    import torch

    tokens, hidden = MATRIX
    left = torch.randn(tokens, hidden).to(dtype)
    right = torch.randn(hidden, hidden).to(dtype)
    return 2 * tokens * hidden * hidden / min(seconds_of(torch.mm, left, right) for _ in range(5))
