"""Examples of the length that a model is trained on: longer ones cut or split into windows, short
ones packed.
"""

import bisect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NO_DOCUMENT = -1  # the number of padding's document


@dataclass(frozen=True)
class Example:
    """Token ids, and for each whether the model learns to produce it.

    `starts` are the places where its documents begin; the first token of one is never learned.
    """

    ids: list[int]
    learned: list[bool]
    starts: tuple[int, ...] = (0,)

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield where each document begins and ends."""
        yield from zip(self.starts, (*self.starts[1:], len(self.ids)), strict=True)

    @property
    def learned_count(self) -> int:
        """How many tokens are learned."""
        return sum(self.learned) - sum(self.learned[start] for start in self.starts if self.ids)


def cut(example: Example, size: int) -> Example:
    """Return the first `size` tokens of a single document."""
    if len(example.ids) <= size:
        return example
    return Example(example.ids[:size], example.learned[:size])


def windows(example: Example, size: int, stride: int) -> list[Example]:
    """Split a single document into windows of at most `size` tokens that begin `stride` apart.

    A token is learned once, in the first window that holds it behind another; the tokens before it
    in later windows are context. So a stride must be less than the size.
    """
    found = []
    done = 1  # tokens before this one are learned, or the first of all
    for start in range(0, len(example.ids), stride):
        end = min(start + size, len(example.ids))
        learned = [n >= done and example.learned[n] for n in range(start, end)]
        if start == 0:
            learned[0] = example.learned[0]
        found.append(Example(example.ids[start:end], learned))
        done = end
        if end == len(example.ids):
            break
    return found


def pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return packs of at most `size` tokens, as the numbers of the examples in each.

    Best fit decreasing: the longest example first, each into the fullest pack that has room for it.
    A longer example is a pack of its own.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        place = bisect.bisect_left(room, (lengths[number], 0))
        if place < len(room):
            left, chosen = room.pop(place)
        else:
            left = size
            chosen = len(packs)
            packs.append([])
        packs[chosen].append(number)
        if left > lengths[number]:
            bisect.insort(room, (left - lengths[number], chosen))
    return packs


def joined(examples: Sequence[Example]) -> Example:
    """Return examples side by side in one, each a document of its own."""
    starts = []
    size = 0
    for example in examples:
        starts += [size + start for start in example.starts]
        size += len(example.ids)
    return Example(
        [token for example in examples for token in example.ids],
        [learned for example in examples for learned in example.learned],
        tuple(starts),
    )
