"""The shards of a repository on the Hugging Face hub, each of which is here only while it is
needed, whole and with the digest that the hub publishes.

`model-00001-of-00130.safetensors`   a shard that was downloaded; its digest is compared before use
`.parts/source.json`                 the repository and commit that all of this is of
`.parts/SHARD.START-END`             bytes of a shard that was not here when they were read
`.cache/`                            what huggingface_hub keeps to go on with a download
"""

import glob
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from re import Match
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field

from neuron_minimax.checkpoint.header import (
    TensorEntry,
    header_length,
    parse_header,
    size_text,
)
from neuron_minimax.checkpoint.hub import HUB_ID, WANTED_FILES, download, named_hub_errors
from neuron_minimax.checkpoint.shard_files import Item, Needs, Read, Result, ShardFiles
from neuron_minimax.checkpoint.writer import (
    PARTIAL_SUFFIX,
    make_directory,
    require_space,
    write_json,
)
from neuron_minimax.errors import CheckpointError, ConversionError, some_of
from neuron_minimax.files import (
    Stamp,
    is_plain_name,
    open_regular,
    read_bytes,
    read_json,
    sha256_of,
)
from neuron_minimax.progress import Progress

PARTS = ".parts"
HEADER_GUESS = 100_000  # bytes of a file that hold most headers
AT_ONCE = 8  # requests
SECONDS = 60  # for one


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the hub says of a shard: its size, and the SHA-256 of its bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    nbytes: Annotated[int, Field(ge=0, lt=2**63)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True)
class Repository:
    """One commit of a repository, its shards, and the names of its small files."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    hub_id: str
    shards: Mapping[str, Published]
    small: tuple[str, ...]

    @property
    def match(self) -> Match[str]:
        """The name and the commit, as `download` takes them."""
        match = HUB_ID.fullmatch(self.hub_id)
        assert match is not None
        return match


class HubFiles(ShardFiles):
    """Shards on the hub; the small files are in the directory.

    What is read of a shard that is not here is fetched, and kept. `at_hand` downloads the shards
    that its targets need, and removes each behind the last that does.
    """

    def __init__(self, repository: Repository, directory: Path, progress: Progress) -> None:
        super().__init__(directory)
        self.repository = repository
        self.progress = progress
        self.held: set[str] = set()
        # A shard has no time of its own; its digest stands for it.
        self.stamps |= {name: Stamp(shard.nbytes, 0) for name, shard in repository.shards.items()}
        self.published = {name: shard.sha256 for name, shard in repository.shards.items()}

    @classmethod
    def open(cls, hub_id: str | Path, directory: Path, progress: Progress) -> "HubFiles":
        """Ask the hub what there is, and fetch the small files into a directory.

        What an earlier run has left there of the same commit is gone on with, of another one it is
        removed. Raises CheckpointError when the hub does not give it, or something else is there.
        """
        match = HUB_ID.fullmatch(str(hub_id))
        if match is None or Path(hub_id).parent.is_dir():
            raise CheckpointError(
                f"{hub_id} is no hub id, ORG/NAME or ORG/NAME@REVISION, and what is here already "
                "needs no streaming: leave out --stream",
                usage=True,
            )
        repository = _ask(match)
        try:
            _claim(directory, repository)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or directory} cannot be used ({error.strerror}); choose another "
                "directory"
            ) from None
        with progress.stage(f"downloading the small files of {hub_id}") as advance:
            names = [glob.escape(name) for name in repository.small]
            download(repository.match, names, advance, directory)
        return cls(repository, directory, progress)

    @property
    def title(self) -> str:
        return self.repository.hub_id

    @property
    def stream_option(self) -> str:
        return " --stream"

    def names(self) -> list[str]:
        return sorted(self.repository.shards)

    def exists(self, shard: str) -> bool:
        return shard in self.repository.shards

    def entries(self, shard: str) -> list[TensorEntry]:
        return self._headers(shard)

    @cached_property
    def _headers(self) -> Callable[[str], list[TensorEntry]]:
        """The headers of all shards, fetched together when the first is asked for."""

        def fetch(shard: str) -> list[TensorEntry] | CheckpointError:
            try:
                return self._fetch_header(shard)
            except CheckpointError as error:
                return error

        found = dict(zip(self.names(), self.overlapped(fetch, self.names()), strict=True))

        def of(shard: str) -> list[TensorEntry]:
            try:
                entries = found[shard]
            except KeyError:
                raise CheckpointError(
                    f"{self._title(shard)} is missing, though the index lists it"
                ) from None
            if isinstance(entries, CheckpointError):
                raise entries
            return entries

        return of

    def _fetch_header(self, shard: str) -> list[TensorEntry]:
        size = self.repository.shards[shard].nbytes
        beginning = self.sample(shard, 0, HEADER_GUESS)
        length = header_length(self._title(shard), size, beginning[:8])
        text = beginning[8 : 8 + length]
        if len(text) < length:
            text = self.sample(shard, 8, length)
        return parse_header(self._title(shard), size, text)

    @contextmanager
    def opened(self, shard: str) -> Iterator[Read]:
        if shard in self.held:
            with super().opened(shard) as read:
                yield read
            return

        def read_part(memory: memoryview, position: int) -> int:
            found = self.sample(shard, position, len(memory))
            memory[: len(found)] = found
            return len(found)

        yield read_part

    def sample(self, shard: str, start: int, nbytes: int) -> bytes:
        end = min(start + nbytes, self.repository.shards[shard].nbytes)
        if end <= start:
            return b""
        path = self.directory / PARTS / f"{shard}.{start}-{end}"
        with suppress(FileNotFoundError):
            data = path.read_bytes()
            if len(data) == end - start:  # as it is not after a loss of power, since none is synced
                return data
        data = self._fetch(shard, start, end)
        partial = path.with_name(f"{path.name}{PARTIAL_SUFFIX}")
        partial.write_bytes(data)
        partial.replace(path)
        return data

    def map(self, shard: str) -> tuple[np.memmap, int]:
        if shard not in self.held:
            raise CheckpointError(
                f"{self._title(shard)} is not here: a checkpoint that is streamed cannot be mapped"
            )
        return super().map(shard)

    def drop_pages(self, shards: Iterable[str]) -> None:
        super().drop_pages(self.held & set(shards))

    def overlapped(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            yield from pool.map(function, items)

    def at_hand(self, needs: Needs) -> Iterator[list[str]]:
        """Yield one target at a time, in an order in which few shards are here at once.

        Raises CheckpointError when a shard does not arrive, or not with its digest.
        """
        self._keep(set().union(*needs.values()))
        for target, kept in _steps(needs):
            self._bring(needs[target])
            yield [target]
            self._keep(kept)

    def require_room(self, needs: Needs, nbytes: Mapping[str, int], directory: Path) -> None:
        here = [path for name in self.names() if (path := self.directory / name).is_file()]
        there = sum(path.stat().st_size for path in here)
        needed = self.room(needs, nbytes) - there
        require_space(directory, max(0, needed), ConversionError)

    def room(self, needs: Needs, nbytes: Mapping[str, int]) -> int:
        """Return how many bytes there are at most at once, of targets and of shards."""
        written = 0
        before: Collection[str] = ()
        most = 0
        for target, kept in _steps(needs):
            written += nbytes[target]
            shards = needs[target] | set(before)
            most = max(most, written + sum(self.stamps[shard].nbytes for shard in shards))
            before = kept
        return most

    def remove(self) -> None:
        self.held.clear()
        self.unmap()
        with suppress(OSError):
            _clear(self.directory)
            self.directory.rmdir()

    def _bring(self, shards: Collection[str]) -> None:
        """Download shards that are not here, and compare all with their digests."""
        new = sorted(set(shards) - self.held)
        if not new:
            return
        total = sum(self.stamps[shard].nbytes for shard in new)
        with self.progress.stage(f"downloading {some_of(new)}", total) as advance:
            names = [glob.escape(shard) for shard in new]
            download(self.repository.match, names, advance, self.directory)
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._require_published, new))
        self.held.update(new)

    def _require_published(self, shard: str) -> None:
        """Raise CheckpointError when a shard has not its digest, though it is downloaded again."""
        path = self.directory / shard
        wanted = self.published[shard]
        found = sha256_of(path)
        if found != wanted:
            self.progress(f"{shard} arrived with other bytes than published: once more")
            download(self.repository.match, [glob.escape(shard)], None, self.directory, again=True)
            found = sha256_of(path)
        if found != wanted:
            path.unlink()
            raise CheckpointError(
                f"{self._title(shard)} was downloaded twice and has the SHA-256 {found}, where "
                f"{wanted} is published; it was removed. Run again later, or from another network"
            )
        self._require_same_parts(shard)

    def _require_same_parts(self, shard: str) -> None:
        """Raise CheckpointError when parts that were fetched before are not the shard's."""
        for part in (self.directory / PARTS).glob(f"{glob.escape(shard)}.*-*"):
            start = int(part.name.removeprefix(f"{shard}.").partition("-")[0])
            data = read_bytes(part)
            with open(open_regular(self.directory / shard), "rb") as file:
                file.seek(start)
                if file.read(len(data)) != data:
                    _clear(self.directory)
                    raise CheckpointError(
                        f"{self._title(shard)}: bytes {start} to {start + len(data)} were other "
                        "ones when they were fetched alone; they were removed: run again"
                    )

    def _keep(self, shards: Collection[str]) -> None:
        """Remove the shards that are here and not among these."""
        for shard in set(self.names()) - set(shards):
            self.held.discard(shard)
            (self.directory / shard).unlink(missing_ok=True)
        self.unmap()

    def _fetch(self, shard: str, start: int, end: int) -> bytes:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        match = self.repository.match
        with named_hub_errors(match, f"a part of {shard} of "):
            url = hf_hub_url(match["name"], shard, revision=match["revision"])
            headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}"}
            response = http_backoff("GET", url, headers=headers, timeout=SECONDS)
            hf_raise_for_status(response)
            data: bytes = response.content
        if len(data) != end - start:
            raise CheckpointError(
                f"the hub gave {size_text(len(data))} of {self._title(shard)} where "
                f"{size_text(end - start)} were asked for; a hub that gives no parts of files "
                "cannot be streamed from: leave out --stream"
            )
        return data

    def _title(self, shard: str) -> Path:
        return Path(self.repository.match["name"]) / shard


