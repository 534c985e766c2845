"""The expert analysis from the command line and the tool: folders, formats, cache, interruption,
placement, errors.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from neuron_minimax import cli
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.cache import open_cache
from neuron_minimax.generation.tokenizer import TextTokenizer
from neuron_minimax.planner.placement import Placement
from neuron_minimax.studies.experts.batch import BatchRunner, Prompt, ReportOptions
from neuron_minimax.studies.experts.command import load_any, read_prompts
from neuron_minimax.studies.experts.trace import Trace
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
    again = json.loads((tmp_path / "weather/summary.json").read_text())
    assert again == json.loads((analysed / "weather/summary.json").read_text())


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
    if form == "json":
        rows = json.loads((folder / "routing.json").read_text())
    else:
        from pyarrow import parquet

        rows = parquet.read_table(folder / "routing.parquet").to_pylist()
    assert (
        rows[0]["experts"] == Trace.load(folder / "trace.safetensors").expert_index[0, 0].tolist()
    )
    assert "prompt-1" in capsys.readouterr().out


def test_the_tool_builds_a_cache_and_uses_it_with_the_same_result(traced, tool, tmp_path, capsys):
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
    assert tool.main([*common[:2], *options, "--output_dir", str(tmp_path / "plain")]) == 0
    found = [
        Trace.load(tmp_path / name / "prompt-1/trace.safetensors") for name in ("cached", "plain")
    ]
    assert np.array_equal(found[0].expert_index, found[1].expert_index)
    manifest = json.loads((cache / "cache.json").read_text())
    manifest["identity"]["source_fingerprint"] = "other"
    (cache / "cache.json").write_text(json.dumps(manifest))
    assert tool.main([*common, *options, "--output_dir", str(tmp_path / "no")]) == 1
    assert "was made of another checkpoint; run `neuron-minimax cache" in capsys.readouterr().err


def test_an_interruption_keeps_what_is_done(traced, tmp_path):
    model, directory = load_any(traced)
    passes = []

    def interrupt(name, tokens, total):
        passes.append(name)
        if passes.count("second") == 3:
            raise KeyboardInterrupt

    tokenizer = TextTokenizer.from_dir(directory)
    runner = BatchRunner(
        model=model,
        tokenizer=tokenizer,
        directory=tmp_path,
        options=QUICK,
        max_new_tokens=5,
        progress=interrupt,
    )
    result = runner.run([Prompt(name=name, text="sunny") for name in ("first", "second", "third")])
    assert result.interrupted
    assert [analysis.trace.finish_reason for analysis in result.analyses] == [
        "length",
        "interrupted",
    ]
    assert len(result.analyses[1].trace.tokens) < len(result.analyses[0].trace.tokens)
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
    seen = []
    tokenizer = TextTokenizer.from_dir(directory)
    runner = BatchRunner(
        model=model,
        tokenizer=tokenizer,
        directory=tmp_path,
        options=QUICK,
        max_new_tokens=4,
        progress=lambda *row: seen.append(row),
    )
    result = runner.run([Prompt(name="one", text="sunny")])
    assert sum(tokens for _, tokens, _ in seen) == len(result.analyses[0].trace.tokens)
    assert {total for _, _, total in seen} == {
        len(runner.encode(Prompt(name="one", text="sunny"))) + 4
    }


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give either --prompt (and a model) or --trace"),
        (["--prompt", "x"], "--prompt needs a model"),
        (["TRACED", "--prompt", " "], "holds no prompt"),
        (
            ["TRACED", "--prompt", "x", "--output-format", "csv"],
            "the output format is 'csv'; expected json, jsonl, parquet",
        ),
        (["--trace", "absent"], "absent is no routing trace"),
        (["--trace", "TRACE", "--placement", "3"], "8 experts cannot be split evenly over 3 ranks"),
        (["absent", "--prompt", "x"], "absent does not exist"),
    ],
)
def test_bad_requests_say_what_is_wrong(traced, analysed, tmp_path, arguments, message, capsys):
    known = {"TRACED": str(traced), "TRACE": str(analysed / "weather/trace.safetensors")}
    given = [known.get(argument, argument) for argument in arguments]
    assert cli.main(["experts", *given, "--output", str(tmp_path / "out")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())
