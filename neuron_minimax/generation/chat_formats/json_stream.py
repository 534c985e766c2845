"""A JSON value (RFC 8259) in text that arrives in pieces: its end, and what of it models write that
others cannot read, as what they can.
"""

import json
import math
import re
from enum import Enum, auto

MAX_DEPTH = 64  # of objects and lists in one another; deeper ones count as malformed
MAX_NUMBER = 1024  # characters

_PLAIN = re.compile(r'[^"\\]*')  # within a string, up to what means something
_UNREADABLE = re.compile(r"[\x00-\x1f\ud800-\udfff]")  # within a string
_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"[-+.0-9A-Za-z]*")  # more than numbers and names hold: looked at when whole
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
_CONSTANTS = frozenset({"NaN", "Infinity", "-Infinity"})  # as Python writes them
_ESCAPED = frozenset('"\\/bfnrtu')
_HEX = frozenset("0123456789abcdefABCDEF")
_CLOSING = {"{": "}", "[": "]"}


class _Expect(Enum):
    """What may come next between the strings and scalars of a value."""

    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()


class JsonStream:
    """Follows one JSON value, the same for any split of its text.

    `ended`: the value is complete. `failed`: the text is no JSON. A number's end is only known from
    what follows it. What is read is written again as JSON that everyone can read: numbers that are
    not finite as texts, half a surrogate pair as U+FFFD, control characters within texts escaped.
    """

    def __init__(self) -> None:
        self.ended = False
        self.failed = False
        self._open: list[str] = []  # the closing brackets that are still to come
        self._expect = _Expect.VALUE
        self._in_string = False
        self._escape = ""  # as much as there is of an escape within a string
        self._high = ""  # the escape of the first half of a surrogate pair, before the second
        self._written: list[str] = []
        self._word: str | None = None  # as much as there is of a number or name

    def feed(self, text: str) -> int:
        """Return how many characters of `text` belong to the value, up to a fault if there is
        one.
        """
        place = 0
        while place < len(text) and not (self.ended or self.failed):
            if self._escape:
                place = self._read_escape(text, place)
            elif self._in_string:
                place = self._read_string(text, place)
            elif self._word is not None:
                place = self._read_word(text, place)
            else:
                place = self._read_structure(text, place)
        return place

    def written(self) -> str:
        """Return the JSON of what has been read since this was asked for last; escapes and numbers
        once they are whole.
        """
        written = "".join(self._written)
        self._written.clear()
        return written

    def _read_structure(self, text: str, place: int) -> int:
        """Read white space and one character between strings and scalars."""
        start = place
        space = _SPACE.match(text, place)
        place = space.end() if space else place
        self._written.append(text[start:place])
        if place == len(text):
            return place
        character = text[place]
        expect = self._expect
        if character == '"' and expect not in (_Expect.COLON, _Expect.COMMA_OR_END):
            self._in_string = True
        elif character == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
        elif character == "," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._open[-1] == "}" else _Expect.VALUE
        elif self._open and character == self._open[-1] and self._may_end():
            self._open.pop()
            self._end_value()
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            return self._begin_value(character, place)
        else:
            self.failed = True
            return place
        self._written.append(character)
        return place + 1

    def _may_end(self) -> bool:
        return self._expect in (_Expect.VALUE_OR_END, _Expect.KEY_OR_END, _Expect.COMMA_OR_END)

    def _begin_value(self, character: str, place: int) -> int:
        """Begin an object, a list, a number or a name."""
        if character not in _CLOSING:
            self._word = ""
            return place
        self._written.append(character)
        self._open.append(_CLOSING[character])
        self._expect = _Expect.KEY_OR_END if character == "{" else _Expect.VALUE_OR_END
        self.failed = len(self._open) > MAX_DEPTH
        return place + 1

    def _end_value(self) -> None:
        self._expect = _Expect.COMMA_OR_END
        self.ended = not self._open

    def _read_word(self, text: str, place: int) -> int:
        found = _WORD.match(text, place)
        end = found.end() if found else place
        self._word = (self._word or "") + text[place:end]
        if len(self._word) > MAX_NUMBER:
            self.failed = True
        elif end < len(text):
            word = self._word
            self.failed = not _SCALAR.fullmatch(word) and word not in _CONSTANTS
            if not self.failed:
                self._written.append(word if _is_readable(word) else f'"{word}"')
            self._word = None
            self._end_value()
        return end

    def _read_string(self, text: str, place: int) -> int:
        start = place
        found = _PLAIN.match(text, place)
        place = found.end() if found else place
        if place > start:
            self._write_half()
            self._written.append(_UNREADABLE.sub(_readable, text[start:place]))
        if place == len(text):
            return place
        if text[place] == "\\":
            self._escape = "\\"
            return place + 1
        self._write_half()
        self._written.append('"')
        self._in_string = False
        if self._expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect = _Expect.COLON
        else:
            self._end_value()
        return place + 1

    def _read_escape(self, text: str, place: int) -> int:
        allowed = _ESCAPED if self._escape == "\\" else _HEX
        if text[place] not in allowed:
            self.failed = True
            return place
        self._escape += text[place]
        if self._escape[1] != "u" or len(self._escape) == len("\\u0000"):
            self._write_escape(self._escape)
            self._escape = ""
        return place + 1

    def _write_escape(self, escape: str) -> None:
        code = int(escape[2:], 16) if escape[1] == "u" else 0
        if self._high and 0xDC00 <= code < 0xE000:
            self._written.append(self._high + escape)
            self._high = ""
            return
        self._write_half()
        if 0xD800 <= code < 0xDC00:
            self._high = escape
        else:
            self._written.append("\ufffd" if 0xDC00 <= code < 0xE000 else escape)

    def _write_half(self) -> None:
        """Write what stands for the first half of a surrogate pair without its second."""
        if self._high:
            self._written.append("\ufffd")
            self._high = ""


def _is_readable(word: str) -> bool:
    """Say whether a word is a value to others: true, false, null, or a finite number."""
    if word in _CONSTANTS:
        return False
    return word[0] in "tfn" or word.lstrip("-").isdigit() or math.isfinite(float(word))


def _readable(found: re.Match[str]) -> str:
    return json.dumps(found[0])[1:-1] if found[0] < " " else "\ufffd"
