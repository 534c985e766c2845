"""A checkpoint on the hub is converted shard by shard: each is downloaded, compared with its
published digest, converted, and removed.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from neuron_minimax.checkpoint.header import read_header
from neuron_minimax.checkpoint.hub_files import HubFiles
from neuron_minimax.checkpoint.index import INDEX_NAME
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.repository import Published, Repository
from neuron_minimax.checkpoint.writer import write_checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.progress import SILENT
from tests.hub_stand_in import COMMIT, Hub, serving
from tests.opened import contents, convert
from tests.tiny import tiny_config, tiny_tensors
from tests.tiny_tokenizer import write_tokenizer

SHARDS = 5  # of three layers, so that layers lie in two or three of them
LAYERS = 3
FIRST = f"model-00001-of-{SHARDS:05d}.safetensors"
SECOND = f"model-00002-of-{SHARDS:05d}.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A checkpoint whose tensors lie layer by layer, as the published ones do."""
    directory = write_tokenizer(tmp_path_factory.mktemp("source") / "checkpoint", 384)
    fields = tiny_config(num_hidden_layers=LAYERS, num_local_experts=2, vocab_size=384)
    tensors = sorted(tiny_tensors(ModelConfig.from_dict(fields)), key=lambda row: _place(row[0]))
    write_checkpoint(directory, fields, tensors, SHARDS)
    return directory


def _place(name: str) -> tuple[int, str]:
    parts = name.split(".")
    if parts[1] == "layers":
        return int(parts[2]), name
    return (-1 if "embed" in name else 99), name


@pytest.fixture(scope="module")
def wanted(checkpoint, tmp_path_factory) -> Path:
    """What a conversion of the files gives."""
    out = tmp_path_factory.mktemp("wanted") / "out"
    convert(checkpoint, out)
    return out


# Runs the command lines that it reads, each in a forked process that ends at its n-th change of a
# file, if it is told so. Importing once saves a second for each.
PROGRAM = """
import json, os, signal, sys
from neuron_minimax.cli import main
import huggingface_hub.file_download, huggingface_hub.hf_api

CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")


def run(arguments, last, folder):
    me = os.getpid()
    count = 0

    def hook(event, given):
        nonlocal count
        writes = event == "open" and isinstance(given[2], int) and given[2] & 0o3
        if (writes or event in CHANGES) and os.getpid() == me:
            count += 1
            if count == last:
                os.kill(me, signal.SIGKILL)

    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.addaudithook(hook)
    code = main(arguments)
    print(count, end="", file=open(f"{folder}/count", "w"), flush=True)
    sys.stdout.flush()
    os._exit(code)


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(*json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a command ended, what it said, and how many files it changed."""

    returncode: int
    stdout: str
    stderr: str
    changes: int


