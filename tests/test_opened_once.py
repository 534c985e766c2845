"""Every file's header is read once per run: commands hand on what they have opened."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest

import generation_demo
from neuron_minimax.checkpoint import header
from neuron_minimax.cli import main
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer

SHARDS = 3  # of the source; the output has one for each of two layers and one for the rest
TOOL = Path(__file__).parents[1] / "tools/test_minimax_m2.py"


@pytest.fixture
def source(tmp_path):
    checkpoint = write_tokenizer(tmp_path / "source", 384)
    return write_tiny(checkpoint, shards=SHARDS, vocab_size=384)


@pytest.fixture
def reads(monkeypatch):
    """How often each file's header was read, by path, since it was last cleared."""
    counts: Counter[Path] = Counter()
    read_header = header.read_header

    def count_and_read(path):
        counts[path] += 1
        return read_header(path)

    monkeypatch.setattr(header, "read_header", count_and_read)
    return counts


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


def read_of(reads, directory):
    """How often the headers of a directory's shards were read, the same for each; () for never."""
    found = {path.name: count for path, count in reads.items() if path.parent == directory}
    shards = {path.name for path in directory.glob("*.safetensors")}
    assert not found or set(found) == shards
    return tuple(set(found.values()))


def test_inspecting_reads_each_header_once(source, tmp_path, reads):
    run("inspect", source, "--check-values")
    assert read_of(reads, source) == (1,)
    other = write_tiny(tmp_path / "other", shards=2, vocab_size=384)
    reads.clear()
    run("inspect", source, "--against", other, "--html", tmp_path / "page.html")
    assert read_of(reads, source) == read_of(reads, other) == (1,)


def test_converting_reads_the_source_once_and_never_the_output(source, tmp_path, reads):
    run("convert", source, tmp_path / "out")
    assert len(list(source.glob("*.safetensors"))) == SHARDS
    assert read_of(reads, source) == (1,)
    assert read_of(reads, tmp_path / "out") == ()
    reads.clear()
    run("convert", source, tmp_path / "out")  # recognized by its manifest alone
    assert read_of(reads, source) == (1,)
    assert read_of(reads, tmp_path / "out") == ()


def test_verifying_reads_both_sides_once_with_logits_too(source, tmp_path, reads):
    run("convert", source, tmp_path / "out")
    reads.clear()
    run("verify", source, tmp_path / "out", "--logits")
    assert read_of(reads, source) == read_of(reads, tmp_path / "out") == (1,)


def test_caching_reads_the_source_once_and_the_cache_when_it_is_checked(source, tmp_path, reads):
    run("cache", source, tmp_path / "cache")
    assert read_of(reads, source) == (1,)
    assert read_of(reads, tmp_path / "cache") == ()
    reads.clear()
    run("cache", source, tmp_path / "cache", "--check")
    assert read_of(reads, source) == read_of(reads, tmp_path / "cache") == (1,)


def test_compiling_takes_the_digests_that_the_conversion_has_recorded(source, tmp_path, reads):
    run("convert", source, tmp_path / "out")
    reads.clear()
    run("compile", tmp_path / "out", tmp_path / "traced", "--engine", "eager", "--seq-len", 64)
    assert read_of(reads, source) == ()
    assert read_of(reads, tmp_path / "out") == ()


def test_the_experts_tool_reads_source_and_cache_once(source, tmp_path, reads):
    spec = importlib.util.spec_from_file_location("tool_opened_once", TOOL)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    arguments = ["--checkpoint", source, "--cache_dir", tmp_path / "cache", "--dump_cache"]
    arguments += ["--enable_expert_similarity", "--prompt", "Oslo", "--max_tokens", "2"]
    arguments += ["--no_sample", "--disable_structured_output", "--output_dir", tmp_path / "found"]
    assert tool.main([str(argument) for argument in arguments]) == 0
    assert read_of(reads, source) == (1,)
    assert read_of(reads, tmp_path / "cache") == (1,)


def test_the_whole_demo_reads_the_source_once(source, tmp_path, reads, capsys):
    arguments = ["--checkpoint", source, "--traced-model-dir", tmp_path / "traced"]
    arguments += ["--engine", "eager", "--seq-len", "256", "--max-new-tokens", "4"]
    assert generation_demo.main([str(argument) for argument in arguments]) == 0
    assert read_of(reads, source) == (1,)
    # Verified and compiled from the same opened directory.
    assert read_of(reads, tmp_path / "traced-converted") == (1,)
    # Loaded from its own directory alone.
    assert read_of(reads, tmp_path / "traced" / "model") == (1,)
    reads.clear()
    assert generation_demo.main([str(argument) for argument in arguments]) == 0
    assert read_of(reads, source) == (1,)
    assert read_of(reads, tmp_path / "traced-converted") == ()  # known by its recorded digests
    assert "is up to date" in capsys.readouterr().out
