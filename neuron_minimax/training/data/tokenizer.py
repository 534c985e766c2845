"""Byte-level BPE tokenizers in the chat format of a family: trained, written and read."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from neuron_minimax.checkpoint.writer import make_directory, replacing, require_place
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import GenerationError, TrainingError, counted, shown
from neuron_minimax.families import FAMILIES
from neuron_minimax.files import read_bytes
from neuron_minimax.generation.chat_formats import CHAT_FORMATS, minimax_m2, turn
from neuron_minimax.generation.tokenizer import load_hugging_face
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.training.data.conversations import demo_conversation
from neuron_minimax.training.data.sources import Texts
from neuron_minimax.training.data.world import SCHEMAS, WORDS

BYTES = 256
# A pair of tokens that is seen once makes no token: it would be a token of one text.
LEAST_SEEN = 2
CORPUS_VOCAB_SIZE = 2048  # of the project's own corpus
DEFAULT_VOCAB_SIZE = 6400  # MiniMind's
LARGEST_VOCAB_SIZE = 1 << 20
TEMPLATE_NAME = "chat_template.jinja"
HERMES_CONTROL = (turn.END_OF_TEXT, turn.ROLE, turn.END_OF_TURN)


@dataclass(frozen=True, kw_only=True)
class TokenizerStyle:
    """What a tokenizer has of its chat format: control tokens in the order of their numbers, which
    are the first of all or follow the learned ones; tags, which are shown as text; a template.

    `roles` are the tokens that tokenizer_config.json names.
    """

    chat_format: str
    control: tuple[str, ...]
    control_first: bool
    roles: Mapping[str, str]

    @property
    def tags(self) -> tuple[str, ...]:
        return CHAT_FORMATS[self.chat_format].tags

    @property
    def template(self) -> str:
        """The chat template, a Jinja program."""
        if self.chat_format == "minimax_m2":
            return (DEMO / TEMPLATE_NAME).read_text(encoding="utf-8")
        text = (
            files("neuron_minimax.training.data")
            .joinpath("hermes.jinja")
            .read_text(encoding="utf-8")
        )
        return f"{{%- set style = '{self.chat_format}' -%}}\n{text}"


def _hermes(chat_format: str, **roles: str) -> TokenizerStyle:
    named = {"eos_token": turn.END_OF_TURN, "pad_token": turn.END_OF_TEXT, **roles}
    return TokenizerStyle(
        chat_format=chat_format, control=HERMES_CONTROL, control_first=True, roles=named
    )


# By chat format. MiniMind publishes its control tokens under these numbers, MiniMax as the last.
STYLES: Mapping[str, TokenizerStyle] = {
    "minimax_m2": TokenizerStyle(
        chat_format="minimax_m2",
        control=(minimax_m2.BEGIN_OF_TEXT, minimax_m2.ROLE, minimax_m2.END_OF_TURN),
        control_first=False,
        roles={"bos_token": minimax_m2.BEGIN_OF_TEXT, "eos_token": minimax_m2.END_OF_TURN},
    ),
    "qwen3": _hermes("qwen3"),
    "qwen2": _hermes("qwen2"),
    "minimind": _hermes("minimind", bos_token=turn.ROLE),
}


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, style: TokenizerStyle, min_frequency: int = 0
) -> Tokenizer:
    """Train byte-level BPE of at most `vocab_size` tokens, control tokens and tags among them.

    Two tokens are merged that stand beside each other at least `min_frequency` times. Digits are
    tokens of their own. Nothing is normalized: every text comes back as it was.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [AddedToken(token, special=True) for token in style.control]
    first = control if style.control_first else []
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(control) + len(first) - len(style.tags),
        min_frequency=min_frequency,
        special_tokens=first,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(
        [AddedToken(token, special=False, normalized=False) for token in style.tags]
    )
    return tokenizer


