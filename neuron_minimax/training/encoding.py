"""Encoding of texts and chats as token ids with a mask of what is learned, and padded batches.

Shapes: B sequences, T tokens of the longest.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neuron_minimax.errors import TrainingError


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model learns to produce it."""

    ids: list[int]
    learned: list[bool]


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences: int64 ids, which are real, and which are to be produced."""

    ids_BT: torch.Tensor
    real_BT: torch.Tensor
    learned_BT: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        return Batch(self.ids_BT.to(device), self.real_BT.to(device), self.learned_BT.to(device))


class Encoder:
    """Encodes rows of training data: texts, or chats with their tools.

    A row is `{"text": ...}`, or `{"messages": [...], "tools": [...]}` as chat templates take them.
    Every token of a text is learned, its end of turn included. Of a chat the assistant's turns are
    learned, from behind the generation prompt of the tokenizer's own template up to the end of
    turn. Longer rows are cut to `max_tokens`. Raises TrainingError when the tokenizer has no
    end-of-turn token, or no usable chat template for a chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        if tokenizer.eos_token_id is None:
            raise TrainingError(
                "the tokenizer has no eos_token; name its end-of-turn token in "
                "tokenizer_config.json"
            )
        self.end_of_turn = int(tokenizer.eos_token_id)
        self._generation_prompt: list[int] = []

    def __call__(self, row: Mapping[str, Any]) -> Example:
        if "messages" in row:
            ids = self._render(row["messages"], row.get("tools"))
            learned = self._assistant_turns(ids)
        elif isinstance(row.get("text"), str):
            ids = self.tokenizer.encode(row["text"], add_special_tokens=False)
            ids = [*ids, self.end_of_turn] if ids else []
            learned = [True] * len(ids)
        else:
            raise TrainingError(
                f"a row has the fields {sorted(row)}; expected 'text' or 'messages'"
            )
        return Example(ids[: self.max_tokens], learned[: self.max_tokens])

    def _render(
        self, messages: list[dict[str, Any]], tools: Any, add_generation_prompt: bool = False
    ) -> list[int]:
        text = self.tokenizer.apply_chat_template(
            messages,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _assistant_turns(self, ids: list[int]) -> list[bool]:
        start = self._generation_prompt or self._find_generation_prompt()
        learned = [False] * len(ids)
        inside = False
        for position, token in enumerate(ids):
            if inside:
                learned[position] = True
                inside = token != self.end_of_turn
            elif (
                token == start[-1]
                and ids[max(0, position + 1 - len(start)) : position + 1] == start
            ):
                inside = True
        return learned

    def _find_generation_prompt(self) -> list[int]:
        messages = [{"role": "user", "content": "."}]
        if not self.tokenizer.chat_template:
            raise TrainingError(
                "the tokenizer has no chat template, which training on messages needs"
            )
        without = self._render(messages, None)
        with_prompt = self._render(messages, None, add_generation_prompt=True)
        if with_prompt[: len(without)] != without or len(with_prompt) == len(without):
            raise TrainingError(
                "the chat template has no generation prompt; expected add_generation_prompt to "
                "append one"
            )
        self._generation_prompt = with_prompt[len(without) :]
        return self._generation_prompt


def micro_batches(examples: Sequence[Example], tokens: int) -> Iterator[Batch]:
    """Yield padded batches of at most `tokens` tokens, padding included.

    They are sorted by length, so that little is padding. A longer example is a batch of its own;
    empty examples are left out.
    """
    waiting: list[Example] = []
    for example in sorted((e for e in examples if e.ids), key=lambda e: len(e.ids)):
        if waiting and len(example.ids) * (len(waiting) + 1) > tokens:
            yield pad(waiting)
            waiting = []
        waiting.append(example)
    if waiting:
        yield pad(waiting)


def pad(examples: Sequence[Example]) -> Batch:
    """Pad on the right. The first token of a sequence is never learned: nothing predicts it."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    batch = Batch(
        torch.zeros(shape, dtype=torch.int64),
        torch.zeros(shape, dtype=torch.bool),
        torch.zeros(shape).bool(),
    )
    for row, example in enumerate(examples):
        size = len(example.ids)
        batch.ids_BT[row, :size] = torch.tensor(example.ids)
        batch.real_BT[row, :size] = True
        batch.learned_BT[row, :size] = torch.tensor(example.learned)
    batch.learned_BT[:, 0] = False
    return batch