class Commands(Hub):
    """A hub, and a process whose commands ask it."""

    def start(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env=self.environment(folder / "home"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object, last: int = 0) -> Done:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        (self.folder / "count").write_text("0")
        line = [[str(argument) for argument in arguments], last, str(self.folder)]
        self.process.stdin.write(json.dumps(line) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        said = [(self.folder / name).read_text() for name in ("stdout", "stderr", "count")]
        return Done(code, said[0], said[1], int(said[2]))

    def convert(self, out: Path, *options: str, last: int = 0) -> Done:
        return self.run("convert", "org/tiny", out, "--stream", *options, last=last)


@pytest.fixture(scope="module")
def commands(checkpoint, tmp_path_factory) -> Iterator[Commands]:
    with serving(Commands(checkpoint)) as hub:
        hub.start(tmp_path_factory.mktemp("commands"))
        yield hub
        hub.process.stdin.close()
        hub.process.stdout.close()
        hub.process.wait()


@pytest.fixture
def hub(commands, monkeypatch) -> Iterator[Commands]:
    """The same hub, without the faults of the test before."""
    commands.forget()
    return commands


def tensors_of(directory: Path) -> dict[str, object]:
    """All files of an output but for the manifest's records of when and where from."""
    found = contents(directory)
    for name in ("source_files", "verified"):
        found["conversion.json"].pop(name, None)
    return found


def shards_in(directory: Path) -> set[str]:
    return {path.name for path in directory.glob("*.safetensors")}


def test_a_streamed_conversion_is_that_of_the_files_and_holds_a_few_of_them(
    hub, wanted, tmp_path, checkpoint
):
    out = tmp_path / "out"
    here: list[set[str]] = []
    sizes: list[int] = []

    def look(name: str) -> None:
        if name.endswith(".safetensors"):
            found = [*out.glob("*.safetensors"), *out.glob(".download/*.safetensors")]
            sizes.append(sum(path.stat().st_size for path in found))
            here.append(shards_in(out / ".download") | {name})

    hub.before = look
    said = hub.convert(out, "--dry-run")
    assert not here
    assert not out.exists()
    done = hub.convert(out)
    assert done.returncode == 0, done.stderr
    assert tensors_of(out) == tensors_of(wanted)
    assert not (out / ".download").exists()
    manifest = json.loads((out / "conversion.json").read_text())
    assert manifest["verified"]
    for name in shards_in(checkpoint):
        assert hub.given[name] == (checkpoint / name).stat().st_size  # once
    needed = _shards_of_layers(checkpoint)
    assert max(map(len, here)) <= max(map(len, needed)) + 1  # the embedding's is kept for the end
    most = float(said.stdout.partition("disk needed: at most ")[2].partition(" MB")[0])
    assert max(sizes) <= most * 1e6 < sum(p.stat().st_size for p in checkpoint.iterdir()) * 2

    again = hub.convert(out)
    assert "is up to date" in again.stdout, again.stderr
    assert sum(hub.given[name] for name in shards_in(checkpoint)) == sum(
        (checkpoint / name).stat().st_size for name in shards_in(checkpoint)
    )


def _shards_of_layers(checkpoint: Path) -> list[set[str]]:
    weight_map = json.loads((checkpoint / INDEX_NAME).read_text())["weight_map"]
    return [
        {shard for name, shard in weight_map.items() if f".layers.{layer}." in name}
        for layer in range(LAYERS)
    ]


def test_the_files_verify_what_was_streamed_and_the_hub_too(hub, checkpoint, tmp_path):
    out = tmp_path / "out"
    assert hub.convert(out).returncode == 0
    again = hub.run("verify", "org/tiny", out, "--stream")
    assert again.returncode == 0, again.stderr
    assert not (out / ".download").exists()
    shard = out / "model-00002-of-00004.safetensors"
    entry = next(entry for entry in read_header(shard) if entry.dtype == "F8_E4M3")
    with open(shard, "r+b") as file:
        file.seek(entry.start)
        code = file.read(1)[0]
        file.seek(entry.start)
        file.write(bytes([code ^ 8]))
    for arguments in (("org/tiny", out, "--stream"), (checkpoint, out)):
        found = hub.run("verify", *arguments)
        assert found.returncode == 1
        assert entry.name in found.stdout
    mended = hub.convert(out, "--check")
    assert mended.returncode == 0, mended.stderr
    assert hub.run("verify", checkpoint, out).returncode == 0


def test_a_shard_with_other_bytes_is_downloaded_once_more(hub, wanted, tmp_path):
    hub.spoiled[SECOND] = 1
    done = hub.convert(tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert f"{SECOND} arrived with other bytes" in done.stderr
    assert tensors_of(tmp_path / "out") == tensors_of(wanted)


def test_a_shard_that_arrives_twice_with_other_bytes_is_refused_by_name(hub, wanted, tmp_path):
    out = tmp_path / "out"
    hub.spoiled[SECOND] = 2
    refused = hub.convert(out)
    assert refused.returncode == 1
    (message,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert f"org/tiny/{SECOND} was downloaded twice" in message
    assert not (out / ".download" / SECOND).exists()
    assert hub.convert(out).returncode == 0
    assert tensors_of(out) == tensors_of(wanted)


def test_a_connection_that_ends_is_gone_on_with(hub, wanted, checkpoint, tmp_path):
    size = (checkpoint / SECOND).stat().st_size
    hub.cut[SECOND] = size // 2
    out = tmp_path / "out"
    for _ in range(2):  # huggingface_hub may go on by itself
        done = hub.convert(out)
        if done.returncode == 0:
            break
        assert len(done.stderr.strip().splitlines()[-1]) < 500
        assert "Traceback" not in done.stderr
    assert done.returncode == 0, done.stderr
    assert tensors_of(out) == tensors_of(wanted)


def without_digests(hub: Hub) -> None:
    hub.has_digests = False


def without_parts(hub: Hub) -> None:
    hub.gives_parts = False


@pytest.mark.parametrize(
    ("change", "words"),
    [(without_digests, "publishes no SHA-256"), (without_parts, "gives no parts of files")],
    ids=["digests", "parts"],
)
def test_a_hub_that_cannot_be_streamed_from_is_named(
    hub, tmp_path, change: Callable[[Hub], None], words
):
    change(hub)
    refused = hub.convert(tmp_path / "out")
    assert refused.returncode == 1
    assert refused.stderr.count(words) == 1
    assert "leave out --stream" in refused.stderr
    sizes = [path.stat().st_size for path in hub.checkpoint.glob("*.safetensors")]
    assert sum(hub.given[name] for name in shards_in(hub.checkpoint)) <= max(sizes)  # not of each


def test_threads_may_read_the_same_bytes(tmp_path, monkeypatch):
    """The three samples of a shard that is shorter than one are the same."""
    shard = "model.safetensors"
    published = Published(nbytes=8, sha256="0" * 64)
    repository = Repository(hub_id=f"org/tiny@{COMMIT}", shards={shard: published}, small=())
    (tmp_path / ".parts").mkdir()
    files = HubFiles(repository, tmp_path, SILENT)
    both_wrote = threading.Barrier(2, timeout=60)
    replace = Path.replace

    def replace_together(path: Path, target: Path) -> Path:
        both_wrote.wait()
        return replace(path, target)

    monkeypatch.setattr(Repository, "part", lambda *_: b"elements")
    monkeypatch.setattr(Path, "replace", replace_together)
    found = list(files.overlapped(lambda _: files.sample(shard, 0, 8), range(2)))
    assert found == [b"elements"] * 2


def test_a_directory_is_not_streamed(hub, checkpoint, tmp_path):
    refused = hub.run("convert", checkpoint, tmp_path / "out", "--stream")
    assert refused.returncode == 2
    assert "leave out --stream" in refused.stderr


def test_a_directory_of_somebody_else_is_left_alone(hub, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    refused = hub.convert(out)
    assert refused.returncode == 1
    assert "letter.txt" in refused.stderr
    assert [path.name for path in out.iterdir()] == ["letter.txt"]


def test_what_is_left_of_another_commit_is_not_used(hub, wanted, tmp_path):
    out = tmp_path / "out"
    hub.commit = "f" * 40
    hub.spoiled[SECOND] = 2
    assert hub.convert(out).returncode == 1
    assert (out / ".download" / ".parts").is_dir()
    hub.commit = "0" * 40
    hub.parts.clear()
    assert hub.convert(out).returncode == 0
    assert hub.parts[FIRST]  # asked for again
    assert tensors_of(out) == tensors_of(wanted)


def test_other_bytes_under_the_same_samples_are_noticed(hub, checkpoint, tmp_path):
    """Between the samples of a shard the fingerprint sees nothing; its digest does."""
    out = tmp_path / "out"
    assert hub.convert(out).returncode == 0
    shard = checkpoint / SECOND
    data = shard.read_bytes()
    place = 100_000  # behind the first sample, before the second
    try:
        shard.write_bytes(data[:place] + bytes([data[place] ^ 8]) + data[place + 1 :])
        hub.commit = "e" * 40
        refused = hub.convert(out)
        assert refused.returncode == 1
        assert f"{SECOND} of org/tiny@{hub.commit} has another SHA-256" in refused.stderr
    finally:
        shard.write_bytes(data)


def test_a_run_that_is_killed_anywhere_is_gone_on_with(hub, wanted, checkpoint, tmp_path):
    out = tmp_path / "out"
    nbytes = {name: (checkpoint / name).stat().st_size for name in shards_in(checkpoint)}
    changes = hub.convert(out).changes
    for left in (changes * 3 // 4, changes // 2, changes // 4, 8, 1):
        code = 0
        while code == 0:  # how many changes a download takes differs a little from run to run
            shutil.rmtree(out)
            hub.given.clear()
            killed = hub.convert(out, last=changes - left)
            code, changes = killed.returncode, killed.changes if killed.returncode == 0 else changes
        assert code == -signal.SIGKILL
        assert hub.convert(out).returncode == 0
        assert tensors_of(out) == tensors_of(wanted)
        assert not (out / ".download").exists()
        more = {name: hub.given[name] - size for name, size in nbytes.items()}
        assert all(0 <= nbytes_more <= nbytes[name] for name, nbytes_more in more.items())
        # what was on its way when it was killed may have been asked for again
        assert sum(map(bool, more.values())) <= 3


def test_what_is_read_of_a_streamed_checkpoint_is_what_its_files_hold(hub, checkpoint, tmp_path):
    program = (
        "import sys; from neuron_minimax import Checkpoint;"
        "c = Checkpoint.stream('org/tiny', sys.argv[1]);"
        "print(c.fingerprint, c.convention, len(c.problems), c.inspect().bytes)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "out")],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    opened = Checkpoint.open(checkpoint)
    expected = f"{opened.fingerprint} {opened.convention} 0 {opened.nbytes}"
    assert done.stdout.strip() == expected, done.stderr
    assert os.listdir(tmp_path / "out") == [".download"]
    assert not hub.given.keys() & shards_in(checkpoint)


WRONG_HALVES = """
import sys
from neuron_minimax import fp8
from neuron_minimax.cli import main

halve = fp8.halve_into


def wrong(halved, codes, spare):
    found = halve(halved, codes, spare)
    halved[0, 0] ^= 8
    return found


fp8.halve_into = wrong
sys.exit(main(["convert", "org/tiny", sys.argv[1], "--stream"]))
"""


def test_a_layer_that_is_not_what_its_sources_give_does_not_count_as_finished(
    hub, wanted, tmp_path
):
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", WRONG_HALVES, str(out)],
        env=hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "does not equal its sources" in done.stderr
    assert not (out / "conversion.json").exists()
    assert hub.convert(out).returncode == 0
    assert tensors_of(out) == tensors_of(wanted)
