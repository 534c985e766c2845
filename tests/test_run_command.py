"""`neuron-minimax run`: from a checkpoint, a converted or a compiled directory to an answer; what
an earlier run has made is kept, reused, and never another model's.
"""

import io
import json
import os
import shutil
from pathlib import Path

import pytest

from neuron_minimax import pipeline
from neuron_minimax.backends.directory import read_manifest
from neuron_minimax.cli import main
from neuron_minimax.errors import CONTROLS, BackendError, NeuronMiniMaxError, printable
from neuron_minimax.generation.llm import LLM
from neuron_minimax.generation.sampling import GREEDY
from neuron_minimax.model.cache import KVCache
from neuron_minimax.pipeline import make_ready, name_of
from tests.tiny import write_tiny
from tests.tiny_tokenizer import write_tokenizer
from tests.tiny_traced import VOCAB

# Compiling is what `compile` is tested for: the first run here leaves it out, later ones reuse it.
EAGER = {"engine": "eager"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A checkpoint that answers greedily, and a work directory in which it was made ready."""
    base = tmp_path_factory.mktemp("run")
    checkpoint = write_tiny(write_tokenizer(base / "tiny", VOCAB), vocab_size=VOCAB)
    (checkpoint / "generation_config.json").write_text(json.dumps({"do_sample": False}))
    make_ready(checkpoint, base / "kept", options=EAGER)
    return base


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it to change, by hard links."""
    return shutil.copytree(made, tmp_path / "run", copy_function=os.link)


def run(capsys, *arguments):
    code = main(["run", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_what_is_kept_is_beside_one_another_under_the_models_name(made):
    assert sorted(path.name for path in (made / "kept").iterdir()) == ["tiny", "tiny-converted"]
    manifest = read_manifest(made / "kept" / "tiny")
    # The tiny model's own limit, which memory allows.
    assert (manifest.options["seq_len"], manifest.options["slots"]) == (512, 1)


@pytest.mark.parametrize("place", ["tiny", "kept/tiny-converted", "kept/tiny"])
def test_a_later_run_answers_from_whatever_directory_and_makes_nothing_again(made, place, capsys):
    before = {path: path.stat().st_mtime_ns for path in (made / "kept").rglob("*")}
    code, out, err = run(
        capsys, made / place, "--work-dir", made / "kept", "--prompt", "hello",
        "--max-new-tokens", "6",
    )  # fmt: skip
    assert code == 0, err
    reply = LLM(made / "kept" / "tiny").chat("hello", GREEDY, max_new_tokens=6)
    words = [printable(text, CONTROLS) for text in (reply.reasoning, reply.text) if text]
    assert words
    assert all(each in out for each in words)
    assert f"neuron-minimax chat {made / 'kept' / 'tiny'}" in err
    assert ("is up to date" in err) == (place != "kept/tiny")
    after = {path: path.stat().st_mtime_ns for path in (made / "kept").rglob("*")}
    files = [path for path in before if path.is_file() and path.name != ".lock"]
    assert [before[path] for path in files] == [after[path] for path in files]


def test_without_a_prompt_it_talks(made, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n/quit\n"))
    code, out, _ = run(capsys, made / "kept" / "tiny", "--max-new-tokens", "4")
    assert code == 0
    assert out.startswith("you> hello\n")
    assert out.endswith("you> /quit\n")


def test_what_is_not_asked_for_stays_as_it_was_compiled(copied):
    traced = make_ready(copied / "tiny", copied / "kept", options={"seq_len": 96})
    found = read_manifest(traced).options
    assert (found["seq_len"], found["engine"]) == (96, "eager")
    make_ready(copied / "tiny", copied / "kept")
    assert read_manifest(traced).options == found


def test_a_context_that_memory_does_not_hold_is_refused_and_a_smaller_one_chosen(
    made, tmp_path, monkeypatch
):
    converted = pipeline.Converted.open(made / "kept" / "tiny-converted")
    per_position = KVCache.allocate(converted.config, 1, 1).nbytes
    memory = converted.nbytes + 2 * 300 * per_position
    told = []

    class Listener(pipeline.Unwatched):
        def say(self, text):
            told.append(text)

    monkeypatch.setattr(pipeline, "available_memory", lambda: memory)
    traced = make_ready(converted.directory, tmp_path, options=EAGER, watcher=Listener())
    assert read_manifest(traced).options["seq_len"] == 300
    assert (
        "context: 300 tokens, prompt and answer together (as much as memory allows of the model's "
        "512)"
    ) in told
    with pytest.raises(NeuronMiniMaxError, match="at most 300 positions fit"):
        make_ready(converted.directory, tmp_path, options={"seq_len": 301})
    monkeypatch.setattr(pipeline, "available_memory", lambda: 1000)
    with pytest.raises(NeuronMiniMaxError, match="a context of 256 positions needs"):
        make_ready(converted.directory, tmp_path / "other", options=EAGER)
    assert not (tmp_path / "other").exists()


def test_another_model_of_the_same_name_is_refused_before_anything_is_replaced(copied, capsys):
    write_tiny(copied / "other" / "tiny", seed=1, vocab_size=VOCAB)
    write_tokenizer(copied / "other" / "tiny", VOCAB)
    before = read_manifest(copied / "kept" / "tiny")
    code, out, err = run(
        capsys, copied / "other" / "tiny", "--work-dir", copied / "kept", "--prompt", "hello"
    )
    assert (code, out) == (1, "")
    assert "was made of another checkpoint" in err
    assert "choose another directory" in err
    assert read_manifest(copied / "kept" / "tiny") == before
    shutil.rmtree(copied / "kept" / "tiny-converted")
    code, _, err = run(
        capsys, copied / "other" / "tiny", "--work-dir", copied / "kept", "--prompt", "hello"
    )
    assert code == 1
    assert "holds a compiled model that was made of another checkpoint" in err
    assert read_manifest(copied / "kept" / "tiny") == before


class Stages(pipeline.Unwatched):
    """Remembers the stages that a run has begun."""

    def __init__(self):
        self.begun = []

    def stage(self, title):
        self.begun.append(title.split()[0])
        return super().stage(title)


def test_a_compile_goes_on_without_the_converted_directory_that_was_removed(copied):
    removed = copied / "kept" / "tiny-converted"
    before = read_manifest(copied / "kept" / "tiny")
    shutil.rmtree(removed)
    stages = Stages()
    traced = make_ready(copied / "tiny", copied / "kept", watcher=stages)
    assert stages.begun == ["inspect", "compile"]
    assert read_manifest(traced) == before
    make_ready(copied / "tiny", copied / "kept", options={"seq_len": 96})
    assert read_manifest(traced).options["seq_len"] == 96
    assert read_manifest(traced).weights == before.weights
    assert not removed.exists()
    assert LLM(traced).chat("hello", GREEDY, max_new_tokens=2).token_ids
    template = copied / "tiny" / "chat_template.jinja"
    changed = template.read_text() + "{# another #}"
    template.unlink()  # a hard link
    template.write_text(changed)
    stages = Stages()
    make_ready(copied / "tiny", copied / "kept", watcher=stages)
    assert stages.begun == ["inspect", "convert", "verify", "compile"]
    assert (traced / "model" / template.name).read_text() == changed


def test_a_checkpoint_with_a_manifest_of_somebody_else_is_a_checkpoint(copied):
    (copied / "tiny" / "manifest.json").write_text("{}")
    assert make_ready(copied / "tiny", copied / "kept") == copied / "kept" / "tiny"
    with pytest.raises(NeuronMiniMaxError, match="is a checkpoint; expected a compiled directory"):
        LLM(copied / "tiny")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent", "--prompt", "x"], 1, ["absent"]),
        (["{made}/kept/tiny", "--seq-len", "64"], 1, ["compiled already", "--seq-len"]),
        (["{made}/kept/tiny", "--batch-size", "4"], 1, ["compiled already", "--batch-size"]),
        (["{made}/tiny", "--compute", "int4", "--work-dir", "{tmp}"], 2, ["int4", "bf16"]),
        (["{made}/tiny", "--seq-len", "100000", "--work-dir", "{tmp}"], 1, ["100000", "512"]),
        (["{made}/kept/tiny", "--prompt", "long " * 300], 1, ["at most 512"]),
        (["{made}/kept/tiny", "--no-thinking", "--prompt", "x"], 1, ["no switch for thinking"]),
        (["{made}/tiny", "--no-thinking", "--work-dir", "{tmp}"], 1, ["no switch for thinking"]),
        (["{made}/kept/tiny-converted", "--thinking", "--work-dir", "{tmp}"], 1, ["no switch"]),
        (["{made}", "--work-dir", "{tmp}"], 1, ["config.json"]),
    ],
)
def test_bad_input_is_one_message(made, tmp_path, capsys, arguments, code, words):
    given = [argument.format(made=made, tmp=tmp_path / "new") for argument in arguments]
    found, out, err = run(capsys, *given)
    assert (found, out) == (code, "")
    (error,) = [line for line in err.splitlines() if line.lower().startswith("error: ")]
    assert all(word in error for word in words), error
    assert "Traceback" not in err
    assert not (tmp_path / "new" / "tiny").exists()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("MiniMaxAI/MiniMax-M2", "MiniMax-M2"),
        ("Qwen/Qwen3-0.6B@refs/pr/1", "Qwen3-0.6B-refs-pr-1"),
        ("/models/m2/", "m2"),
        ("/models/m2-converted", "m2"),
        ("/cache/models--Qwen--Qwen3-0.6B/snapshots/abc", "Qwen3-0.6B"),
        ("/", "model"),
    ],
)
def test_what_is_made_of_a_model_has_its_name(model, name):
    assert name_of(model) == name


def test_the_current_directory_has_a_name_too(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert name_of(Path()) == "here"


def test_a_context_that_fits_in_bf16_alone_is_not_kept_for_float32(tmp_path, monkeypatch):
    checkpoint = write_tiny(write_tokenizer(tmp_path / "tiny", VOCAB), vocab_size=VOCAB)
    made = tmp_path / "kept"
    options = {"engine": "eager", "compute": "bf16", "seq_len": 512}
    traced = make_ready(checkpoint, made, options=options)
    converted = pipeline.Converted.open(made / "tiny-converted")
    of_float32 = KVCache.allocate(converted.config, 1, 1).nbytes
    memory = converted.nbytes + 2 * 300 * of_float32
    monkeypatch.setattr(pipeline, "available_memory", lambda: memory)
    make_ready(checkpoint, made, options={"compute": "bf16"})
    with pytest.raises(BackendError, match="at most 300 positions fit"):
        make_ready(checkpoint, made, options={"compute": "float32"})
    assert read_manifest(traced).options["compute"] == "bf16"
