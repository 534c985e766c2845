"""How commands end from outside: by a signal, a closed pipe, a full disk behind standard output."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from neuron_minimax.cli.ending import KEPT, exit_code, resumable
from neuron_minimax.errors import NeuronMiniMaxError
from tests.full_size import write_sparse
from tests.test_processes import is_running, wait_for_the_end
from tests.tiny import write_tiny

COMMAND = [sys.executable, "-m", "neuron_minimax"]
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("stopping") / "checkpoint")


@pytest.fixture(scope="module")
def long_to_read(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 5 GB in few tensors, holes all."""
    directory = tmp_path_factory.mktemp("large") / "checkpoint"
    return write_sparse(directory, num_hidden_layers=20, num_local_experts=16)


def children(parent: int) -> list[int]:
    path = Path(f"/proc/{parent}/task/{parent}/children")
    return list(map(int, path.read_text().split()))


def has_worked(process: int) -> bool:
    """Say whether a process has used the CPU: its caller has done more than start it."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12]) > 5  # ticks of a hundredth of a second


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_and_its_processes_with_one_line(
    long_to_read: Path, number: signal.Signals, code: int
) -> None:
    command = [*COMMAND, "inspect", str(long_to_read), "--check-values"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        limit = time.monotonic() + 300
        while not (workers := children(process.pid)) or not all(map(has_worked, workers)):
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(number)
        out, said = process.communicate(timeout=120)
        assert process.returncode == code
        assert out == b""
        assert said.decode().splitlines()[-1] == f"stopped by {number.name}; {KEPT}"
        assert b"Traceback" not in said
        wait_for_the_end(workers)


def test_a_signal_amid_an_import_ends_a_command_with_one_line(tmp_path: Path) -> None:
    command = [*COMMAND, "train", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        maps = Path(f"/proc/{process.pid}/maps")
        limit = time.monotonic() + 300
        while "libtorch" not in maps.read_text():  # which is being imported
            assert process.poll() is None
            assert time.monotonic() < limit
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert said == f"stopped by SIGINT; {KEPT}\n"
    assert not (tmp_path / "out").exists()


def test_an_error_that_an_import_makes_of_an_interruption_is_the_interruption(capsys) -> None:
    def importing() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ImportError("the extension module failed to import") from None
        return 0

    assert exit_code(importing) == 143
    assert capsys.readouterr().err == f"stopped by SIGTERM; {KEPT}\n"


def test_an_error_long_after_an_interruption_that_was_obeyed_is_itself(capsys) -> None:
    def going_on() -> int:
        with suppress(KeyboardInterrupt):  # as a chat does, which ends a reply
            signal.raise_signal(signal.SIGINT)
        raise NeuronMiniMaxError("the disk is full")

    assert exit_code(going_on) == 1
    assert capsys.readouterr().err == "error: the disk is full\n"


@pytest.mark.parametrize("arguments", [["inspect", "{checkpoint}"], ["--help"], ["--version"]])
def test_output_that_cannot_be_written_is_an_error(checkpoint: Path, arguments: list[str]) -> None:
    if not FULL.exists():
        pytest.skip("this system has no /dev/full")
    given = [argument.format(checkpoint=checkpoint) for argument in arguments]
    with FULL.open("w") as full:
        done = subprocess.run(
            [*COMMAND, *given], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: input or output: No space left on device\n"


def test_a_closed_pipe_ends_a_command_quietly(checkpoint: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, "inspect", str(checkpoint)],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_output_without_an_encoding_for_a_name_is_escaped(tmp_path: Path) -> None:
    directory = write_tiny(tmp_path / "größe")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*COMMAND, "inspect", str(directory)], env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe" in done.stdout


def test_this_module_knows_a_process_that_has_ended() -> None:
    process = subprocess.Popen(["true"])
    wait_for_the_end([process.pid])
    process.wait()
    assert not is_running(process.pid)


@pytest.mark.parametrize("exact", ["", "graph 1 of 3 is kept; run it again"])
def test_advice_is_given_once_by_who_knows_most(
    exact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        with resumable("run the same command again"):
            stop = KeyboardInterrupt()
            if exact:
                stop.add_note(exact)
            raise stop

    assert exit_code(work) == 130
    said = exact or "run the same command again"
    assert capsys.readouterr().err == f"stopped by SIGINT; {said}\n"