def _steps(needs: Needs) -> Iterator[tuple[str, set[str]]]:
    """Yield the targets by the last of their shards, each with the shards that later ones need of
    those that are here.
    """
    order = sorted(needs, key=lambda target: sorted(needs[target], reverse=True))
    here: set[str] = set()
    for number, target in enumerate(order, start=1):
        here |= needs[target]
        here &= set().union(*(needs[later] for later in order[number:]))
        yield target, set(here)


def _ask(match: Match[str]) -> Repository:
    """Ask the hub for the files of a repository."""
    from huggingface_hub import HfApi

    with named_hub_errors(match):
        info = HfApi().model_info(match["name"], revision=match["revision"], files_metadata=True)
    shards = {}
    small = []
    for file in info.siblings or ():
        name = file.rfilename
        if not is_plain_name(name):
            continue
        if not name.endswith(".safetensors"):
            small += [name] if any(Path(name).match(pattern) for pattern in WANTED_FILES) else []
            continue
        if file.lfs is None or file.size is None:
            raise CheckpointError(
                f"the hub publishes no SHA-256 of {name} of {match[0]}, which streaming compares; "
                "leave out --stream"
            )
        shards[name] = Published(nbytes=file.size, sha256=file.lfs.sha256)
    return Repository(hub_id=f"{match['name']}@{info.sha}", shards=shards, small=tuple(small))


def _claim(directory: Path, repository: Repository) -> None:
    """Make a directory one of this commit's downloads."""
    marker = directory / PARTS / "source.json"
    try:
        before = read_json(marker, Repository, CheckpointError, "remove it")
    except FileNotFoundError:
        before = None
        if directory.exists() and not marker.parent.exists() and any(directory.iterdir()):
            raise CheckpointError(
                f"{directory} is not empty and holds no download of this command; choose a new or "
                "empty directory"
            ) from None
    if before != repository:
        _clear(directory)
    make_directory(marker.parent)
    fields = {name: vars(shard) for name, shard in repository.shards.items()}
    write_json(
        marker, {"hub_id": repository.hub_id, "shards": fields, "small": list(repository.small)}
    )


def _clear(directory: Path) -> None:
    """Empty a directory of downloads; what shows that it is one goes last."""
    if directory.is_dir():
        for path in sorted(directory.iterdir(), key=lambda path: path.name == PARTS):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
