"""Tiny compiled models with a tokenizer, from checkpoint to loaded CPU backend, made on the spot
for tests.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from neuron_minimax.backends import compile_model
from neuron_minimax.backends.base import Backend
from neuron_minimax.generation.generate import Answer, answer, generate
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.opened import convert
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer

VOCAB = 384


def write_traced(
    directory: Path,
    *,
    slots: int = 4,
    seq_len: int = 128,
    buckets: tuple[int, ...] = (16, 32),
    **overrides: Any,
) -> Path:
    """Make directory/{checkpoint,converted,traced}; returns the last. Eager engine, float32, random
    weights.
    """
    checkpoint = write_tokenizer(directory / "checkpoint", VOCAB)
    write_tiny(checkpoint, vocab_size=VOCAB, **overrides)
    convert(checkpoint, directory / "converted")
    options = {"slots": slots, "seq_len": seq_len, "buckets": buckets, "engine": "eager"}
    compile_model(directory / "converted", directory / "traced", options=options)
    return directory / "traced"


def answer_alone(
    backend: Backend,
    prompt_ids: Sequence[int],
    tokenizer: TextTokenizer | None = None,
    **options: Any,
) -> Answer:
    """The whole answer to one prompt with nothing else in the batch; `options` of generate."""
    return answer(generate(backend, prompt_ids, **options), tokenizer)
