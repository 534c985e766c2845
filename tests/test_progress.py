"""Long work tells what it does on standard error, live on a terminal and else in lines; standard
output holds the result alone.
"""

import json
import os
import pty
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import neuron_minimax as nm
from neuron_minimax.cli.progress import Shown, Stage
from neuron_minimax.progress import duration
from tests.heard import Heard
from tests.tiny import write_tiny
from tests.waiting import wait_until

LIMIT = 60  # seconds, also on a slow machine


Said = Callable[[], str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    """All that standard error, which is no terminal, has been told so far."""
    parts: list[str] = []

    def read() -> str:
        parts.append(capsys.readouterr().err)
        return "".join(parts)

    return read


def test_a_stage_is_told_of_in_lines_again_and_again_and_at_its_end(said: Said) -> None:
    progress = Shown(first=0.01, every=0.01)
    with progress.stage("reading", 4_000_000) as advance:
        advance(1_000_000, "shard 1")
        wait_until(lambda: said().count("reading: shard 1, 1.0 MB of 4.0 MB, 25%, ") > 1)
        advance(3_000_000)
        wait_until(lambda: "reading: shard 1, 4.0 MB of 4.0 MB, 100%, " in said())
    assert re.search(r"^reading: 4\.0 MB in \d+ s\n\Z", said(), re.MULTILINE)


def test_a_short_stage_says_nothing(said: Said) -> None:
    with Shown(first=LIMIT).stage("reading") as advance:
        advance(1)
    assert said() == ""


def test_a_stage_that_fails_has_no_end(said: Said) -> None:
    with pytest.raises(ZeroDivisionError), Shown(first=0).stage("reading"):
        raise ZeroDivisionError
    assert "done in" not in said()


@pytest.fixture
def hectic() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hectic")
def test_stages_and_lines_of_several_threads_are_whole_lines(said: Said) -> None:
    progress = Shown(first=0, every=0.001)

    def work(name: str) -> None:
        with progress.stage(name) as advance:
            for number in range(50):
                advance(doing=f"part {number}")
                progress(f"{name} says {number}")

    threads = [threading.Thread(target=work, args=(f"graph_{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    line = re.compile(r"graph_\d(: (part \d+, )?\d+ s| says \d+|: done in \d+ s)")
    lines = said().splitlines()
    assert [each for each in lines if not line.fullmatch(each)] == []
    assert sum(" says " in each for each in lines) == 200
    assert sum(": done in " in each for each in lines) == 4


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (61, "1 min 1 s"),
        (3599.6, "1 h 0 min"),
        (7260, "2 h 1 min"),
        (3994, "1 h 7 min"),
        (90_000, "25 h 0 min"),
    ],
)
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_stage_estimates_what_is_left_from_what_is_done() -> None:
    stage = Stage("answering", 100, "questions", began=time.monotonic() - 30)
    stage.advance(25)
    assert stage.line() == "answering: 25 of 100 questions, 25%, 30 s, about 1 min 30 s left"
    stage.advance(75)
    assert stage.line() == "answering: 100 of 100 questions, 100%, 30 s"


TERMINAL = """
import sys, time
from neuron_minimax.cli.progress import Shown
progress = Shown(first=0)
with progress.stage("reading [red]", 4_000_000) as advance:
    advance(1_000_000, "shard 1")
    progress("a \\x1b[31m line")
    print("a result")
    with progress.stage("a \\x1b[31mgraph"):
        time.sleep(0.3)
"""


def test_on_a_terminal_bars_live_on_standard_error_alone() -> None:
    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL], stdout=subprocess.PIPE, stderr=follower, env=environment
    ) as process:
        os.close(follower)
        shown = b""
        while True:
            try:
                piece = os.read(leader, 4096)
            except OSError:  # the terminal is closed
                break
            shown += piece
        assert process.stdout is not None
        assert process.stdout.read() == b"a result\n"
    os.close(leader)
    assert process.returncode == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert "reading [red]" in text
    assert re.search(r"shard 1, 1\.0 MB of 4\.0 MB, 25%, \d+ s, about \d+ s left", text)
    assert "a \\x1b[31m line" in text
    assert "a \\x1b[31mgraph " in text  # the bar
    assert re.search(r"a \\x1b\[31mgraph: done in \d+ s", text)
    assert "reading [red]: 1.0 MB in " in text


def test_json_is_alone_on_standard_output_whatever_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from neuron_minimax.cli import main, progress

    shown = progress.Shown
    monkeypatch.setattr("neuron_minimax.cli.checkpoints.Shown", lambda: shown(first=0))
    assert main(["inspect", str(write_tiny(tmp_path)), "--json", "--check-values"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["usable"] is True
    assert "reading values: " in captured.err


def test_every_stage_of_the_way_ends_with_all_that_it_announced(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "checkpoint", shards=2)
    heard = Heard()
    opened = nm.Checkpoint.open(source, progress=heard)
    opened.inspect(values=True, against=source, progress=heard)
    converted = nm.plan_conversion(opened).write(tmp_path / "converted")
    nm.compare_logits(opened, converted, progress=heard)
    options = {"engine": "eager", "seq_len": 32, "buckets": [8], "slots": 1}
    for check in (False, True):
        nm.compile(
            converted,
            tmp_path / "traced",
            copy_weights=True,
            check=check,
            progress=heard,
            **options,
        )
    nm.load(tmp_path / "traced", heard)
    nm.verify_compiled(tmp_path / "traced", heard)
    assert all(stage.ended for stage in heard.stages)
    counted = {
        stage.what: (stage.total, sum(stage.counts)) for stage in heard.stages if stage.total
    }
    assert {what for what in counted if not what.startswith("reading /")} == {
        "reading values",
        "comparing",
        "copying weights",
    }
    assert len(counted) == 4
    for what, (total, done) in counted.items():
        assert total == done, what
    assert f"loading {tmp_path / 'traced'}" in {stage.what for stage in heard.stages}


def test_a_file_that_is_read_again_because_it_is_a_copy_is_counted(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "checkpoint")
    converted = nm.plan_conversion(nm.Checkpoint.open(source)).write(tmp_path / "converted")
    shard = min((tmp_path / "converted").glob("*.safetensors"))
    os.utime(shard, ns=(0, 0))
    heard = Heard()
    nm.Converted.open(tmp_path / "converted", progress=heard)
    nbytes = sum(
        record.nbytes for record in converted.records.values() if record.shard == shard.name
    )
    assert sum(heard.named(f"opening {tmp_path / 'converted'}").counts) == nbytes
