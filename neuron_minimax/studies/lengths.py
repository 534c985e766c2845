"""Perplexity by position in chats longer than the trained length, with and without RoPE scaling."""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.training.data import held_out
from neuron_minimax.training.encoding import Encoder, Example
from neuron_minimax.training.tokenizer import load_tokenizer

SINGLE_TURN = (
    "capital",
    "currency",
    "continent",
    "sum",
    "difference",
    "sort",
    "reverse",
    "compare",
    "count",
    "python",
)


@dataclass(frozen=True, kw_only=True)
class LengthReport:
    """Perplexity per learned token by RoPE setting, for positions up to each bound (and beyond the
    bound before).
    """

    bounds: tuple[int, ...]
    rows: Mapping[str, tuple[float, ...]]

    def render(self) -> str:
        """A Markdown table."""
        starts = (0, *self.bounds[:-1])
        heads = [f"{start} to {end}" for start, end in zip(starts, self.bounds, strict=True)]
        lines = ["| RoPE | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
        lines += [
            f"| {name} | " + " | ".join(f"{value:.3f}" for value in row) + " |"
            for name, row in self.rows.items()
        ]
        return "\n".join(lines)


def measure_lengths(
    checkpoint: str | Path,
    chats: int = 8,
    bounds: Sequence[int] = (512, 1024, 2048),
    factor: float = 4.0,
) -> LengthReport:
    """Perplexity of the assistant's tokens in `chats` chats of held-out questions, as long as the
    last bound.

    RoPE as trained, and with linear and YaRN scaling by `factor`. Raises CheckpointError on an
    unusable checkpoint.
    """
    opened = Checkpoint(checkpoint)
    opened.require_usable()
    encoder = Encoder(load_tokenizer(checkpoint), bounds[-1])
    examples = [long_chat(encoder, seed) for seed in range(chats)]
    trained = opened.config.max_position_embeddings
    settings: dict[str, dict[str, Any] | None] = {
        "as trained": None,
        f"linear, factor {factor:g}": {"rope_type": "linear", "factor": factor},
        f"YaRN, factor {factor:g}": {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained,
        },
    }  # fmt: skip
    rows = {}
    for name, scaling in settings.items():
        config = ModelConfig.from_dict({**opened.config.raw, "rope_scaling": scaling})
        model = Decoder.from_checkpoint(opened, config=config)
        rows[name] = perplexities(model, examples, bounds)
    return LengthReport(bounds=tuple(bounds), rows=rows)


def long_chat(encoder: Encoder, seed: int) -> Example:
    """Held-out questions of one turn, one after another, until the encoder's `max_tokens` are
    full.
    """
    conversations = [c for c in held_out(500, 10_000 + seed) if c.kind in SINGLE_TURN]
    random.Random(seed).shuffle(conversations)
    return encoder({"messages": [message for c in conversations for message in c.messages]})


@torch.inference_mode()
def perplexities(
    model: Decoder, examples: Sequence[Example], bounds: Sequence[int]
) -> tuple[float, ...]:
    """exp of the mean -log p of learned tokens, by the range of positions between one bound and the
    next.
    """
    sums = [0.0] * len(bounds)
    counts = [0] * len(bounds)
    for example in examples:
        ids = torch.tensor([example.ids])
        learned = torch.tensor(example.learned)[1:]
        loss = F.cross_entropy(model(ids)[0][0, :-1].float(), ids[0, 1:], reduction="none")
        start = 0
        for number, bound in enumerate(bounds):
            part = slice(start, bound - 1)
            sums[number] += float(loss[part][learned[part]].sum())
            counts[number] += int(learned[part].sum())
            start = bound - 1
    return tuple(math.exp(total / max(1, count)) for total, count in zip(sums, counts, strict=True))
