"""PyTorch's own files (`.pth`, `pytorch_model.bin`), or float16 shards, made into a checkpoint.

Files of torch are pickles: only tensors are read from them (`weights_only=True`), and nothing in
them is run. MiniMind's training writes no config.json; one is derived from its tensors then.
"""

import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuron_minimax.checkpoint.finished import held
from neuron_minimax.checkpoint.kinds import CONFIG_NAME, Wanted, require
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.writer import (
    TOKENIZER_BYTES,
    copy_companions,
    sync_directory,
    token_numbers,
    write_checkpoint,
)
from neuron_minimax.config import CONFIG_BYTES, ModelConfig
from neuron_minimax.errors import CheckpointError, counted, shown
from neuron_minimax.families import Role
from neuron_minimax.families.minimind import derived_config
from neuron_minimax.files import read_json, stamp
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.progress import SILENT, Advance, Progress

if TYPE_CHECKING:
    import torch

State = Mapping[str, "torch.Tensor"]
ADVICE = "give the file that torch.save wrote of a model's state_dict"
# What torch.compile and DistributedDataParallel put before each name.
WRAPPERS = ("_orig_mod.", "module.")
# Where a training run's file has the model's state beside others.
SECTIONS = ("model", "state_dict", "model_state_dict")
PARTIAL_SUFFIX = ".importing"


@dataclass(frozen=True, kw_only=True)
class Imported(Rendered):
    """A checkpoint made of torch's files: what was widened or left out, and fields of config.json
    that no file says.
    """

    directory: Path
    tensors: int
    widened: int
    head_is_embedding: bool
    assumed: Mapping[str, Any]

    def render(self) -> str:
        lines = [f"{self.directory}: {counted(self.tensors, 'tensor')}"]
        if self.widened:
            lines.append(f"{self.widened} of them widened from float16 to float32, exactly")
        if self.head_is_embedding:
            lines.append("the head equals the embedding and is stored once (tie_word_embeddings)")
        if self.assumed:
            fields = ", ".join(f"{name} {value}" for name, value in self.assumed.items())
            lines.append(
                "config.json is derived from the tensors; what they do not show is what MiniMind's "
                f"own code takes: {fields}. Where the model was trained otherwise, give --config"
            )
        return "\n".join(lines)


def import_torch(
    source: str | Path,
    directory: str | Path,
    *,
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    progress: Progress = SILENT,
) -> Imported:
    """Write a checkpoint in Hugging Face's layout from torch's files, whole or not at all.

    `source` is a file of torch.save, or a directory with pytorch_model*.bin, one .pth, or float16
    .safetensors; `config` a config.json, that of the directory by default; `tokenizer` a directory
    with the tokenizer's files. float16 is widened to float32, the rest kept. Raises CheckpointError
    or ConfigError on files that hold anything but the tensors of a supported model,
    ConversionError when another run writes there.
    """
    source = Path(source)
    directory = Path(directory)
    if tokenizer is not None and not (Path(tokenizer) / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{tokenizer} has no tokenizer.json; give the directory of the tokenizer's files"
        )
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} is there already; choose another directory")
    with progress.stage(f"reading {source}"):
        state = _unwrapped(source, _read(source))
    raw, assumed = _config(source, config, state)
    model = ModelConfig.from_dict(raw)
    embedding, head = (
        model.family.weight_of(role).template for role in (Role.EMBEDDING, Role.HEAD)
    )
    tied = model.tie_word_embeddings and _equal(state, embedding, head)
    kept = {name: tensor for name, tensor in state.items() if not (tied and name == head)}
    partial = directory.with_name(directory.name + PARTIAL_SUFFIX)
    with held(partial, CheckpointError):
        try:
            with progress.stage(f"writing {directory}") as advance:
                _write(partial, raw, kept, advance)
            for place in (source, tokenizer):
                if place is not None and Path(place).is_dir():
                    copy_companions(Path(place), partial)
            _require_usable(source, Checkpoint(partial))
            _require_room(model, partial, source if tokenizer is None else tokenizer)
            if directory.exists():
                directory.rmdir()
            partial.rename(directory)
        except OSError as error:
            raise CheckpointError(
                f"{partial} cannot be written ({error.strerror}); mend it, and run this again"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    sync_directory(directory.parent)
    return Imported(
        directory=directory,
        tensors=len(kept),
        widened=sum(str(tensor.dtype) == "torch.float16" for tensor in kept.values()),
        head_is_embedding=tied,
        assumed=assumed,
    )


def _read(source: Path) -> State:
    if not source.is_dir():
        return _load(source)
    require(source, Wanted.TORCH, CheckpointError)
    bins = sorted(source.glob("pytorch_model*.bin")) or sorted(source.glob("*.pth"))
    shards = sorted(source.glob("*.safetensors"))
    if len(bins) > 1 and bins[0].suffix == ".pth":
        names = ", ".join(path.name for path in bins)
        raise CheckpointError(f"{source} has several models ({names}); give one of these files")
    state: dict[str, torch.Tensor] = {}
    for path in bins or shards:
        loaded = _load(path) if bins else _load_safetensors(path)
        twice = state.keys() & loaded.keys()
        if twice:
            raise CheckpointError(f"{min(twice)} is in {path.name} and in a file before it")
        state |= loaded
    return state


def _load(path: Path) -> dict[str, Any]:
    import torch

    try:
        stamp(path)  # refuses a pipe, which would be waited for
        mapped = zipfile.is_zipfile(path)  # what torch has written since 1.6
        damaged = zipfile.ZipFile(path).testzip() if mapped else None
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist; {ADVICE}") from None
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); {ADVICE}") from None
    # Unpickling raises whatever the file makes it raise, with advice to run it.
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone, and nothing else in it is run "
            f"({type(error).__name__}); {ADVICE}"
        ) from None
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged in {shown(damaged)}; download it again")
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} holds {type(found).__name__}, no state dict; {ADVICE}")
    sections = [found[name] for name in SECTIONS if isinstance(found.get(name), dict)]
    return sections[0] if sections else found


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stamp(path)  # refuses a pipe, which would be waited for
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); download it again") from None


