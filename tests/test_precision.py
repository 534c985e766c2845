"""The precision report: what it says of good checkpoints, of lists of modules, of values, and of
two checkpoints.
"""

import json
import re
import subprocess
import sys
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers.quantizers.quantizers_utils import should_convert_module

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.layout import Layout
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import CheckpointError, ConfigError
from neuron_minimax.families import module_of
from neuron_minimax.families.minimax_m2 import MINIMAX_M2
from neuron_minimax.inspection.compare import compare
from neuron_minimax.inspection.modules import Framework, Module, judge, modules_of, needed, reaches
from neuron_minimax.inspection.values import check_values
from tests.opened import convert, inspect
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint, write_tiny

RAGGED = {"hidden_size": 320, "intermediate_size": 192, "head_dim": 96, "rotary_dim": 48}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint", shards=3)


def errors(report):
    return [finding for finding in report.findings if finding.severity == "error"]


def test_a_published_checkpoint_is_usable_and_counted_by_dtype_and_kind(tiny):
    report = inspect(tiny)
    assert report.usable
    assert not errors(report)
    assert report.dtypes["F8_E4M3"][0] == 2 * (4 + 3 * 8)
    assert {row.kind: row.found for row in report.kinds}["w1"] == 16
    assert sum(row.bytes + row.scale_bytes for row in report.kinds) == report.bytes
    stored = [path.stat().st_size for path in tiny.glob("*.safetensors")]
    assert report.bytes < sum(stored) < report.bytes + 100_000
    assert all(
        row.precision == "FP8 with scales"
        for row in report.kinds
        if row.group in ("attention", "experts")
    )
    assert all(row.precision == "F32" for row in report.kinds if row.group == "router")


def test_a_ragged_checkpoint_has_partial_blocks_and_is_usable(tmp_path):
    rows = {row.kind: row for row in inspect(write_tiny(tmp_path / "ragged", **RAGGED)).kinds}
    assert rows["w1"].shapes == ((192, 320),)
    assert rows["w1"].scale_shapes == ((2, 3),)


# Parts of names, and of patterns
PIECES = ("model", "layers", "1", "11", "self_attn", "q_proj", "gate", "gate_up_proj")
PIECES += (".", r"\.", ".*", r"\d", "[0-9]", "|", "?", "(a|b)*")


def module_at(path):
    return Module(path=path, weights=1, fp8=0, renamed=MINIMAX_M2.transformers_names)


def test_transformers_agrees_on_what_an_entry_reaches():
    paths = [f"model.layers.{layer}.self_attn.q_proj" for layer in (1, 11)]
    paths += [
        "lm_head",
        "model.layers.1.mlp.gate",
        "model.layers.1.mlp.experts",
        "model.layers.11.mlp.gate",
    ]
    entries = [
        "gate",
        "lm_head",
        "self_attn",
        "q_proj",
        "model.layers.1",
        "model.layers.*.self_attn",
        "experts",
        "mlp",
    ]
    entries += ["model.layers.1.mlp", "head", "e_score_correction_bias", "model"]
    for entry in entries:
        for path in paths:
            assert reaches(Framework.HUGGING_FACE, entry, module_at(path)) != should_convert_module(
                path, [entry]
            ), (entry, path)
    gate = module_at("model.layers.1.block_sparse_moe.gate")
    assert reaches(Framework.HUGGING_FACE, "block_sparse_moe.gate", gate)


@settings(deadline=None)
@given(
    entry=st.lists(st.sampled_from(PIECES), min_size=1, max_size=4).map("".join),
    path=st.lists(st.sampled_from(PIECES[:8]), min_size=1, max_size=4).map(".".join),
)
def test_transformers_agrees_on_any_entry(entry, path):
    try:
        kept = not should_convert_module(path, [entry])
    except re.error:
        return
    module = Module(path=path, weights=1, fp8=0)
    assert reaches(Framework.HUGGING_FACE, entry, module) == kept


def test_nxdi_finds_gate_inside_gate_up_proj():
    gate_up = module_at("layers.0.block_sparse_moe.expert_mlps.mlp_op.gate_up_proj")
    assert reaches(Framework.NXDI, "gate", gate_up)


def test_the_module_paths_are_those_the_conversion_writes(tiny):
    conversion = plan_conversion(Checkpoint(tiny), Layout())
    written = {module_of(output.name) for output in conversion.outputs if len(output.shape) > 1}
    checkpoint = Checkpoint(tiny)
    modules = modules_of(checkpoint.entries, checkpoint.config)
    assert {module.path for module in modules[Framework.NXDI]} == written


