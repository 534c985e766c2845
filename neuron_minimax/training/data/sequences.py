"""The sequences that a run trains on, made and counted before its first step, in an order that the
seed decides.
"""

import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.progress import Advance, nothing
from neuron_minimax.training.data.corpus import CorpusSource
from neuron_minimax.training.data.encoding import Encoded, Encoder
from neuron_minimax.training.data.sources import DemoSource, JsonLines
from neuron_minimax.training.data.windows import Example, joined, pack

LINES_SHOWN = 5
MADE_COUNTED = 500  # rows of an endless source that are looked at before the first step
MADE_HELD_OUT = 200  # chats of an endless source that stand for its held-out share
NOTHING = "has nothing to learn"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is made of the rows of a file.

    A longer text is split into windows that begin `stride` tokens apart (None: one less than a
    window has). With `pack` several short sequences become one. `held_out` is the share of rows to
    evaluate on. Each of `epochs` goes through all sequences once; None: as often as the steps need.
    Rows with nothing to learn are errors, or left out with `skip_rows`.
    """

    stride: int | None = None
    pack: bool = False
    held_out: float = 0.0
    epochs: int | None = None
    skip_rows: bool = False

    def __post_init__(self) -> None:
        if self.epochs is not None and self.epochs < 1:
            raise TrainingError(f"epochs is {self.epochs}; expected at least 1", usage=True)
        if not 0 <= self.held_out < 1:
            raise TrainingError(
                f"the held-out share is {self.held_out}; expected at least 0, less than 1",
                usage=True,
            )


@dataclass(kw_only=True)
class Counts:
    """What became of the rows of a source. `tokens` and `learned` are of all sequences once;
    `documents` are in them, more than one in a packed sequence.
    """

    name: str
    texts: int = 0
    chats: int = 0
    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    learned: int = 0
    split: int = 0
    windows: int = 0
    cut: int = 0
    lost: int = 0
    replies: int = 0
    unanswering: int = 0
    without_reasoning: int = 0
    unwritten: int = 0
    left_out: list[int] = field(default_factory=list)  # lines
    unused: Mapping[str, int] = field(default_factory=dict)
    # Control tokens that are spelled, and in how many rows.
    control_in_texts: Counter[str] = field(default_factory=Counter)
    control_in_chats: Counter[str] = field(default_factory=Counter)

    def add(self, is_text: bool, row: Encoded) -> None:
        """Count one row."""
        self.texts += is_text
        self.chats += not is_text
        self.documents += len(row.examples)
        self.split += row.windows > 0
        self.windows += row.windows
        self.cut += row.lost > 0
        self.lost += row.lost
        self.replies += row.replies
        self.unanswering += row.unanswering
        self.without_reasoning += row.without_reasoning
        self.unwritten += row.unwritten
        (self.control_in_texts if is_text else self.control_in_chats).update(row.control)

    def line(self) -> str:
        """Say it in one line."""
        rows = self.texts + self.chats
        parts = [
            f"{self.name}: {counted(rows, 'row')} ({counted(self.texts, 'text')}, "
            f"{counted(self.chats, 'chat')}), {counted(self.sequences, 'sequence')} of "
            f"{counted(self.tokens, 'token')}, {self.learned:,} of them learned"
        ]
        if self.split:
            parts.append(f"{counted(self.split, 'text')} split into {self.windows:,} windows")
        if self.cut:
            parts.append(
                f"{counted(self.cut, 'chat')} cut, {counted(self.lost, 'token')} of replies not "
                "learned"
            )
        if self.unanswering:
            parts.append(f"{counted(self.unanswering, 'reply')} to no message not learned")
        if self.without_reasoning:
            parts.append(
                f"{counted(self.without_reasoning, 'reply')} without reasoning beside others with "
                "it not learned"
            )
        if self.unwritten:
            parts.append(
                f"the reasoning of {counted(self.unwritten, 'reply')} is not written by the chat "
                "template"
            )
        if self.left_out:
            parts.append(
                f"{counted(len(self.left_out), 'row')} with nothing to learn left out "
                f"({_lines(self.left_out)})"
            )
        for found, what in (
            (self.control_in_texts, "control tokens in texts, learned as such"),
            (self.control_in_chats, "spelled like control tokens in chats, encoded as words"),
            (self.unused, "fields that nothing reads"),
        ):
            if found:
                names = ", ".join(f"{name} ({rows:,})" for name, rows in sorted(found.items()))
                parts.append(f"{what}: {names}")
        return "; ".join(parts)


class Sequences:
    """The sequences of a source, endlessly: an order for each epoch, decided by seed and epoch.

    `end` is the number of sequences after which a run of whole `epochs` is over; None without them.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        counts: Counts,
        seed: int = 0,
        packed_to: int | None = None,
    ) -> None:
        self.name = counts.name
        self.counts = counts
        self.seed = seed
        self.end: int | None = None
        self.epochs: int | None = None
        self._firsts: dict[int, int] = {}  # of steps that begin elsewhere than by their number
        # A list of ints takes many times the memory.
        self._ids = array("i")
        self._learned = bytearray()
        self._starts = array("q", [0])
        for example in examples:
            self._ids.extend(example.ids)
            self._learned.extend(example.learned)
            self._starts.append(len(self._ids))
        documents = range(len(self._starts) - 1)
        self._packs = [[number] for number in documents]
        if packed_to is not None:
            lengths = [self._starts[n + 1] - self._starts[n] for n in documents]
            self._packs = pack(lengths, packed_to)
        counts.sequences = len(self._packs)
        counts.tokens = len(self._ids)
        counts.learned = sum(self._document(number).learned_count for number in documents)
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        """Return how many sequences an epoch has."""
        return len(self._packs)

    def __iter__(self) -> Iterator[Example]:
        """Yield every sequence once, in the order of the rows, as for an evaluation."""
        return map(self._sequence, range(len(self)))

    def example(self, index: int) -> Example:
        """Return sequence `index` of the run; it depends on data, options, seed and index alone."""
        epoch, place = divmod(index, len(self))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = list(range(len(self)))
            random.Random(f"{self.seed}:{epoch}").shuffle(self._order)
        return self._sequence(self._order[place])

    def indices(self, step: int, batch_size: int) -> range:
        """Return the sequences of a step, fewer in the last one of whole epochs."""
        found = _indices(step, batch_size, self.end)
        return range(self._firsts.get(step, found.start), found.stop)

    def steps(self, batch_size: int, epochs: int) -> int:
        """Let the run be over after so many epochs, and return how many steps that takes."""
        self.epochs = epochs
        self.end = epochs * len(self)
        return ceil_div(self.end, batch_size)

    def go_on(self, step: int, epochs: int, batch_size: int) -> None:
        """Take it that a run of so many epochs goes on after `step`. Where that was its last one,
        and of fewer sequences, the next step has those too that had no place in it: in the end each
        is seen once an epoch.
        """
        self._firsts[step] = min(step * batch_size, epochs * len(self))

    def _sequence(self, number: int) -> Example:
        return joined([self._document(document) for document in self._packs[number]])

    def _document(self, number: int) -> Example:
        first = self._starts[number]
        last = self._starts[number + 1]
        return Example(self._ids[first:last].tolist(), list(map(bool, self._learned[first:last])))


