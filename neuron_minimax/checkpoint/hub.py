"""Checkpoints by the name they have on the Hugging Face hub: `org/name` or `org/name@revision`."""

import re
from collections.abc import Sequence
from pathlib import Path

from neuron_minimax.errors import CheckpointError

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*?)(?:@(?P<revision>[\w./-]+))?")
# What a checkpoint is made of here; code files are never fetched.
WANTED_FILES = ("*.safetensors", "*.json", "*.jinja", "merges.txt")


def local_directory(checkpoint: str | Path, files: Sequence[str] = WANTED_FILES) -> Path:
    """Return the directory of a checkpoint that is named by path or by hub id.

    A path in a directory that exists is taken as it is. Else a hub id is looked up in the local
    cache of huggingface_hub and completed by a download, which resumes and shows its progress; with
    HF_HUB_OFFLINE=1 the cache alone is used. `files` are patterns of what is needed. Raises
    CheckpointError when there is neither.
    """
    path = Path(checkpoint)
    match = HUB_ID.fullmatch(str(checkpoint))
    if match is None or path.parent.is_dir():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        found = snapshot_download(
            match["name"], revision=match["revision"], allow_patterns=list(files)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{checkpoint} is neither a directory here nor a checkpoint that the Hugging Face hub "
            f"gives ({reason}); check the name, or download it with `hf download {match['name']}`"
        ) from None
    return Path(found)
