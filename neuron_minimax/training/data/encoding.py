"""Encoding of texts and chats as token ids with a mask of what is learned, and padded batches.

Shapes: B sequences, T tokens of the longest.
"""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.generation.chat_formats import CHAT_FORMATS
from neuron_minimax.training.data.chats import ChatWriter, Part, WrittenChat
from neuron_minimax.training.data.rows import Row
from neuron_minimax.training.data.windows import NO_DOCUMENT, Example, cut, windows

BATCH_TOKENS = 128  # of padding take as long as another batch
ENDS_OF_TURN = tuple(form.end_of_turn for form in CHAT_FORMATS.values())
# Tokens that a message may hold: parts of a reply, though some tokenizers call them special.
TAGS = {tag for form in CHAT_FORMATS.values() for tag in form.tags}
# Parts the spelling of a control token on its way through a template. Unicode keeps this code point
# for use within a program.
MARK = "\ufdd0"
ESCAPED_MARK = r"\ufdd0"  # by a template that writes ASCII


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The examples of a row, each with a token to learn; without any, `cause` says why.

    `windows` is how many a longer text was split into (else 0), `lost` how many tokens of replies
    lie beyond the window of a longer chat. The other numbers count replies, as WrittenChat does.
    `control` names the control tokens that a text, or a message of a chat, spells.
    """

    examples: tuple[Example, ...] = ()
    cause: str = ""
    windows: int = 0
    lost: int = 0
    replies: int = 0
    unanswering: int = 0
    without_reasoning: int = 0
    unwritten: int = 0
    control: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Right-padded sequences: int64 ids and positions, which are real, and which are to be
    produced.

    `documents_BT` numbers the documents of packed sequences, which do not see each other; None
    where every sequence is one document. `documents` counts all of them.
    """

    ids_BT: torch.Tensor
    real_BT: torch.Tensor
    learned_BT: torch.Tensor
    positions_BT: torch.Tensor
    documents: int
    documents_BT: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        documents_BT = self.documents_BT
        return Batch(
            ids_BT=self.ids_BT.to(device),
            real_BT=self.real_BT.to(device),
            learned_BT=self.learned_BT.to(device),
            positions_BT=self.positions_BT.to(device),
            documents=self.documents,
            documents_BT=None if documents_BT is None else documents_BT.to(device),
        )


class ControlTokens:
    """The control tokens of a tokenizer, and how a chat's messages spell one as mere text.

    Before a template sees the messages, a MARK goes between the characters of each token that they
    spell; behind it what is whole is the template's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self._numbers = {token.content: number for number, token in added if token.special}
        self._special = _any_of(self._numbers)
        self._control = _any_of(self._numbers.keys() - TAGS)

    def spelled_in(self, value: Any) -> tuple[str, ...]:
        """Return the control tokens that a text spells, or the texts in lists and dictionaries."""
        return tuple(sorted({name for text in _texts_in(value) for name in self._in(text)}))

    def parted(self, value: Any) -> Any:
        """Return the same with every control token's spelling parted."""
        if isinstance(value, str):
            return self._control.sub(lambda found: MARK.join(found[0]), value)
        if isinstance(value, list | tuple):
            return [self.parted(each) for each in value]
        if isinstance(value, dict):
            return {self.parted(name): self.parted(each) for name, each in value.items()}
        return value

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a rendered text whose messages were parted.

        Raises TrainingError when the tokenizer or the template cannot keep them apart.
        """
        ids: list[int] = []
        for place, piece in enumerate(self._special.split(text)):
            if place % 2:  # a match of the pattern's group
                ids.append(self._numbers[piece])
                continue
            whole = piece.replace(MARK, "")
            found = self.tokenizer.encode(
                whole, add_special_tokens=False, split_special_tokens=True, verbose=False
            )
            if ESCAPED_MARK in piece or not {*self._numbers.values()}.isdisjoint(found):
                names = ", ".join(self._in(whole.replace(ESCAPED_MARK, "")))
                raise TrainingError(
                    f"a message spells {names}, which its chat template and tokenizer cannot write "
                    "as text; remove it from the row"
                )
            ids += found
        return ids

    def _in(self, text: str) -> list[str]:
        return [str(name) for name in self._control.findall(text)]


def _any_of(names: Collection[str]) -> re.Pattern[str]:
    """Return a pattern of one group that matches each name, or nothing without any."""
    longest_first = sorted(names, key=lambda name: -len(name))
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value:
            yield from _texts_in(each)
        if isinstance(value, dict):
            yield from _texts_in(list(value.values()))


class Encoder:
    """Encodes rows of training data (rows.py): texts, or chats with their tools.

    Every token of a text is learned, and then its end of turn; a text of more than `max_tokens` is
    split into windows, which begin `stride` tokens apart (max_tokens - 1 by default), so that every
    token is learned once. Of a chat the replies are learned (chats.py); what of them lies behind
    `max_tokens` is cut. Control tokens are those that the template writes, and those in a text;
    what a message spells like one is encoded as any other words. Raises TrainingError when the
    tokenizer has no end-of-turn token, or no chat template that renders a chat.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, stride: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.stride = stride or max(1, max_tokens - 1)
        if not 1 <= self.stride < max(2, max_tokens):
            raise TrainingError(
                f"the stride is {counted(self.stride, 'token')}; expected 1 to {max_tokens - 1}, "
                "less than a window's",
                usage=True,
            )
        if tokenizer.eos_token_id is None:
            raise TrainingError(
                "the tokenizer has no eos_token; name its end-of-turn token in "
                "tokenizer_config.json"
            )
        self.end_of_turn = int(tokenizer.eos_token_id)
        known = (end for end in ENDS_OF_TURN if end in tokenizer.get_vocab())
        self._chats = ChatWriter(tokenizer, {str(tokenizer.eos_token), *known})
        self._control = ControlTokens(tokenizer)

    def __call__(self, row: Row) -> Example:
        """Return the first example of a row, cut to `max_tokens`; it may have nothing to learn."""
        if row.get("text") is not None:
            return cut(self._text(row["text"]), self.max_tokens)
        _, _, whole = self._written(row["messages"], row.get("tools"))
        return cut(whole[0], self.max_tokens) if whole else Example([], [])

    def encode(self, row: Row) -> Encoded:
        """Return all examples of a row."""
        if row.get("text") is not None:
            return self._encode_text(row["text"])
        return self._encode_chat(row["messages"], row.get("tools"))

    def _encode_text(self, text: str) -> Encoded:
        example = self._text(text)
        if not example.ids:
            return Encoded(cause="its text is empty")
        found = windows(example, self.max_tokens, self.stride)
        return Encoded(
            examples=tuple(found),
            windows=len(found) if len(found) > 1 else 0,
            control=self._control.spelled_in(text),
        )

    def _encode_chat(self, messages: list[dict[str, Any]], tools: Any) -> Encoded:
        if not any(message["role"] == "assistant" for message in messages):
            return Encoded(cause="it has no message of an assistant")
        chat, control, whole = self._written(messages, tools)
        kept = [cut(example, self.max_tokens) for example in whole]
        cause = ""
        if not whole:
            cause = "its replies answer no message"
        elif not any(example.learned_count for example in kept):
            prompts = min(example.learned.index(True) for example in whole)
            size = counted(prompts, "token")
            cause = f"its prompt of {size} fills the {self.max_tokens} of a sequence"
        return Encoded(
            examples=tuple(example for example in kept if example.learned_count),
            cause=cause,
            lost=sum(example.learned_count for example in whole)
            - sum(example.learned_count for example in kept),
            replies=chat.replies,
            unanswering=chat.unanswering,
            without_reasoning=chat.without_reasoning,
            unwritten=chat.unwritten,
            control=control,
        )

    def _written(
        self, messages: list[dict[str, Any]], tools: Any
    ) -> tuple[WrittenChat, tuple[str, ...], list[Example]]:
        """Return a chat, the control tokens that its messages spell, and its whole sequences."""
        control = self._control.spelled_in([messages, tools])
        if control:
            messages = self._control.parted(messages)
            tools = self._control.parted(tools)
        chat = self._chats.write(messages, tools)
        encode = self._control.encode if control else self._ids
        return chat, control, [_joined(parts, encode) for parts in chat.sequences]

    def _text(self, text: str) -> Example:
        ids = self._ids(text)
        ids += [self.end_of_turn] if ids else []
        return Example(ids, [True] * len(ids))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, verbose=False))


