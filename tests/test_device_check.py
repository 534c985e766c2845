"""The device check with CPU backends on both sides: a right device passes, and each fault is
found where it is and named. The device's faults are built in `tests/faulty_device.py`, apart
from the faults that the check knows.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.device_check import schedule, tokens
from neuron_minimax.device_check.check import (
    CheckRequest,
    CompiledDevice,
    Device,
    check_device,
    run_checks,
)
from neuron_minimax.device_check.probes import Layer, Probe, write_probe
from neuron_minimax.device_check.reference import Fault
from neuron_minimax.device_check.router import ExpertChoice, RouterCase, judge_router
from neuron_minimax.device_check.schedule import Asked
from neuron_minimax.device_check.verdicts import (
    Expectation,
    KnownFault,
    Report,
    Status,
    Verdict,
    judge_logits,
)
from neuron_minimax.errors import BackendError, ConversionError
from neuron_minimax.kernels.reference import dequantize
from neuron_minimax.progress import SILENT
from tests import faulty_device as faults
from tests.faulty_device import InProcess, with_fault
from tests.heard import Heard
from tests.opened import convert
from tests.tiny import write_tiny
from tests.tiny_traced import write_traced

REQUEST = CheckRequest(
    layer=1, slots=3, seq_len=40, buckets=(8, 24), tp_degree=2, compute="float32"
)
CHECKS = ("router", "value and output projection", "QK norm", "one layer")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("device")
    convert(write_tiny(base / "source", seed=3), base / "converted")
    return base / "converted"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


def verdicts_of(report: Report) -> dict[str, Verdict]:
    assert tuple(verdict.check for verdict in report.verdicts)[: len(CHECKS)] == CHECKS
    return {verdict.check: verdict for verdict in report.verdicts}


def statuses(report: Report) -> str:
    """The first letter of each check's status, in order."""
    return "".join(verdict.status[0] for verdict in report.verdicts)


@pytest.mark.parametrize("compute", ["float32", "bf16"])
def test_a_device_that_computes_as_the_cpu_does_passes_every_check(
    converted: Path, work: Path, compute: str
) -> None:
    request = replace(REQUEST, compute=compute)
    heard = Heard()
    report = run_checks(converted, work, request, InProcess(request=request), progress=heard)
    assert statuses(report) == "PPPP", report.render()
    assert report.passed
    assert (tuple(stage.what for stage in heard.stages), heard.lines) == (CHECKS, [])


def test_a_device_that_rounds_elsewhere_passes_every_check(converted: Path, work: Path) -> None:
    report = run_checks(
        converted, work, replace(REQUEST, compute="bf16"), InProcess(request=REQUEST)
    )
    assert statuses(report) == "PPPP", report.render()
    assert verdicts_of(report)["one layer"].measured.difference > 0.001


