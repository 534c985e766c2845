"""Checkpoints by the name they have on the Hugging Face hub: `org/name` or `org/name@revision`."""

import io
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
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
    with progress.stage(f"downloading {checkpoint}") as advance:
        return download(match, files, None if progress is SILENT else advance)


def download(
    repository: re.Match[str],
    files: Sequence[str],
    advance: Advance | None = None,
    directory: Path | None = None,
    again: bool = False,
) -> Path:
    """Download the files with these patterns, which resumes, into the hub's cache or a directory;
    return where they are. `repository` is a match of HUB_ID; `again` disregards what is there.

    Raises CheckpointError when the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    with named_hub_errors(repository, "" if directory is None else f"{', '.join(files)} of "):
        return Path(
            snapshot_download(
                repository["name"],
                revision=repository["revision"],
                allow_patterns=list(files),
                local_dir=directory,
                force_download=again,
                tqdm_class=None if advance is None else _bars(advance),
            )
        )


@contextmanager
def named_hub_errors(repository: re.Match[str], part: str = "") -> Iterator[None]:
    """Turn what huggingface_hub raises, and whatever it uses to reach the hub, into one message:
    that there is no such checkpoint, or that the part of one which is known did not arrive.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # of requests, httpx or hf_xet, whichever a version has
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if part:
            raise CheckpointError(
                f"{part}{repository[0]} did not arrive ({reason}); what has arrived is kept: run "
                "again"
            ) from None
        raise CheckpointError(
            f"{repository[0]} is neither a directory here nor a checkpoint that the Hugging Face "
            f"hub gives ({reason}); check the name, or download it with `hf download "
            f"{repository['name']}`"
        ) from None


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
