"""The checkpoint's tokenizer and chat template, its stop tokens and its sampling defaults."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from neuron_minimax.checkpoint.kinds import CONFIG_NAME
from neuron_minimax.checkpoint.tokenizer_file import (
    GENERATION_NAME,
    GenerationFields,
    StopFields,
)
from neuron_minimax.checkpoint.writer import COMPANION_FILES, TOKENIZER_BYTES, token_numbers
from neuron_minimax.config import LARGEST
from neuron_minimax.errors import GenerationError, shown
from neuron_minimax.families import DEFAULT_FAMILY, FAMILIES, Family, family_of
from neuron_minimax.families.family import SamplingDefaults
from neuron_minimax.files import read_bytes, read_json, stamp
from neuron_minimax.generation import template
from neuron_minimax.generation.chat_formats import CHAT_FORMATS, ChatFormat
from neuron_minimax.generation.plain_text import ChatPrompt
from neuron_minimax.generation.sampling import GREEDY, SamplingParams
from neuron_minimax.limited import LimitedProcess, OverLimitError, SetupError

READ_SUFFIXES = (".json", ".jinja", ".txt", ".model")  # of what transformers may open
CONFIG_BYTES = 8 << 20
NO_LIMIT = 10**30  # tokens; the engine knows how long a prompt may be
PROBE = "a text"
ADVICE = "download it again"
FIELDS_OF: dict[str, type[StopFields] | type[GenerationFields]] = {
    GENERATION_NAME: GenerationFields,
    CONFIG_NAME: StopFields,
}
Fields = TypeVar("Fields", bound=StopFields | GenerationFields)


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """Text to tokens and back for one checkpoint.

    `stop_token_ids` end an answer and `pad_token_id` fills padding. `sampling` holds the
    checkpoint's defaults, `sampling_without_reasoning` those where the prompt has closed the
    reasoning. `chat_format` is the family's. `hidden_ids` are control tokens that are
    never shown as text (the tags of the chat format are shown).
    """

    hugging_face: Any
    chat_format: ChatFormat
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    sampling: SamplingParams
    sampling_without_reasoning: SamplingParams
    hidden_ids: frozenset[int]

    @classmethod
    def from_dir(cls, directory: str | Path) -> "TextTokenizer":
        """Load the tokenizer files of a checkpoint or compiled directory; no code from it is run.

        The chat format is that of the family which config.json names, MiniMax-M2's without one.
        Raises GenerationError when there are no tokenizer files, they cannot be read, they are of
        another family, or no stop token is known.
        """
        directory = Path(directory)
        tokenizer = load_hugging_face(directory)
        family = _family_of(directory)
        chat_format = CHAT_FORMATS[family.chat_format].for_template(str(tokenizer.chat_template))
        vocabulary = tokenizer.get_vocab()
        stops = read_stop_tokens(
            directory,
            len(tokenizer),
            vocabulary.get(chat_format.end_of_turn, tokenizer.eos_token_id),
        )
        if not stops:
            raise GenerationError(
                f"{directory}: no stop token is known; set eos_token_id in generation_config.json "
                f"({family.title}: {chat_format.end_of_turn_id})"
            )
        ends = [vocabulary[marker] for marker in chat_format.always_stops if marker in vocabulary]
        stops = tuple(dict.fromkeys([*stops, *ends]))
        shown = {vocabulary[marker] for marker in chat_format.tags if marker in vocabulary}
        turns = {vocabulary[each] for each in chat_format.turn_markers if each in vocabulary}
        return cls(
            hugging_face=tokenizer,
            chat_format=chat_format,
            stop_token_ids=stops,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            sampling=_sampling_defaults(family.sampling, directory),
            sampling_without_reasoning=_sampling_without_reasoning(family, directory),
            hidden_ids=frozenset(tokenizer.all_special_ids) - shown | turns | set(stops),
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, nothing added; spelled-out special tokens count as such, but
        for those that messages in a rendered chat have spelled.
        """
        return template.encode(self.hugging_face, text)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without the control tokens."""
        visible = [token for token in ids if token not in self.hidden_ids]
        return self.spell(visible)

    def spell(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, control tokens included."""
        return template.spell(self.hugging_face, ids)

    def token_text(self, token: int) -> str:
        """Return the spelling of one token, control tokens included (for lists of alternatives)."""
        if token not in self._texts:
            self._texts[token] = self.spell([token])
        return self._texts[token]

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character."""
        if token not in self._bytes:
            self._bytes[token] = self._spelled_bytes(token)
        return self._bytes[token]

    def _spelled_bytes(self, token: int) -> bytes:
        spelling = self.hugging_face.convert_ids_to_tokens(token)
        if spelling is None or token in self.hugging_face.added_tokens_decoder:
            return self.token_text(token).encode()
        table = _byte_of_character()
        if all(character in table for character in spelling):
            return bytes(table[character] for character in spelling)
        return self.token_text(token).encode()

    # Lists of alternatives name the same tokens again and again.
    @functools.cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    @functools.cached_property
    def _bytes(self) -> dict[int, bytes]:
        return {}

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, template.Scalar] | None = None,
    ) -> ChatPrompt:
        """Return the prompt for the next assistant turn, from the checkpoint's own chat template.

        `encode` makes special tokens of its markers alone, whatever the messages spell.
        `messages` and `tools` have OpenAI's form, except that arguments of tool calls are objects,
        not text. `arguments` are those of the template, such as `enable_thinking`; one that it
        lacks is refused by name. The template is a program of the checkpoint's authors: it runs in
        a process of its own. Raises GenerationError without a template, when it refuses the
        messages, and when it takes too much time or memory.
        """
        try:
            return self._renderer.call(
                template.render, list(messages), tools, arguments, self.chat_format.tags
            )
        except OverLimitError as error:
            raise GenerationError(f"the chat template does not end: {error}") from None
        except SetupError as error:
            raise GenerationError(
                f"the tokenizer cannot be made again from what it writes ({error}); {ADVICE}"
            ) from None

    def sampling_after(self, prompt: str) -> SamplingParams:
        """Return the checkpoint's defaults for an answer to a rendered prompt."""
        closed = self.chat_format.closes_reasoning(prompt)
        return self.sampling_without_reasoning if closed else self.sampling

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: the fields, not what is kept beside them, a process above all."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @functools.cached_property
    def _renderer(self) -> LimitedProcess:
        return template.renderer(self.hugging_face)


