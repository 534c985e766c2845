"""A finished output: its manifest, and whether every file is still the one that was written.

The manifest records the size, the time stamp and, for small files, the SHA-256 of every file of the
output; the tensors' records cover the shards. A file with its recorded stamp is taken as it is, one
with another time stamp (a copy) is read again, one that is missing or differs is a fault. The
stamps of the source's files say whether the source is still the one that was read.
"""

import errno
import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import ConfigDict, Field

from neuron_minimax.checkpoint.index import INDEX_NAME
from neuron_minimax.checkpoint.kinds import CONFIG_NAME
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.records import (
    Count,
    TensorFields,
    damaged_tensors,
    read_records,
)
from neuron_minimax.checkpoint.writer import COMPANION_FILES, make_directory, replacing
from neuron_minimax.errors import ConversionError, NeuronMiniMaxError, some_of
from neuron_minimax.files import (
    MODIFIED,
    FileName,
    Stamp,
    differences,
    parse_json,
    read_bytes,
    sha256_of,
    stamp,
)
from neuron_minimax.progress import Advance, nothing

Manifest = TypeVar("Manifest", bound="Recorded")
NAN_MEDIAN = re.compile(rb'("median_if_[a-z]+": )NaN')
# What a directory's reader takes wherever it finds it, beside what an index names.
SMALL_FILES = (CONFIG_NAME, INDEX_NAME, *COMPANION_FILES)
# and seconds
LOCK_ATTEMPTS = 20
LOCK_PAUSE = 0.05


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file as it was when it was written or read; `sha256` is empty for shards, but for those
    that came from the hub for a while.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    nbytes: Count
    modified_ns: Annotated[int, Field(gt=-(2**63), lt=2**63)]
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""

    @property
    def stamp(self) -> Stamp:
        return Stamp(self.nbytes, self.modified_ns)


Files = Mapping[FileName, FileRecord]


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """What the manifests of all outputs have in common.

    Those of earlier versions have neither `files` nor `source_files`. `verified` says that the
    output was compared with its source by other code than made it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    tensors: Mapping[str, TensorFields]
    made_by: str = ""
    files: Files | None = None
    source_files: Files | None = None
    verified: bool = False

    @property
    def shards(self) -> set[str]:
        return {fields.shard for fields in self.tensors.values()}


@dataclass(frozen=True, kw_only=True)
class OutputManifest(Recorded):
    """The manifest of any output."""

    __pydantic_config__ = ConfigDict(extra="ignore")

    identity: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The state of an output's files: the record of each as it is now, what is wrong with which
    file, and the tensors that do not have their digests.
    """

    files: Files
    faults: Mapping[str, str]
    damaged: tuple[str, ...] = ()

    def require_whole(
        self, directory: Path, again: str, error: type[NeuronMiniMaxError] = ConversionError
    ) -> None:
        """Raise `error` naming the files that are not as written, and the command that makes them
        `again`.
        """
        if self.faults:
            shown = [f"{name} {fault}" for name, fault in list(self.faults.items())[:3]]
            more = len(self.faults) - len(shown)
            text = "; ".join([*shown, *([f"and {more} more"] if more else [])])
            changed = [name for name in COMPANION_FILES if name in self.faults]
            own = f" (a change of {changed[0]} belongs into the checkpoint)" if changed else ""
            raise error(f"{directory} is not as it was written: {text}; run {again}{own}")


def read_recorded(
    path: Path, kind: type[Manifest], error: type[NeuronMiniMaxError], advice: str
) -> Manifest:
    """Read a manifest as `read_json` does, one of an earlier version too, which wrote NaN as the
    medians of a checkpoint without FP8 weights.
    """
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{path} cannot be read ({problem.strerror}); {advice}") from None
    return parse_json(NAN_MEDIAN.sub(rb"\1null", data), kind, path, error, advice)


def record_of(path: Path, *, shard: bool = False) -> FileRecord:
    """Return the record of a file as it is now; that of a shard has no digest, which the records of
    its tensors are. Raises OSError.
    """
    before = stamp(path)
    digest = "" if shard else sha256_of(path)
    return FileRecord(nbytes=before.nbytes, modified_ns=before.modified_ns, sha256=digest)


