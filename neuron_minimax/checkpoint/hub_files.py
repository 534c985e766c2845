"""The shards of a repository on the Hugging Face hub, each of which is here only while it is
needed, whole and with the digest that the hub publishes.

`model-00001-of-00130.safetensors`   a shard that was downloaded; its digest is compared before use
`.parts/source.json`                 the repository and commit that all of this is of
`.parts/SHARD.START-END`             bytes of a shard that was not here when they were read
`.cache/`                            what huggingface_hub keeps to go on with a download
"""

import glob
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from neuron_minimax.checkpoint.header import (
    TensorEntry,
    header_length,
    parse_header,
)
from neuron_minimax.checkpoint.hub import HUB_ID, download
from neuron_minimax.checkpoint.repository import Repository
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
    open_regular,
    read_bytes,
    read_json,
    sha256_of,
)
from neuron_minimax.progress import Progress

PARTS = ".parts"
HEADER_GUESS = 100_000  # bytes of a file that hold most headers
AT_ONCE = 8  # requests, and files whose digest is computed


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
        self._beginnings: dict[str, bytes] = {}
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
        repository = Repository.ask(match)
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
        files = cls(repository, directory, progress)
        files._fetch_beginnings()
        return files

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
        beginning = self._beginnings.get(shard)
        if beginning is None:
            raise CheckpointError(
                f"{self.repository.title_of(shard)} is missing, though the index lists it"
            )
        size = self.repository.shards[shard].nbytes
        end = 8 + header_length(self.repository.title_of(shard), size, beginning[:8])
        return parse_header(self.repository.title_of(shard), size, beginning[8:end])

    def _fetch_beginnings(self) -> None:
        """Fetch every shard's bytes up to the end of its header.

        Raises CheckpointError, at the first that does not arrive, or for a hub without parts.
        """
        self.repository.require_parts()
        found = self.overlapped(self._beginning, self.names())
        self._beginnings = dict(zip(self.names(), found, strict=True))

    def _beginning(self, shard: str) -> bytes:
        beginning = self.sample(shard, 0, HEADER_GUESS)
        size = self.repository.shards[shard].nbytes
        end = 0
        with suppress(CheckpointError):  # which `entries` raises
            end = 8 + header_length(self.repository.title_of(shard), size, beginning[:8])
        return beginning + self.sample(shard, len(beginning), end - len(beginning))

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
        data = self.repository.part(shard, start, end)
        # Two threads may read the same bytes: the samples of a small shard are the same ones.
        partial = path.with_name(f"{path.name}.{threading.get_ident()}{PARTIAL_SUFFIX}")
        partial.write_bytes(data)
        partial.replace(path)
        return data

    def map(self, shard: str) -> tuple[np.memmap, int]:
        if shard not in self.held:
            raise CheckpointError(
                f"{self.repository.title_of(shard)} is not here: a checkpoint that is streamed "
                "cannot be mapped"
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
                f"{self.repository.title_of(shard)} was downloaded twice and has the SHA-256 "
                f"{found}, where {wanted} is published; it was removed. Run again later, or from "
                "another network"
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
                        f"{self.repository.title_of(shard)}: bytes {start} to "
                        f"{start + len(data)} were other ones when they were fetched alone; they "
                        "were removed: run again"
                    )

    def _keep(self, shards: Collection[str]) -> None:
        """Remove the shards that are here and not among these."""
        for shard in set(self.names()) - set(shards):
            self.held.discard(shard)
            (self.directory / shard).unlink(missing_ok=True)
        self.unmap()


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