@pytest.mark.parametrize(
    ("broken", "wanted", "check", "cause"),
    [
        (
            faults.drop_bias,
            "FPPS",
            "router",
            "without e_score_correction_bias: it is missing on the device",
        ),
        (
            faults.round_router,
            "FPPS",
            "router",
            "with the gate and e_score_correction_bias rounded to BF16",
        ),
        (
            faults.move_experts,
            "FPPS",
            "router",
            "no known fault explains it: experts may be out of place",
        ),
        (faults.halve_values, "PFSS", "value and output projection", "no known fault explains it"),
        (
            faults.split_norms,
            "PPFS",
            "QK norm",
            "each of the 2 ranks takes the QK norm over its own heads",
        ),
        (
            faults.rotate_everything,
            "PPFS",
            "QK norm",
            "RoPE rotates all 128 channels of a head instead of the",
        ),
        (
            faults.swap_gate_and_up,
            "PPPF",
            "one layer",
            "the gate and up projections of the experts are swapped",
        ),
        (faults.double_a_scale, "PPPF", "one layer", "what is left is the experts"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_fails_its_check_alone_and_is_named(
    converted: Path, work: Path, broken: Callable, wanted: str, check: str, cause: str
) -> None:
    report = run_checks(converted, work, REQUEST, with_fault(REQUEST, broken, broken))
    assert statuses(report) == wanted, report.render()
    assert cause in verdicts_of(report)[check].meaning
    assert not report.passed


def test_a_lost_bias_is_named_in_bf16_with_the_experts_and_the_number_of_tokens(
    converted: Path, work: Path
) -> None:
    request = replace(REQUEST, compute="bf16")
    report = run_checks(
        converted, work, request, with_fault(request, faults.drop_bias, faults.drop_bias)
    )
    verdict = verdicts_of(report)["router"]
    assert verdict.status is Status.FAIL
    assert "without e_score_correction_bias" in verdict.meaning
    assert "where the CPU chose [" in verdict.finding
    assert "context encoding" in verdict.finding


def test_a_norm_that_is_wrong_in_token_generation_alone_is_named_so(
    converted: Path, work: Path
) -> None:
    report = run_checks(converted, work, REQUEST, with_fault(REQUEST, None, faults.split_norms))
    assert statuses(report) == "PPFS"
    verdict = verdicts_of(report)["QK norm"]
    assert "context encoding right" in verdict.finding
    assert "token generation wrong" in verdict.finding
    assert verdict.meaning.endswith("instead of the full width, in token generation alone")


def test_steps_at_wrong_positions_fail_in_token_generation_alone(
    converted: Path, work: Path
) -> None:
    report = run_checks(converted, work, REQUEST, InProcess(request=REQUEST, make=faults.LateSteps))
    assert statuses(report) == "PPFS", report.render()
    verdict = verdicts_of(report)["QK norm"]
    assert "context encoding right" in verdict.finding
    assert "cache writes, positions" in verdict.meaning


def test_a_bias_lost_in_token_generation_alone_is_counted_by_phase(
    converted: Path, work: Path
) -> None:
    report = run_checks(converted, work, REQUEST, with_fault(REQUEST, None, faults.drop_bias))
    assert statuses(report) == "FPPS"
    assert "context encoding 0 of" in verdicts_of(report)["router"].finding


def compiled(work: Path, *command: str, limit: float = 120.0) -> Device:
    options = {
        "slots": 3,
        "seq_len": 40,
        "buckets": (8, 24),
        "engine": "eager",
        "compute": "float32",
    }
    device = CompiledDevice(work=work, backend="cpu", options=options, progress=SILENT, limit=limit)
    return replace(device, command=command) if command else device


@pytest.mark.parametrize(
    ("code", "limit", "said"),
    [
        ("import os; os.abort()", 60.0, "failed with exit code -6"),
        ("import time; time.sleep(600)", 1.0, "was stopped after 1 seconds"),
    ],
)
def test_a_crash_or_a_hang_is_a_verdict_and_the_other_checks_go_on(
    converted: Path, work: Path, code: str, limit: float, said: str
) -> None:
    report = run_checks(
        converted, work, REQUEST, compiled(work, sys.executable, "-c", code, limit=limit)
    )
    assert statuses(report) == "FFSS"
    assert f"the run on the device {said}" in verdicts_of(report)["router"].meaning


def test_a_process_that_writes_no_logits_fails(converted: Path, work: Path) -> None:
    run_checks(
        converted, work, REQUEST, InProcess(request=REQUEST)
    )  # whose answers must not be taken
    report = run_checks(
        converted, work, REQUEST, compiled(work, sys.executable, "-c", "pass", limit=30.0)
    )
    assert statuses(report) == "FFSS"


class Changed(InProcess):
    """A device whose logits are changed on their way."""

    def run_probe(self, probe: Path, asked: Path, logits: Path) -> None:
        super().run_probe(probe, asked, logits)
        found = torch.from_numpy(
            np.array(TensorDirectory(logits.parent, [logits.name]).array("logits"))
        )
        save_file({"logits": self.change(found)}, logits)

    @staticmethod
    def change(logits: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda logits: logits.index_fill(0, torch.tensor([2]), torch.nan), "NaN"),
        (lambda logits: logits[:1].expand_as(logits).contiguous(), "the same for every prompt"),
        (lambda logits: logits[:-1], "expected ["),
    ],
    ids=["nan", "constant", "short"],
)
def test_logits_that_cannot_be_right_fail(
    converted: Path, work: Path, change: Callable, said: str
) -> None:
    device = type("Device", (Changed,), {"change": staticmethod(change)})(request=REQUEST)
    report = run_checks(converted, work, REQUEST, device)
    assert statuses(report) == "FFSS"
    assert all(said in verdict.finding for verdict in report.verdicts[:2])


def test_wrong_affinities_of_the_right_experts_fail(converted: Path, work: Path) -> None:
    class Even(Changed):
        @staticmethod
        def change(logits: torch.Tensor) -> torch.Tensor:
            experts = torch.where(logits[:, :8] > 0, logits[:, :8].amax(1, keepdim=True), 0.0)
            return torch.cat([experts, logits[:, 8:]], 1)

    report = run_checks(converted, work, REQUEST, Even(request=REQUEST))
    assert (
        "the experts are the CPU's, their affinities are not"
        in verdicts_of(report)["router"].finding
    )


def router_case(
    bias: torch.Tensor, experts_per_token: int = 2
) -> tuple[RouterCase, list[schedule.Row]]:
    generator = torch.Generator().manual_seed(0)
    case = RouterCase(
        bias_name="e_score_correction_bias",
        gate_EH=torch.randn(8, 256, generator=generator) / 8,
        bias_E=bias,
        inputs_NH=torch.randn(30, 256, generator=generator),
        experts_per_token=experts_per_token,
    )
    row = schedule.Row(phase=schedule.Phase.CONTEXT_ENCODING, slot=0, length=1)
    return case, [row] * 30


def judged(
    case: RouterCase, rows: list[schedule.Row], expected: torch.Tensor, found: torch.Tensor
) -> Verdict:
    return judge_router(case, rows, (expected, found), found)


@pytest.mark.parametrize(
    ("bias", "experts_per_token", "said"),
    [
        (torch.linspace(0, 1, 8), 8, "every token has the same experts"),
        (torch.linspace(0, 90, 8), 2, "every token has the same experts"),
        (torch.linspace(0, 1e-9, 8), 2, "changes no token's experts"),
    ],
)
def test_a_router_check_that_could_see_nothing_fails_as_the_tools_own_fault(
    bias: torch.Tensor, experts_per_token: int, said: str
) -> None:
    case, rows = router_case(bias, experts_per_token)
    verdict = judged(case, rows, case.affinity_NE, case.affinity_NE)
    assert verdict.status is Status.FAIL
    assert said in verdict.finding
    assert "says nothing about the device" in verdict.meaning


def test_coded_experts_that_the_cpu_itself_does_not_show_fail_as_the_tools_own_fault() -> None:
    case, rows = router_case(torch.linspace(0, 1, 8))
    verdict = judged(case, rows, torch.zeros(30, 8), case.affinity_NE)
    assert "not visible in the CPU's own logits" in verdict.finding


def test_affinities_with_the_bias_in_them_are_named() -> None:
    case, rows = router_case(torch.linspace(0.5, 1, 8))
    biased = case.choice().choice_NE * case.choice().chosen_NE
    verdict = judged(case, rows, case.affinity_NE, biased / biased.sum(1, keepdim=True))
    assert "with e_score_correction_bias in them" in verdict.meaning


def test_lost_experts_are_told_from_wrong_choices() -> None:
    case, rows = router_case(torch.linspace(0, 1, 8))
    found = case.affinity_NE.clone()
    found[:, 6:] = 0
    verdict = judged(case, rows, case.affinity_NE, found)
    assert "outputs of experts are lost, doubled or of another sign" in verdict.meaning


def test_a_probe_that_would_not_see_a_known_fault_fails_as_the_tools_own_fault() -> None:
    logits = torch.randn(6, 20, generator=torch.Generator().manual_seed(0))
    fault = Fault(name="none", says="nothing is wrong", apply=lambda model: None)
    row = schedule.Row(phase=schedule.Phase.TOKEN_GENERATION, slot=0, length=2)
    expectation = Expectation(
        check="one layer",
        rows=[row] * 6,
        logits_NV=logits,
        float32_NV=logits,
        compute="float32",
        compared_N=torch.ones(6, dtype=torch.bool),
        faults=[KnownFault(fault=fault, logits_NV=logits.clone(), only_steps=logits.clone)],
        if_wrong="",
        next_step="",
    )
    assert "would not see that nothing is wrong" in judge_logits(expectation, logits).finding
    few = replace(expectation, compared_N=torch.arange(6) < 3, faults=())
    assert "only 3 rows of logits can be compared" in judge_logits(few, logits).finding
    constant = replace(expectation, logits_NV=logits[:1].expand(6, 20), faults=())
    assert "the same for every prompt" in judge_logits(constant, logits).finding


def test_near_ties_may_fall_either_way_and_nothing_else_may() -> None:
    choice = ExpertChoice(
        choice_NE=torch.tensor([[5.0, 4.0, 3.0, 2.99]]),
        margin_NE=torch.full((1, 4), 0.006),
        experts_per_token=3,
    )
    assert choice.near_tie_N.tolist() == [True]
    assert choice.allows(torch.tensor([[True, True, False, True]])).tolist() == [True]
    assert choice.allows(torch.tensor([[True, False, True, True]])).tolist() == [False]


def test_the_margin_of_a_choice_covers_what_rounding_the_hidden_state_to_bf16_moves() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(400, 256, generator=generator)
    gate = torch.randn(32, 256, generator=generator) / 8
    bias = torch.randn(32, generator=generator) / 4
    exact = RouterCase(
        bias_name="bias", gate_EH=gate, bias_E=bias, inputs_NH=hidden, experts_per_token=4
    )
    rounded = replace(exact, inputs_NH=hidden.bfloat16())
    moved = (exact.choice().choice_NE - rounded.choice().choice_NE).abs()
    assert (moved <= rounded.choice().margin_NE).all()
    flipped = (exact.choice().chosen_NE != rounded.choice().chosen_NE).any(1)
    assert flipped.any()
    assert rounded.choice().allows(exact.choice().chosen_NE).all()


def test_probes_differ_in_weights_alone(converted: Path, tmp_path: Path) -> None:
    layer = Layer(converted, 1)
    layouts = []
    for probe in Probe:
        write_probe(layer, probe, tmp_path / probe)
        entries = TensorDirectory(tmp_path / probe).entries.values()
        layouts.append({entry.name: (entry.dtype, entry.shape) for entry in entries})
    assert layouts[0] == layouts[1] == layouts[2]
    configs = [json.loads((tmp_path / probe / "config.json").read_text()) for probe in Probe]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0]["num_hidden_layers"] == 1
    source = TensorDirectory(converted)
    own = TensorDirectory(tmp_path / Probe.LAYER)
    for name in own.entries:
        stored = source.array(name.replace("layers.0.", "layers.1."))
        np.testing.assert_array_equal(own.array(name), stored)