def test_the_published_list_is_right_for_hugging_face_and_breaks_nxdi(tiny):
    report = inspect(tiny)
    verdicts = {(v.framework, v.entry): v.verdict for v in report.module_lists[0].verdicts}
    assert verdicts[Framework.HUGGING_FACE, "gate"] == "right"
    assert verdicts[Framework.NXDI, "gate"] == "breaks"
    assert verdicts[Framework.NXDI, "e_score_correction_bias"] == "no effect"
    warned = [f for f in report.findings if f.kind == "modules_to_not_convert"]
    assert [(f.severity, f.subject) for f in warned] == [("note", "gate")]


def test_a_good_checkpoint_has_notes_and_no_warnings(tiny):
    report = inspect(tiny, check_values=True)
    assert report.findings
    others = {finding.severity for finding in report.findings if finding.kind != "tokenizer"}
    assert others == {"note"}


def test_listing_self_attn_is_an_error_that_counts_its_weights(tiny):
    report = inspect(tiny, ["self_attn", "lm_head"])
    assert not report.usable
    (finding,) = errors(report)
    assert finding.subject == "self_attn"
    assert all(
        word in finding.message
        for word in ("8 weights", "FP8 with scales", "AssertionError", "gqa.py:134")
    )


def test_a_given_list_without_lm_head_is_an_error(tiny):
    (finding,) = errors(inspect(tiny, ["router"]))
    assert finding.subject == "lm_head"
    assert "no scales" in finding.message


def test_the_needed_list_is_the_one_a_conversion_writes_and_judged_right(tiny):
    report = inspect(tiny)
    conversion = plan_conversion(Checkpoint(tiny), Layout())
    assert report.needed["NxDI"] == conversion.modules_to_not_convert
    assert report.needed["Hugging Face"] == ("gate", "lm_head")
    assert inspect(tiny, report.needed["NxDI"]).usable


def test_a_needed_entry_reaches_one_layer_and_not_its_namesakes():
    modules = [
        Module(path=f"layers.{n}.self_attn.o_proj.o_proj", weights=1, fp8=int(n != 1))
        for n in range(12)
    ]
    entries = needed(Framework.NXDI, modules)
    assert entries == ("layers.1.self_attn",)
    assert [verdict.verdict for verdict in judge(Framework.NXDI, entries, modules)] == ["right"]


