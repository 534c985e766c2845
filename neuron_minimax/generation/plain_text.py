"""Text that stays text: what people and tools say spells special tokens, and becomes none.

A chat template writes a prompt of its own markers and of what messages say. Both are one string,
in which a marker that a user has typed looks like the template's. So spellings in messages are
marked before they are rendered, and the prompt that comes out is cut at the template's markers:
what is marked is made into tokens by the vocabulary alone.

Nothing here imports torch: these functions run in limited processes.
"""

import itertools
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer


class ChatPrompt(str):
    """A rendered prompt. Its `pieces` join to the text; the second of each says whether special
    tokens that it spells are mere text.
    """

    pieces: tuple[tuple[str, bool], ...]

    def __new__(cls, pieces: Sequence[tuple[str, bool]]) -> "ChatPrompt":
        prompt = super().__new__(cls, "".join(text for text, _ in pieces))
        prompt.pieces = tuple(pieces)
        return prompt

    def __getnewargs__(self) -> Any:
        return (self.pieces,)


class Marks:
    """Marks what messages spell, and tells it from the markers of the template afterwards."""

    def __init__(self, hugging_face: Any) -> None:
        self._tokens = sorted(
            {token.content for token in hugging_face.added_tokens_decoder.values()},
            key=len,
            reverse=True,
        )
        # No message can have it, template filters leave it alone, and JSON does not escape it.
        self._mark = f"\x7f{secrets.randbelow(10**16):016}\x7f"

    def marked(self, value: Any, allowed: Sequence[str] = ()) -> Any:
        """Return a value with the texts in it marked; they may spell what is `allowed`."""
        if isinstance(value, str):
            return self._marked_text(value, [each for each in self._tokens if each not in allowed])
        if isinstance(value, Mapping):
            return {
                self.marked(key, allowed): self.marked(each, allowed) for key, each in value.items()
            }
        if isinstance(value, list | tuple):
            return [self.marked(each, allowed) for each in value]
        return value

    def _marked_text(self, text: str, tokens: Sequence[str]) -> str:
        """Mark each spelling behind its first character, and what at the end may be the beginning
        of one, which the template would complete.
        """
        places = set()
        for token in tokens:
            start = text.find(token)
            while start >= 0:
                places.add(start + 1)
                start = text.find(token, start + 1)
            for size in range(1, min(len(token) - 1, len(text)) + 1):
                if token.startswith(text[-size:]):
                    places.add(len(text) - size + 1)
        bounds = [0, *sorted(places), len(text)]
        return self._mark.join(text[start:end] for start, end in itertools.pairwise(bounds))

    def prompt(self, rendered: str) -> ChatPrompt:
        """Return what a template has made of marked messages."""
        if self._mark not in rendered:
            return ChatPrompt([(rendered, False)])
        pieces: list[tuple[str, bool]] = []
        markers = "|".join(map(re.escape, self._tokens))
        for part in re.split(f"({markers})", rendered):
            plain = self._mark in part
            text = part.replace(self._mark, "")
            if pieces and not plain and not pieces[-1][1]:
                text = pieces.pop()[0] + text
            pieces.append((text, plain))
        return ChatPrompt(pieces)


def encode_plain(hugging_face: Any, text: str) -> list[int]:
    """Return the tokens of a text by the vocabulary alone: no special token is looked for."""
    whole = hugging_face.backend_tokenizer
    plain = Tokenizer(whole.model)  # shared, not copied
    plain.normalizer = whole.normalizer
    plain.pre_tokenizer = whole.pre_tokenizer
    return list(plain.encode(text, add_special_tokens=False).ids)