def smallest_vocabulary(style: TokenizerStyle) -> int:
    """Return how many tokens there are before any is learned."""
    return BYTES + len(style.control) + len(style.tags)


def tokenizer_files(tokenizer: Tokenizer, style: TokenizerStyle) -> dict[str, bytes]:
    """Return the files of a tokenizer as transformers reads them, and the stop token's number in
    generation_config.json, which goes before a config.json of other numbers.
    """
    roles = dict(style.roles)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **roles,
        "additional_special_tokens": [t for t in style.control if t not in roles.values()],
        "clean_up_tokenization_spaces": False,
    }
    numbers = {
        name.replace("_token", "_token_id"): tokenizer.token_to_id(token)
        for name, token in roles.items()
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": _as_json(config),
        TEMPLATE_NAME: style.template.encode(),
        "generation_config.json": _as_json(numbers),
    }


def write_files(contents: Mapping[str, bytes], directory: Path) -> None:
    """Write files, each under its final name only when it is whole. Raises OSError."""
    make_directory(directory)
    for name, data in contents.items():
        with replacing(directory / name) as file:
            file.write(data)


def _as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class TokenizerReport(Rendered):
    """A tokenizer that was made, or was there already. `nbytes` and `ids` are of some texts."""

    output: Path
    family: str
    tokens: int
    texts: int
    nbytes: int
    ids: int
    was_there: bool = False

    def render(self) -> str:
        done = "is up to date" if self.was_there else "written"
        return (
            f"{self.output} {done}: {self.tokens:,} tokens from {counted(self.texts, 'text')}, "
            f"{self.nbytes / max(1, self.ids):.2f} bytes a token, in the chat format of "
            f"{self.family}; to train with it: neuron-minimax train OUT --tokenizer {self.output}"
        )


def make_tokenizer(
    output: Path, data: Sequence[Path], family: str, vocab_size: int | None = None
) -> TokenizerReport:
    """Train byte-level BPE of exactly `vocab_size` tokens from files of rows (.jsonl) or of lines
    of text, and write tokenizer.json, tokenizer_config.json, chat_template.jinja and
    generation_config.json. Without files it is trained from the project's corpus (corpus.py).

    The same texts give the same bytes; a directory that holds them is up to date. Raises
    TrainingError when the family is unknown, a file cannot be read, the files are too small for the
    vocabulary, or the directory holds another tokenizer; OSError when it cannot be written.
    """
    if family not in FAMILIES:
        raise TrainingError(
            f"there is no family {family!r}; expected {', '.join(FAMILIES)}", usage=True
        )
    style = STYLES[FAMILIES[family].chat_format]
    size = vocab_size or (DEFAULT_VOCAB_SIZE if data else CORPUS_VOCAB_SIZE)
    least = smallest_vocabulary(style)
    if not least < size <= LARGEST_VOCAB_SIZE:
        raise TrainingError(
            f"the vocabulary's size is {size}; expected more than {least}, the bytes and the "
            f"special tokens of {family}, and at most {LARGEST_VOCAB_SIZE}",
            usage=True,
        )
    require_place(output, TrainingError)
    texts = Texts(data)
    tokenizer = build_tokenizer(texts, size, style, LEAST_SEEN)
    found = tokenizer.get_vocab_size()
    if found < size:
        smaller = f", or --vocab-size {found}" if found > least else ""
        raise TrainingError(
            f"{texts.name} has enough for {found} tokens, not for {size}: no other tokens stand "
            f"beside each other twice; expected more text{smaller}"
        )
    nbytes, ids = _checked(tokenizer, texts.seen)
    contents = tokenizer_files(tokenizer, style)
    was_there = _is_there(output, contents)
    if not was_there:
        write_files(contents, output)
    return TokenizerReport(
        output=output,
        family=family,
        tokens=found,
        texts=texts.count,
        nbytes=nbytes,
        ids=ids,
        was_there=was_there,
    )


