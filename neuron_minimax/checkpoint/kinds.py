"""This module says what kind of directory a command was given, and which command takes it.

Whoever opens a directory asks here, so that the wrong kind is named in one line.

The files that tell kinds apart have their names here.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from neuron_minimax.errors import NeuronMiniMaxError, some_of
from neuron_minimax.files import read_bytes

CONFIG_NAME = "config.json"
CONVERSION_NAME = "conversion.json"
CACHE_NAME = "cache.json"
COMPILED_NAME = "manifest.json"
STATE_NAME = "training_state.pt"
UNFINISHED = ".unfinished"
DOWNLOADS = ".download"  # in an output: shards of a source on the hub, while they are needed
SNAPSHOTS = "snapshots"  # of a repository in the hub's cache

LFS_MARK = b"version https://git-lfs.github.com/spec/"
POINTER_BYTES = 1024  # at most, by the specification of Git LFS


class Wanted(StrEnum):
    """The kind of directory that a command opens."""

    CHECKPOINT = "a checkpoint directory"
    CONFIG = "a directory with a config.json"
    TORCH = "PyTorch's own files"
    CONVERTED = "a converted directory"
    COMPILED = "a compiled directory"


# A file that makes a directory the wanted one, whatever else lies there.
DECISIVE = {
    Wanted.CONFIG: CONFIG_NAME,
    Wanted.CONVERTED: CONVERSION_NAME,
}
# The file that a directory of the wanted kind has; where it is missing, it is looked for below.
MARKS = DECISIVE | {Wanted.COMPILED: COMPILED_NAME}
DOWNLOAD = (
    "`hf download ORG/NAME --local-dir DIR` makes one, and a hub id, ORG/NAME, is taken in its "
    "place"
)
# The next step where nothing more is known.
MAKES = {
    Wanted.CHECKPOINT: DOWNLOAD,
    Wanted.CONFIG: DOWNLOAD,
    Wanted.TORCH: "give the file that torch.save wrote of a model's state_dict, or its directory",
    Wanted.CONVERTED: "`neuron-minimax convert CKPT OUT` makes one",
    Wanted.COMPILED: "`neuron-minimax compile OUT TRACED` makes one",
}


def _named(*patterns: str) -> Callable[[Path], list[str]]:
    """Return a function that gives the names of a directory's files with one of these patterns."""
    return lambda path: sorted(file.name for each in patterns for file in path.glob(each))


def is_compiled(path: Path) -> bool:
    """Return whether a directory is a compiled one: beside a config.json a manifest is somebody
    else's.
    """
    return (path / COMPILED_NAME).exists() and not (path / CONFIG_NAME).exists()


def _is_finished(path: Path) -> bool:
    written = any((path / name).exists() for name in (CONVERSION_NAME, CACHE_NAME))
    return written or is_compiled(path)


def _unfinished(path: Path) -> list[str]:
    return [] if _is_finished(path) else _named(UNFINISHED, DOWNLOADS)(path)


def _compiled(path: Path) -> list[str]:
    return [COMPILED_NAME] if is_compiled(path) else []


def _training(path: Path) -> list[str]:
    """Return the state of a run that has not written its checkpoint."""
    return [] if (path / CONFIG_NAME).exists() else _named(STATE_NAME)(path)


def _pointers(path: Path) -> list[str]:
    """Return the names of the files that Git LFS has not fetched."""
    found = []
    patterns = ("*.safetensors", "*.bin", "*.pth", "*.json", "*.jinja", "*.txt", "*.model")
    for file in sorted(file for pattern in patterns for file in path.glob(pattern)):
        with suppress(OSError):
            if file.stat().st_size <= POINTER_BYTES and read_bytes(file).startswith(LFS_MARK):
                found.append(file.name)
    return found


def _without_shards(*patterns: str) -> Callable[[Path], list[str]]:
    return lambda path: [] if any(path.glob("*.safetensors")) else _named(*patterns)(path)


def _checkpoint(path: Path) -> list[str]:
    return _named("*.safetensors")(path) if (path / CONFIG_NAME).exists() else []


def _hub_caches(path: Path) -> list[str]:
    return [name.removeprefix("models--").replace("--", "/") for name in _named("models--*")(path)]


class Kind(NamedTuple):
    """A kind of directory: what it is called, the function that returns the files or folders which
    show it, and the next step, by what was wanted; that of None stands for all others.

    {path} stands for the directory, {names} for what shows it, {first} for the first of that.
    `passes` are what it may be taken for.
    """

    what: str
    recognized: Callable[[Path], list[str]]
    instead: Mapping[Wanted | None, str]
    passes: tuple[Wanted, ...] = ()


