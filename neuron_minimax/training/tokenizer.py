"""The demo's tokenizer: byte-level BPE, single digits, MiniMax's special tokens and format."""

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError
from neuron_minimax.generation.chat_formats.minimax_m2 import (
    BEGIN_OF_TEXT,
    END_OF_TURN,
    ROLE,
    MiniMaxM2Format,
)
from neuron_minimax.training.data import demo_conversation
from neuron_minimax.training.world import SCHEMAS, WORDS

SPECIAL = MiniMaxM2Format.turn_markers
# Visible in decoded text, as in MiniMax's tokenizer: what reads a reply needs them.
MARKERS = MiniMaxM2Format.tags


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train byte-level BPE of at most `vocab_size` tokens, the special ones last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL) - len(MARKERS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKERS])
    return tokenizer


def write_demo_tokenizer(
    directory: Path, vocab_size: int = 1280, seed: int = 0, conversations: int = 20_000
) -> None:
    """Make the demo's tokenizer from its own conversations and write its three files.

    They are tokenizer.json, tokenizer_config.json and chat_template.jinja. This is how the
    embedded ones were made (demo/README.md).
    """
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(_texts(seed, conversations), vocab_size)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TURN,
        "additional_special_tokens": [ROLE],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )
    if directory.resolve() != DEMO.resolve():
        shutil.copyfile(DEMO / "chat_template.jinja", directory / "chat_template.jinja")


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a directory from its own files, without downloads or remote code.

    Raises TrainingError when there is none, or it cannot be read.
    """
    if not (Path(directory) / "tokenizer.json").exists():
        raise TrainingError(
            f"{directory} holds no tokenizer; expected tokenizer.json and tokenizer_config.json"
        )
    try:
        return AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"the tokenizer in {directory} cannot be read: {str(error).splitlines()[0]}"
        ) from None


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
