"""Tiny compiled models with a tokenizer, from checkpoint to loaded CPU backend, made on the spot
for tests.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from neuron_minimax.backends import compile_model
from neuron_minimax.backends.base import Backend
from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.generation.generate import Answer, answer, generate
from neuron_minimax.generation.tokenizer import TextTokenizer
from tests.opened import convert
from tests.tiny import write_tiny
from tests.tiny_chats import write_chat_tokenizer
from tests.tiny_tokenizer import write_tokenizer

VOCAB = 384


def write_traced(
    directory: Path,
    *,
    slots: int = 4,
    seq_len: int = 128,
    buckets: tuple[int, ...] = (16, 32),
    family: str = "minimax_m2",
    **overrides: Any,
) -> Path:
    """Make directory/{checkpoint,converted,traced}; returns the last. Eager engine, float32, random
    weights.
    """
    checkpoint = directory / "checkpoint"
    if family == "minimax_m2":
        write_tokenizer(checkpoint, VOCAB)
    else:
        write_chat_tokenizer(checkpoint, family, VOCAB)
    write_tiny(checkpoint, vocab_size=VOCAB, family=family, **overrides)
    convert(checkpoint, directory / "converted")
    options = {"slots": slots, "seq_len": seq_len, "buckets": buckets, "engine": "eager"}
    compile_model(directory / "converted", directory / "traced", options=options)
    return directory / "traced"


def with_another_checkpoint(traced: Path, directory: Path, change: Callable[[Path], Any]) -> Path:
    """The compiled directory of `traced` again, below `directory`, after a change of small files of
    its checkpoint's directory, which are hard links.
    """
    shutil.copytree(traced.parent, directory, copy_function=os.link)
    change(directory / "checkpoint")
    convert(directory / "checkpoint", directory / "converted")
    options = read_manifest(traced).options
    compile_model(directory / "converted", directory / "traced", options=options)
    return directory / "traced"


def edit_manifest(traced: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a compiled directory's manifest as somebody does who knows its digest."""
    path = traced / "manifest.json"
    fields = json.loads(path.read_text())
    change(fields)
    fields.pop("digest", None)
    text = json.dumps(fields, sort_keys=True)
    fields["digest"] = hashlib.sha256(text.encode()).hexdigest()
    path.unlink()  # it may be a hard link
    path.write_text(json.dumps(fields))


def answer_alone(
    backend: Backend,
    prompt_ids: Sequence[int],
    tokenizer: TextTokenizer | None = None,
    **options: Any,
) -> Answer:
    """The whole answer to one prompt with nothing else in the batch; `options` of generate."""
    return answer(generate(backend, prompt_ids, **options), tokenizer)
