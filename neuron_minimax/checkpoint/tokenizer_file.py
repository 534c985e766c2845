"""The small files beside the weights, looked at before hours of work: whether they are whole."""

from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.header import ADVICE
from neuron_minimax.checkpoint.schema import Problem
from neuron_minimax.checkpoint.writer import (
    COMPANION_FILES,
    TOKENIZER_BYTES,
    companion,
    token_numbers,
)
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError
from neuron_minimax.files import read_bytes, read_json

TOKENIZER_NAME = "tokenizer.json"
NO_TOKENIZER = (
    f"the checkpoint has no {TOKENIZER_NAME}: a model made of it takes token ids alone; put it, "
    "tokenizer_config.json and chat_template.jinja beside the weights"
)


def has_tokenizer(directory: Path) -> bool:
    return (directory / TOKENIZER_NAME).exists()


def broken_companions(directory: Path, config: ModelConfig) -> list[Problem]:
    """Return what is wrong with the small files that a conversion copies: no regular files, cut
    off, of other contents, or of a vocabulary that is larger than the model's.
    """
    found = []
    for name in COMPANION_FILES:
        try:
            path = companion(directory, name)
            if path is None:
                continue
            if name.endswith(".json"):
                fields = _read(directory / name, path)
                if name == TOKENIZER_NAME:
                    _check_vocabulary(directory / name, fields, config)
            else:
                read_bytes(path, TOKENIZER_BYTES).decode()
        except CheckpointError as error:
            found.append(Problem(name, str(error), "tokenizer"))
        except UnicodeDecodeError:
            message = f"{directory / name} is no text in UTF-8; {ADVICE}"
            found.append(Problem(name, message, "tokenizer"))
        except OSError as error:
            message = f"{directory / name} cannot be read ({error.strerror}); {ADVICE}"
            found.append(Problem(name, message, "tokenizer"))
    return found


def require_whole_companions(directory: Path, config: ModelConfig) -> None:
    """Raise CheckpointError with the first of `broken_companions`."""
    for problem in broken_companions(directory, config):
        raise CheckpointError(problem.message)


def _read(shown_as: Path, path: Path) -> dict[str, Any]:
    try:
        return read_json(path, dict[str, Any], CheckpointError, ADVICE, TOKENIZER_BYTES)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), str(shown_as))) from None


def _check_vocabulary(path: Path, fields: dict[str, Any], config: ModelConfig) -> None:
    if not isinstance(fields.get("model"), dict):
        raise CheckpointError(f"{path} has no model; expected a tokenizer: {ADVICE}")
    largest = max(token_numbers(fields), default=-1)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path} has token {largest}, but the model has vocab_size {config.vocab_size}; take "
            "the tokenizer of the checkpoint"
        )