def _checked(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, int]:
    """Return how many bytes and tokens the texts have, having read each back from its tokens."""
    nbytes = 0
    ids = 0
    for text in texts:
        encoded = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(encoded, skip_special_tokens=False) == text
        nbytes += len(text.encode())
        ids += len(encoded)
    return nbytes, ids


def _is_there(directory: Path, contents: dict[str, bytes]) -> bool:
    """Say whether a directory holds exactly these files.

    Raises TrainingError when it holds others of these names.
    """
    for name, data in contents.items():
        try:
            if read_bytes(directory / name) != data:
                raise TrainingError(
                    f"{directory} holds another tokenizer ({name} is different); choose another "
                    "directory, or remove it first"
                )
        except FileNotFoundError:
            return False
    return True


def write_demo_tokenizer(
    directory: Path, vocab_size: int = 1280, seed: int = 0, conversations: int = 20_000
) -> None:
    """Make the demo's tokenizer from its own conversations and write its three files.

    They are tokenizer.json, tokenizer_config.json and chat_template.jinja. This is how the
    embedded ones were made (demo/README.md).
    """
    style = STYLES["minimax_m2"]
    tokenizer = build_tokenizer(_texts(seed, conversations), vocab_size, style)
    contents = tokenizer_files(tokenizer, style)
    config = {**json.loads(contents["tokenizer_config.json"]), "model_max_length": 512}
    contents["tokenizer_config.json"] = _as_json(config)
    del contents["generation_config.json"]  # the demo has one of its own
    write_files(contents, directory)


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory from its own files, without downloads or remote code.

    Raises TrainingError when there is none, or it cannot be read.
    """
    directory = Path(directory)
    if not (directory / "tokenizer.json").exists():
        raise TrainingError(
            f"{directory} holds no tokenizer; expected tokenizer.json and tokenizer_config.json"
        )
    try:
        return load_hugging_face(directory)
    except GenerationError as error:
        raise TrainingError(str(error)) from None


def require_same_tokens(tokenizer: PreTrainedTokenizerBase, directory: Path, initial: Path) -> None:
    """Raise TrainingError when a tokenizer, read from `directory`, has other tokens than that of
    the checkpoint `initial` under the numbers that both have. More tokens are none of them.
    """
    if not (initial / "tokenizer.json").exists():
        return
    given = {number: token for token, number in tokenizer.get_vocab().items()}
    known = {number: token for token, number in load_tokenizer(initial).get_vocab().items()}
    others = sorted(number for number in given.keys() & known if given[number] != known[number])
    if others:
        first = others[0]
        raise TrainingError(
            f"{directory} has other tokens than {initial}, whose weights are to be trained on: "
            f"{counted(len(others), 'number')} of {len(known):,} stand for another one, such as "
            f"{first} for {shown(given[first])}, not {shown(known[first])}; leave --tokenizer out"
        )


def _texts(seed: int, conversations: int) -> Iterator[str]:
    """Yield the words of the conversations as they stand in a prompt, without special tokens.

    What is in every prompt or is one item of a list is repeated, so that it becomes few tokens.
    """
    for _ in range(conversations // 20):
        yield "system\nYou are a helpful assistant."
        yield from (json.dumps(schema["function"]) for schema in SCHEMAS.values())
        yield "\n# Tools\n<tools>\n<tool></tool>\n</tools>\n<response></response>\n"
        yield " " + " ".join(WORDS)
    for index in range(conversations):
        for message in demo_conversation(seed, index).messages:
            role = "ai" if message["role"] == "assistant" else message["role"]
            yield f"{role}\n{message['content']}\n"
            yield f"\n{message.get('reasoning_content', '')}\n"
            for call in message.get("tool_calls", ()):
                for name, value in call["function"]["arguments"].items():
                    yield f'<invoke name="{call["function"]["name"]}">\n'
                    yield f'<parameter name="{name}">{value}</parameter>\n</invoke>\n'
