"""The sources of training rows: the demo's conversations, and JSON Lines files.

What is trained on is in sequences.py. To hold rows out: `training, held_out = source.split(0.05)`.
"""

import codecs
import hashlib
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.files import open_regular, parse_json
from neuron_minimax.progress import Advance, nothing
from neuron_minimax.training.data.conversations import Conversation, demo_conversation, held_out
from neuron_minimax.training.data.corpus import corpus_words, words_of
from neuron_minimax.training.data.rows import ROW_ADVICE, Row, parse_row, unused_fields

LINE_BYTES = 16 << 20  # of a row
FIRST_BYTES = 4  # that tell an encoding
ROWS_SUFFIX = ".jsonl"
CORPUS_ROWS = 6000  # of the project's own corpus, which has few words
CHECKED = 200  # texts that are encoded and read back


class DemoSource:
    """The demo's training conversations of one seed, without an end; with `focus`, every other one
    of its kinds.
    """

    def __init__(self, seed: int, focus: Sequence[str] = ()) -> None:
        self.seed = seed
        self.focus = tuple(focus)
        self.name = "demo" + (f", focus on {', '.join(self.focus)}" if self.focus else "")

    def row(self, index: int) -> Row:
        """Return conversation `index`, which depends on seed, focus and index alone."""
        return _as_row(demo_conversation(self.seed, index, self.focus))

    def held_out(self, count: int) -> list[Row]:
        """Return `count` conversations whose questions are never trained."""
        return [_as_row(conversation) for conversation in held_out(count, self.seed)]


def _as_row(conversation: Conversation) -> Row:
    return {"messages": conversation.messages, "tools": conversation.tools}


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """Rows of a JSON Lines file, as rows.py reads them, in the order of the file.

    `lines` are their numbers in the file, `sha256` is the digest of the whole file as it was read,
    `unused` counts the rows with a field that nothing reads. `part` names what a split made.
    """

    path: Path
    rows: tuple[Row, ...]
    lines: tuple[int, ...]
    sha256: str
    unused: Mapping[str, int] = field(default_factory=dict)
    part: str = ""

    @classmethod
    def read(cls, path: Path, advance: Advance = nothing) -> "JsonLines":
        """Read a file; `advance` counts its rows. Raises TrainingError naming file and line when a
        row is not JSON or not a text or chat, and when there are none.
        """
        digest = hashlib.sha256()
        lines = []
        rows = []
        unused: Counter[str] = Counter()
        for number, raw in _read_objects(path, digest):
            where = f"{path} line {number}"
            lines.append(number)
            rows.append(parse_row(raw, where))
            unused.update(unused_fields(raw, where))
            advance(1)
        if not rows:
            raise TrainingError(f"{path} has no rows; {ROW_ADVICE}")
        return cls(
            path=path,
            rows=tuple(rows),
            lines=tuple(lines),
            sha256=digest.hexdigest(),
            unused=dict(unused),
        )

    @property
    def name(self) -> str:
        """What a resumed run must agree with."""
        plural = "" if len(self.rows) == 1 else "s"
        return f"{self.path.name}, {len(self.rows)} row{plural}{self.part}"

    def where(self, number: int) -> str:
        """Return what a message calls a row."""
        return f"{self.path} line {self.lines[number]}"

    def split(self, share: float) -> tuple["JsonLines", "JsonLines"]:
        """Return two sources: the rows to train on, and about `share` of the rows held out.

        The digest of its content decides about a row, whatever its place, so that equal rows are on
        one side. Raises TrainingError when one side would have none.
        """
        if not 0 < share < 1:
            raise TrainingError(f"the held-out share is {share}; expected more than 0, less than 1")
        keys = [_key(row) for row in self.rows]
        bound = sorted(keys)[min(len(keys) - 1, max(1, round(share * len(keys))))]
        held = [number for number, key in enumerate(keys) if key < bound]
        trained = [number for number, key in enumerate(keys) if key >= bound]
        if not held or not trained:
            raise TrainingError(
                f"{self.path} has {counted(len(set(keys)), 'different row')}, of which a share of "
                f"{share} cannot be held out; expected at least 2 and some of each kind"
            )
        return (
            self._of(trained, f", {len(held)} held out"),
            self._of(held, ", held out"),
        )

    def _of(self, numbers: Sequence[int], part: str) -> "JsonLines":
        return replace(
            self,
            rows=tuple(self.rows[number] for number in numbers),
            lines=tuple(self.lines[number] for number in numbers),
            part=part,
        )


