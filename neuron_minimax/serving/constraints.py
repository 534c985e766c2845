"""Output that has to follow a grammar, run by llguidance: JSON of a schema, or a tool call."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from llguidance import LLMatcher
from llguidance.hf import from_tokenizer

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.tokenizer import TextTokenizer

ANY_OBJECT = {"type": "object"}
# One spelling of white space: a weak model can otherwise indent for ever.
JSON_STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
START = "start: /\\n{0,2}/ "  # what may still come after </think>


class Constraint:
    """The grammar's state for one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        """Return logits [V] with -inf for every token that the grammar does not allow now."""
        bias = torch.frombuffer(bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8)
        return logits.masked_fill(bias == 0, -torch.inf)

    def advance(self, token: int) -> None:
        """Take the chosen token. Raises GenerationError when the grammar library gives up."""
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            raise GenerationError(
                f"the output cannot follow its grammar: {self._matcher.get_error()}"
            )


class Grammars:
    """Makes constraints for one tokenizer; `vocab_size` is the width of the model's logits."""

    def __init__(self, tokenizer: TextTokenizer, vocab_size: int) -> None:
        stops = list(tokenizer.stop_token_ids)
        self._tokenizer = from_tokenizer(
            tokenizer.hugging_face, n_vocab=vocab_size, eos_token=stops
        )
        self._format = tokenizer.chat_format
        self._vocabulary = tokenizer.hugging_face.get_vocab()

    def json(self, schema: Mapping[str, Any]) -> str:
        """Return the grammar of one JSON value of `schema`.

        Raises GenerationError when the schema cannot be enforced.
        """
        return self._checked(START + "value\nvalue: " + _json_rule(schema), "the JSON schema")

    def tool_calls(self, tools: Sequence[Mapping[str, Any]], several: bool = True) -> str:
        """Return the grammar of a turn that calls at least one of `tools` (OpenAI's form).

        Every call gives the required arguments. Raises GenerationError when a tool's schema cannot
        be enforced.
        """
        rules = self._format.call_grammar(
            tools, several=several, literal=self._literal, json_rule=_json_rule
        )
        return self._checked("\n".join([START + "calls", *rules]), "the tools' parameters")

    def constraint(self, grammar: str) -> Constraint:
        """Return a fresh state of a grammar made here."""
        return Constraint(LLMatcher(self._tokenizer, grammar, log_level=0))

    def _literal(self, marker: str) -> str:
        """Spell a tag for the grammar: as a special token where it is one, else as text."""
        token = self._vocabulary.get(marker)
        return (
            marker
            if token is not None and self._tokenizer.is_special_token(token)
            else json.dumps(marker)
        )

    def _checked(self, grammar: str, what: str) -> str:
        problem = LLMatcher.validate_grammar(grammar, self._tokenizer)
        if problem:
            reason = problem.splitlines()[0].partition(": ")[2] or problem.splitlines()[0]
            raise GenerationError(f"{what} cannot be enforced: {reason}")
        return grammar


def _json_rule(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": JSON_STYLE})
