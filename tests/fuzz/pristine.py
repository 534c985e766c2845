"""Whole small inputs and outputs of every kind, made once; a case works on a copy of those that it
needs, at the place where they were made.
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from neuron_minimax.api import compile as compile_model
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.planner.placement import as_numbered
from neuron_minimax.studies.experts.trace import Recorder, record
from neuron_minimax.training.data.encoding import Encoder
from neuron_minimax.training.data.sequences import DataOptions, encode_rows
from neuron_minimax.training.data.sources import JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.options import TrainingOptions
from neuron_minimax.training.trainer import Trainer
from tests.opened import build_cache, convert
from tests.tiny import tiny_config, write_tiny
from tests.tiny_tokenizer import write_tokenizer

VOCAB = 384
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "rotary_dim": 32,
    "num_local_experts": 4,
    "eos_token_id": 3,
}
TRAINED = {
    **SMALL,
    "hidden_size": 16,
    "intermediate_size": 16,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_hidden_layers": 1,
    "num_local_experts": 2,
}
COMPILE = {"slots": 2, "seq_len": 64, "buckets": (16,), "engine": "eager"}
TRAINING = TrainingOptions(steps=3, batch_size=2, max_tokens=64)
ROWS = (
    {"text": "The weather in Paris is sunny."},
    {
        "messages": [
            {"role": "user", "content": "What is 1 + 2?"},
            {"role": "assistant", "reasoning_content": "3", "content": "It is 3."},
        ]
    },
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [
                    {
                        "type": "function",
                        "function": {"name": "get_weather", "arguments": {"city": "Oslo"}},
                    }
                ],
            },
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "get_weather",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ],
    },
)
BODIES: dict[str, dict[str, Any]] = {
    "chat.json": {
        "model": "m",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                ],
            },
            {"role": "tool", "content": "3", "tool_call_id": "1"},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "max_tokens": 5,
        "stop": ["a", "b"],
        "seed": 1,
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
    },
    "completion.json": {
        "prompt": [[1, 2, 3]],
        "max_tokens": 3,
        "stop": "x",
        "logprobs": 1,
        "stream": True,
    },
    "tokens.json": {"tokens": [1, 2, 3]},
}
HUGE = 3 << 30


class _Stopped(Exception):
    pass


@dataclass(frozen=True)
class Pristine:
    """The inputs as they were made (`kept`), the directory that cases work in, and a third one for
    the output of children.
    """

    root: Path

    @property
    def kept(self) -> Path:
        return self.root / "kept"

    @property
    def work(self) -> Path:
        return self.root / "work"

    @property
    def output(self) -> Path:
        return self.root / "output"

    def restore(self, names: Sequence[str]) -> None:
        """Make the working directory hold these alone, with the times of the originals."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name in names:
            source = self.kept / name
            if source.is_dir():
                shutil.copytree(source, self.work / name)
            else:
                shutil.copy2(source, self.work / name)


def make_pristine(root: Path) -> Pristine:
    """Make all of it."""
    made = Pristine(root)
    work = made.work
    work.mkdir(parents=True)
    made.output.mkdir()
    checkpoint = write_tokenizer(work / "checkpoint", VOCAB)
    write_tiny(checkpoint, shards=2, **SMALL)
    generation = {
        "eos_token_id": [3],
        "do_sample": True,
        "temperature": 1.0,
        "top_p": 0.95,
        "top_k": 40,
    }
    (checkpoint / "generation_config.json").write_text(json.dumps(generation))
    convert(checkpoint, work / "converted")
    build_cache(checkpoint, work / "cache")
    _stop_halfway(checkpoint, work / "unfinished")
    compile_model(work / "converted", work / "traced", **COMPILE)
    _write_trace(work)
    as_numbered(2, 4, 2).save(work / "placement.json")
    (work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    small = {"a": np.ones((2, 3), np.float32), "b": np.arange(5), "c": np.zeros((0, 4), np.float16)}
    (work / "small").mkdir()
    save_file(small, work / "small" / "model.safetensors", metadata={"format": "pt"})
    list(make_trainer(work).run(1))
    for name, body in BODIES.items():
        (work / name).write_text(json.dumps(body))
    shutil.move(work, made.kept)
    return made


def make_trainer(work: Path) -> Trainer:
    """A run of three steps on the rows, in work/trained."""
    encoder = Encoder(load_tokenizer(work / "checkpoint"), TRAINING.max_tokens)
    return Trainer(
        config=ModelConfig.from_dict(tiny_config(**TRAINED)),
        options=TRAINING,
        source=encode_rows(
            JsonLines.read(work / "rows.jsonl"), encoder, DataOptions(skip_rows=True)
        ),
        encoder=encoder,
        directory=work / "trained",
    )


def _stop_halfway(checkpoint: Path, out: Path) -> None:
    """Leave a conversion after its first shard."""
    done = 0

    def progress(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if done > plan.nbytes // 2:
            raise _Stopped

    plan = plan_conversion(Checkpoint.open(checkpoint))
    with contextlib.suppress(_Stopped):
        plan.write(out, advance=progress)


def _write_trace(work: Path) -> None:
    model = Decoder.from_converted(work / "converted")
    recorder = Recorder.of(model)
    list(record(model, [5, 6, 7, 8], recorder, max_new_tokens=3))
    texts = tuple(f"t{token}" for token in recorder.tokens)
    recorder.trace(texts=texts, answer="a b", finish_reason="length", name="trace").save(
        work / "trace.safetensors"
    )


def journal(made: Pristine) -> str:
    """The path of the unfinished conversion's first journal."""
    found = sorted((made.kept / "unfinished" / ".unfinished").glob("model-*.json"))
    return str(found[0].relative_to(made.kept))


# What may be in the place of a file.
def _empty(path: Path) -> None:
    path.touch()


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def _unreadable(path: Path) -> None:
    path.write_bytes(b"{}")
    path.chmod(0)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(HUGE)


SPECIALS: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "empty": _empty,
    "fifo": os.mkfifo,
    "socket": _socket,
    "directory": Path.mkdir,
    "link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "link to /dev/null": lambda path: path.symlink_to("/dev/null"),
    "dangling link": lambda path: path.symlink_to("nothing"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "unreadable": _unreadable,
    "3 GiB of zeros": _huge,
}


def replace_by(path: Path, special: str) -> None:
    """Put something else in the place of a file."""
    path.unlink()
    SPECIALS[special](path)
