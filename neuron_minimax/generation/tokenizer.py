"""The checkpoint's tokenizer and chat template, its stop tokens and its sampling defaults."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neuron_minimax.errors import GenerationError
from neuron_minimax.families import DEFAULT_FAMILY, FAMILIES, Family
from neuron_minimax.generation.chat_formats import CHAT_FORMATS, ChatFormat
from neuron_minimax.generation.sampling import GREEDY, SamplingParams


@dataclass(frozen=True, kw_only=True)
class TextTokenizer:
    """Text to tokens and back for one checkpoint.

    `stop_token_ids` end an answer and `pad_token_id` fills padding. `sampling` holds the
    checkpoint's defaults. `chat_format` is the family's. `hidden_ids` are control tokens that are
    never shown as text (the tags of the chat format are shown).
    """

    hugging_face: Any
    chat_format: ChatFormat
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    sampling: SamplingParams
    hidden_ids: frozenset[int]

    @classmethod
    def from_dir(cls, directory: str | Path) -> "TextTokenizer":
        """Load the tokenizer files of a checkpoint or compiled directory; no code from it is run.

        The chat format is that of the family which config.json names, MiniMax-M2's without one.
        Raises GenerationError when there are no tokenizer files, they cannot be read, or no stop
        token is known.
        """
        from transformers import AutoTokenizer

        directory = Path(directory)
        if not (directory / "tokenizer.json").is_file():
            raise GenerationError(
                f"{directory} has no tokenizer.json; copy tokenizer.json, tokenizer_config.json "
                "and chat_template.jinja from the checkpoint"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # tokenizers raises a bare one for a broken tokenizer.json
            raise GenerationError(
                f"the tokenizer in {directory} cannot be loaded: {error}"
            ) from None
        family = _family_of(directory)
        chat_format = CHAT_FORMATS[family.chat_format]
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
        shown = {vocabulary[marker] for marker in chat_format.tags if marker in vocabulary}
        return cls(
            hugging_face=tokenizer,
            chat_format=chat_format,
            stop_token_ids=stops,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0],
            sampling=_sampling_defaults(family, _read_json(directory / "generation_config.json")),
            hidden_ids=frozenset(tokenizer.all_special_ids) - shown | set(stops),
        )

    def encode(self, text: str) -> list[int]:
        """Return the tokens of `text`, nothing added; spelled-out special tokens count as such."""
        return self.hugging_face.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without the control tokens."""
        visible = [token for token in ids if token not in self.hidden_ids]
        return self.spell(visible)

    def spell(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, control tokens included."""
        return self.hugging_face.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def token_text(self, token: int) -> str:
        """Return the spelling of one token, control tokens included (for lists of alternatives)."""
        return self.spell([token])

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character."""
        spelling = self.hugging_face.convert_ids_to_tokens(token)
        if spelling is None or token in self.hugging_face.added_tokens_decoder:
            return self.token_text(token).encode()
        table = _byte_of_character()
        if all(character in table for character in spelling):
            return bytes(table[character] for character in spelling)
        return self.token_text(token).encode()

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the prompt for the next assistant turn, from the checkpoint's own chat template.

        `messages` and `tools` have OpenAI's form, except that arguments of tool calls are objects,
        not text. Raises GenerationError without a template, or when it refuses the messages.
        """
        if not self.hugging_face.chat_template:
            raise GenerationError(
                "the checkpoint has no chat template; add its chat_template.jinja or use plain text"
            )
        try:
            return self.hugging_face.apply_chat_template(
                list(messages),
                tools=list(tools) if tools else None,
                add_generation_prompt=True,
                tokenize=False,
            )
        except Exception as error:  # whatever Jinja or the template itself raises
            raise GenerationError(
                f"the chat template does not take these messages: {error}"
            ) from None


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
    for name in ("generation_config.json", "config.json"):
        stops = _read_json(Path(directory) / name).get("eos_token_id")
        if not isinstance(stops, list):
            stops = [] if stops is None else [stops]
        bad = next(
            (stop for stop in stops if not isinstance(stop, int) or isinstance(stop, bool)), None
        )
        if bad is not None:
            raise GenerationError(
                f"{Path(directory) / name}: eos_token_id {bad!r} is no token; expected an integer"
            )
        possible = tuple(stop for stop in stops if 0 <= stop < vocab_size)
        if possible:
            return possible
    if fallback is not None:
        return (fallback,)
    published = CHAT_FORMATS[_family_of(Path(directory)).chat_format].end_of_turn_id
    return (published,) if vocab_size > published else ()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise GenerationError(
            f"{path} cannot be read as JSON ({error}); download it again"
        ) from None
    if not isinstance(contents, dict):
        raise GenerationError(f"{path} holds a {type(contents).__name__}; expected an object")
    return contents


def _family_of(directory: Path) -> Family:
    """Return the family that config.json names, MiniMax-M2 where it names none we know."""
    return FAMILIES.get(
        str(_read_json(directory / "config.json").get("model_type")), DEFAULT_FAMILY
    )


def _sampling_defaults(family: Family, generation: Mapping[str, Any]) -> SamplingParams:
    """Return what generation_config.json says, else what the family's authors recommend."""
    if generation.get("do_sample") is False:
        return GREEDY
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    given = {name: generation[name] for name in names if generation.get(name) is not None}
    return SamplingParams(**{**asdict(family.sampling), **given})
