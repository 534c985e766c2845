"""Grammars for output that has to follow one, as llguidance takes them: JSON of a schema, or a tool
call.

Nothing here imports torch: grammars are made and tried in a limited process, before the same
library compiles them in ours.
"""

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from neuron_minimax.errors import GenerationError, shortened
from neuron_minimax.generation.chat_formats import ChatFormat

# One spelling of white space: a weak model can otherwise indent for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
AFTER_REASONING = "\\n{0,2}"  # what may still come behind its end
WISHED = {"tools": "the tools' parameters", "response_format": "the JSON schema"}
# The library's own limits, where its defaults allow one token more than some milliseconds, or one
# grammar hundreds of megabytes. Its messages would otherwise quote the whole state.
PARSER_LIMITS = LLParserLimits(
    step_lexer_fuel=100_000, step_max_items=25_000, max_lexer_states=50_000, verbose_errors=False
)
POSITION = re.compile(r"^at \d+\(\d+\): ")
LISTING = re.compile(r"\n +\d+ \| ")
REASON = 300  # characters


class GrammarError(GenerationError):
    """A grammar that cannot be enforced, or takes too much to follow; `param` asked for it."""

    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What a request wants: JSON of `schema`, a call of one or `several` of `tools`, or one of the
    two. The prompt has left the reasoning `open`, or the model may open it itself, or not.
    """

    schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    several: bool = True
    reasoning: Literal["open", "possible", "none"] = "none"

    @property
    def asked_by(self) -> str:
        """The field of the request that is named when it cannot be enforced."""
        return "response_format" if self.schema is not None else "tools"


class Grammars:
    """Makes grammars for one tokenizer; `vocab_size` is the width of the model's logits."""

    def __init__(
        self, hugging_face: Any, chat_format: ChatFormat, stops: Sequence[int], vocab_size: int
    ) -> None:
        self._tokenizer = from_tokenizer(hugging_face, n_vocab=vocab_size, eos_token=list(stops))
        self._format = chat_format
        self._vocabulary = hugging_face.get_vocab()

    def make(self, wish: Wish) -> str:
        """Return the grammar of a whole output that gives what is wished for.

        Reasoning may come first, and where the format has calls within it, they follow the grammar
        as well. Every call gives the required arguments. Raises GrammarError when a schema cannot
        be enforced.
        """
        rules = []
        answers = []
        if wish.tools:
            answers.append("calls")
            rules += self._format.call_grammar(
                wish.tools, several=wish.several, literal=self._literal, json_rule=_json_rule
            )
        if wish.schema is not None:
            answers.append("value")
            rules.append(f"value: {_json_rule(wish.schema)}")
        rules.append(f"answer: {' | '.join(answers)}")
        start = {
            "none": "answer",
            "possible": f"answer | {self._literal(self._format.reasoning_tags[0])} thought",
            "open": "thought",
        }[wish.reasoning]
        if wish.reasoning != "none":
            rules += self._reasoning(calls=bool(wish.tools) and self._format.calls_in_reasoning)
        return self._checked("\n".join([f"start: {start}", *rules]), WISHED[wish.asked_by])

    def _reasoning(self, *, calls: bool) -> list[str]:
        """Return the rules of `thought`: reasoning up to its end and the answer behind it, or up to
        calls in it.
        """
        ways = {self._format.reasoning_tags[1]: f"/{AFTER_REASONING}/ answer"}
        if calls:
            ways[self._format.calls_tag] = "called thought?"
        tags = "|".join(tag.replace("/", r"\/") for tag in ways)
        rules = [f"UNTIL_TAG: /(?s:.*)/ & ~/(?s:.*)({tags})(?s:.*)/"]
        alternatives = []
        for number, (tag, rest) in enumerate(ways.items()):
            until = f"UNTIL_TAG {tag}"
            if self._literal(tag) != tag:
                until = f"until_{number}"
                rules.append(f"{until}[suffix={json.dumps(tag)}]: /(?s:.*)/")
            alternatives.append(f"{until} {rest}")
        return [*rules, f"thought: {' | '.join(alternatives)}"]

    def matcher(self, grammar: str) -> LLMatcher:
        """Return a fresh state of a grammar made here."""
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=PARSER_LIMITS)

    def _literal(self, marker: str) -> str:
        """Spell a tag for the grammar: as a special token where it is one, else as text."""
        token = self._vocabulary.get(marker)
        return (
            marker
            if token is not None and self._tokenizer.is_special_token(token)
            else json.dumps(marker)
        )

    def _checked(self, grammar: str, what: str) -> str:
        """Return a grammar that compiles and allows a first token."""
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer, limits=PARSER_LIMITS)
        if not problem:
            matcher = self.matcher(grammar)
            matcher.compute_bitmask()
            problem = matcher.get_error()
        if problem:
            # The library adds where in our grammar that is, before the reason and below it.
            reason = LISTING.split(POSITION.sub("", problem), maxsplit=1)[0]
            reason = shortened(" ".join(reason.split()), REASON)
            raise GrammarError(f"{what} cannot be enforced: {reason}")
        return grammar


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def make_grammar(grammars: Grammars, pickled: bytes) -> str:
    """Return the grammar of a pickled Wish. Raises GrammarError when it cannot be enforced."""
    wish: Wish = pickle.loads(pickled)
    try:
        return grammars.make(wish)
    except GrammarError as error:
        error.param = wish.asked_by
        raise
