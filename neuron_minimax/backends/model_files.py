"""The model of compiled graphs: small files as copies beside them, shards as hard links or copies,
or all left where it is; and whether it is still that of the converted directory.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from neuron_minimax.backends.manifest import (
    COPIES,
    HARD_LINKS,
    Manifest,
    require_own,
    withhold,
)
from neuron_minimax.checkpoint.finished import examine
from neuron_minimax.checkpoint.kinds import CONFIG_NAME, CONVERSION_NAME
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.records import damaged_tensors, records_as_json
from neuron_minimax.checkpoint.streaming import PageDropper
from neuron_minimax.checkpoint.writer import copy_file, require_space, sync_directory, sync_files
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import BackendError, ConversionError, some_of
from neuron_minimax.files import stamp
from neuron_minimax.progress import Advance, Progress

MODEL = "model"
NEW_MODEL = ".model-new"
OLD_MODEL = ".model-old"
# Of link(2): another file system, one without links, another user's file, too many links already.
NO_LINK = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EMLINK)


def fingerprint(converted: Converted) -> str:
    """Identity of what graphs are compiled from: the conversion, every tensor's digest and the
    configuration, without tokenizer files and the version that wrote it.
    """
    identity = asdict(converted.manifest.identity)
    identity.pop("made_by")
    everything = [
        identity,
        small_files(converted).get(CONFIG_NAME),
        records_as_json(converted.records),
    ]
    return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


def small_files(converted: Converted) -> dict[str, str]:
    """SHA-256 of a converted directory's configuration, index and tokenizer files, by name."""
    return {name: record.sha256 for name, record in converted.files.items() if record.sha256}


def model_directory(traced: Path, manifest: Manifest) -> Path:
    """The converted directory that a compiled one takes its weights from."""
    if manifest.holds_weights:
        return traced / MODEL
    # Links are followed before "..", as the system does.
    return Path(os.path.normpath(traced.resolve() / manifest.weights))


def place_of(converted: Path, traced: Path) -> str:
    """The place of a converted directory as a manifest holds it: relative where it lies beside the
    compiled one, so that both can be moved together.
    """
    source = converted.resolve()
    beside = source.parent == traced.resolve().parent
    return os.path.join("..", source.name) if beside else str(source)


def take_model(converted: Converted, traced: Path, progress: Progress) -> str:
    """Make a new model of small files and hard links to the converted shards, which take no space.

    Returns what a manifest says of the weights: where the file system has no such links, that is
    their place, and no model is made. Raises ConversionError when the converted directory changed
    meanwhile.
    """
    new = traced / NEW_MODEL
    remove(new)
    _make_own(new)
    for name in _shards(converted):
        if not _hard_link(converted.directory / name, new / name):
            remove(new)
            return place_of(converted.directory, traced)
    _finish(converted, new, progress)
    return HARD_LINKS


def copy_model(
    converted: Converted, traced: Path, placed: Converted | None, progress: Progress
) -> str:
    """Make a new model that has its own copies of the converted shards, each compared with its
    digests.

    Those that an interrupted compile has copied are kept, those of `placed`, a whole model that is
    here, are taken over. Returns what a manifest says of the weights. Raises BackendError before
    the first byte when the disk is too small; ConversionError when the converted directory is
    damaged, or changed meanwhile.
    """
    new = traced / NEW_MODEL
    _keep_copies(converted, new)
    mine = placed if placed is not None and placed.records == converted.records else None
    missing = [
        name
        for name in _shards(converted)
        if not (new / name).exists()
        and not (mine and _hard_link(mine.directory / name, new / name))
    ]
    nbytes = sum(converted.files[name].nbytes for name in missing)
    advice = "free some space, choose another disk, or compile without --copy-weights"
    require_space(traced, nbytes, BackendError, advice)
    dropper = PageDropper((converted.tensors,), nbytes)
    with progress.stage("copying weights", nbytes) as advance:

        def both(count: int = 0, doing: str = "") -> None:
            advance(count, doing)
            dropper.advance(count)

        for name in missing:
            _copy_shard(converted, name, new, both)
            if dropper.drops:
                TensorDirectory(new, shards=[name]).drop_pages()
    dropper.finish()
    _finish(converted, new, progress)
    return COPIES


