"""The interface of a compiled model: fixed batch slots, each with its own key/value cache."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError, counted

if TYPE_CHECKING:
    import torch

# Positions whose logits are held at once where those of a whole prompt are asked for.
LOGIT_ROWS = 64


def check_buckets(buckets: tuple[int, ...], seq_len: int) -> None:
    """Raise BackendError unless context-encoding lengths ascend from 1 to `seq_len` at most."""
    ascending = tuple(sorted(set(buckets)))
    if not buckets or buckets != ascending or buckets[0] < 1 or buckets[-1] > seq_len:
        raise BackendError(
            f"buckets {list(buckets)}: expected ascending lengths from 1 to seq_len {seq_len}",
            usage=True,
        )


def given_options(options: Mapping[str, Any], taken: Iterable[str], backend: str) -> dict[str, Any]:
    """Return the options that are not None. Raises BackendError naming one that is not taken."""
    given = {name: value for name, value in options.items() if value is not None}
    foreign = sorted(given.keys() - set(taken))
    if foreign:
        raise BackendError(
            f"the {backend} backend does not take --{foreign[0].replace('_', '-')}; it belongs to "
            "another one",
            usage=True,
        )
    return given


def check_seq_len(seq_len: int, config: ModelConfig) -> None:
    """Raise BackendError unless the model has so many positions."""
    if seq_len > config.max_position_embeddings:
        raise BackendError(
            f"seq_len {seq_len} is beyond max_position_embeddings {config.max_position_embeddings} "
            "of config.json"
        )


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """The limits and abilities of one compiled model; lengths in tokens.

    slots                 sequences that can be alive at the same time
    seq_len               positions per slot, prompt and answer together
    buckets               context-encoding lengths, ascending; no more than the last is encoded at
                          once, and to encode what fits the first again is cheaper than to spare it
    padded                a prompt is padded to the smallest bucket that holds it
    chunked_encoding      encode may continue a slot (start > 0), and prompts longer than the last
                          bucket are split
    all_position_logits   encode(all_positions=True) and encode_rows are allowed
    slot_copies           copy is allowed
    """

    slots: int
    seq_len: int
    buckets: tuple[int, ...]
    vocab_size: int
    chunked_encoding: bool
    all_position_logits: bool
    slot_copies: bool = False
    padded: bool = True

    def __post_init__(self) -> None:
        if self.slots < 1 or self.seq_len < 1:
            raise BackendError(
                f"slots {self.slots}, seq_len {self.seq_len} cannot be compiled; expected positive "
                "sizes"
            )
        check_buckets(self.buckets, self.seq_len)

    @property
    def longest_prompt(self) -> int:
        """Most tokens that encode takes at once from an empty slot."""
        return self.seq_len if self.chunked_encoding else self.buckets[-1]

    def encoded_length(self, length: int) -> int:
        """What encoding `length` tokens costs: their number, or that of the bucket they fill."""
        return self.bucket_for(length) if self.padded else length

    def bucket_for(self, length: int) -> int:
        """The smallest bucket that holds `length` tokens; `length` is at most the last bucket."""
        return next(bucket for bucket in self.buckets if length <= bucket)


class Backend(ABC):
    """A loaded model with `capabilities.slots` independent sequences.

    A slot's cache belongs to the caller: `encode(slot, ids, 0)` starts a sequence and overwrites
    what was there; `step` appends one token to every active slot. All logits are float32 on the
    CPU. One thread at a time. `model_directory` holds config.json, generation_config.json and the
    tokenizer files of the compiled model.
    """

    config: ModelConfig
    capabilities: Capabilities
    model_directory: Path

    @property
    def failure(self) -> BackendError | None:
        """Why nothing can be asked of the model any more, once that is so."""
        return None

    def encode(
        self, slot: int, ids: Sequence[int], start: int = 0, *, all_positions: bool = False
    ) -> "torch.Tensor":
        """Run tokens `ids` of one slot at positions start, start + 1, ...

        Returns the logits [V] of the last position, or [T,V] with `all_positions`. With `start > 0`
        the slot must already hold `start` tokens. Raises BackendError when the slot, a token or a
        length is out of range.
        """
        chunks = self._chunks(slot, ids, start, all_positions)
        logits = [self._encode(slot, chunk, at, all_positions) for at, chunk in chunks]
        if not all_positions:
            return logits[-1]
        import torch  # here, so that options are checked without it

        return torch.cat(logits)

    def encode_rows(
        self, slot: int, ids: Sequence[int], start: int = 0
    ) -> "Iterator[torch.Tensor]":
        """Do what `encode` does with `all_positions`, and yield its logits in rows [R,V]: no more
        than LOGIT_ROWS of them are computed at once where the backend can tell them apart.

        A vocabulary is large: all logits of a long prompt take gigabytes.
        """
        for at, chunk in self._chunks(slot, ids, start, all_positions=True):
            yield from self._encode_rows(slot, chunk, at)

    def step(
        self, tokens: "torch.Tensor", positions: "torch.Tensor", active: "torch.Tensor"
    ) -> "torch.Tensor":
        """Append one token to each active slot: `tokens` [S] int64, `positions` [S] int64 (the
        number of tokens the slot already holds), `active` [S] bool. Returns logits [S,V]; rows of
        inactive slots mean nothing, and their caches are left as they are. Raises BackendError when
        a shape, token or position is out of range.
        """
        can = self.capabilities
        for name, values in (("tokens", tokens), ("positions", positions), ("active", active)):
            if values.shape != (can.slots,):
                raise BackendError(
                    f"step: {name} has shape {list(values.shape)}; expected [{can.slots}], one per "
                    "slot"
                )
        used = active.tolist()
        limits = (
            ("token", tokens, can.vocab_size, "vocab_size"),
            ("position", positions, can.seq_len, "seq_len"),
        )
        for name, values, limit, limit_name in limits:
            for slot, value in enumerate(values.tolist()):
                if used[slot] and not 0 <= value < limit:
                    raise BackendError(
                        f"step: slot {slot} has {name} {value}; expected 0 to {limit - 1} "
                        f"({limit_name})"
                    )
        if not all(used):
            # Compiled graphs check no index: what an inactive slot is given must not reach them.
            tokens = tokens.masked_fill(~active, 0)
            positions = positions.masked_fill(~active, 0)
        return self._step(tokens, positions, active)

    def copy(self, source: int, target: int, start: int, end: int) -> None:
        """Make slot `target` hold at positions start to end - 1 what `source` holds there.

        Attention reads what is before, too: a copy goes on where both hold the same. Raises
        BackendError when this model's slots cannot be copied, or a slot or position is out of
        range.
        """
        if not self.capabilities.slot_copies:
            raise BackendError("this compiled model cannot copy between slots; encode the tokens")
        self._check_slot(source)
        self._check_slot(target)
        if not 0 <= start <= end <= self.capabilities.seq_len:
            raise BackendError(
                f"copy of positions {start} to {end}: expected an ascending range within seq_len "
                f"{self.capabilities.seq_len}"
            )
        self._copy(source, target, start, end)

    @abstractmethod
    def reset(self, slot: int) -> None:
        """Forget what the slot holds."""

    @abstractmethod
    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> "torch.Tensor":
        """`encode` for checked arguments and at most the last bucket's number of tokens."""

    def _encode_rows(self, slot: int, ids: list[int], start: int) -> "Iterator[torch.Tensor]":
        """`encode_rows` for checked arguments and at most the last bucket's number of tokens."""
        yield self._encode(slot, ids, start, True)

    def _copy(self, source: int, target: int, start: int, end: int) -> None:
        """`copy` for checked arguments; called where the capabilities have it."""
        raise NotImplementedError

    @abstractmethod
    def _step(
        self, tokens: "torch.Tensor", positions: "torch.Tensor", active: "torch.Tensor"
    ) -> "torch.Tensor":
        """`step` for checked arguments; inactive slots have token and position 0."""

    def _chunks(
        self, slot: int, ids: Sequence[int], start: int, all_positions: bool
    ) -> list[tuple[int, list[int]]]:
        """Check the arguments of an encode; return its tokens in chunks that fit a bucket, each
        with its first position.
        """
        self._check_slot(slot)
        tokens = [int(token) for token in ids]
        self._check_prompt(tokens, start)
        if all_positions and not self.capabilities.all_position_logits:
            raise BackendError("this compiled model returns the logits of the last position only")
        largest = self.capabilities.buckets[-1]
        return [
            (start + offset, tokens[offset : offset + largest])
            for offset in range(0, len(tokens), largest)
        ]

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.capabilities.slots:
            raise BackendError(
                f"slot {slot} does not exist; this model was compiled for "
                f"{counted(self.capabilities.slots, 'slot')}"
            )

    def _check_prompt(self, ids: list[int], start: int) -> None:
        can = self.capabilities
        if not ids:
            raise BackendError("the prompt is empty; expected at least one token")
        if start < 0 or (start > 0 and not can.chunked_encoding):
            raise BackendError(
                f"encode starts at position {start}, but this compiled model starts prompts at 0 "
                "only"
            )
        if start + len(ids) > can.seq_len:
            raise BackendError(
                f"the prompt ends at position {start + len(ids)}, but the model is compiled for "
                f"seq_len {can.seq_len}; shorten it or compile with a larger --seq-len"
            )
        if len(ids) > can.longest_prompt:
            raise BackendError(
                f"the prompt has {len(ids)} tokens, but the largest bucket is {can.buckets[-1]} "
                "and this model cannot encode in chunks; shorten it or compile with a larger bucket"
            )
        for token in ids:
            if not 0 <= token < can.vocab_size:
                raise BackendError(
                    f"token {token} is outside of the vocabulary; expected 0 to "
                    f"{can.vocab_size - 1}"
                )
