"""The checkpoint's chat template at work, within limits: templates are programs of somebody else.

Nothing here imports torch: these functions run in limited processes.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jinja2 import Environment, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser

from neuron_minimax.errors import GenerationError, shortened
from neuron_minimax.generation.plain_text import ChatPrompt, Marks, encode_plain
from neuron_minimax.limited import LimitedProcess, Limits, Setup, itself

# Rendering takes milliseconds; only a template that does not end comes near.
LIMITS = Limits(cpu_seconds=10, memory=512 << 20)
# What says whether the model shall reason, by the templates' own names: Qwen's and MiniMind's.
THINKING_SWITCHES = ("enable_thinking", "open_thinking")
# What a template is given in any case.
GIVEN = ("messages", "tools", "documents", "add_generation_prompt")
FUNCTIONS = ("raise_exception", "strftime_now")
# What a message has of the assistant's own words, which may have tags as the model wrote them.
OWN_WORDS = ("content", "reasoning_content")
# Texts by which one sees what a template does with a message.
PROBES = ("first-probe", "second-probe")
Scalar = str | int | float | bool | None


class TemplateArgumentError(GenerationError):
    """An argument that the chat template does not have; `name` is what was asked for."""

    name = ""


def render(
    hugging_face: Any,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None,
    arguments: Mapping[str, Scalar] | None = None,
    tags: Sequence[str] = (),
) -> ChatPrompt:
    """Return the prompt for the next assistant turn, in which the template's own markers alone are
    special tokens; what the assistant itself has said may spell its `tags`.

    `arguments` are the template's own: see known_arguments. Raises GenerationError without a
    template, or when it refuses the messages, TemplateArgumentError for an argument it lacks.
    """
    if not hugging_face.chat_template:
        raise GenerationError(
            "the checkpoint has no chat template; add its chat_template.jinja or use plain text"
        )
    try:
        named = _by_own_names(hugging_face, tools, arguments) if arguments else {}
        marks = Marks(hugging_face)
        rendered = hugging_face.apply_chat_template(
            [_marked(message, marks, tags) for message in messages],
            tools=marks.marked(list(tools)) if tools else None,
            add_generation_prompt=True,
            tokenize=False,
            **marks.marked(named),
        )
        return marks.prompt(rendered)
    except (MemoryError, TemplateArgumentError):
        raise
    except Exception as error:  # whatever Jinja or the template itself raises
        reason = shortened(str(error))  # it may quote the messages
        raise GenerationError(f"the chat template does not take these messages: {reason}") from None


def _marked(message: Mapping[str, Any], marks: Marks, tags: Sequence[str]) -> dict[str, Any]:
    """Return a message with its texts marked."""
    said = OWN_WORDS if message.get("role") == "assistant" else ()
    return {key: marks.marked(value, tags if key in said else ()) for key, value in message.items()}


@functools.lru_cache(maxsize=4)  # a tokenizer's template stays as it is
def writes_late_system(hugging_face: Any) -> bool:
    """Say whether the template writes a system message where it stands in the conversation."""
    probe = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    late = [{"role": "system", "content": PROBES[0]}, {"role": "user", "content": PROBES[1]}]
    written = _probe(hugging_face, [*probe, *late])
    return "assistant" in written.partition(PROBES[0])[0] and PROBES[0] in written


@functools.lru_cache(maxsize=4)
def writes_results_apart(hugging_face: Any) -> bool:
    """Say whether the template writes each text of a tool's list of them as a result of its own."""
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    texts = [{"type": "text", "text": probe} for probe in PROBES]
    written = _probe(
        hugging_face,
        [
            {"role": "user", "content": "user"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": texts},
        ],
    )
    between = written.partition(PROBES[0])[2].partition(PROBES[1])[0]
    printed = written.partition(PROBES[0])[0][-1:] in ("'", '"')  # as it is, not written
    return bool(between.strip()) and not printed


def _probe(hugging_face: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return render(hugging_face, messages, None)
    except GenerationError:
        return ""


def known_arguments(
    hugging_face: Any, tools: Sequence[Mapping[str, Any]] | None = None
) -> frozenset[str]:
    """Return the names that the chat template reads beside what every template is given.

    A template that cannot be read has none: rendering tells what is wrong with it.
    """
    source = hugging_face.get_chat_template(tools=list(tools) if tools else None)
    return _read_names(source) - {*GIVEN, *FUNCTIONS, *hugging_face.special_tokens_map}


def _by_own_names(
    hugging_face: Any,
    tools: Sequence[Mapping[str, Any]] | None,
    arguments: Mapping[str, Scalar],
) -> dict[str, Scalar]:
    """Return arguments under the template's names: a switch for thinking has several.

    Raises TemplateArgumentError for the first one that it lacks.
    """
    known = known_arguments(hugging_face, tools)
    named: dict[str, Scalar] = {}
    for asked, value in arguments.items():
        names = (asked, *THINKING_SWITCHES) if asked in THINKING_SWITCHES else (asked,)
        name = next((each for each in names if each in known), None)
        if name is None:
            error = TemplateArgumentError(_refusal(asked, known))
            error.name = asked
            raise error
        named[name] = value
    return named


def _refusal(name: str, known: frozenset[str]) -> str:
    if name in THINKING_SWITCHES:
        return (
            f"{shortened(name)}: the chat template of this model has no switch for thinking; it "
            "alone decides whether the model reasons: leave the switch out"
        )
    return (
        f"{shortened(name)} is no argument of this model's chat template; it has "
        f"{', '.join(sorted(known)) or 'none'}"
    )


@functools.lru_cache(maxsize=4)
def _read_names(source: str) -> frozenset[str]:
    """Return the names that a template reads from outside.

    One that it also sets itself is meant to be given only where it asks whether it is defined.
    """
    environment = Environment(extensions=[loopcontrols, _GenerationTag], autoescape=True)
    try:
        tree = environment.parse(source)
        read = meta.find_undeclared_variables(tree)
    except (TemplateError, RecursionError):
        return frozenset()
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = {
        test.node.name
        for test in tree.find_all(nodes.Test)
        if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
    }
    return frozenset(read - environment.globals.keys() - (own - asked))


class _GenerationTag(Extension):
    """The tag of transformers around what an assistant says; here only what is in it counts."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def encode(hugging_face: Any, text: str) -> list[int]:
    """Return the tokens of `text`, nothing added; spelled-out special tokens count as such, but for
    those that messages in a chat's prompt have spelled.

    Raises GenerationError for half a surrogate pair, as which Python reads bytes that are no UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"the text is no valid Unicode at character {error.start + 1} "
            f"({text[error.start]!r}); expected text in UTF-8"
        ) from None
    pieces = text.pieces if isinstance(text, ChatPrompt) else ((text, False),)
    return [
        token
        for piece, plain in pieces
        for token in (
            encode_plain(hugging_face, piece)
            if plain
            else hugging_face.encode(piece, add_special_tokens=False)
        )
    ]


def spell(hugging_face: Any, ids: Iterable[int]) -> str:
    """Return the text of `ids`, control tokens included."""
    return hugging_face.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def renderer(hugging_face: Any) -> LimitedProcess:
    """Return a process that renders with this tokenizer's template."""
    setup = Setup(itself, hugging_face, preload=[type(hugging_face).__module__])
    return LimitedProcess(setup, LIMITS)