def _unwrapped(source: Path, found: Mapping[str, Any]) -> State:
    """Return the tensors under the model's own names."""
    import torch

    state = {}
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{source} holds {shown(name)}, which is {type(tensor).__name__}, beside tensors; "
                f"{ADVICE}"
            )
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise CheckpointError(
                f"{shown(name)} in {source} is {tensor.dtype}; expected float16, bfloat16 or "
                "float32 (a checkpoint with FP8 weights needs no import: convert takes it as it is)"
            )
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"{shown(name)} in {source} is sparse; expected dense tensors")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{shown(name)} in {source} holds NaN or infinite elements; take the file of an "
                "earlier step"
            )
        own = name
        for wrapper in WRAPPERS:
            own = own.removeprefix(wrapper)
        if own in state:
            raise CheckpointError(f"{source} holds {shown(own)} twice, once wrapped; {ADVICE}")
        state[own] = tensor
    if not state:
        raise CheckpointError(f"{source} holds no tensors; {ADVICE}")
    return state


def _config(
    source: Path, config: str | Path | None, state: State
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return config.json, and those of its fields that nothing says."""
    beside = source if source.is_dir() else source.parent
    path = beside / CONFIG_NAME if config is None else Path(config)
    if config is not None and path.is_dir():
        path = path / CONFIG_NAME
    if config is not None or path.is_file():
        try:
            advice = "give the config.json of the model"
            return read_json(path, dict[str, Any], CheckpointError, advice, CONFIG_BYTES), {}
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist; give the model's config.json") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    derived = derived_config(shapes)
    if derived is None:
        raise CheckpointError(
            f"{source} has no config.json beside it, and its tensors are not those of MiniMind; "
            "give the model's config.json with --config"
        )
    return derived


def _equal(state: State, embedding: str, head: str) -> bool:
    import torch

    return head in state and embedding in state and torch.equal(state[head], state[embedding])


def _require_usable(source: Path, made: Checkpoint) -> None:
    """Raise CheckpointError with the first problem: what was made goes with it."""
    if made.problems:
        more = f" (and {len(made.problems) - 1} more)" if len(made.problems) > 1 else ""
        raise CheckpointError(
            f"{source} is not the model of its config.json: {made.problems[0]}{more}"
        )


def _require_room(model: ModelConfig, made: Path, origin: str | Path) -> None:
    """Raise CheckpointError when the tokenizer that came along has more tokens than the model."""
    path = made / "tokenizer.json"
    if not path.exists():
        return
    advice = "give another --tokenizer"
    fields = read_json(path, dict[str, Any], CheckpointError, advice, TOKENIZER_BYTES)
    largest = max(token_numbers(fields), default=0)
    if largest >= model.vocab_size:
        raise CheckpointError(
            f"the tokenizer of {origin} has token {largest}, but the model has "
            f"vocab_size {model.vocab_size}; give the tokenizer that it was trained with"
        )


def _write(directory: Path, raw: Mapping[str, Any], state: State, advance: Advance) -> None:
    """Write the files, in place of what an earlier run has left."""
    for path in directory.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    stored = {name: value for name, value in raw.items() if name not in ("torch_dtype", "dtype")}
    write_checkpoint(directory, stored, _arrays(state), advance=advance)


def _arrays(state: State) -> Iterator[tuple[str, str, np.ndarray]]:
    import torch

    for name, tensor in state.items():
        whole = tensor.detach().contiguous()
        if whole.dtype == torch.bfloat16:
            yield name, "BF16", whole.view(torch.uint16).numpy()
        else:
            yield name, "F32", whole.float().numpy()
