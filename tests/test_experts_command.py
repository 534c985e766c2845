"""The expert analysis from the command line and the tool: folders, formats, cache, interruption,
placement, errors.
"""

import importlib.util
import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from neuron_minimax import cli
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.cache import open_cache
from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.planner.placement import Placement
from neuron_minimax.studies.experts import command
from neuron_minimax.studies.experts.batch import (
    TRACE_NAME,
    BatchRunner,
    Prompt,
    ReportOptions,
    free_name,
)
from neuron_minimax.studies.experts.command import load_any, read_prompts
from neuron_minimax.studies.experts.report import write_plots
from neuron_minimax.studies.experts.statistics import Analysis
from neuron_minimax.studies.experts.trace import Trace
from tests.heard import Heard
from tests.opened import build_cache

QUICK = ReportOptions(plots=False)
TOOL = Path(__file__).parents[1] / "tools/test_minimax_m2.py"


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tool_under_test", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def analysed(traced, tmp_path_factory) -> Path:
    """Two prompts through the command line."""
    output = tmp_path_factory.mktemp("out")
    (output / "weather.txt").write_text("The weather in Paris is sunny.")
    arguments = ["--prompt", str(output / "weather.txt"), "--prompt", "one two three 123 {x}"]
    options = [
        "--max-new-tokens",
        "6",
        "--greedy",
        "--output-format",
        "jsonl",
        "--output",
        str(output),
    ]
    assert cli.main(["experts", str(traced), *arguments, *options]) == 0
    return output


def test_every_result_names_its_prompt(analysed):
    text = "The weather in Paris is sunny."
    assert Trace.load(analysed / "weather/trace.safetensors").prompt == text
    assert json.loads((analysed / "weather/summary.json").read_text())["prompt"] == text
    comparison = json.loads((analysed / "comparison.json").read_text())
    assert [row["prompt"] for row in comparison["prompts"]] == [text, "one two three 123 {x}"]
    assert text in (analysed / "weather/report.html").read_text()