def load_hugging_face(directory: Path) -> Any:
    """Load the tokenizer files of a directory with transformers; no code from it is run.

    Raises GenerationError when there are none, or they cannot be read.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig

    if not (directory / "tokenizer.json").is_file():
        raise GenerationError(
            f"{directory} has no tokenizer.json; copy tokenizer.json, tokenizer_config.json "
            "and chat_template.jinja from the checkpoint"
        )
    _check_files(directory)
    # What transformers does not know it would warn of, without a need of more than its files.
    known = {} if _model_type(directory) in CONFIG_MAPPING else {"config": PretrainedConfig()}
    try:
        tokenizer = _loader(directory)(
            str(directory),
            trust_remote_code=False,
            local_files_only=True,
            model_max_length=NO_LIMIT,
            **_listed_tokens(directory),
            **known,
        )
        template.spell(tokenizer, template.encode(tokenizer, PROBE))  # some fail only then
    except (KeyboardInterrupt, SystemExit):
        raise
    # For a broken tokenizer.json tokenizers raises a bare one, or panics, which is no Exception
    except BaseException as error:
        raise GenerationError(f"the tokenizer in {directory} cannot be loaded: {error}") from None
    if not isinstance(tokenizer.model_max_length, int | float):
        raise GenerationError(
            f"{directory / 'tokenizer_config.json'}: model_max_length is "
            f"{tokenizer.model_max_length!r}; expected a number"
        )
    return tokenizer


def _settings(directory: Path) -> dict[str, Any]:
    """Return what tokenizer_config.json says. Raises GenerationError when it cannot be read."""
    path = directory / "tokenizer_config.json"
    try:
        return read_json(path, dict[str, Any], GenerationError, ADVICE, CONFIG_BYTES)
    except FileNotFoundError:
        return {}


def _loader(directory: Path) -> Callable[..., Any]:
    """Return what loads a tokenizer: by its class where the installed transformers has that, else
    (as of a tokenizer that a later version has saved) from tokenizer.json itself.
    """
    import transformers

    named = _settings(directory).get("tokenizer_class")
    known = not isinstance(named, str) or any(
        hasattr(transformers, name) for name in (named, f"{named}Fast")
    )
    if known:
        return transformers.AutoTokenizer.from_pretrained  # type: ignore[no-any-return]

    def load(*arguments: Any, **options: Any) -> Any:
        # It would warn that the file names another class, which is why it is called.
        before = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()
        try:
            return transformers.PreTrainedTokenizerFast.from_pretrained(*arguments, **options)
        finally:
            transformers.logging.set_verbosity(before)

    return load


def _listed_tokens(directory: Path) -> dict[str, Any]:
    """Return the special tokens that transformers 5 saves as a list under a name where version 4
    wants a mapping; both know the older name.
    """
    extra = _settings(directory).get("extra_special_tokens")
    if not isinstance(extra, list):
        return {}
    return {"extra_special_tokens": {}, "additional_special_tokens": extra}


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's spelling of bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def read_stop_tokens(
    directory: str | Path, vocab_size: int, fallback: int | None = None
) -> tuple[int, ...]:
    """Return the tokens that end an answer, from the first place that knows any.

    The places are generation_config.json, config.json, `fallback` (the tokenizer's end of turn),
    and the published end of turn of the family where the vocabulary has it. A token outside of the
    vocabulary (what small models inherit from the large one's config.json) is passed over: it
    cannot occur. Raises GenerationError when a file cannot be read, or holds something other than
    tokens.
    """
    for name, kind in FIELDS_OF.items():
        named = _read(Path(directory) / name, kind).eos_token_id
        stops = named if isinstance(named, tuple) else (named,)
        possible = tuple(stop for stop in stops if stop is not None and 0 <= stop < vocab_size)
        if possible:
            return possible
    if fallback is not None:
        return (fallback,)
    published = CHAT_FORMATS[_family_of(Path(directory)).chat_format].end_of_turn_id
    return (published,) if vocab_size > published else ()


def _read(path: Path, kind: type[Fields]) -> Fields:
    """Return what a file says, which says nothing where there is none."""
    try:
        return read_json(path, kind, GenerationError, ADVICE, CONFIG_BYTES)
    except FileNotFoundError:
        return kind()


def _check_files(directory: Path) -> None:
    """Refuse what transformers would wait for, or build more of than fits into memory.

    Raises GenerationError naming the file that is no regular one, too large or no JSON object.
    """
    for path in sorted([*directory.iterdir(), *directory.glob("additional_chat_templates/*")]):
        companion = path.name in COMPANION_FILES
        if path.suffix not in READ_SUFFIXES or (path.is_dir() and not companion):
            continue
        try:
            if not companion:
                stamp(path)
            elif path.suffix == ".json":
                read = read_json(path, dict[str, Any], GenerationError, ADVICE, TOKENIZER_BYTES)
                _check_numbers(path, read)
            else:
                read_bytes(path, TOKENIZER_BYTES)
        except FileNotFoundError:  # a link to nothing is as no file
            continue
        except OSError as error:
            raise GenerationError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None


def _check_numbers(path: Path, read: Mapping[str, Any]) -> None:
    """Refuse a token number for which the tokenizers library would make a table of gigabytes."""
    largest = max(token_numbers(read), default=0)
    if largest > LARGEST["vocab_size"]:
        raise GenerationError(
            f"{path} has a token with number {shown(largest)}; expected at most "
            f"{LARGEST['vocab_size']}; {ADVICE}"
        )


def _family_of(directory: Path) -> Family:
    """Return the family that config.json is of, MiniMax-M2 where a tokenizer lies alone.

    Raises GenerationError when config.json is of none that we know.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        return DEFAULT_FAMILY
    raw = read_json(path, dict[str, Any], GenerationError, ADVICE, CONFIG_BYTES)
    family = family_of(raw)
    named = raw.get("model_type")
    if family is None and named is not None:
        known = dict.fromkeys(each.model_type for each in FAMILIES.values())
        raise GenerationError(
            f"{path}: model_type is {shown(named)}; expected one of {', '.join(known)}: the chat "
            "formats of others are not known"
        )
    return family or DEFAULT_FAMILY


def _model_type(directory: Path) -> str:
    """Return what config.json calls its model, MiniMax-M2 without one, nothing where it says none.

    Raises GenerationError when config.json cannot be read.
    """
    path = directory / CONFIG_NAME
    if not path.exists():
        return DEFAULT_FAMILY.model_type
    named = read_json(path, dict[str, Any], GenerationError, ADVICE, CONFIG_BYTES).get("model_type")
    return named if isinstance(named, str) else ""


def _sampling_defaults(
    recommended: SamplingDefaults, directory: Path, passed_over: Mapping[str, Any] | None = None
) -> SamplingParams:
    """Return what generation_config.json says, else what the family's authors recommend.

    A value that `passed_over` has as well does not count.
    """
    path = directory / GENERATION_NAME
    generation = _read(path, GenerationFields)
    if generation.do_sample is False:
        return GREEDY
    counted = dict(generation.sampling.items() - (passed_over or {}).items())
    try:
        return SamplingParams(**{**asdict(recommended), **counted})
    except GenerationError as error:
        raise GenerationError(f"{path}: {error}") from None


def _sampling_without_reasoning(family: Family, directory: Path) -> SamplingParams:
    """Return the defaults of answers without reasoning, where the authors recommend others.

    generation_config.json has but one value for both: where it is the one recommended for
    reasoning, it is not meant for the others.
    """
    recommended = family.sampling_without_reasoning
    if recommended is None:
        return _sampling_defaults(family.sampling, directory)
    return _sampling_defaults(recommended, directory, passed_over=asdict(family.sampling))
