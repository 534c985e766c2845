"""The formats in which families write an assistant's turn, found by name.

A format reads a model's output as it streams, and says how a tool call is written.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from neuron_minimax.generation.chat_formats.hermes import (
    MiniMindFormat,
    Qwen2Format,
    Qwen3Format,
)
from neuron_minimax.generation.chat_formats.minimax_m2 import MiniMaxM2Format
from neuron_minimax.generation.chat_formats.qwen3_coder import Qwen3CoderFormat
from neuron_minimax.generation.events import Event

__all__ = ["CHAT_FORMATS", "ChatFormat", "OutputParser"]


class OutputParser(Protocol):
    """Turns the pieces of one turn's text into events, the same for any split of the text."""

    def feed(self, text: str) -> list[Event]:
        """Return the events that `text` completes."""

    def finish(self) -> list[Event]:
        """Return the events left when the output has ended."""


class ChatFormat(Protocol):
    """One format: its markers, its parser, and its grammar of tool calls.

    `turn_markers` are control tokens of the chat template, never shown as text; `end_of_turn`, one
    of them, ends an answer, and `end_of_turn_id` is its number in the published vocabulary.
    `always_stops` end an answer whatever the checkpoint's files say, where it has them as tokens.
    `tags` are tokens that mark parts of the output and are shown as text; `reasoning_tags` open and
    close the reasoning. With `model_opens_reasoning` the model may open it itself, first of all,
    where the prompt does neither. `calls_tag` opens calls, which with `calls_in_reasoning` may
    stand there as well; `call_endings` close what calls have open, in any order.
    """

    turn_markers: tuple[str, ...]
    end_of_turn: str
    end_of_turn_id: int
    always_stops: tuple[str, ...]
    tags: tuple[str, ...]
    reasoning_tags: tuple[str, str]
    model_opens_reasoning: bool
    calls_tag: str
    calls_in_reasoning: bool
    call_endings: tuple[str, ...]

    def for_template(self, source: str) -> "ChatFormat":
        """Return the format of a checkpoint by its chat template: families may have several."""

    def opens_reasoning(self, prompt: str) -> bool:
        """Say whether a rendered prompt ends inside the reasoning."""

    def closes_reasoning(self, prompt: str) -> bool:
        """Say whether a rendered prompt has closed the reasoning: there will be none."""

    def parser(
        self, *, in_reasoning: bool, tools: Iterable[Mapping[str, Any]] | None
    ) -> OutputParser:
        """Return a parser of one output; `tools` in OpenAI's form type the arguments of calls.

        Without tools (None) there are no calls: their tags are text.
        """

    def call_grammar(
        self,
        tools: Sequence[Mapping[str, Any]],
        *,
        several: bool,
        literal: Callable[[str], str],
        json_rule: Callable[[Mapping[str, Any]], str],
    ) -> list[str]:
        """Return the rules (llguidance's Lark dialect) of a turn that calls at least one tool.

        The first two rules are `calls`, one call, or with `several` one or more, and `called`, what
        follows the tag that opens them. `literal` spells a tag in the grammar, `json_rule` a value
        of a JSON schema.
        """


CHAT_FORMATS: dict[str, ChatFormat] = {
    "minimax_m2": MiniMaxM2Format(),
    "qwen3": Qwen3Format(),
    "qwen3_coder": Qwen3CoderFormat(),
    "qwen2": Qwen2Format(),
    "minimind": MiniMindFormat(),
}
