"""What kind of text a token is, by its characters: tags, digits, code, punctuation, and the writing
systems.
"""

import re
import unicodedata

TAG = re.compile(r"\s*(\]~|\[e~\[|</?[\w:]+>?|<\||\]<)")
CODE = re.compile(r"[{}()\[\]<>=+*/\\|&^%$#@_;`~]|\w\.\w|[a-z][A-Z]|::|->")
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
CLASSES = ("tag", "digits", "code", "latin", "cjk", "other script", "punctuation", "space", "other")


def classify(text: str) -> str:
    """One of CLASSES for the spelling of a token; a part of a character is `other`."""
    stripped = text.strip()
    if not stripped:
        return "space" if text else "other"
    if TAG.match(text):
        return "tag"
    if any(character.isdigit() for character in stripped) and not any(map(str.isalpha, stripped)):
        return "digits"
    if CODE.search(stripped):
        return "code"
    letters = [character for character in stripped if character.isalpha()]
    if letters:
        return _script(letters[0])
    marks = all(unicodedata.category(character)[0] in "PS" for character in stripped)
    return "punctuation" if marks and "\ufffd" not in stripped else "other"


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return (
        "latin" if name.startswith("LATIN") else "cjk" if name.startswith(CJK) else "other script"
    )