def _key(row: Row) -> bytes:
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()


def _read_objects(path: Path, digest: "hashlib._Hash") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of every line that is not blank."""
    for number, line in read_lines(path, digest):
        yield (
            number,
            parse_json(line, dict[str, Any], f"{path} line {number}", TrainingError, ROW_ADVICE),
        )


def read_lines(path: Path, digest: "hashlib._Hash") -> Iterator[tuple[int, bytes]]:
    """Yield every line that is not blank, with its number; the digest sees the whole file. UTF-8's
    byte order mark is left out.

    Raises TrainingError when it cannot be read, is no text in UTF-8 by its first bytes, or a line
    is too long.
    """
    try:
        with open(open_regular(path), "rb") as file:
            for number in itertools.count(1):
                line = file.readline(LINE_BYTES + 1)
                if number == 1:
                    _require_text(path, line[:FIRST_BYTES])
                if not line:
                    return
                if len(line) > LINE_BYTES:
                    raise TrainingError(
                        f"{path} line {number} has more than {LINE_BYTES} bytes; {ROW_ADVICE}"
                    )
                digest.update(line)
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, line
    except OSError as error:
        raise TrainingError(f"{path} cannot be read: {error.strerror}") from None


def _require_text(path: Path, first: bytes) -> None:
    """Raise TrainingError, with the command that mends it, where the first bytes are of a file in
    another encoding or of a compressed one.
    """
    file = shlex.quote(str(path))
    text = shlex.quote(f"{path.with_suffix('')}.utf8{path.suffix}")
    for begins, what, command in (
        (codecs.BOM_UTF32_LE, "UTF-32", f"iconv -f UTF-32 -t UTF-8 {file} > {text}"),
        (codecs.BOM_UTF32_BE, "UTF-32", f"iconv -f UTF-32 -t UTF-8 {file} > {text}"),
        (codecs.BOM_UTF16_LE, "UTF-16", f"iconv -f UTF-16 -t UTF-8 {file} > {text}"),
        (codecs.BOM_UTF16_BE, "UTF-16", f"iconv -f UTF-16 -t UTF-8 {file} > {text}"),
        (b"{\0", "UTF-16 without its mark", f"iconv -f UTF-16LE -t UTF-8 {file} > {text}"),
        (b"\0{", "UTF-16 without its mark", f"iconv -f UTF-16BE -t UTF-8 {file} > {text}"),
        (b"\x1f\x8b", "compressed by gzip", f"gunzip --keep {file}"),
        (b"\x28\xb5\x2f\xfd", "compressed by zstd", f"unzstd {file}"),
        (b"PK\3\4", "a zip archive", f"unzip {file}"),
    ):
        if first.startswith(begins):
            raise TrainingError(f"{path} is {what}; expected text in UTF-8: {command}")


class Texts:
    """The texts of files, read once; the first stay, to look at the tokenizer with."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.name = ", ".join(map(str, paths)) if paths else "the corpus"
        self.count = 0
        self.seen: list[str] = []

    def __iter__(self) -> Iterator[str]:
        for text in _words(self.paths):
            self.count += 1
            if len(self.seen) < CHECKED:
                self.seen.append(text)
            yield text


def _words(paths: Sequence[Path]) -> Iterator[str]:
    """Yield the texts of every file. Raises TrainingError, also when one has none."""
    if not paths:
        yield from corpus_words(0, CORPUS_ROWS)
    for path in paths:
        found = False
        for number, line in read_lines(path, hashlib.sha256()):
            where = f"{path} line {number}"
            if path.suffix == ROWS_SUFFIX:
                raw = parse_json(line, dict[str, Any], where, TrainingError, ROW_ADVICE)
                texts = words_of(parse_row(raw, where))
            else:
                texts = iter([_decoded(line, where)])
            for text in texts:
                found = found or bool(text.strip())
                yield text
        if not found:
            raise TrainingError(
                f"{path} has no text in it; expected lines of text, or rows in a file named "
                f"{ROWS_SUFFIX}"
            )


def _decoded(line: bytes, where: str) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise TrainingError(
            f"{where} is no UTF-8 ({error.reason}); expected lines of text, or rows in a file "
            f"named {ROWS_SUFFIX}"
        ) from None
