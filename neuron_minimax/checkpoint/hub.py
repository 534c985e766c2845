"""Checkpoints by the name they have on the Hugging Face hub: `org/name` or `org/name@revision`."""

import io
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from neuron_minimax.checkpoint.kinds import CONFIG_NAME, SNAPSHOTS
from neuron_minimax.errors import CheckpointError
from neuron_minimax.files import read_bytes
from neuron_minimax.progress import SILENT, Advance, Progress

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
# What a checkpoint is made of here; code files are never fetched.
WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")


def local_directory(
    checkpoint: str | Path,
    files: Sequence[str] = WANTED_FILES,
    progress: Progress = SILENT,
) -> Path:
    """Return the directory of a checkpoint that is named by path or by hub id.

    A path in a directory that exists is taken as it is, but of a repository in the hub's cache (or
    of its snapshots) the main snapshot. Else a hub id is looked up in the local cache of
    huggingface_hub and completed by a download, which resumes; with HF_HUB_OFFLINE=1 the cache
    alone is used. Its progress is huggingface_hub's own bars, unless `progress` is given.
    `files` are patterns of what is needed. Raises CheckpointError when there is neither.
    """
    path = Path(checkpoint)
    match = HUB_ID.fullmatch(str(checkpoint))
    if match is None or path.parent.is_dir():
        return _snapshot(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        with progress.stage(f"downloading {checkpoint}") as advance:
            found = snapshot_download(
                match["name"],
                revision=match["revision"],
                allow_patterns=list(files),
                tqdm_class=None if progress is SILENT else _bars(advance),
            )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{checkpoint} is neither a directory here nor a checkpoint that the Hugging Face hub "
            f"gives ({reason}); check the name, or download it with `hf download {match['name']}`"
        ) from None
    return Path(found)


def _bars(advance: Advance) -> type[Any]:
    """A class of tqdm's bars that tells a stage what they would show."""
    from tqdm.std import tqdm

    lock = threading.Lock()
    told = 0

    class Bar(tqdm):  # type: ignore[misc]
        """One of files, and one or more of the same bytes, of which the furthest counts."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "file": io.StringIO(), "leave": False})

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            nonlocal told
            if self.unit != "B":
                advance(doing=f"{self.n} of {self.total} files are there")
                return True
            with lock:
                new = max(0, int(self.n) - told)
                told += new
            advance(new)
            return True

    return Bar


def _snapshot(path: Path) -> Path:
    repository = path.parent if path.name == SNAPSHOTS else path
    snapshots = repository / SNAPSHOTS
    if (path / CONFIG_NAME).exists() or not snapshots.is_dir():
        return path
    names = [found.name for found in snapshots.iterdir()]
    main = names[0] if len(names) == 1 else ""
    with suppress(OSError):
        main = read_bytes(repository / "refs" / "main").decode(errors="replace").strip()
    return snapshots / main if main in names else path
