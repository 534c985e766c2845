"""The end of a JSON value (RFC 8259) in text that arrives in pieces."""

import re
from enum import Enum, auto

MAX_DEPTH = 64  # of objects and lists in one another; deeper ones count as malformed
MAX_NUMBER = 1024  # characters

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')  # within a string, up to what means something
_SPACE = re.compile(r"[ \t\n\r]*")
_WORD = re.compile(r"[-+.0-9A-Za-z]*")  # more than numbers and names hold: looked at when whole
_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?|true|false|null")
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
    what follows it.
    """

    def __init__(self) -> None:
        self.ended = False
        self.failed = False
        self._open: list[str] = []  # the closing brackets that are still to come
        self._expect = _Expect.VALUE
        self._in_string = False
        self._escape = ""  # as much as there is of an escape within a string
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

    def _read_structure(self, text: str, place: int) -> int:
        """Read white space and one character between strings and scalars."""
        space = _SPACE.match(text, place)
        place = space.end() if space else place
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
        return place + 1

    def _may_end(self) -> bool:
        return self._expect in (_Expect.VALUE_OR_END, _Expect.KEY_OR_END, _Expect.COMMA_OR_END)

    def _begin_value(self, character: str, place: int) -> int:
        """Begin an object, a list, a number or a name."""
        if character not in _CLOSING:
            self._word = ""
            return place
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
            self.failed = not _SCALAR.fullmatch(self._word)
            self._word = None
            self._end_value()
        return end

    def _read_string(self, text: str, place: int) -> int:
        found = _PLAIN.match(text, place)
        place = found.end() if found else place
        if place == len(text):
            return place
        if text[place] == "\\":
            self._escape = "\\"
        elif text[place] == '"':
            self._in_string = False
            if self._expect in (_Expect.KEY, _Expect.KEY_OR_END):
                self._expect = _Expect.COLON
            else:
                self._end_value()
        else:
            self.failed = True
            return place
        return place + 1

    def _read_escape(self, text: str, place: int) -> int:
        allowed = _ESCAPED if self._escape == "\\" else _HEX
        if text[place] not in allowed:
            self.failed = True
            return place
        escape = self._escape + text[place]
        whole = escape[1] != "u" or len(escape) == len("\\u0000")
        self._escape = "" if whole else escape
        return place + 1
