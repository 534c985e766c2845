"""How the study of experts ends otherwise than well: signals, a full disk, a second run, and traces
that are none.
"""

import dataclasses
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from neuron_minimax import cli
from neuron_minimax.errors import GenerationError
from neuron_minimax.studies.experts.batch import BatchRunner, ReportOptions, write_analysis
from neuron_minimax.studies.experts.command import ExpertsRequest, read_prompts, run_experts
from neuron_minimax.studies.experts.report import write_plots
from neuron_minimax.studies.experts.statistics import Analysis
from neuron_minimax.studies.experts.trace import FORMAT, Trace
from tests.full_disk import files_of_at_most

QUICK = ReportOptions(plots=False)


def make_trace(layers: int = 2, tokens: int = 12, top_k: int = 2, experts: int = 4) -> Trace:
    generator = np.random.default_rng(0)
    scores = generator.random((layers, tokens, experts), dtype=np.float32).astype(np.float16)
    return Trace(
        tokens=np.arange(tokens, dtype=np.int32),
        is_decode=np.arange(tokens) >= max(1, tokens // 2),
        expert_index=np.argsort(-scores, axis=2)[:, :, :top_k].astype(np.int16),
        affinity=np.full((layers, tokens, top_k), 1 / top_k, np.float32),
        scores=scores,
        bias=np.zeros((layers, experts), np.float32),
        texts=tuple(f"t{number}" for number in range(tokens)),
        answer="t6",
        finish_reason="length",
        name="small",
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_trace().save(tmp_path / "saved.safetensors")
    return tmp_path / "saved.safetensors"


def analyse(output: Path, *traces: Path) -> None:
    run_experts(ExpertsRequest(output=output, traces=traces, options=QUICK))


def everything(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_keeps_what_was_recorded_and_ends_with_one_line(
    traced, tmp_path, monkeypatch, capsys, number
) -> None:
    trace = BatchRunner.trace
    seen = []

    def interrupting(self: BatchRunner, prompt: Any, *rest: Any) -> Any:
        seen.append(prompt.name)
        if len(seen) == 2:
            signal.raise_signal(number)
        return trace(self, prompt, *rest)

    monkeypatch.setattr(BatchRunner, "trace", interrupting)
    monkeypatch.setattr("neuron_minimax.studies.experts.batch.write_plots", lambda *_: None)
    prompts = [argument for text in ("one", "two", "three") for argument in ("--prompt", text)]
    arguments = ["experts", str(traced), *prompts, "--max-new-tokens", "3", "--greedy"]
    assert cli.main([*arguments, "--output", str(tmp_path / "out")]) == 128 + number
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"stopped by {number.name}; 2 of 3 prompts kept in {tmp_path / 'out'}; give the "
        "others again"
    )
    reasons = [
        Trace.load(tmp_path / "out" / name / "trace.safetensors").finish_reason
        for name in ("prompt-1", "prompt-2")
    ]
    assert reasons == ["length", "interrupted"]
    assert (tmp_path / "out/prompt-2/report.html").exists()
    assert not (tmp_path / "out/prompt-3").exists()


def test_a_second_run_into_a_directory_is_refused(saved, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    descriptor = os.open(tmp_path / "out", os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        arguments = ["experts", "--trace", str(saved), "--output", str(tmp_path / "out")]
        assert cli.main(arguments) == 1
    finally:
        os.close(descriptor)
    assert not list((tmp_path / "out").iterdir())


def test_a_full_disk_leaves_every_file_as_it_was(saved, tmp_path) -> None:
    analyse(tmp_path / "out", saved)
    before = everything(tmp_path / "out")
    for size in sorted({len(data) - 1 for data in before.values()} | {0}):
        with (
            files_of_at_most(size),
            pytest.raises(GenerationError, match=r"results cannot be written \(File too large\)"),
        ):
            analyse(tmp_path / "out", saved)
        assert everything(tmp_path / "out") == before


def test_plots_are_written_whole_or_not_at_all(tmp_path) -> None:
    path = tmp_path / "activation.light.png"
    path.write_bytes(b"before")
    with files_of_at_most(100), pytest.raises(OSError, match="File too large"):
        write_plots(Analysis(trace=make_trace()), tmp_path)
    assert everything(tmp_path) == {path.name: b"before"}


def test_results_have_the_mode_that_the_umask_allows(saved, tmp_path) -> None:
    before = os.umask(0o027)
    try:
        analyse(tmp_path / "out", saved)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out/small").iterdir()}
    assert modes == {0o640}


def test_traces_of_one_name_get_folders_of_their_own(saved, tmp_path) -> None:
    analyse(tmp_path / "out", saved, saved)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"small", "small-2"}


def test_a_name_of_another_output_gets_a_folder_of_its_own(tmp_path) -> None:
    path = tmp_path / "t.safetensors"
    dataclasses.replace(make_trace(), name="comparison.json").save(path)
    analyse(tmp_path / "out", path)
    assert (tmp_path / "out/comparison.json-2/report.html").exists()
    dataclasses.replace(make_trace(), name="a b" * 80).save(path)
    analyse(tmp_path / "out", path)
    assert (tmp_path / "out" / ("a-b" * 80)[:100].strip("-") / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["../../outside", "/absolute", "..", ".", "", "a/b", "a\0b", "\x1b[31m", "a\nb"]
)
def test_a_trace_s_name_is_never_a_path(tmp_path, name: str) -> None:
    path = tmp_path / "in/trace.safetensors"
    path.parent.mkdir()
    dataclasses.replace(make_trace(), name=name).save(path)
    with pytest.raises(GenerationError, match="which names no folder"):
        analyse(tmp_path / "in/out/deep", path)
    assert {str(found.relative_to(tmp_path)) for found in tmp_path.rglob("*")} == {
        "in",
        "in/trace.safetensors",
    }


def test_the_page_of_a_trace_is_not_ended_by_its_texts(tmp_path) -> None:
    texts = ("</script><script>alert(1)</script>", "<!--<script>", "__TITLE__", "__DATA__")
    trace = dataclasses.replace(make_trace(tokens=4), texts=texts, name="__DATA__")
    write_analysis(Analysis(trace=trace), tmp_path, QUICK)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2
    assert "<title>Experts of __DATA__</title>" in page
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    assert json.loads(data)["routing"]["texts"] == list(texts)


def damaged(arrays: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Arrays that do not fit each other, by what is wrong."""
    nan = arrays["scores"].copy()
    nan[0, 0, 0] = np.nan
    beyond = arrays["expert_index"].copy()
    beyond[1, 2, 0] = 4
    before = arrays["expert_index"].copy()
    before[1, 2, 0] = -1
    changes: dict[str, dict[str, np.ndarray]] = {
        "dtype": {"scores": arrays["scores"].astype(np.float32)},
        "unsigned": {"expert_index": arrays["expert_index"].astype(np.uint8)},
        "fewer tokens": {"tokens": arrays["tokens"][:-1]},
        "fewer layers": {"affinity": arrays["affinity"][:1]},
        "more experts": {"bias": np.zeros((2, 5), np.float32)},
        "flat": {"bias": arrays["bias"].reshape(-1)},
        "not finite": {"scores": nan},
        "an expert too far": {"expert_index": beyond},
        "an expert before the first": {"expert_index": before},
        "a negative token": {"tokens": arrays["tokens"] - 5},
        "one more": {"extra": np.zeros(3, np.float32)},
    }
    found = {what: {**arrays, **change} for what, change in changes.items()}
    return found | {
        "no bias": {name: array for name, array in arrays.items() if name != "bias"},
        "no tokens": {
            name: array[:, :0] if array.ndim == 3 else array[:0] if name != "bias" else array
            for name, array in arrays.items()
        },
        "nothing": {},
    }


def test_arrays_that_do_not_fit_are_no_trace(saved, tmp_path) -> None:
    arrays = load_file(saved)
    words = json.dumps({"texts": [], "answer": "", "finish_reason": ""})
    metadata = {"format": FORMAT, "name": "x", "words": words}
    save_file(arrays, tmp_path / "good", metadata)
    assert Trace.load(tmp_path / "good").name == "x"
    for what, bad in damaged(arrays).items():
        save_file(bad, tmp_path / "bad", metadata)
        with pytest.raises(GenerationError, match="is no routing trace"):
            pytest.fail(f"{what}: {Trace.load(tmp_path / 'bad').name}")


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"format": FORMAT},
        {"words": "[]"},
        {"words": "{"},
        {"words": "[" * 100_000},
        {"words": json.dumps({"texts": [1], "answer": "", "finish_reason": ""})},
        {"words": json.dumps({"texts": ["one"], "answer": "", "finish_reason": ""})},
        {"words": json.dumps({"texts": [], "answer": None, "finish_reason": ""})},
        {"words": json.dumps({"texts": [], "answer": "\ud800", "finish_reason": ""})},
        {"words": json.dumps({"texts": [], "answer": "", "finish_rgason": ""})},
    ],
    ids=lambda metadata: str(metadata)[:40],
)
def test_words_that_are_none_are_no_trace(saved, tmp_path, metadata: dict[str, str]) -> None:
    whole = {"format": FORMAT, "name": "x", **metadata} if "words" in metadata else metadata
    save_file(load_file(saved), tmp_path / "bad", whole)
    with pytest.raises(
        GenerationError, match=r"bad (is no routing trace|\(words\) cannot be used)"
    ):
        Trace.load(tmp_path / "bad")


def test_only_a_regular_file_is_a_trace(tmp_path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(3 << 30)
    for name in ("fifo", "zeros"):
        with pytest.raises(GenerationError, match="is no routing trace"):
            Trace.load(tmp_path / name)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 2, 1, 3), (3, 1, 2, 2)])
def test_the_smallest_traces_are_analysed(tmp_path, shape: tuple[int, ...]) -> None:
    make_trace(*shape).save(tmp_path / "t")
    analysis = Analysis(trace=Trace.load(tmp_path / "t"))
    write_analysis(analysis, tmp_path / "out", QUICK)
    assert (tmp_path / "out/report.html").exists()
    assert analysis.render()
    if shape == (1, 1, 1, 1):
        assert write_plots(analysis, tmp_path, ("light",))


def test_the_same_trace_is_the_same_file(tmp_path) -> None:
    for number in range(8):
        make_trace().save(tmp_path / str(number))
    assert len(set(everything(tmp_path).values())) == 1


def test_traces_of_different_models_make_no_placement(saved, tmp_path, capsys) -> None:
    make_trace(layers=3).save(tmp_path / "other")
    arguments = ["experts", "--trace", str(saved), "--trace", str(tmp_path / "other")]
    assert cli.main([*arguments, "--placement", "2", "--output", str(tmp_path / "out")]) == 1
    assert "the traces are of different models" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused(tmp_path) -> None:
    with pytest.raises(GenerationError, match="no valid UTF-8"):
        read_prompts(["a\udcffb"])
    (tmp_path / "p.txt").write_bytes(b"\xff")
    with pytest.raises(GenerationError, match="cannot be read"):
        read_prompts([str(tmp_path / "p.txt")])
    shutil.rmtree(tmp_path)
