"""What a file system may hold after power was lost, from a record of the calls before.

Content is there as it was last synced. A name is there, or gone, as its directory was last synced;
of later changes of names none has happened, or all, or all but one. A file that was not synced at
its end has the old content, no byte, or zeros. That is what POSIX promises; ext4 promises more
about order, XFS about zeros less.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.interruptions.shim import Call


@dataclass(eq=False)
class File:
    """A file's content as of its last sync (None: there was none), and what it has besides."""

    synced: bytes | None = None
    size: int = 0
    modified_ns: int = 0
    mode: int = 0o100644
    dirty: bool = False
    truncated: bool = False
    outside: Path | None = None  # a file that was linked from elsewhere
    target: str | None = None  # of a symbolic link

    def content(self, unsynced: str) -> bytes:
        """Return what is found. `unsynced` says what has become of what was not synced: "old",
        "empty" or "zeros".
        """
        if not self.dirty:
            return self.synced or b""
        if unsynced == "zeros":
            return bytes(self.size)
        if unsynced == "empty" and self.truncated:
            return b""
        return self.synced or b""


@dataclass(eq=False)
class Directory:
    """A directory's names now, and as they were last synced."""

    mode: int = 0o040755
    names: dict[str, "File | Directory"] = field(default_factory=dict)
    synced: dict[str, "File | Directory"] = field(default_factory=dict)


Entry = File | Directory
Names = dict[Directory, dict[str, Entry]]


@dataclass(frozen=True, eq=False)
class Edit:
    """One name of a directory, and what it means from now on: None where it is gone."""

    directory: Directory
    name: str
    entry: Entry | None

    @property
    def key(self) -> tuple[int, str]:
        return id(self.directory), self.name


@dataclass(frozen=True)
class Found:
    """One entry of a tree that may be found, by its path below the top.

    `link` is the first path of the same file.
    """

    path: Path
    mode: int
    content: bytes | None = None
    modified_ns: int = 0
    outside: Path | None = None
    target: str | None = None
    link: Path | None = None


Tree = tuple[Found, ...]