def _shards(converted: Converted) -> list[str]:
    return [name for name in converted.files if name.endswith(".safetensors")]


def _make_own(new: Path) -> None:
    new.mkdir()
    withhold(new)


def _keep_copies(converted: Converted, new: Path) -> None:
    """Keep of an interrupted compile the shards that are whole: those that have got the time stamp,
    after they were compared, and are no links.
    """
    if new.is_symlink() or not new.is_dir():
        remove(new)
        _make_own(new)
    require_own(new, new.stat())
    shards = _shards(converted)
    for path in new.iterdir():
        found = path.lstat()
        copied = path.name in shards and stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if not copied or converted.files[path.name].stamp != stamp(path):
            remove(path)


def _copy_shard(converted: Converted, name: str, new: Path, advance: Advance) -> None:
    copy_file(converted.directory / name, new / name, advance)
    records = {key: record for key, record in converted.records.items() if record.shard == name}
    damaged = damaged_tensors(TensorDirectory(new, shards=[name]), records)
    if damaged:
        remove(new / name)
        raise ConversionError(
            f"{converted.directory / name} has other bytes ({some_of(damaged)}) than recorded; run "
            f"{_check(converted)}"
        )
    _take_stamp(converted.directory / name, new / name)


def _take_stamp(source: Path, target: Path) -> None:
    found = source.stat()
    os.utime(target, ns=(found.st_atime_ns, found.st_mtime_ns))


def _finish(converted: Converted, new: Path, progress: Progress) -> None:
    """Copy the small files beside the shards, and put all on the disk."""
    for name in {*converted.files, CONVERSION_NAME} - {*_shards(converted)}:
        copy_file(converted.directory / name, new / name)
        _take_stamp(converted.directory / name, new / name)
    sync_files(new.iterdir())
    if Converted.open(new, progress=progress).fingerprint != converted.fingerprint:
        raise ConversionError(f"{converted.directory} was changed meanwhile; compile again")


def put_model(traced: Path) -> None:
    """Put the new copy of the model, or the absence of one, in the place of the old one."""
    with suppress(FileNotFoundError):
        (traced / MODEL).rename(traced / OLD_MODEL)
    with suppress(FileNotFoundError):
        (traced / NEW_MODEL).rename(traced / MODEL)
    sync_directory(traced)
    remove(traced / OLD_MODEL)


def require_whole(converted: Converted, progress: Progress) -> None:
    """Read every byte of the converted directory before it is taken. Raises ConversionError naming
    files that are not as they were written.
    """
    with progress.stage(f"reading {converted.directory}", converted.nbytes) as advance:
        found = examine(converted.directory, converted.manifest, everything=True, advance=advance)
    found.require_whole(converted.directory, _check(converted))


def _check(converted: Converted) -> str:
    return f"`neuron-minimax convert CKPT {converted.directory} --check`"


def damaged_model(opened: Converted, progress: Progress) -> str:
    """Say which file of a model has other bytes than recorded; all are read."""
    with progress.stage(f"reading {opened.directory}", opened.nbytes) as advance:
        faults = examine(opened.directory, opened.manifest, everything=True, advance=advance).faults
    return next((f"{name} {fault}" for name, fault in faults.items()), "")


def changed(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Say which file is not the same, of SHA-256 by name; "" when all are."""
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if before[name] != now[name]:
            return f"{name} is another one"
    return ""


def _hard_link(source: Path, destination: Path) -> bool:
    """Link a file, or say that this cannot be. Raises OSError when it can, but failed."""
    try:
        os.link(source.resolve(), destination)
    except OSError as error:
        if error.errno in NO_LINK:
            return False
        raise
    return True


def remove(*paths: Path) -> None:
    """Remove files and directories, as far as they exist."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