class MadeSequences:
    """The rows of a source without an end, made and encoded when they are asked for."""

    epochs = None

    def __init__(self, source: DemoSource | CorpusSource, encoder: Encoder) -> None:
        self.name = source.name
        self.source = source
        self.encoder = encoder
        self.counts = Counts(name=source.name)

    def example(self, index: int) -> Example:
        """Return a sequence of row `index`; of a row that makes several, its number chooses one."""
        return self._chosen(index, self.encoder.encode(self.source.row(index)))

    def indices(self, step: int, batch_size: int) -> range:
        """Return the rows of a step."""
        return _indices(step, batch_size, None)

    def count(self, steps: int, batch_size: int) -> None:
        """Look at the first rows that a run would train on, at least those of a whole step.

        Raises TrainingError when a step of them has nothing to learn.
        """
        rows = min(steps * batch_size, max(batch_size, MADE_COUNTED))
        self.counts = Counts(name=f"{self.name}, the first {counted(rows, 'row')}")
        self.counts.sequences = rows
        learned: list[int] = []
        for index in range(rows):
            row = self.source.row(index)
            encoded = self.encoder.encode(row)
            self.counts.add(row.get("text") is not None, encoded)
            example = self._chosen(index, encoded)
            learned.append(example.learned_count)
            self.counts.tokens += len(example.ids)
            self.counts.learned += learned[-1]
        for step in range(rows // batch_size):
            if not any(learned[index] for index in self.indices(step, batch_size)):
                raise TrainingError(
                    f"no token of step {step + 1} would be learned: no reply of the {self.name} "
                    f"begins within {self.encoder.max_tokens} tokens; expected more tokens"
                )

    def _chosen(self, index: int, row: Encoded) -> Example:
        return row.examples[index % len(row.examples)] if row.examples else Example([], [])


def encode_rows(
    source: JsonLines,
    encoder: Encoder,
    options: DataOptions,
    seed: int = 0,
    advance: Advance = nothing,
) -> Sequences:
    """Encode every row of a file, and count what becomes of it.

    Raises TrainingError naming the line of a row that cannot be rendered, the lines of rows with
    nothing to learn unless these may be left out, and the file when nothing is left.
    """
    counts = Counts(name=source.name, unused=source.unused)
    causes: list[str] = []  # of the rows that are left out
    examples = _examples(source, encoder, counts, causes, advance)
    found = Sequences(examples, counts, seed, encoder.max_tokens if options.pack else None)
    left_out = counts.left_out
    if not len(found):
        raise TrainingError(
            f"{source.path} {NOTHING} in {counted(len(source.rows), 'row')}: {_most(causes)} "
            f"({_lines(left_out)}); expected texts, or chats whose replies begin within "
            f"{encoder.max_tokens} tokens"
        )
    if left_out and not options.skip_rows:
        others = len(left_out) - 1
        more = f" (and {counted(others, 'row')} more: {_lines(left_out)})" if others else ""
        raise TrainingError(
            f"{source.path} line {left_out[0]} {NOTHING}: {causes[0]}{more}; mend or remove what "
            "has nothing, or leave it out with --skip-rows"
        )
    if counts.documents != len(source.rows):
        plural = "" if counts.documents == 1 else "s"  # a name that resumed runs compare
        found.name += f" in {counts.documents} sequence{plural}"
    if options.stride is not None:
        found.name += f", stride {options.stride}"
    if options.pack:
        found.name += ", packed"
    return found


def _examples(
    source: JsonLines, encoder: Encoder, counts: Counts, causes: list[str], advance: Advance
) -> Iterator[Example]:
    """Yield the examples of every row, and count the rows as they are read."""
    for number, row in enumerate(source.rows):
        try:
            encoded = encoder.encode(row)
        except TrainingError as error:
            raise TrainingError(f"{source.where(number)}: {error}") from None
        counts.add(row.get("text") is not None, encoded)
        if not encoded.examples:
            counts.left_out.append(source.lines[number])
            causes.append(encoded.cause)
        yield from encoded.examples
        advance(1)


def _indices(step: int, batch_size: int, end: int | None) -> range:
    first = step * batch_size
    last = first + batch_size
    return range(first, last if end is None else min(last, end))


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:LINES_SHOWN]))
    word = "line" if len(numbers) == 1 else "lines"
    return f"{word} {shown}{', ...' if len(numbers) > LINES_SHOWN else ''}"


def _most(causes: Sequence[str]) -> str:
    return " or ".join(cause for cause, _ in Counter(causes).most_common(3))