def test_coded_experts_write_one_channel_each_in_every_block_of_their_channels(
    tmp_path: Path,
) -> None:
    convert(write_tiny(tmp_path / "source", intermediate_size=256), tmp_path / "converted")
    layer = Layer(tmp_path / "converted", 0)
    write_probe(layer, Probe.ROUTER, tmp_path / "probe")
    stored = TensorDirectory(tmp_path / "probe")
    prefix = "layers.0.block_sparse_moe.expert_mlps.mlp_op."
    gate_up, down = (
        dequantize(
            stored.tensor(f"{prefix}{name}.weight"),
            stored.tensor(f"{prefix}{name}.scale"),
            (128, 128),
            parts,
        )
        for name, parts in (("gate_up_proj", 2), ("down_proj", 1))
    )
    for expert in range(8):
        assert gate_up[expert].nonzero()[:, 1].tolist() == [0, 128, 256, 384]
        assert down[expert].nonzero().tolist() == [
            [0, c] for c in [int(layer.code.channels[expert])]
        ] + [[128, int(layer.code.channels[expert])]]
    assert len(set(layer.code.channels.tolist()) | {layer.code.constant}) == 9


def test_a_large_vocabulary_is_cut_to_tokens_from_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuron_minimax.device_check.probes.MOST_TOKENS", 48)
    convert(write_tiny(tmp_path / "source", eos_token_id=150), tmp_path / "converted")
    write_probe(Layer(tmp_path / "converted", 0), Probe.LAYER, tmp_path / "probe")
    config = ModelConfig.from_dir(tmp_path / "probe")
    assert (config.vocab_size, config.eos_token_ids) == (48, ())
    full = TensorDirectory(tmp_path / "converted")
    cut = TensorDirectory(tmp_path / "probe")
    rows = np.arange(48) * 160 // 48
    for name in ("embed_tokens.weight", "lm_head.weight"):
        np.testing.assert_array_equal(cut.array(name), full.array(name)[rows])