COMPILE = "`neuron-minimax compile {path} TRACED` makes one of it"
CONVERT = "`neuron-minimax convert {path} OUT` makes one of it"
NO_SNAPSHOT = "give one of its snapshots, or get it whole: `hf download ORG/NAME`"
# The first that fits is said.
KINDS = (
    Kind(
        "is a compiled directory",
        _compiled,
        {None: "give what it was compiled from; generate, serve and experts take it as it is"},
        passes=(Wanted.COMPILED,),
    ),
    Kind(
        "is a converted directory",
        _named(CONVERSION_NAME),
        {
            Wanted.COMPILED: COMPILE,
            None: "give the checkpoint that it was made of; compile, verify and experts take it "
            "as it is",
        },
    ),
    Kind(
        "holds an output that is not finished",
        _unfinished,
        {None: "run the command that makes it again"},
    ),
    Kind(
        "is a dense cache of a checkpoint",
        _named(CACHE_NAME),
        {
            Wanted.CONVERTED: "give what `neuron-minimax convert CKPT OUT` makes of the checkpoint",
            Wanted.COMPILED: "convert the checkpoint and compile that",
            None: "it is a checkpoint already: inspect, quality and experts take it as it is",
        },
        passes=(Wanted.CHECKPOINT,),
    ),
    Kind(
        "is a clone whose large files Git LFS has not fetched ({names})",
        _pointers,
        {None: "run `git lfs pull` in it, or `hf download ORG/NAME --local-dir DIR`"},
    ),
    Kind(
        "is a checkpoint",
        _checkpoint,
        {
            Wanted.CONVERTED: CONVERT,
            Wanted.COMPILED: "`neuron-minimax convert {path} OUT` and then `neuron-minimax compile "
            "OUT TRACED` make one of it",
            None: "inspect, convert, cache, quality and experts take it as it is",
        },
        passes=(Wanted.CHECKPOINT, Wanted.TORCH),
    ),
    Kind(
        "holds {names}, an adapter for another model, without that model",
        _named("adapter_config.json"),
        {None: "merge it into its model's checkpoint first"},
    ),
    Kind(
        "holds PyTorch's own files ({names})",
        _without_shards("pytorch_model*.bin", "*.pth"),
        {None: "`neuron-minimax import {path} CKPT` makes a checkpoint of them"},
        passes=(Wanted.TORCH,),
    ),
    Kind(
        "holds GGUF files ({names}), which are llama.cpp's and not read",
        _named("*.gguf"),
        {None: "download the model's safetensors: `hf download ORG/NAME --local-dir DIR`"},
    ),
    Kind(
        "holds a training run without its checkpoint ({names})",
        _training,
        {None: "run the same `neuron-minimax train` again, it goes on and writes it"},
    ),
    Kind(
        "is an output of `neuron-minimax experts`",
        _named("comparison.json", "trace.safetensors", "*/trace.safetensors"),
        {None: "its trace.safetensors go to `neuron-minimax experts --trace`"},
    ),
    Kind(
        "is a cache of the Hugging Face hub (of {names})",
        _hub_caches,
        {None: "give the hub id: {first}"},
    ),
    Kind(
        "is a repository in the Hugging Face hub's cache",
        _named(SNAPSHOTS),
        {
            Wanted.CHECKPOINT: NO_SNAPSHOT,
            Wanted.CONFIG: NO_SNAPSHOT,
            None: "`neuron-minimax convert {path} OUT` comes first",
        },
    ),
    Kind(
        "has a config.json and no weights",
        _named(CONFIG_NAME),
        {None: "download it again, which goes on: `hf download ORG/NAME --local-dir DIR`"},
    ),
    Kind(
        "holds safetensors files ({names}) and no config.json",
        _named("*.safetensors"),
        {None: "download the model's config.json to it, and its other small files"},
        passes=(Wanted.TORCH,),
    ),
)


def require(path: Path, wanted: Wanted, error: type[NeuronMiniMaxError]) -> None:
    """Raise `error`, with what there is and the next step, where a path is of another kind than the
    wanted one. What may be a checkpoint passes as one, however much of it is missing or damaged.
    """
    try:
        if wanted in DECISIVE and (path / DECISIVE[wanted]).exists():
            return
        found = _found(path, wanted)
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); expected {wanted}") from None
    if found:
        raise error(f"{path} {found}")


def _advice_for_file(path: Path) -> str:
    match path.suffix:
        case ".safetensors":
            return f"; give the directory that it lies in, {path.parent}"
        case ".pth" | ".bin" | ".pt":
            return f"; `neuron-minimax import {path} CKPT` makes a checkpoint of it"
        case ".gguf":
            return "; GGUF is llama.cpp's and not read: download the model's safetensors"
    return ""


def _found(path: Path, wanted: Wanted) -> str:
    """Return what a path is instead of the wanted kind, and the next step; "" where it is that."""
    expected = f"expected {wanted}: {MAKES[wanted]}"
    if not path.exists():
        return f"does not exist; {expected}"
    if not path.is_dir():
        return f"is a file; expected {wanted}{_advice_for_file(path)}"
    for kind in KINDS:
        names = kind.recognized(path)
        if names:
            if wanted in kind.passes:
                return ""
            instead = kind.instead.get(wanted, kind.instead[None])
            text = f"{kind.what}; expected {wanted}: {instead}"
            return text.format(path=path, names=some_of(names), first=names[0])
    mark = MARKS.get(wanted, CONFIG_NAME)
    below = sorted(str(file.parent) for file in path.glob(f"*/{mark}"))
    if below:
        return f"has no {mark}; expected {wanted}, such as {some_of(below)} below it"
    holds = f"has no {mark}" if any(path.iterdir()) else "is empty"
    return f"{holds}; {expected}"
