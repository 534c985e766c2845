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
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from llguidance.hf import from_tokenizer

from neuron_minimax.errors import GenerationError, shortened
from neuron_minimax.generation.chat_formats import ChatFormat

# One spelling of white space: a weak model can otherwise indent for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
START = "start: "
AFTER_REASONING = "/\n{0,2}/ "  # what may still come behind its end
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
    """What a request wants: JSON of `schema`, or a call of one or `several` of `tools`.

    The answer may come `after_reasoning`, or begins at once.
    """

    schema: Mapping[str, Any] | None = None
    tools: Sequence[Mapping[str, Any]] = ()
    several: bool = True
    after_reasoning: bool = True


class Grammars:
    """Makes grammars for one tokenizer; `vocab_size` is the width of the model's logits."""

    def __init__(
        self, hugging_face: Any, chat_format: ChatFormat, stops: Sequence[int], vocab_size: int
    ) -> None:
        self._tokenizer = from_tokenizer(hugging_face, n_vocab=vocab_size, eos_token=list(stops))
        self._format = chat_format
        self._vocabulary = hugging_face.get_vocab()

    def json(self, schema: Mapping[str, Any], *, after_reasoning: bool = True) -> str:
        """Return the grammar of one JSON value of `schema`.

        Raises GrammarError when the schema cannot be enforced.
        """
        start = _start(after_reasoning)
        return self._checked(f"{start}value\nvalue: {_json_rule(schema)}", "the JSON schema")

    def tool_calls(
        self,
        tools: Sequence[Mapping[str, Any]],
        several: bool = True,
        *,
        after_reasoning: bool = True,
    ) -> str:
        """Return the grammar of a turn that calls at least one of `tools` (OpenAI's form).

        Every call gives the required arguments. Raises GrammarError when a tool's schema cannot
        be enforced.
        """
        rules = self._format.call_grammar(
            tools, several=several, literal=self._literal, json_rule=_json_rule
        )
        start = _start(after_reasoning)
        return self._checked("\n".join([start + "calls", *rules]), "the tools' parameters")

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


def _start(after_reasoning: bool) -> str:
    return START + AFTER_REASONING if after_reasoning else START


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})


def make_grammar(grammars: Grammars, pickled: bytes) -> str:
    """Return the grammar of a pickled Wish. Raises GrammarError when it cannot be enforced."""
    wish: Wish = pickle.loads(pickled)
    try:
        if wish.schema is not None:
            return grammars.json(wish.schema, after_reasoning=wish.after_reasoning)
        return grammars.tool_calls(wish.tools, wish.several, after_reasoning=wish.after_reasoning)
    except GrammarError as error:
        error.param = "tools" if wish.schema is None else "response_format"
        raise