def _joined(parts: Sequence[Part], encode: Callable[[str], list[int]]) -> Example:
    """Encode the parts one by one: the model's own tokens begin where the prompt's end."""
    encoded = [encode(part.text) for part in parts]
    return Example(
        [token for ids in encoded for token in ids],
        [part.learned for part, ids in zip(parts, encoded, strict=True) for _ in ids],
    )


def micro_batches(examples: Sequence[Example], tokens: int) -> Iterator[Batch]:
    """Yield padded batches of at most `tokens` tokens, padding included.

    Sorted by length, the examples are parted where that leaves least padding; a batch counts as
    much as BATCH_TOKENS of it. An example of more tokens is a batch of its own; empty examples are
    left out.
    """
    ordered = sorted((e for e in examples if e.ids), key=lambda e: len(e.ids))
    sizes = [len(example.ids) for example in ordered]
    # The least cost of the first n examples, and where their last batch begins.
    costs = [0]
    firsts = [0]
    for end, longest in enumerate(sizes, start=1):
        most = max(1, tokens // longest)
        cost, first = min(
            (costs[first] + (end - first) * longest + BATCH_TOKENS, first)
            for first in range(max(0, end - most), end)
        )
        costs.append(cost)
        firsts.append(first)
    ends = [len(sizes)]
    while ends[-1]:
        ends.append(firsts[ends[-1]])
    for first, end in pairwise(reversed(ends)):
        yield pad(ordered[first:end])


def pad(examples: Sequence[Example]) -> Batch:
    """Pad on the right. The first token of a document is never learned: nothing predicts it."""
    shape = (len(examples), max(len(example.ids) for example in examples))
    ids_BT = torch.zeros(shape, dtype=torch.int64)
    real_BT = torch.zeros(shape, dtype=torch.bool)
    learned_BT = torch.zeros(shape, dtype=torch.bool)
    positions_BT = torch.arange(shape[1]).repeat(shape[0], 1)
    documents_BT = torch.full(shape, NO_DOCUMENT)
    for row, example in enumerate(examples):
        size = len(example.ids)
        ids_BT[row, :size] = torch.tensor(example.ids)
        real_BT[row, :size] = True
        learned_BT[row, :size] = torch.tensor(example.learned)
        for document, (start, end) in enumerate(example.spans()):
            documents_BT[row, start:end] = document
            positions_BT[row, start:] = torch.arange(shape[1] - start)
            learned_BT[row, start] = False
    documents = sum(len(example.starts) for example in examples)
    return Batch(
        ids_BT=ids_BT,
        real_BT=real_BT,
        learned_BT=learned_BT,
        positions_BT=positions_BT,
        documents=documents,
        documents_BT=documents_BT if documents > len(examples) else None,
    )