class Disk:
    """The directory `top`, while recorded calls change it; at first it held what `base` holds, all
    of it synced.
    """

    def __init__(self, top: Path, base: Path) -> None:
        self.top = top
        self.root = _read_directory(base, {})
        self.pending: list[tuple[Edit, ...]] = []

    def apply(self, call: Call) -> None:
        """Do what a call did. Raises KeyError when the record has a gap."""
        if call.name == "open":
            self._open(call)
        elif call.name in ("write", "truncate"):
            self._change(call)
        elif call.name == "fsync":
            self._sync(call)
        elif call.name == "mkdir":
            self._edit(call.path, Directory(call.mode))
        elif call.name in ("unlink", "rmdir"):
            self._edit(call.path, None)
        elif call.name == "rename":
            moved = self._entry(call.origin)
            assert moved is not None, f"{call.origin} was moved, and is not known"
            gone = Edit(*self._place(call.origin), None)
            self._do((gone, Edit(*self._place(call.path), moved)))
        elif call.name == "link":
            entry = self._entry(call.origin) if self._is_below(call.origin) else None
            self._edit(call.path, entry or File(outside=call.origin))
        elif call.name == "symlink":
            self._edit(call.path, File(target=str(call.origin)))
        elif call.name == "attributes":
            entry = self._entry(call.path)
            if entry is not None:
                entry.mode = call.mode
            if isinstance(entry, File):
                entry.modified_ns = call.modified_ns
        else:
            raise AssertionError(f"{call.name} is no call that power loss knows")

    def trees(self) -> Iterator[Tree]:
        """Yield what may be found when power is lost now."""
        lost = self._names(())
        kept = self._names(self.pending)
        for unsynced in ("old", "empty", "zeros"):
            yield tuple(self._walk(kept, unsynced))
        yield tuple(self._walk(lost, "old"))
        for index, dropped in enumerate(self.pending):
            keys = {edit.key for edit in dropped}
            later = [
                edits
                for edits in self.pending[index + 1 :]
                if keys.isdisjoint(edit.key for edit in edits)
            ]
            yield tuple(self._walk(self._names([*self.pending[:index], *later]), "empty"))

    def _names(self, edits: Sequence[tuple[Edit, ...]]) -> Names:
        names: Names = {}
        for edit in (edit for together in edits for edit in together):
            found = names.setdefault(edit.directory, dict(edit.directory.synced))
            _put(found, edit)
        return names

    def _walk(self, names: Names, unsynced: str) -> Iterator[Found]:
        seen: dict[File, Path] = {}

        def walk(directory: Directory, place: Path) -> Iterator[Found]:
            entries = names.get(directory, directory.synced)
            for name, entry in sorted(entries.items()):
                path = place / name
                if isinstance(entry, Directory):
                    yield Found(path, entry.mode)
                    yield from walk(entry, path)
                    continue
                yield Found(
                    path,
                    entry.mode,
                    entry.content(unsynced),
                    entry.modified_ns,
                    entry.outside,
                    entry.target,
                    seen.get(entry),
                )
                seen.setdefault(entry, path)

        return walk(self.root, Path())

    def _open(self, call: Call) -> None:
        found = self._entry(call.path)
        if found is None:
            self._edit(call.path, File(mode=call.mode, modified_ns=call.modified_ns))
        elif call.flags & os.O_TRUNC:
            self._change(call)

    def _change(self, call: Call) -> None:
        file = self._entry(call.path)
        if file is None:  # removed while it is open
            return
        assert isinstance(file, File), f"{call.path} is a directory"
        file.dirty = True
        file.truncated = file.truncated or call.size < file.size
        file.size = call.size
        file.modified_ns = call.modified_ns

    def _sync(self, call: Call) -> None:
        entry = self._entry(call.path)
        if isinstance(entry, Directory):
            entry.synced = dict(entry.names)
            rest = []
            for edits in self.pending:
                # Of a move into another directory, the other half may still be lost.
                left = tuple(edit for edit in edits if edit.directory is not entry)
                if left:
                    rest.append(left)
            self.pending = rest
        elif entry is not None:
            entry.synced = call.contents
            entry.size = call.size
            entry.modified_ns = call.modified_ns
            entry.dirty = False
            entry.truncated = False

    def _edit(self, path: Path, entry: Entry | None) -> None:
        self._do((Edit(*self._place(path), entry),))

    def _do(self, edits: tuple[Edit, ...]) -> None:
        for edit in edits:
            _put(edit.directory.names, edit)
        self.pending.append(edits)

    def _is_below(self, path: Path) -> bool:
        return path.is_relative_to(self.top)

    def _place(self, path: Path) -> tuple[Directory, str]:
        directory = self._entry(path.parent)
        assert isinstance(directory, Directory), f"{path.parent} is no known directory"
        return directory, path.name

    def _entry(self, path: Path) -> Entry | None:
        entry: Entry = self.root
        for name in path.relative_to(self.top).parts:
            if not isinstance(entry, Directory) or name not in entry.names:
                return None
            entry = entry.names[name]
        return entry


def build(tree: Tree, top: Path) -> None:
    """Make an empty directory hold what was found."""
    for found in tree:
        path = top / found.path
        if found.content is None:
            path.mkdir()
            path.chmod(stat.S_IMODE(found.mode))
        elif found.target is not None:
            path.symlink_to(found.target)
        elif found.link is not None:
            os.link(top / found.link, path)
        elif found.outside is not None:
            os.link(found.outside, path)
        else:
            path.write_bytes(found.content)
            path.chmod(stat.S_IMODE(found.mode))
            os.utime(path, ns=(found.modified_ns, found.modified_ns))


def _put(names: dict[str, Entry], edit: Edit) -> None:
    if edit.entry is None:
        names.pop(edit.name, None)
    else:
        names[edit.name] = edit.entry


def _read_directory(path: Path, known: dict[int, File]) -> Directory:
    directory = Directory(path.stat().st_mode)
    for entry in path.iterdir():
        found = entry.lstat()
        if stat.S_ISDIR(found.st_mode):
            directory.names[entry.name] = _read_directory(entry, known)
            continue
        if found.st_ino not in known:
            known[found.st_ino] = _read_file(entry, found)
        directory.names[entry.name] = known[found.st_ino]
    directory.synced = dict(directory.names)
    return directory


def _read_file(path: Path, found: os.stat_result) -> File:
    if stat.S_ISLNK(found.st_mode):
        return File(target=os.readlink(path), mode=found.st_mode)
    return File(path.read_bytes(), found.st_size, found.st_mtime_ns, found.st_mode)