def test_every_bucket_is_entered_and_slots_are_in_no_order() -> None:
    limits = schedule.Limits(slots=4, seq_len=64, buckets=(8, 16, 32), vocabulary=100)
    rows = schedule.rows_of(schedule.attention_rounds(limits))
    lengths = {row.length for row in rows if row.phase is schedule.Phase.CONTEXT_ENCODING}
    assert {8, 16, 32} <= lengths
    slots = [[sequence.slot for sequence in round_] for round_ in schedule.router_rounds(limits)]
    assert any(row != sorted(row) for row in slots)
    assert len(schedule.rows_of(schedule.router_rounds(limits))) >= 2 * schedule.ROUTER_ROWS


def answers(*, margin: float, places: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Device, CPU and float32 logits [2,4,8], the device behind by `margin` at so many places."""
    expected = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1))
    expected[..., 3] = 6.0
    found = expected.clone()
    for place in range(places):
        expected[1, 1 + place, 5] = 6.0 - margin
        found[1, 1 + place] = expected[1, 1 + place]
        found[1, 1 + place, 5] = 6.5
    return found, expected, expected + 0.01


def test_first_tokens_may_differ_at_near_ties_only() -> None:
    assert (
        tokens.judge_tokens(*answers(margin=0.0, places=0)).finding == "all 8 tokens are the CPU's"
    )
    near = tokens.judge_tokens(*answers(margin=0.02, places=1))
    assert near.status is Status.PASS
    assert "token 2 of prompt 2" in near.finding
    far = tokens.judge_tokens(*answers(margin=1.0, places=2))
    assert far.status is Status.FAIL
    assert far.measured.difference == pytest.approx(1.0, abs=1e-5)
    assert "token generation of the full model" in far.meaning
    found, expected, float32 = answers(margin=0.0, places=0)
    assert "any token would pass" in tokens.judge_tokens(found, expected, float32 + 9).finding


def test_the_full_model_is_checked_last_from_its_compiled_directory(tmp_path: Path) -> None:
    traced = write_traced(tmp_path, slots=2, num_hidden_layers=1)
    options = {"slots": 2, "seq_len": 40, "buckets": (8, 24), "engine": "eager"}
    report = check_device(
        tmp_path / "converted", tmp_path / "work", options, backend="cpu", traced=traced
    )
    assert statuses(report) == "PPPPP", report.render()
    assert report.verdicts[-1].finding == f"all {4 * tokens.TOKENS} tokens are the CPU's"
    other = tmp_path / "other"
    convert(write_tiny(tmp_path / "source", seed=8), other)
    with pytest.raises(BackendError, match="compiled from another directory"):
        check_device(other, tmp_path / "work", options, backend="cpu", traced=traced)


def test_the_command_prints_verdicts_and_exits_by_them(
    converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    arguments = [
        "check-device",
        str(converted),
        str(tmp_path),
        "--backend",
        "cpu",
        "--engine",
        "eager",
        "--json",
    ]
    code = main(
        [*arguments, "--seq-len", "40", "--buckets", "8,24", "--batch-size", "2", "--layer", "1"]
    )
    found = json.loads(capsys.readouterr().out)
    assert (code, found["passed"], len(found["verdicts"])) == (0, True, 4)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--layer", "7"], 1, "has layers 0 to 1"),
        (["--seq-len", "3", "--buckets", "2"], 1, "no room for a prompt of two tokens"),
        (["--buckets", "a"], 2, "--buckets is 'a'"),
    ],
)
def test_bad_input_is_one_message(
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    code: int,
    said: str,
) -> None:
    command = ["check-device", str(converted), str(tmp_path), "--backend", "cpu"]
    assert main([*command, *arguments]) == code
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")


def test_a_work_directory_with_other_files_or_a_source_without_conversion_is_refused(
    converted: Path, tmp_path: Path
) -> None:
    (tmp_path / "router-layer1").mkdir()
    (tmp_path / "router-layer1" / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match=r"mine\.txt"):
        run_checks(converted, tmp_path, REQUEST, InProcess(request=REQUEST))
    with pytest.raises(ConversionError, match="is a checkpoint; expected a converted directory"):
        Layer(write_tiny(tmp_path / "source"), 0)


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"rounds": 1}',
        '{"rounds": [[{"slot": true, "prompt": [1], "continuation": []}]]}',
        '{"prompts": [["1"]], "tokens": 1}',
        '{"prompts": [], "tokens": 1, "more": 1}',
        "[" * 100_000,
    ],
)
def test_a_process_refuses_to_be_asked_something_else(tmp_path, text):
    (tmp_path / "asked.json").write_text(text)
    with pytest.raises(BackendError, match=r"asked\.json cannot be used .* check-device again"):
        Asked.read(tmp_path / "asked.json")
    with pytest.raises(BackendError, match="does not exist"):
        Asked.read(tmp_path / "absent.json")