def compare_files(
    directory: Path, recorded: Files, *, everything: bool = False
) -> tuple[dict[str, FileRecord], dict[str, str]]:
    """Compare files with their records: stamps first, then the digests of those with another time
    stamp (of all, if `everything`), as far as they have any.

    Return the records as they are now, and what is wrong: file name to a phrase such as "is
    missing".
    """
    faults = differences(directory, {name: record.stamp for name, record in recorded.items()})
    files = dict(recorded)
    for name, record in recorded.items():
        if faults.get(name, MODIFIED if everything else "") != MODIFIED:
            continue
        faults.pop(name, None)
        try:
            shard = name.endswith(".safetensors") and not record.sha256
            files[name] = record_of(directory / name, shard=shard)
        except OSError as problem:
            faults[name] = f"cannot be read ({problem.strerror})"
            continue
        if record.sha256 and files[name].sha256 != record.sha256:
            faults[name] = "has other bytes"
    return files, faults


def examine(
    directory: Path,
    manifest: Recorded,
    *,
    everything: bool = False,
    shards: bool = True,
    advance: Advance = nothing,
) -> Examination:
    """Compare an output's files with its manifest: stamps first, then the bytes of those with
    another time stamp (of all, if `everything`; of the small ones alone, unless `shards`).
    `advance` is called with the bytes of each tensor that is read.
    """
    recorded = manifest.files
    if recorded is None:
        recorded = _before_records(directory, manifest)
        everything = True
    files, faults = compare_files(directory, recorded, everything=everything)
    for name in SMALL_FILES:
        if name not in recorded and os.path.lexists(directory / name):
            faults[name] = "is no part of it"
    suspects = [
        name
        for name in manifest.shards & files.keys()
        if name not in faults and (everything or files[name].stamp != recorded[name].stamp)
    ]
    damaged: list[str] = []
    if suspects and shards:
        records = {
            name: record
            for name, record in read_records(manifest.tensors).items()
            if record.shard in suspects
        }
        stored = TensorDirectory(directory, shards=suspects)
        damaged = damaged_tensors(stored, records, advance)
        for shard in suspects:
            names = [name for name in damaged if records[name].shard == shard]
            if names:
                faults[shard] = f"has other bytes ({some_of(names)})"
    return Examination(files=files, faults=faults, damaged=tuple(damaged))


def _before_records(directory: Path, manifest: Recorded) -> dict[str, FileRecord]:
    """Return records of what a manifest without any vouches for: the stamps that there are."""
    names = {CONFIG_NAME, *manifest.shards}
    if len(manifest.shards) > 1:
        names.add(INDEX_NAME)
    names |= {name for name in COMPANION_FILES if (directory / name).exists()}
    found = {}
    for name in sorted(names):
        now = Stamp(0, 0)  # of a file that is missing, which `differences` says
        with suppress(OSError):
            now = stamp(directory / name)
        found[name] = FileRecord(nbytes=now.nbytes, modified_ns=now.modified_ns)
    return found


def source_files(source: TensorDirectory, companions: bool = True) -> dict[str, FileRecord]:
    """Return the records of the files that an output is made of, as they were before the first was
    read.
    """
    small = SMALL_FILES if companions else (CONFIG_NAME, INDEX_NAME)
    return {
        name: FileRecord(
            nbytes=found.nbytes,
            modified_ns=found.modified_ns,
            sha256=source.files.published.get(name, ""),
        )
        for name in sorted({*source.shards, *small})
        if (found := source.stamps.get(name)) is not None
    }


def stamped(files: Files) -> dict[str, Stamp]:
    """Return the stamps of a source's files, but of those that are known by their digest."""
    return {name: record.stamp for name, record in files.items() if not record.sha256}