@pytest.mark.parametrize("listed", ["gate", [["gate"]], [1]])
def test_a_list_that_is_no_list_of_names_is_refused(tmp_path, listed):
    directory = write_tiny(tmp_path / "c")
    raw = json.loads((directory / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] = listed
    (directory / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigError, match=r"modules_to_not_convert.*valid (string|array|tuple)"):
        inspect(directory)


def test_a_dense_checkpoint_needs_no_list_and_is_usable(tmp_path):
    report = inspect(write_tiny(tmp_path / "dense", dense=True))
    assert report.usable
    assert report.needed == {"Hugging Face": (), "NxDI": ()}


def test_a_missing_quantization_config_is_a_warning_since_the_tensors_decide(tmp_path):
    directory = write_tiny(tmp_path / "c")
    raw = json.loads((directory / "config.json").read_text())
    del raw["quantization_config"]
    (directory / "config.json").write_text(json.dumps(raw))
    report = inspect(directory)
    assert report.usable
    assert any(
        "quantization_config" in f.message and "silently" in f.message for f in report.findings
    )


def test_multi_token_prediction_tensors_are_reported_and_tolerated(tmp_path):
    raw = tiny_config()
    tensors = [*tiny_tensors(Checkpoint(write_tiny(tmp_path / "a")).config)]
    tensors.append(("model.mtp.0.proj.weight", "BF16", np.zeros((4, 4), np.uint16)))
    write_checkpoint(tmp_path / "b", raw, tensors)
    report = inspect(tmp_path / "b")
    assert report.usable
    assert report.mtp == ("model.mtp.0.proj.weight",)
    assert any(finding.kind == "mtp" for finding in report.findings)


def test_a_converted_directory_is_recognized_first_of_all(tiny, tmp_path):
    convert(tiny, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"is a converted directory.*verify"):
        inspect(tmp_path / "out")
    (tmp_path / "out" / "conversion.json").unlink()
    report = inspect(tmp_path / "out")
    assert not report.usable
    assert report.findings[0].kind == "converted"
    assert "verify" in report.findings[0].message


def test_no_checkpoint_at_all_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        inspect(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(CheckpointError, match=r"a config\.json and no weights"):
        inspect(tmp_path / "empty")


def test_the_json_report_has_the_documented_keys_and_no_nan(tiny):
    values = json.loads(
        json.dumps(inspect(tiny, ["lm_head"], check_values=True).to_json(), allow_nan=False)
    )
    text = (Path(__file__).parents[1] / "docs" / "inspect.md").read_text(encoding="utf-8")
    for place in (
        values,
        values["kinds"][0],
        values["findings"][0],
        values["values"],
        values["values"]["scales"][0],
    ):
        for key in place:
            assert f"`{key}`" in text, key


def test_rendered_lines_fit_120_columns(tiny):
    lines = inspect(tiny, ["self_attn"], check_values=True).render().splitlines()
    assert max(len(line) for line in lines if str(tiny) not in line) <= 120


def test_value_statistics_equal_a_slow_computation(tmp_path):
    directory = write_tiny(tmp_path / "c", **RAGGED)
    stored = load_codes(directory)
    values = check_values(Checkpoint(directory))
    assert values.convention == "multiplier"
    assert values.codes == sum(codes.size for codes, _ in stored.values())
    scales = np.concatenate(
        [scale.ravel() for name, (_, scale) in stored.items() if ".w2." in name]
    )
    row = next(row for row in values.scales if row.kind == "w2")
    assert (row.blocks, row.minimum, row.maximum) == (scales.size, scales.min(), scales.max())
    assert row.median == np.median(scales.astype(np.float64))


def test_one_row_of_each_block_goes_into_the_histogram_and_not_always_the_same(tmp_path):
    directory = write_tiny(tmp_path / "c", **RAGGED)
    stored = rewrite_codes(directory, number_in_block)
    histogram = np.array(check_values(Checkpoint(directory)).histogram)
    assert histogram.sum() == sum(codes[::128].size for codes, _ in stored.values())
    everything = np.bincount(np.concatenate([codes.ravel() for codes, _ in stored.values()]))
    assert (histogram[: everything.size] <= everything).all()
    assert not histogram[everything.size :].any()
    # Of 128 places in a block; chosen evenly, this many blocks would meet half of them.
    assert np.count_nonzero(histogram) > 32


def test_where_the_rows_of_a_block_are_alike_one_of_them_tells_all(tmp_path):
    directory = write_tiny(tmp_path / "c", **RAGGED)
    stored = rewrite_codes(directory, first_of_block)
    values = check_values(Checkpoint(directory))
    rows = np.concatenate([codes[::128].ravel() for codes, _ in stored.values()])
    assert values.histogram == tuple(np.bincount(rows, minlength=256))
    for layer in range(2):
        for expert in range(8):
            wanted = np.sqrt(sum(map(squared_norm, expert_of(stored, layer, expert))))
            assert values.expert_norms[layer][expert] == pytest.approx(wanted, rel=1e-6)


def test_sampled_statistics_are_exactly_those_of_the_rows_that_the_weights_names_choose(tmp_path):
    directory = write_tiny(tmp_path / "c", **RAGGED)
    stored = load_codes(directory)
    values = check_values(Checkpoint(directory))
    sampled = [codes[sampled_rows(name, len(codes))].ravel() for name, (codes, _) in stored.items()]
    assert values.histogram == tuple(np.bincount(np.concatenate(sampled), minlength=256))
    for layer in range(2):
        for expert in range(8):
            start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
            names = [f"{start}{name}.weight" for name in ("w1", "w2", "w3")]
            wanted = sum(norm_of_samples(name, dequantized(*stored[name])) for name in names)
            found = values.expert_norms[layer][expert]
            assert found == pytest.approx(np.sqrt(wanted), rel=1e-6)


def sampled_rows(name, rows):
    """One row of each block of 128, 37 rows on from one to the next, the first by the weight's
    name.
    """
    return [
        first + (crc32(name.encode()) + 37 * block) % min(128, rows - first)
        for block, first in enumerate(range(0, rows, 128))
    ]


def norm_of_samples(name, weight):
    """The squared norm of a weight whose blocks had their sampled row in each row."""
    blocks = zip(range(0, len(weight), 128), sampled_rows(name, len(weight)), strict=True)
    return sum(np.sum(weight[row] ** 2) * len(weight[first : first + 128]) for first, row in blocks)


def number_in_block(codes):
    """Codes that are their row's place in its block of 128; the last two share a finite one."""
    places = (np.arange(len(codes)) % 128).clip(max=126)
    return np.broadcast_to(places[:, None], codes.shape).astype(np.uint8)


def first_of_block(codes):
    """Each row as the first of its block of 128."""
    return codes[np.arange(len(codes)) // 128 * 128]


def rewrite_codes(directory, change):
    """Put change(codes) in place of the codes of every FP8 weight; return what is stored then."""
    checkpoint = Checkpoint(directory)
    for name, (codes, _) in load_codes(directory).items():
        entry = checkpoint.entry(name)
        with (directory / entry.shard).open("r+b") as file:
            file.seek(entry.start)
            file.write(change(codes).tobytes())
    return load_codes(directory)


def expert_of(stored, layer, expert):
    """The codes and scales of an expert's three weights."""
    start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
    return [stored[f"{start}{name}.weight"] for name in ("w1", "w2", "w3")]


def squared_norm(weight):
    """The squared Frobenius norm of a weight, from its codes and scales."""
    return np.sum(dequantized(*weight) ** 2)


def load_codes(directory):
    """Codes (uint8) and scales of every FP8 weight of a single-file checkpoint, read by the
    safetensors library.
    """
    tensors = load_file(directory / "model.safetensors")
    fp8_names = [name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn]
    return {
        n: (tensors[n].view(torch.uint8).numpy(), tensors[n + "_scale_inv"].numpy())
        for n in fp8_names
    }


def dequantized(codes, scales):
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).double().numpy()
    rows, columns = np.indices(codes.shape)
    return values * scales[rows // 128, columns // 128]


def test_a_router_bias_that_is_no_number_is_null(tmp_path):
    checkpoint = Checkpoint(write_tiny(tmp_path / "c"))
    entry = checkpoint.entry("model.layers.0.block_sparse_moe.e_score_correction_bias")
    with (checkpoint.directory / entry.shard).open("r+b") as file:
        file.seek(entry.start)
        file.write(np.full(entry.shape, np.nan, np.float32).tobytes())
    bias = check_values(Checkpoint(checkpoint.directory)).to_json()["router_bias"]
    assert bias[0] == [None, None]
    assert None not in bias[1]


def test_expert_norms_are_near_those_of_the_dequantized_weights(tmp_path):
    directory = write_tiny(tmp_path / "c", **RAGGED)
    values = check_values(Checkpoint(directory))
    stored = load_codes(directory)
    for layer in range(2):
        for expert in range(8):
            wanted = np.sqrt(sum(map(squared_norm, expert_of(stored, layer, expert))))
            assert values.expert_norms[layer][expert] == pytest.approx(wanted, rel=0.1)


def test_two_equal_checkpoints_compare_equal_and_one_changed_byte_is_named(tmp_path):
    first = write_tiny(tmp_path / "a", shards=1)
    second = write_tiny(tmp_path / "b", shards=2)
    assert compare(Checkpoint(first), Checkpoint(second), values=True).equal
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = Checkpoint(second)
    entry = changed.entry(name)
    with (second / entry.shard).open("r+b") as file:
        file.seek(entry.end - 1)
        file.write(bytes([changed.array(name)[-1, -1] ^ 1]))
    found = compare(Checkpoint(first), Checkpoint(second), values=True)
    assert found.different_values == (name,)
    assert name in found.render()
    assert compare(Checkpoint(first), Checkpoint(second)).equal  # headers alone cannot see it


def test_a_comparison_names_other_shapes_dtypes_and_names(tmp_path):
    first = Checkpoint(write_tiny(tmp_path / "a"))
    second = Checkpoint(write_tiny(tmp_path / "b", dense=True, num_hidden_layers=1, vocab_size=176))
    found = compare(first, second)
    assert not found.equal
    assert any(name.startswith("model.layers.1.") for name in found.only_in_first)
    assert ("lm_head.weight", "BF16 [160, 256]", "F32 [176, 256]") in found.different_headers
    assert ("vocab_size", 160, 176) in found.config_fields


# The high-water mark of this program alone: getrusage would count the parent's pages from before
# exec.
MEASURED = """
import re, sys
from tests.opened import inspect
report = inspect(sys.argv[1])
assert "torch" not in sys.modules
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(report.tensors, report.parameters, report.usable, peak)
"""


def test_the_full_size_layout_is_inspected_without_torch_in_under_500_megabytes(full_size):
    output = subprocess.run(
        [sys.executable, "-c", MEASURED, str(full_size)], check=True, capture_output=True, text=True
    ).stdout
    tensors, parameters, usable, kilobytes = output.split()
    assert (tensors, parameters, usable) == ("96103", "228689764864", "True")
    assert int(kilobytes) < 500_000
