"""An output is the same whichever version writes it: another one resumes it at every point, and
recognizes it when it is finished.
"""

import json
import os
from pathlib import Path

import pytest

from neuron_minimax.checkpoint import output
from neuron_minimax.errors import ConversionError
from tests.opened import build_cache, contents, convert
from tests.tiny import write_tiny

COMMANDS = {
    "convert": (convert, "conversion.json"),
    "cache": (build_cache, "cache.json"),
}
# Files that appear under their final names, one after the other, in a whole run.
WRITES = {
    "convert": ("source", "identity", *("shard", "journal") * 3, "index", "config", "manifest"),
    "cache": ("source", "identity", "shard", "journal", "config", "manifest"),
}
POINTS = [(command, count) for command in WRITES for count in range(1, len(WRITES[command]) + 1)]


class Stopped(Exception):
    """Raised in place of a process's end."""


@pytest.fixture
def version(monkeypatch):
    """Sets the version that writes from here on."""

    def set_version(text: str) -> None:
        monkeypatch.setattr(output, "__version__", text)

    return set_version


def stop_after(monkeypatch, count: int) -> list[str]:
    """Let that many files appear under their final names, then raise; the names as they come."""
    names: list[str] = []
    replace = os.replace

    def replace_and_stop(source, target):
        replace(source, target)
        names.append(Path(target).name)
        if len(names) >= count:
            raise Stopped

    monkeypatch.setattr(os, "replace", replace_and_stop)
    return names


@pytest.mark.parametrize(("command", "count"), POINTS)
def test_another_version_resumes_at_every_point(tmp_path, monkeypatch, version, command, count):
    run, manifest = COMMANDS[command]
    source = write_tiny(tmp_path / "source")
    version("1.0")
    run(source, tmp_path / "whole")
    with monkeypatch.context() as patched:
        names = stop_after(patched, count)
        with pytest.raises(Stopped):
            run(source, tmp_path / "out")
    kind = WRITES[command][count - 1]
    assert len(names) == count
    assert names[-1].endswith(".safetensors") == (kind == "shard")
    version("2.0")
    result = run(source, tmp_path / "out")
    assert result.was_finished == (kind == "manifest")
    assert result.reused_shards == (
        0 if kind == "manifest" else WRITES[command][:count].count("journal")
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    made_by = json.loads((tmp_path / "out" / manifest).read_text())["made_by"]
    assert made_by == f"neuron-minimax {'1.0' if kind == 'manifest' else '2.0'}"


@pytest.mark.parametrize("command", COMMANDS)
def test_another_version_recognizes_a_finished_output(tmp_path, version, command):
    run, _ = COMMANDS[command]
    source = write_tiny(tmp_path / "source")
    version("1.0")
    assert not run(source, tmp_path / "out").was_finished
    version("2.0")
    assert run(source, tmp_path / "out").was_finished


def test_the_fingerprint_of_a_conversion_does_not_depend_on_the_version(tmp_path, version):
    source = write_tiny(tmp_path / "source")
    fingerprints = set()
    for text in ("1.0", "2.0"):
        version(text)
        fingerprints.add(convert(source, tmp_path / text).fingerprint)
    assert len(fingerprints) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_an_output_of_a_version_that_compared_itself_is_still_good(tmp_path, version, command):
    run, name = COMMANDS[command]
    source = write_tiny(tmp_path / "source")
    version("1.0")
    run(source, tmp_path / "out")
    path = tmp_path / "out" / name
    manifest = json.loads(path.read_text())
    manifest["identity"]["made_by"] = manifest.pop("made_by")
    path.write_text(json.dumps(manifest))
    version("2.0")
    assert run(source, tmp_path / "out").was_finished
    (tmp_path / "out" / ".unfinished").mkdir()
    (tmp_path / "out" / ".unfinished" / "identity.json").write_text(
        json.dumps(manifest["identity"])
    )
    path.unlink()
    assert not run(source, tmp_path / "out").was_finished
    manifest["identity"]["source_fingerprint"] = "of something else"
    path.write_text(json.dumps(manifest))
    with pytest.raises(ConversionError, match=r"differs in source_fingerprint\)"):
        run(source, tmp_path / "out")