def changed_source(manifest: Recorded, source: TensorDirectory, written_ns: int) -> str:
    """Say which of the source's shards is not the one that the output was made of; "" when all
    are. `written_ns` is the time stamp of a manifest that has no records of its source.

    The small files need no stamps: the fingerprint covers config.json, and the others are compared
    or copied in any case.
    """
    recorded = manifest.source_files
    for name in source.shards:
        now = source.stamps.get(name)
        if now is None:
            return f"{name} of {source.files.title} is missing"
        if recorded is None:
            if now.modified_ns > written_ns:
                return f"{name} of {source.files.title} is newer than this output"
        elif name not in recorded:
            return f"{name} of {source.files.title} was not there"
        elif recorded[name].nbytes != now.nbytes:
            return (
                f"{name} of {source.files.title} had {recorded[name].nbytes} bytes and has "
                f"{now.nbytes}"
            )
        elif recorded[name].sha256 != source.files.published.get(name, ""):
            both = recorded[name].sha256 and name in source.files.published
            differs = "has another SHA-256" if both else "was taken from elsewhere"
            return f"{name} of {source.files.title} {differs}"
        elif recorded[name].stamp != now:
            return f"{name} of {source.files.title} was modified since"
    return ""


def files_as_json(files: Files) -> dict[str, dict[str, Any]]:
    """Records as a manifest holds them."""
    return {
        name: {key: value for key, value in asdict(record).items() if value != ""}
        for name, record in sorted(files.items())
    }


def renew(path: Path, files: Files, source: Files | None = None, verified: bool = False) -> None:
    """Record other stamps in a manifest, which is replaced whole; the caller holds its directory.

    While the manifest has no records of its source, it keeps its own time stamp, which stands for
    them. Raises OSError.
    """
    fields = json.loads(read_bytes(path), parse_constant=lambda name: None)
    before = stamp(path)
    fields["files"] = files_as_json(files)
    if source is not None:
        fields["source_files"] = files_as_json(source)
    if verified:
        fields["verified"] = True
    with replacing(path) as file:
        file.write((json.dumps(fields, indent=2, allow_nan=False) + "\n").encode())
        if "source_files" not in fields:
            file.flush()
            os.utime(file.fileno(), ns=(before.modified_ns, before.modified_ns))


def try_to_renew(
    path: Path,
    manifest: Recorded,
    files: Files,
    source: Files | None = None,
    verified: bool = False,
) -> bool:
    """Do as `renew`, unless another run holds the directory or has replaced the manifest, or it may
    not be written; return whether the records are there.
    """
    same_source = source in (None, manifest.source_files)
    if files == manifest.files and same_source and verified <= manifest.verified:
        return True
    try:
        with locked(path.parent, fcntl.LOCK_EX, attempts=1):
            now = read_recorded(path, OutputManifest, ConversionError, "")
            if now.tensors != manifest.tensors or now.files not in (None, manifest.files):
                return False
            renew(path, files, source, verified)
    except (OSError, ConversionError):
        return False
    return True


@contextmanager
def locked(directory: Path, kind: int, attempts: int = LOCK_ATTEMPTS) -> Iterator[None]:
    """Hold a directory, alone (LOCK_EX) or with others (LOCK_SH); the lock ends with the process.

    Processes of a killed run may hold it until their last piece, which is waited for. Raises
    ConversionError when another run holds it, OSError when it cannot be opened or locked. Readers
    go on where the file system has no locks.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _lock(descriptor, directory, kind, attempts)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held(directory: Path, error: type[NeuronMiniMaxError]) -> Iterator[None]:
    """Hold a directory alone, which is made where there is none.

    Raises `error` when that is impossible, ConversionError when another run holds it.
    """
    with ExitStack() as stack:
        try:
            make_directory(directory)
            stack.enter_context(locked(directory, fcntl.LOCK_EX))
        except OSError as problem:
            raise error(
                f"{directory} cannot be used ({problem.strerror}); choose another directory"
            ) from None
        yield


def _lock(descriptor: int, directory: Path, kind: int, attempts: int) -> None:
    for attempt in range(attempts):
        try:
            return fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt + 1 < attempts:
                time.sleep(LOCK_PAUSE)
        except OSError as problem:
            if kind == fcntl.LOCK_SH and problem.errno in (errno.ENOLCK, errno.EOPNOTSUPP):
                return None
            raise
    used = "written" if kind == fcntl.LOCK_SH else "written or read"
    raise ConversionError(f"{directory} is being {used} by another run; wait for it or stop it")
