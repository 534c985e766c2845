"""Output directories that resume: locked, journaled shard by shard, and finished when their
manifest is there and every file is as it says.

A directory under construction holds `.unfinished/` with the identity of the run, the stamps of the
source's files and one journal per finished shard. The manifest appears last. What of a finished
directory is missing or damaged is made again beside the rest.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from neuron_minimax import __version__
from neuron_minimax.checkpoint.finished import (
    SMALL_FILES,
    FileRecord,
    Files,
    OutputManifest,
    changed_source,
    examine,
    files_as_json,
    held,
    read_recorded,
    record_of,
    renew,
    source_files,
    stamped,
)
from neuron_minimax.checkpoint.index import INDEX_NAME
from neuron_minimax.checkpoint.kinds import CONFIG_NAME, DOWNLOADS, UNFINISHED
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.records import (
    TensorRecord,
    read_records,
    records_as_json,
)
from neuron_minimax.checkpoint.shard_files import Needs
from neuron_minimax.checkpoint.shards import StreamedShard, digests_of, write_shards
from neuron_minimax.checkpoint.unfinished import IDENTITY_NAME, Unfinished
from neuron_minimax.checkpoint.writer import (
    COMPANION_FILES,
    PARTIAL_SUFFIX,
    copy_companions,
    find_companions,
    write_index,
    write_json,
)
from neuron_minimax.errors import ConversionError, NeuronMiniMaxError, some_of
from neuron_minimax.files import differences, stamp
from neuron_minimax.progress import Advance, nothing

# Who wrote an output is recorded, never compared. Earlier versions had it in the identity.
MADE_BY = "made_by"
SHARD_SUFFIX = ".safetensors"
# as all recipes name their shards
SHARD_NAME = re.compile(r"model(-\d{5,}-of-\d{5,})?\.safetensors")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a directory is to hold, and how it is made.

    manifest_name  appears last
    identity       what would be made: source fingerprint, options and format version
    source         what it is made of
    shards         gives the files to write
    config         gives config.json
    manifest       gives the command's own fields of the manifest
    companions     whether the source's tokenizer, template and generation config come along
    compare        what a user does when the source's time stamps have changed
    prove          compares a written shard with its sources, while these are there, and raises
    """

    manifest_name: str
    identity: Mapping[str, Any]
    source: TensorDirectory
    shards: Callable[[], Sequence[StreamedShard]]
    config: Callable[[], Mapping[str, Any]]
    manifest: Callable[[Mapping[str, TensorRecord]], Mapping[str, Any]]
    compare: str
    companions: bool = True
    prove: Callable[[StreamedShard, Mapping[str, TensorRecord]], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Filled:
    """The course of a run: shards that were checked and kept, one line for each file that was made
    again, tensors that did not have their digests, and whether no shard had to be written.
    """

    reused_shards: int = 0
    changes: tuple[str, ...] = ()
    damaged: tuple[str, ...] = ()
    was_finished: bool = False


def fill_directory(
    path: Path,
    recipe: Recipe,
    *,
    overwrite: bool = False,
    check: bool = False,
    advance: Advance = nothing,
) -> Filled:
    """Fill a directory, or finish what an earlier run has left there; `advance` gets bytes done.

    `check` reads every byte of a finished one, computes again what the source gives, and writes the
    shards that differ. Raises ConversionError when the directory holds another output (unless
    `overwrite`), another run uses it, it cannot be written, the disk is too small (before the first
    byte), or the source changes meanwhile; a CheckpointError from a piece stops the run and leaves
    finished shards for the next one.
    """
    with held(path, ConversionError):
        output = _Output(path, recipe, advance)
        try:
            with _named_errors(path):
                output.require_same_source()
                if recipe.companions:
                    find_companions(recipe.source.directory)  # before hours of streaming
                manifest = output.claim(overwrite, check)
                return output.make() if manifest is None else output.repair(manifest, check)
        except NeuronMiniMaxError:
            output.require_same_source()  # a change would explain whatever was found
            raise


class _Output:
    """A directory that this run holds."""

    def __init__(self, path: Path, recipe: Recipe, advance: Advance) -> None:
        self.path = path
        self.recipe = recipe
        self.advance = advance
        self.manifest_path = path / recipe.manifest_name
        # as it reads back from a file
        self.identity = comparable(json.loads(json.dumps(recipe.identity)))
        self.source_files = source_files(recipe.source, recipe.companions)
        self.unfinished = Unfinished(path, recipe.source, self.source_files)

    def require_same_source(self) -> None:
        """Raise ConversionError when a file of the source is not the one that was opened."""
        source = self.recipe.source
        for name, found in differences(source.directory, stamped(self.source_files)).items():
            raise ConversionError(
                f"{source.directory} changed while it was read: {name} {found}; run again when "
                "nothing writes to it"
            )

    def claim(self, overwrite: bool, check: bool) -> OutputManifest | None:
        """Return the manifest of the finished output, or None when it has to be made; then
        `.unfinished` is there.
        """
        require_ours(self.path, self.recipe.manifest_name)
        manifest = None
        try:
            manifest, stale = self._look(check)
        except ConversionError as unreadable:
            if not overwrite:
                raise
            stale = str(unreadable)
        if stale and not overwrite:
            raise ConversionError(f"{self.path} {stale}")
        if stale or manifest is None:
            replaced = self._recorded_shards(manifest) if stale else set()
            self._require_only_ours(replaced)
            for name in replaced:  # while there is a record of them
                (self.path / name).unlink(missing_ok=True)
            self.unfinished.begin(self.identity, afresh=bool(stale))
            self.manifest_path.unlink(missing_ok=True)
            return None
        self.unfinished.remove()
        self._remove_partial_files()
        return manifest

    def _recorded_shards(self, manifest: OutputManifest | None) -> set[str]:
        """Return the shards that earlier runs have recorded here."""
        recorded = self.unfinished.journaled() | (set() if manifest is None else manifest.shards)
        return {name for name in recorded if name.endswith(SHARD_SUFFIX)}

    def _require_only_ours(self, replaced: set[str]) -> None:
        """Raise ConversionError when a safetensors file of somebody else would make the output
        unreadable: without an index the only one is read. Beside an index it stays as it is.
        """
        if len(self.shards) > 1:
            return
        ours = replaced | {shard.name for shard in self.shards}
        for path in sorted(self.path.glob("*" + SHARD_SUFFIX)):
            if path.name not in ours:
                raise ConversionError(
                    f"{self.path} holds {path.name}, which is no part of this output; move it "
                    "elsewhere, or choose another directory"
                )

    def _remove_partial_files(self) -> None:
        for path in self.path.glob("*" + PARTIAL_SUFFIX):
            name = path.name.removesuffix(PARTIAL_SUFFIX)
            small = (*SMALL_FILES, self.recipe.manifest_name)
            if name in small or SHARD_NAME.fullmatch(name):
                path.unlink()

    @cached_property
    def shards(self) -> Sequence[StreamedShard]:
        return self.recipe.shards()

    def make(self) -> Filled:
        """Write what is not there yet, after re-reading what is."""
        shards = self.shards
        records: dict[str, TensorRecord] = {}
        missing = []
        for shard in shards:
            found = self.unfinished.trusted(shard)
            if found is None:
                missing.append(shard)
            else:
                records |= found
                self.advance(shard.nbytes)
        kept = {shard.name for shard in shards} - {shard.name for shard in missing}
        for name in (*SMALL_FILES, *(shard.name for shard in missing)):
            (self.path / name).unlink(missing_ok=True)
        self._remove_partial_files()
        records |= self._write(missing)
        self._finish(_in_order(shards, records), before={}, proven=True)
        return Filled(reused_shards=len(kept))

    def repair(self, manifest: OutputManifest, check: bool) -> Filled:
        """Make what of a finished directory is missing, damaged, or of another state of the source.

        The manifest stays until another takes its place: whenever this run ends, it tells the next
        one what is still to be done.
        """
        found = examine(self.path, manifest, everything=check)
        records = read_records(manifest.tensors)
        faults = dict(found.faults)
        damaged = list(found.damaged)
        touched = check or not faults.keys().isdisjoint(manifest.shards)
        shards = self.shards if touched else ()
        if check:
            given: dict[str, TensorRecord] = {}
            for group in self._at_hand(shards):
                given |= digests_of(group, self.recipe.source, self.advance)
            for shard in shards:
                others = [name for name in _names(shard) if given[name] != records.get(name)]
                if others:
                    faults[shard.name] = f"has not what the source gives ({some_of(others)})"
                    damaged += [name for name in others if name not in damaged]
        missing = [
            shard
            for shard in shards
            if shard.name in faults or _names(shard) != _names_in(shard.name, records)
        ]
        if not check:
            kept = manifest.shards - {shard.name for shard in missing}
            self.advance(sum(record.nbytes for record in records.values() if record.shard in kept))
        records |= self._write(missing)
        changes = [f"{name} {fault}: made again" for name, fault in faults.items()]
        if faults or missing or self._small_files_changed(manifest):
            ordered = _in_order(shards, records) if touched else records
            files = self._finish(ordered, found.files, manifest.verified)
            changes += [
                f"{name}: {'taken from the checkpoint again' if name in files else 'removed'}"
                for name in SMALL_FILES
                if name not in faults and _digest(files, name) != _digest(found.files, name)
            ]
        elif found.files != manifest.files or self.source_files != manifest.source_files:
            with suppress(OSError):  # of a directory that may only be read
                renew(self.manifest_path, found.files, self.source_files)
        return Filled(changes=tuple(changes), damaged=tuple(damaged), was_finished=not missing)

    def _finish(
        self, records: Mapping[str, TensorRecord], before: Files, proven: bool
    ) -> dict[str, FileRecord]:
        """Write the small files, then the manifest that vouches for all: whatever it names is on
        the disk before. Return the record of every file. `proven` says whether each shard was
        compared with its sources where the recipe does that.
        """
        shards = {record.shard for record in records.values()}
        names = set(shards)
        if len(shards) > 1:
            weight_map = {name: record.shard for name, record in records.items()}
            write_index(self.path, weight_map, sum(record.nbytes for record in records.values()))
            names.add(INDEX_NAME)
        if self.recipe.companions:
            names.update(copy_companions(self.recipe.source.directory, self.path))
        write_json(self.path / CONFIG_NAME, dict(self.recipe.config()))
        names.add(CONFIG_NAME)
        for name in {*SMALL_FILES, *filter(_is_ours, before)} - names:
            (self.path / name).unlink(missing_ok=True)
        files = {name: record_of(self.path / name, shard=name in shards) for name in sorted(names)}
        self.require_same_source()
        write_json(
            self.manifest_path,
            {
                "identity": self.identity,
                MADE_BY: f"neuron-minimax {__version__}",
                **({"verified": True} if proven and self.recipe.prove else {}),
                **self.recipe.manifest(records),
                "files": files_as_json(files),
                "source_files": files_as_json(self.source_files),
                "tensors": records_as_json(records),
            },
        )
        self.unfinished.remove()
        return files

    def _look(self, check: bool) -> tuple[OutputManifest | None, str]:
        """Return the manifest, if there is one, and why what is there is not this output, nor one
        to go on with: "" when it is.
        """
        choose = "choose another directory, or pass --overwrite to replace it"
        try:
            manifest = read_recorded(self.manifest_path, OutputManifest, ConversionError, choose)
        except FileNotFoundError:
            identity = self.unfinished.identity(choose)
            differs = "" if identity is None else self._differs(identity)
            holds = f"holds the unfinished output of another run ({differs}); {choose}"
            return None, holds if differs else ""
        differs = self._differs(manifest.identity)
        if differs:
            return manifest, f"holds the finished output of another run ({differs}); {choose}"
        changed = changed_source(
            manifest, self.recipe.source, stamp(self.manifest_path).modified_ns
        )
        if changed and not check:
            return manifest, (
                f"was made of other bytes, it seems: {changed}; {self.recipe.compare}, or pass "
                "--overwrite to make it again"
            )
        known = {*self.source_files, CONFIG_NAME, INDEX_NAME, *(manifest.files or ())}
        for name in SMALL_FILES:
            if name not in known and os.path.lexists(self.path / name):
                return manifest, (
                    f"holds {name}, which is no part of this output; put it into the checkpoint if "
                    "it belongs there, or remove it"
                )
        return manifest, ""

    def _differs(self, identity: Mapping[str, Any]) -> str:
        found = comparable(identity)
        keys = sorted(self.identity.keys() | found.keys())
        changed = [key for key in keys if self.identity.get(key) != found.get(key)]
        return f"differs in {', '.join(changed)}" if changed else ""

    def _small_files_changed(self, manifest: OutputManifest) -> bool:
        """Return whether the source has other small files than those that were copied."""
        recorded = manifest.source_files
        return recorded is None or any(
            recorded.get(name) != self.source_files.get(name) for name in COMPANION_FILES
        )

    def _write(self, shards: Sequence[StreamedShard]) -> dict[str, TensorRecord]:
        """Write shards; each is recorded when it is whole, and proven where that is asked for."""
        journal = self.unfinished.write_journal
        prove = self.recipe.prove
        source = self.recipe.source
        sizes = {shard.name: shard.nbytes for shard in shards}
        source.files.require_room(_needs(shards), sizes, self.path)
        records: dict[str, TensorRecord] = {}
        for group in self._at_hand(shards):
            later = journal if prove is None else _not_yet
            records |= write_shards(group, source, self.path, later, self.advance)
            if prove is None:
                continue
            for shard in group:
                own = {tensor.name: records[tensor.name] for tensor in shard.tensors}
                prove(shard, own)
                journal(shard.name, own)
        return records

    def _at_hand(self, shards: Sequence[StreamedShard]) -> Iterator[list[StreamedShard]]:
        """Yield shards in groups whose sources are there."""
        named = {shard.name: shard for shard in shards}
        for names in self.recipe.source.files.at_hand(_needs(shards)):
            yield [named[name] for name in names]


def _needs(shards: Sequence[StreamedShard]) -> Needs:
    return {shard.name: shard.sources for shard in shards}


def _not_yet(shard: str, records: Mapping[str, TensorRecord]) -> None:
    """Record nothing of a shard that is to be proven first."""


def require_ours(directory: Path, manifest_name: str) -> None:
    """Raise ConversionError when a directory has files that no run of the command has left which
    writes this manifest. Raises OSError when it cannot be read.
    """
    known = (directory / manifest_name, directory / UNFINISHED / IDENTITY_NAME)
    if not directory.exists() or any(os.path.lexists(path) for path in known):
        return
    for path in directory.iterdir():
        if path.name not in (UNFINISHED, DOWNLOADS):
            raise ConversionError(
                f"{directory} is not empty (it holds {path.name}) and was not made by this "
                "command; choose a new or empty directory"
            )


@contextmanager
def _named_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one message."""
    try:
        yield
    except OSError as error:
        place = Path(error.filename) if isinstance(error.filename, str) else path
        done = "written" if place.is_relative_to(path) else "read"
        raise ConversionError(
            f"{place} cannot be {done} ({error.strerror or error}); what is finished is kept: mend "
            "it and run again"
        ) from None


def comparable(identity: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an identity that decide whether two outputs are the same."""
    return {name: value for name, value in identity.items() if name != MADE_BY}


def _is_ours(name: str) -> bool:
    """Return whether a recorded file of this name may be one that this module has written."""
    return name in SMALL_FILES or name.endswith(SHARD_SUFFIX)


def _names(shard: StreamedShard) -> list[str]:
    return [tensor.name for tensor in shard.tensors]


def _names_in(shard: str, records: Mapping[str, TensorRecord]) -> list[str]:
    return [name for name, record in records.items() if record.shard == shard]


def _in_order(
    shards: Sequence[StreamedShard], records: Mapping[str, TensorRecord]
) -> dict[str, TensorRecord]:
    return {tensor.name: records[tensor.name] for shard in shards for tensor in shard.tensors}


def _digest(files: Files, name: str) -> str:
    return files[name].sha256 if name in files else ""
