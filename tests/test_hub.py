"""A checkpoint named by its hub id is the snapshot in huggingface_hub's own cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuron_minimax.checkpoint.hub import local_directory
from tests.hub_stand_in import COMMIT, Hub, serving
from tests.tiny import write_tiny

PROGRAM = """
import sys
from neuron_minimax.checkpoint.hub import local_directory
from neuron_minimax.errors import CheckpointError
try:
    print(local_directory(sys.argv[1]))
except CheckpointError as error:
    print(f"refused: {error}")
"""


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache as huggingface_hub lays it out, with one repository in it."""
    home = tmp_path_factory.mktemp("hub")
    repository = home / "hub" / "models--org--tiny"
    write_tiny(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return home


def found(home: Path, name: str) -> str:
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize("name", ["org/tiny", "org/tiny@main", f"org/tiny@{COMMIT}"])
def test_a_hub_id_is_its_snapshot_in_the_cache(hub_home, name):
    assert found(hub_home, name) == str(hub_home / "hub/models--org--tiny/snapshots" / COMMIT)


def test_a_name_that_the_hub_does_not_give_is_refused_with_the_next_step(hub_home):
    answer = found(hub_home, "org/other")
    assert answer.startswith("refused: org/other is neither a directory here nor")
    assert "hf download org/other" in answer


@pytest.mark.parametrize("name", ["a--b/c", "org/name.git", "org/" + "n" * 120])
def test_a_name_that_no_repository_can_have_is_refused_in_one_message(hub_home, name):
    answer = found(hub_home, name)
    assert answer.startswith(f"refused: {name} is neither a directory here nor")
    assert len(answer.splitlines()) == 1


def test_paths_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    for path in ("org/tiny", "org/missing", "./missing", "missing", tmp_path / "a" / "b"):
        assert local_directory(path) == Path(path)


def test_every_command_takes_a_hub_id(hub_home, tmp_path):
    environment = {**os.environ, "HF_HOME": str(hub_home), "HF_HUB_OFFLINE": "1"}
    plan = ["plan", "org/tiny", "--instance", "trn2.48xlarge", "--tp-degree", "2", "--json"]
    commands = [
        ["inspect", "org/tiny"],
        ["convert", "org/tiny", str(tmp_path / "converted")],
        ["verify", "org/tiny", str(tmp_path / "converted")],
        ["cache", "org/tiny", str(tmp_path / "cache")],
    ]
    for command in [*commands, plan]:
        done = subprocess.run(
            [sys.executable, "-m", "neuron_minimax", *command],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0 or command is plan, done.stderr
        assert done.stderr == "" or "error" not in done.stderr


DOWNLOAD = """
import sys
from neuron_minimax.checkpoint.hub import local_directory
from tests.heard import Heard
heard = Heard()
print(local_directory("org/tiny", progress=heard))
(stage,) = heard.stages
print(stage.what)
print(sum(stage.counts))
print(stage.doing[-1])
"""


def test_a_download_tells_how_many_bytes_and_files_are_there(tmp_path):
    checkpoint = write_tiny(tmp_path / "checkpoint", shards=2)
    nbytes = sum(path.stat().st_size for path in checkpoint.iterdir())
    count = len(list(checkpoint.iterdir()))
    with serving(Hub(checkpoint)) as hub:
        environment = hub.environment(tmp_path / "home")
        command = [sys.executable, "-c", DOWNLOAD]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    directory, what, counted, doing = done.stdout.splitlines()
    assert Path(directory).name == COMMIT
    assert {path.name for path in Path(directory).iterdir()} == {
        path.name for path in checkpoint.iterdir()
    }
    assert what == "downloading org/tiny"
    assert int(counted) == nbytes
    assert doing == f"{count} of {count} files are there"
    assert "%|" not in done.stderr  # huggingface_hub's own bars
