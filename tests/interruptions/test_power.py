"""What may be found after power was lost, where fsync(2) and rename(2) say it."""

import os
import stat
from pathlib import Path

import pytest

from tests.interruptions.power import Disk, build
from tests.interruptions.shim import Call

FILE = stat.S_IFREG | 0o644
FOLDER = stat.S_IFDIR | 0o755


class Recorder:
    """Makes the calls of a run on a disk, in order; files are named by their paths below `top`."""

    def __init__(self, base: Path) -> None:
        self.top = Path("/run/top")
        self.disk = Disk(self.top, base)
        self.sizes: dict[str, int] = {}

    def __call__(
        self,
        name: str,
        path: str,
        *,
        size: int = 0,
        origin: str = "",
        contents: bytes | None = None,
        flags: int = 0,
    ) -> None:
        mode = FOLDER if name == "mkdir" else FILE
        place = self.top / origin if origin else Path()
        self.disk.apply(Call(1, name, size, 1, mode, flags, self.top / path, place, contents))

    def write(self, path: str, data: bytes, synced: bool = False) -> None:
        """Make a file anew."""
        self("open", path, flags=os.O_CREAT | os.O_TRUNC)
        self("write", path, size=len(data))
        if synced:
            self("fsync", path, size=len(data), contents=data)

    @property
    def found(self) -> list[dict[str, bytes]]:
        """What files may be there, without repetitions."""
        trees = [
            {str(found.path): found.content for found in tree if found.content is not None}
            for tree in self.disk.trees()
        ]
        return [tree for index, tree in enumerate(trees) if tree not in trees[:index]]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/old").write_bytes(b"old")
    return tmp_path / "base"


def test_a_file_that_was_not_synced_may_be_absent_empty_or_zeros(base: Path) -> None:
    run = Recorder(base)
    run.write("new", b"data")
    assert run.found == [
        {"old": b"old", "new": b""},
        {"old": b"old", "new": bytes(4)},
        {"old": b"old"},
    ]


def test_a_file_replaced_by_rename_alone_may_be_empty(base: Path) -> None:
    run = Recorder(base)
    run.write("new", b"data")
    run("rename", "old", origin="new")
    assert {"old": b""} in run.found


def test_a_file_that_was_synced_and_then_renamed_is_the_old_or_the_new_one(base: Path) -> None:
    run = Recorder(base)
    run.write("new", b"data", synced=True)
    run("rename", "old", origin="new")
    assert {tree["old"] for tree in run.found} == {b"old", b"data"}
    run("fsync", "")
    assert run.found == [{"old": b"data"}]


def test_changes_of_names_that_were_not_synced_are_lost_one_by_one(base: Path) -> None:
    run = Recorder(base)
    for name in "ab":
        run.write(name, b"data", synced=True)
    run("unlink", "old")
    assert {frozenset(tree) for tree in run.found} == {
        frozenset(["a", "b"]),
        frozenset(["old"]),
        frozenset(["b"]),
        frozenset(["a"]),
        frozenset(["a", "b", "old"]),
    }


def test_a_directory_that_was_not_synced_in_its_own_takes_all_with_it(base: Path) -> None:
    run = Recorder(base)
    run("mkdir", "inner")
    run.write("inner/file", b"data", synced=True)
    run("fsync", "inner")
    assert run.found == [{"old": b"old", "inner/file": b"data"}, {"old": b"old"}]


def test_a_file_that_was_overwritten_in_place_may_have_its_old_content(base: Path) -> None:
    run = Recorder(base)
    run("open", "old", flags=os.O_CREAT | os.O_TRUNC)
    run("write", "old", size=4)
    assert run.found == [{"old": b"old"}, {"old": b""}, {"old": bytes(4)}]
    run("fsync", "old", size=4, contents=b"data")
    assert run.found == [{"old": b"data"}]


def test_what_may_be_found_is_built_as_it_was(base: Path, tmp_path: Path) -> None:
    (base / "old").chmod(0o640)
    os.utime(base / "old", ns=(5, 5))
    os.link(base / "old", base / "same")
    (base / "inner").mkdir(mode=0o750)
    (base / "inner/link").symlink_to("../old")
    (tree, *_) = Disk(Path("/run/top"), base).trees()
    (tmp_path / "found").mkdir()
    build(tree, tmp_path / "found")
    found = tmp_path / "found/old"
    assert found.read_bytes() == b"old"
    assert stat.S_IMODE(found.stat().st_mode) == 0o640
    assert found.stat().st_mtime_ns == 5
    assert found.samefile(tmp_path / "found/same")
    assert stat.S_IMODE((tmp_path / "found/inner").stat().st_mode) == 0o750
    assert (tmp_path / "found/inner/link").readlink() == Path("../old")