def test_without_matplotlib_the_report_is_whole_and_what_is_left_out_is_said_first(
    traced, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said_before = []

    def loading(*arguments):
        said_before.append(capsys.readouterr().err)
        return real(*arguments)

    real = command.load_any
    monkeypatch.setattr(command, "load_any", loading)
    arguments = ["--prompt", "sunny", "--max-new-tokens", "2", "--output", str(tmp_path)]
    assert cli.main(["experts", str(traced), *arguments]) == 0
    assert "matplotlib is not installed" in said_before[0]
    assert "`pip install matplotlib`" in said_before[0]
    # A placement has no figures.
    trace = ["--trace", str(tmp_path / "prompt-1/trace.safetensors"), "--placement", "2"]
    assert cli.main(["experts", *trace, "--output", str(tmp_path)]) == 0
    assert "matplotlib" not in capsys.readouterr().err
    assert "sunny" in (tmp_path / "prompt-1/report.html").read_text()
    assert not list((tmp_path / "prompt-1").glob("*.png"))
    with pytest.raises(GenerationError, match=r"needs matplotlib.*`pip install matplotlib`"):
        write_plots(Analysis(trace=Trace.load(tmp_path / "prompt-1/trace.safetensors")), tmp_path)


def test_parquet_without_pyarrow_is_refused_before_the_model_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    options = ["--output-format", "parquet", "--output", str(tmp_path / "out")]
    assert cli.main(["experts", "no such model", "--prompt", "sunny", *options]) == 1
    said = capsys.readouterr().err
    assert "parquet needs pyarrow, which is not installed: `pip install pyarrow`" in said
    assert not (tmp_path / "out").exists()


def test_every_prompt_has_its_folder_and_the_comparison_names_them(analysed):
    for name in ("weather", "prompt-2"):
        found = {path.name for path in (analysed / name).iterdir()}
        assert {"trace.safetensors", "summary.json", "routing.jsonl", "report.html"} <= found
        assert {
            "activation.light.png",
            "activation.dark.svg",
            "correlation_by_distance.dark.png",
        } <= found
    comparison = json.loads((analysed / "comparison.json").read_text())
    assert [row["name"] for row in comparison["prompts"]] == ["weather", "prompt-2"]
    distance = np.array(comparison["distance"])
    assert np.array_equal(distance, distance.T)
    assert distance[0, 0] == 0
    assert distance[0, 1] > 0


def test_the_routing_records_hold_what_the_trace_holds(analysed):
    trace = Trace.load(analysed / "weather/trace.safetensors")
    rows = [
        json.loads(line) for line in (analysed / "weather/routing.jsonl").read_text().splitlines()
    ]
    assert len(rows) == trace.layers * len(trace.tokens)
    for row in rows:
        layer = row["layer"]
        position = row["position"]
        assert row["token"] == trace.tokens[position]
        assert row["text"] == trace.texts[position]
        assert row["phase"] == ("decode" if trace.is_decode[position] else "prefill")
        assert row["experts"] == trace.expert_index[layer, position].tolist()
        assert np.allclose(row["weights"], trace.affinity[layer, position], atol=1e-6)
        assert np.allclose(row["scores"], trace.scores[layer, position, row["experts"]], atol=1e-4)
    summary = json.loads((analysed / "weather/summary.json").read_text())
    assert summary["prefill_tokens"] + summary["decode_tokens"] == len(trace.tokens)
    assert sum(summary["token_classes"].values()) == len(trace.tokens)


def test_a_saved_trace_is_analysed_without_the_model(analysed, tmp_path, capsys):
    path = analysed / "weather/trace.safetensors"
    assert cli.main(["experts", "--trace", str(path), "--output", str(tmp_path)]) == 0
    assert "weather: " in capsys.readouterr().out
    by_model = json.loads((analysed / "weather/summary.json").read_text())
    assert len(by_model["router_similarity_by_distance"]) == by_model["layers"]
    again = json.loads((tmp_path / "weather/summary.json").read_text())
    assert again == by_model | {"router_similarity_by_distance": None}
    shown = [(home / "weather/report.html").read_text() for home in (analysed, tmp_path)]
    assert ["Router similarity" in report for report in shown] == [True, False]


def test_a_placement_is_written_and_judged_on_a_held_out_trace(analysed, tmp_path, capsys):
    traces = [str(analysed / name / "trace.safetensors") for name in ("weather", "prompt-2")]
    arguments = [
        "--trace",
        traces[0],
        "--held-out",
        traces[1],
        "--placement",
        "4",
        "--output",
        str(tmp_path),
    ]
    assert cli.main(["experts", *arguments]) == 0
    placement = Placement.load(tmp_path / "expert_placement.json")
    trace = Trace.load(traces[1])
    counts = np.stack([np.bincount(layer.ravel(), minlength=8) for layer in trace.expert_index])
    said = capsys.readouterr().out
    assert "on held-out tokens" in said
    assert f"{placement.max_to_mean(counts).mean():.3f} after" in said


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_the_tool_analyses_with_its_own_options(traced, tool, tmp_path, form, capsys):
    if form == "parquet":
        pytest.importorskip("pyarrow", reason="parquet needs pyarrow, which is optional")
    arguments = [
        "--checkpoint",
        str(traced.parent / "checkpoint"),
        "--prompt",
        "Paris",
        "--max_tokens",
        "3",
        "--no_sample",
    ]
    options = [
        "--output_dir",
        str(tmp_path),
        "--output_format",
        form,
        "--enable_expert_similarity",
        "--n_jobs",
        "2",
    ]
    assert tool.main([*arguments, *options]) == 0
    folder = tmp_path / "prompt-1"
    assert (folder / "expert_similarity_0.light.png").exists()
    summary = json.loads((folder / "summary.json").read_text())
    assert len(summary["expert_similarity_by_distance"]) == summary["layers"]
    assert summary["expert_similarity_error"] == 0
    assert "Expert similarity of layers" in (folder / "report.html").read_text()
    if form == "json":
        rows = json.loads((folder / "routing.json").read_text())
    else:
        from pyarrow import parquet

        rows = parquet.read_table(folder / "routing.parquet").to_pylist()
    assert (
        rows[0]["experts"] == Trace.load(folder / "trace.safetensors").expert_index[0, 0].tolist()
    )
    said = capsys.readouterr().out
    assert "prompt-1" in said
    assert "experts: an expert's nearest is at cosine" in said


def test_every_run_of_the_tool_has_a_new_folder_by_default(tool):
    outputs = [tool.request_of(tool.parse([])).output for _ in range(2)]
    assert len(set(outputs)) == 2
    assert not any(output.exists() for output in outputs)


def test_the_tool_builds_a_cache_and_uses_it_with_the_same_result(
    traced, tool, tmp_path, capsys, monkeypatch
):
    checkpoint = traced.parent / "checkpoint"
    cache = tmp_path / "cache"
    common = ["--checkpoint", str(checkpoint), "--cache_dir", str(cache)]
    assert tool.main([*common, "--dump_only"]) == 0
    assert (cache / "cache.json").exists()
    assert "Loading from cache" not in capsys.readouterr().out
    options = [
        "--prompt",
        "Oslo",
        "--max_tokens",
        "3",
        "--no_sample",
        "--disable_structured_output",
    ]
    assert tool.main([*common, *options, "--output_dir", str(tmp_path / "cached")]) == 0
    assert f"Loading from cache {cache}" in capsys.readouterr().out
    assert not (tmp_path / "cached/prompt-1/summary.json").exists()
    monkeypatch.chdir(tmp_path)
    assert tool.main([*common[:2], *options]) == 0
    (made,) = tmp_path.glob("experts_*")
    found = [
        Trace.load(folder / "prompt-1/trace.safetensors") for folder in (tmp_path / "cached", made)
    ]
    assert np.array_equal(found[0].expert_index, found[1].expert_index)
    assert found[1].answer
    assert f"answer: {found[1].answer}" in capsys.readouterr().out
    manifest = json.loads((cache / "cache.json").read_text())
    manifest["identity"]["source_fingerprint"] = "other"
    (cache / "cache.json").write_text(json.dumps(manifest))
    assert tool.main([*common, *options, "--output_dir", str(tmp_path / "no")]) == 1
    assert "was made of another checkpoint; run `neuron-minimax cache" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_done(traced, tmp_path):
    model, directory = load_any(traced)
    passes = []

    def interrupt(tokens, name):
        passes.append(name)
        if name == "second" and passes.count(name) == 3:
            raise KeyboardInterrupt

    tokenizer = TextTokenizer.from_dir(directory)
    runner = BatchRunner(
        model=model,
        tokenizer=tokenizer,
        directory=tmp_path,
        options=QUICK,
        max_new_tokens=5,
        progress=Heard(interrupt),
    )
    with pytest.raises(KeyboardInterrupt) as stopped:
        runner.run([Prompt(name=name, text="sunny") for name in ("first", "second", "third")])
    assert stopped.value.__notes__ == [f"2 of 3 prompts kept in {tmp_path}; give the others again"]
    first, second = (
        Trace.load(tmp_path / name / "trace.safetensors") for name in ("first", "second")
    )
    assert (first.finish_reason, second.finish_reason) == ("length", "interrupted")
    assert len(second.tokens) < len(first.tokens)
    assert (tmp_path / "second/report.html").exists()
    assert not (tmp_path / "third").exists()
    assert [
        row["name"] for row in json.loads((tmp_path / "comparison.json").read_text())["prompts"]
    ] == [
        "first",
        "second",
    ]


def test_progress_counts_every_token_up_to_the_announced_total(traced, tmp_path):
    model, directory = load_any(traced)
    heard = Heard()
    tokenizer = TextTokenizer.from_dir(directory)
    runner = BatchRunner(
        model=model,
        tokenizer=tokenizer,
        directory=tmp_path,
        options=QUICK,
        max_new_tokens=4,
        progress=heard,
    )
    result = runner.run([Prompt(name="one", text="sunny")])
    stage = heard.named("experts")
    assert sum(stage.counts) == len(result.analyses[0].trace.tokens)
    assert stage.total == len(runner.encode(Prompt(name="one", text="sunny"))) + 4


def test_experts_are_compared_before_the_prompts_and_an_interruption_ends_that_at_once(
    traced, tmp_path
):
    model, directory = load_any(traced)
    heard = Heard()
    runner = BatchRunner(
        model=model,
        tokenizer=TextTokenizer.from_dir(directory),
        directory=tmp_path / "out",
        options=QUICK,
        similarity_of=Checkpoint(traced.parent / "checkpoint"),
        max_new_tokens=10**9,
        progress=heard,
    )
    prompts = [Prompt(name="one", text="sunny")]
    with pytest.raises(GenerationError, match="exceed the model's"):
        runner.run(prompts)
    assert not heard.stages

    def interrupt(count, doing):
        if heard.stages[-1].what == "comparing experts of all layers" and count:
            os.kill(os.getpid(), signal.SIGINT)

    runner.max_new_tokens = 4
    heard.on_advance = interrupt
    with pytest.raises(KeyboardInterrupt):
        runner.run(prompts)
    assert heard.stages[-1].counts == [1]
    assert not (tmp_path / "out").exists()
    heard = runner.progress = Heard()
    assert runner.run(prompts).analyses[0].expert_layers is not None
    assert [(stage.what, sum(stage.counts)) for stage in heard.stages[:-1]] == [
        ("comparing experts of all layers", runner.similarity_of.config.num_hidden_layers)
    ]


def test_compiled_converted_checkpoint_and_cache_load_the_same_model(traced, tmp_path):
    import torch

    build_cache(traced.parent / "checkpoint", tmp_path / "cache")
    source = Checkpoint(traced.parent / "checkpoint")
    places = (traced, traced.parent / "converted", traced.parent / "checkpoint")
    models = [load_any(place)[0] for place in places] + [
        load_any(source, open_cache(tmp_path / "cache", source))[0]
    ]
    with torch.inference_mode():
        logits = [model(torch.arange(7)[None])[0] for model in models]
    assert all(torch.allclose(other, logits[0], atol=1e-3) for other in logits[1:])


def test_an_empty_prompt_is_not_the_directory_that_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("not asked for")
    monkeypatch.chdir(tmp_path)
    assert [prompt.text for prompt in read_prompts(["."])] == ["not asked for"]
    with pytest.raises(GenerationError, match="'' holds no prompt"):
        read_prompts([""])


def test_prompts_are_texts_files_or_directories_with_names_of_their_own(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    found = read_prompts([str(tmp_path), str(tmp_path / "a.txt"), "plain text"])
    assert [(prompt.name, prompt.text) for prompt in found] == [
        ("a", "text of a"),
        ("b", "text of b"),
        ("a-2", "text of a"),
        ("prompt-3", "plain text"),
    ]


def test_a_word_that_is_no_file_s_name_is_a_text():
    texts = ["3.5", "Hello.", "What is in notes.txt?"]
    assert [prompt.text for prompt in read_prompts(texts)] == texts


def test_the_results_of_another_prompt_stay(analysed, tmp_path):
    shutil.copytree(analysed / "weather", tmp_path / "weather")
    trace = Trace.load(tmp_path / "weather" / TRACE_NAME)
    tokens = trace.tokens[~trace.is_decode].tolist()
    assert free_name(tmp_path, "weather", tokens) == "weather"  # of the same prompt, again
    assert free_name(tmp_path, "weather", [*tokens[:-1], 0]) == "weather-2"
    assert free_name(tmp_path, "weather", [0], ["weather", "weather-2"]) == "weather-3"
    assert free_name(tmp_path, "other", [0]) == "other"


def test_what_an_interruption_left_of_a_long_prompt_is_replaced_by_the_same_prompt(
    analysed, tmp_path
):
    trace = Trace.load(analysed / "weather" / TRACE_NAME)
    made = replace(trace, finish_reason="interrupted", prompt="long")
    (tmp_path / "weather").mkdir()
    made.save(tmp_path / "weather" / TRACE_NAME)
    tokens = [*trace.tokens.tolist(), 0, 0]  # it ended amid these
    assert free_name(tmp_path, "weather", tokens, text="long") == "weather"
    assert free_name(tmp_path, "weather", tokens, text="another") == "weather-2"
    assert free_name(tmp_path, "weather", [0, *tokens], text="long") == "weather-2"
    replace(made, finish_reason="length").save(tmp_path / "weather" / TRACE_NAME)
    assert free_name(tmp_path, "weather", tokens, text="long") == "weather-2"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give either --prompt (and a model) or --trace"),
        (["--prompt", "x"], 2, "--prompt needs a model"),
        (["TRACED", "--prompt", " "], 1, "holds no prompt"),
        (["TRACED", "--prompt", "x", "--output-format", "csv"], 2, "'csv' is not one of 'json'"),
        (["TRACED", "--prompt", "nosuch.txt"], 1, "the prompt file nosuch.txt does not exist"),
        (["--trace", "absent"], 1, "absent is no routing trace"),
        (["--trace", "TRACE", "--placement", "9"], 1, "8 experts cannot be split over 9"),
        (["absent", "--prompt", "x"], 1, "absent does not exist"),
    ],
)
def test_bad_requests_say_what_is_wrong(
    traced, analysed, tmp_path, arguments, code, message, capsys
):
    known = {"TRACED": str(traced), "TRACE": str(analysed / "weather/trace.safetensors")}
    given = [known.get(argument, argument) for argument in arguments]
    assert cli.main(["experts", *given, "--output", str(tmp_path / "out")]) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "out").exists() == ("--placement" in arguments)
