"""The questions to a probe: prompts in slots and tokens after them, the same for device and CPU.

Shapes: N rows, one for each prompt and each step of each slot; V vocabulary.
"""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

import torch
from pydantic import ConfigDict

from neuron_minimax.backends.base import Backend
from neuron_minimax.checkpoint.writer import write_json
from neuron_minimax.errors import BackendError
from neuron_minimax.files import read_json
from neuron_minimax.fp8 import ceil_div

SEED = 0
MOST_SLOTS = 8
ROUTER_ROWS = 64
VALUE_ROWS = 32
LAYER_ROWS = 24
STEPS = 8


class Phase(StrEnum):
    CONTEXT_ENCODING = "context encoding"
    TOKEN_GENERATION = "token generation"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The sizes that the device's graphs are compiled for; lengths in tokens."""

    slots: int
    seq_len: int
    buckets: tuple[int, ...]
    vocabulary: int

    def __post_init__(self) -> None:
        if self.seq_len < 4 or self.buckets[-1] < 2:
            raise BackendError(
                f"seq_len {self.seq_len} and buckets {list(self.buckets)} leave no room for a "
                "prompt of two tokens and two steps; check with a larger --seq-len and --buckets"
            )


@dataclass(frozen=True, kw_only=True)
class SlotTokens:
    """A prompt for one slot, and the tokens that are then appended one by one."""

    slot: int
    prompt: tuple[int, ...]
    continuation: tuple[int, ...]


# Sequences that are alive together, each in its slot; their continuations are of one length.
Round = tuple[SlotTokens, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What a process is to run: rounds, or prompts to continue greedily by so many tokens."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    rounds: tuple[Round, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    tokens: int = 0

    def write(self, path: Path) -> None:
        """Write it as JSON. Raises OSError."""
        write_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Asked":
        """Raises BackendError when the file is something else."""
        try:
            return read_json(path, cls, BackendError, "run check-device again")
        except FileNotFoundError:
            raise BackendError(f"{path} does not exist; run check-device again") from None


@dataclass(frozen=True, kw_only=True)
class Row:
    """The origin of one row of logits: phase, slot, and the number of tokens before it."""

    phase: Phase
    slot: int
    length: int


def rows_of(rounds: Sequence[Round]) -> list[Row]:
    """The rows in the order of `run_rounds`."""
    rows = []
    for round_ in rounds:
        for sequence in round_:
            row = Row(phase=Phase.CONTEXT_ENCODING, slot=sequence.slot, length=len(sequence.prompt))
            rows.append(row)
        for step in range(len(round_[0].continuation)):
            for sequence in round_:
                length = len(sequence.prompt) + step + 1
                rows.append(Row(phase=Phase.TOKEN_GENERATION, slot=sequence.slot, length=length))
    return rows


def run_rounds(backend: Backend, rounds: Sequence[Round]) -> torch.Tensor:
    """Logits [N,V] float32: each prompt of a round is encoded, then all its slots take their
    steps together.
    """
    logits = []
    for round_ in rounds:
        for sequence in round_:
            backend.reset(sequence.slot)
            logits.append(backend.encode(sequence.slot, sequence.prompt))
        for step in range(len(round_[0].continuation)):
            logits_SV = backend.step(*_step(backend.capabilities.slots, round_, step))
            logits += [logits_SV[sequence.slot] for sequence in round_]
    return torch.stack(logits).float()


def _step(slots: int, round_: Round, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, positions and the active slots, each [S]."""
    tokens = torch.zeros(slots, dtype=torch.long)
    positions = torch.zeros(slots, dtype=torch.long)
    active = torch.zeros(slots, dtype=torch.bool)
    for sequence in round_:
        tokens[sequence.slot] = sequence.continuation[step]
        positions[sequence.slot] = len(sequence.prompt) + step
        active[sequence.slot] = True
    return tokens, positions, active


def router_rounds(limits: Limits) -> list[Round]:
    """Many prompts of unequal lengths with one step each: a token's experts do not depend on
    other tokens here.
    """
    return _short_rounds(limits, ROUTER_ROWS, 16, 1)


def value_rounds(limits: Limits) -> list[Round]:
    """Prompts of one token: attention over one position is its value."""
    return _short_rounds(limits, VALUE_ROWS, 1, 0)


def attention_rounds(limits: Limits) -> list[Round]:
    """For every bucket one prompt that needs it, beside short ones, and steps after them."""
    generator = random.Random(SEED)
    steps = min(STEPS, limits.seq_len // 2)
    longest = min(limits.buckets[-1], limits.seq_len - steps)
    rounds = []
    for bucket in limits.buckets:
        full = max(2, min(bucket, longest))
        lengths = [max(2, length) for length in (full, full // 2, full - 1, 5) if length <= longest]
        slots = _slots(limits, min(len(lengths), limits.slots), generator)
        sequences = zip(slots, lengths, strict=False)
        rounds.append(
            tuple(_sequence(limits, generator, slot, length, steps) for slot, length in sequences)
        )
    return rounds


def layer_rounds(limits: Limits) -> list[Round]:
    """Those of `attention_rounds`, and more short ones, since tokens whose experts nearly tie
    are left out.
    """
    return attention_rounds(limits) + _short_rounds(limits, LAYER_ROWS, 16, 2)


def _short_rounds(limits: Limits, prompts: int, longest: int, steps: int) -> list[Round]:
    generator = random.Random(SEED)
    longest = min(longest, limits.buckets[-1], limits.seq_len - steps)
    used = min(limits.slots, MOST_SLOTS)
    return [
        tuple(
            _sequence(limits, generator, slot, generator.randint(1, longest), steps)
            for slot in _slots(limits, used, generator)
        )
        for _ in range(ceil_div(prompts, used))
    ]


def _slots(limits: Limits, count: int, generator: random.Random) -> list[int]:
    """Slots in no order, so that the place in the batch cannot be the place in the schedule."""
    return generator.sample(range(limits.slots), count)


def _sequence(
    limits: Limits, generator: random.Random, slot: int, length: int, steps: int
) -> SlotTokens:
    tokens = tuple(generator.randrange(limits.vocabulary) for _ in range(length + steps))
    return SlotTokens(slot=slot, prompt=tokens[:length], continuation=tokens[length:])
