"""The small files beside the weights, looked at before hours of work: whether they are whole."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field

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
from neuron_minimax.families.family import out_of_range
from neuron_minimax.files import Parsed, read_bytes, read_json

TOKENIZER_NAME = "tokenizer.json"
NO_TOKENIZER = (
    f"the checkpoint has no {TOKENIZER_NAME}: a model made of it takes token ids alone; put it, "
    "tokenizer_config.json and chat_template.jinja beside the weights"
)

GENERATION_NAME = "generation_config.json"
TEMPLATE_NAMES = ("chat_template.jinja", "chat_template.json")
NO_TEMPLATE = (
    "the checkpoint has no chat template: a model made of it goes on from plain text, and does "
    f"not chat; put {TEMPLATE_NAMES[0]} beside the weights"
)
_TYPED = ConfigDict(extra="ignore", allow_inf_nan=False)


@dataclass(frozen=True, kw_only=True)
class StopFields:
    """What is read of a config.json beside the model; it may be of a family that we do not know."""

    __pydantic_config__ = _TYPED

    eos_token_id: int | tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationFields:
    """What is read of a generation_config.json; a `top_k` of 0 or -1 is none."""

    __pydantic_config__ = _TYPED

    eos_token_id: int | tuple[int, ...] | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end an answer, none or several."""
        if self.eos_token_id is None:
            return ()
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def sampling(self) -> dict[str, float]:
        """The options of sampling that are stated."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def has_template(directory: Path) -> bool:
    """Return whether a directory has a chat template in one of the places where it may be."""
    if any((directory / name).exists() for name in TEMPLATE_NAMES):
        return True
    with suppress(OSError, CheckpointError):
        settings = directory / "tokenizer_config.json"
        return bool(_read(settings, settings, dict[str, Any]).get("chat_template"))
    return False


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
                fields = _read(directory / name, path, dict[str, Any])
                if name == TOKENIZER_NAME:
                    _check_vocabulary(directory / name, fields, config)
                elif name == GENERATION_NAME:
                    _check_sampling(directory / name, path)
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


def _read(shown_as: Path, path: Path, kind: type[Parsed]) -> Parsed:
    try:
        return read_json(path, kind, CheckpointError, ADVICE, TOKENIZER_BYTES)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(path), str(shown_as))) from None


def _check_sampling(shown_as: Path, path: Path) -> None:
    """Raise CheckpointError for what a model made of it would refuse to sample with."""
    generation = _read(shown_as, path, GenerationFields)
    if generation.do_sample is False:
        return  # the others are not used
    for name, value in generation.sampling.items():
        problem = "" if name == "top_k" else out_of_range(name, value)
        if problem:
            raise CheckpointError(f"{shown_as}: {problem}")


def _check_vocabulary(path: Path, fields: dict[str, Any], config: ModelConfig) -> None:
    if not isinstance(fields.get("model"), dict):
        raise CheckpointError(f"{path} has no model; expected a tokenizer: {ADVICE}")
    largest = max(token_numbers(fields), default=-1)
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path} has token {largest}, but the model has vocab_size {config.vocab_size}; take "
            "the tokenizer of the checkpoint"
        )
