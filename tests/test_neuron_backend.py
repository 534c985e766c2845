"""What of the Neuron backend runs without NxDI: options and the planner in front, supervision,
coverage, messages.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_minimax.backends import compile_model
from neuron_minimax.backends.nxdi import backend, coverage, options, vllm_plugin
from neuron_minimax.backends.nxdi.supervise import run_supervised
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import BackendError, CheckpointError, NeuronMiniMaxError
from neuron_minimax.planner import blockwise
from neuron_minimax.planner.sdks import SDKS
from tests.full_size import published_config
from tests.opened import convert
from tests.tiny import write_tiny

PUBLISHED = ModelConfig.from_dict(published_config())
TRN3 = "trn3 Gen1 server (1/4 of Gen1)"
ROOT = Path(__file__).parents[1]
WITHOUT_NXDI = pytest.mark.skipif(
    importlib.util.find_spec("neuronx_distributed_inference") is not None,
    reason="the Neuron packages are installed",
)


def test_defaults_are_the_instance_and_degrees_that_m2_was_run_with() -> None:
    checked = backend.check_options(PUBLISHED, {"slots": 32, "tp_degree": None})
    assert checked == {
        "instance": "trn2.48xlarge",
        "tp_degree": 64,
        "moe_tp_degree": 1,
        "moe_ep_degree": 64,
        "slots": 32,
        "seq_len": 1024,
        "buckets": [128, 256, 512, 1024],
        "blockwise_matmul": "torch",
        "expert_kernel": "torch",
        "expert_scales": "block",
        "expert_placement": None,
        "expert_placement_sha256": None,
        "compiler_cache": None,
    }
    assert backend.check_options(PUBLISHED, checked) == checked


def test_the_planner_stops_a_compile_that_cannot_work_and_force_goes_on() -> None:
    refused = {"instance": "inf2.48xlarge", "tp_degree": 24, "moe_tp_degree": 3, "slots": 8}
    with pytest.raises(
        BackendError, match=r"R3 refuse: with expert parallelism batch_size 8(?s:.*)--force"
    ):
        backend.check_options(PUBLISHED, refused)
    assert backend.check_options(PUBLISHED, refused, force=True)["moe_ep_degree"] == 8
    assert backend.check_options(PUBLISHED, refused | {"slots": 32})["slots"] == 32


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"buckets": [256, 128]}, "ascending"),
        ({"seq_len": 1}, "seq_len"),
        ({"slots": 32, "colour": 1}, "colour"),
        ({"slots": 32, "engine": "eager"}, "cpu backend"),
        ({"instance": "m5.large"}, "expected one of"),
    ],
)
def test_bad_options_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(NeuronMiniMaxError, match=message):
        backend.check_options(PUBLISHED, bad)


def test_a_placement_is_known_by_its_contents(tmp_path: Path) -> None:
    config = PUBLISHED
    placement = tmp_path / "placement.json"
    request = {"slots": 32, "expert_placement": str(placement)}
    with pytest.raises(BackendError, match=r"placement\.json cannot be read"):
        backend.check_options(config, request)
    checked = []
    for text in ("{}", "{ }", "{}"):
        placement.write_text(text)
        checked.append(backend.check_options(config, request))
    assert checked[0] == checked[2] != checked[1]


def test_settings_fit_the_chip_and_directories_belong_to_one_compile(tmp_path: Path) -> None:
    checked = options.parse(backend.check_options(PUBLISHED, {"slots": 32}))
    fields = options.neuron_config_fields(checked)
    assert (fields["logical_nc_config"], fields["blockwise_matmul_config"]) == (
        2,
        {"use_torch_block_wise": True, "logical_nc_config": 2},
    )
    assert fields["moe_mask_padded_tokens"]
    assert fields["disable_numeric_cc_token"]
    assert (fields["ctx_batch_size"], fields["tkg_batch_size"], fields["max_context_length"]) == (
        1,
        32,
        1024,
    )
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    variables = options.environment(tmp_path, tmp_path / "a", checked)
    assert (variables["XLA_HANDLE_SPECIAL_SCALAR"], variables["UNSAFE_FP8FNCAST"]) == ("1", "1")
    assert variables["DISABLE_NUMERIC_CC_TOKEN"] == "1"
    other = options.environment(tmp_path, tmp_path / "b", checked)
    for name in ("NEURON_COMPILE_CACHE_URL", "BASE_COMPILE_WORK_DIR"):
        assert variables[name] != other[name]
    assert variables["NEURON_PLATFORM_TARGET_OVERRIDE"] == "trn2"
    checked = options.parse(
        backend.check_options(
            PUBLISHED, {"slots": 32, "instance": "inf2.48xlarge", "moe_tp_degree": 3}
        )
    )
    assert "NEURON_PLATFORM_TARGET_OVERRIDE" not in options.environment(
        tmp_path, tmp_path / "a", checked
    )
    fields = options.neuron_config_fields(checked)
    shared = options.parse(
        {**backend.check_options(PUBLISHED, {"slots": 32}), "compiler_cache": "/nvme/cache"}
    )
    assert (
        options.environment(tmp_path, tmp_path / "a", shared)["NEURON_COMPILE_CACHE_URL"]
        == "/nvme/cache"
    )
    assert (fields["logical_nc_config"], fields["tp_degree"]) == (1, 24)
    assert fields["blockwise_matmul_config"] == {
        "use_torch_block_wise": True,
        "logical_nc_config": 1,
    }


def test_the_fp8_casts_are_left_out_for_codes_that_the_chip_reads_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = published_config() | {"neuron_minimax": {"fp8_range": "ocp"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    # The plan refuses them while no compiler has shown that this suffices; --force goes on.
    native = options.parse(options.check(PUBLISHED, {"slots": 32, "instance": TRN3}, False))
    variables = options.environment(tmp_path, tmp_path, native)
    assert not {"XLA_HANDLE_SPECIAL_SCALAR", "UNSAFE_FP8FNCAST"} & variables.keys()
    monkeypatch.setenv("UNSAFE_FP8FNCAST", "1")  # left over from another model
    assert "UNSAFE_FP8FNCAST" not in backend.process_environment(tmp_path, tmp_path, native)
    (tmp_path / "config.json").write_text(json.dumps(published_config()))
    assert (
        options.FP8_CASTS.items() <= backend.process_environment(tmp_path, tmp_path, native).items()
    )


@pytest.mark.parametrize("name", blockwise.BLOCKWISE_MATMULS)
def test_each_way_through_the_blocks_reaches_nxdi_and_the_vllm_plugin(
    name: str, tmp_path: Path
) -> None:
    checked = backend.check_options(PUBLISHED, {"slots": 32, "blockwise_matmul": name})
    settings = options.neuron_config_fields(options.parse(checked))["blockwise_matmul_config"]
    convert(write_tiny(tmp_path / "source"), tmp_path / "converted")
    made = vllm_plugin.override_neuron_config(
        tmp_path / "converted",
        moe_tp_degree=1,
        moe_ep_degree=64,
        buckets=(512, 1024),
        blockwise_matmul=name,
    )
    assert made["blockwise_matmul_config"] == blockwise.BLOCKWISE_MATMULS[name].settings
    assert settings == made["blockwise_matmul_config"] | {"logical_nc_config": 2}
    assert len([value for value in settings.values() if value is True]) == 1


def test_packages_of_another_sdk_stop_a_compile_unless_they_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = {**SDKS["2.29"].python, "neuronx-cc": "2.24.5133.0+abc"}
    monkeypatch.setattr(backend, "installed_versions", lambda: found)
    checked = backend.check_options(PUBLISHED, {"slots": 32})
    found["neuronx-cc"] = "2.26.6360.0"
    with pytest.raises(
        BackendError,
        match=r"neuronx-cc 2\.26\.6360\.0 \(tested: 2\.24\.5133\.0\): silently .*--allow",
    ) as caught:
        backend.check_options(PUBLISHED, {"slots": 32})
    assert SDKS["2.29"].install_line in str(caught.value)
    assert (
        backend.check_options(PUBLISHED, {"slots": 32, "allow_untested_versions": True}) == checked
    )
    found.update(SDKS["2.28"].python)
    inf2 = {"slots": 32, "instance": "inf2.48xlarge", "moe_tp_degree": 3}
    assert backend.untested_versions("inf2.48xlarge") == []
    assert backend.check_options(PUBLISHED, inf2)
    with pytest.raises(
        BackendError, match=r"neuronx-distributed 0\.17\.26814 \(tested: 0\.18\.27753\)"
    ):
        backend.check_options(PUBLISHED, {"slots": 32})


def test_what_a_compile_rounds_and_what_it_was_made_with_stands_in_its_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "run_supervised", lambda *_, **__: 1.0)
    monkeypatch.setattr(
        backend, "installed_versions", lambda: SDKS["2.29"].python | {"nki": "0.4.0"}
    )
    checked = backend.check_options(PUBLISHED, {"slots": 32, "allow_untested_versions": True})
    said: dict[str, list[str]] = {}
    for name, sizes in (("fp8", {}), ("dense", {"dense": True})):
        convert(write_tiny(tmp_path / f"{name}-source", **sizes), tmp_path / name)
        (tmp_path / f"{name}-graphs").mkdir()
        lines: list[str] = []
        _, notes = backend.build(
            tmp_path / name, tmp_path / f"{name}-graphs", checked, lines.append
        )
        assert [f"warning: {note}" for note in notes[1:]] == lines
        said[name] = notes[1:]
    assert said["fp8"] == [
        "untested version: nki 0.4.0 (tested: 0.3.0)",
        "56 of 64 expert-parallel ranks hold an expert of zeros, which no token can choose: the "
        "ranks do not divide 8 experts",
    ]
    rounded = (
        len(TensorDirectory(tmp_path / "dense").entries) - 2 * 2
    )  # but for gate and bias of two layers
    assert said["dense"][1].startswith(
        f"{rounded} float32 weights are rounded to BF16 for this compile, the first "
    )


@pytest.mark.parametrize("page", ["README.md", "docs/neuron_instance.md"])
def test_the_pages_give_the_install_line_of_every_sdk(page: str) -> None:
    text = " ".join((ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ").split())
    for sdk in SDKS.values():
        assert sdk.install_line in text


def supervise(tmp_path: Path, code: str, limit: float = 30.0) -> list[str]:
    lines: list[str] = []
    command = [sys.executable, "-u", "-c", code]
    run_supervised(command, os.environ, tmp_path / "log", lines.append, limit=limit, interval=0.2)
    return lines


def test_a_long_compile_reports_progress_and_keeps_its_log(tmp_path: Path) -> None:
    lines = supervise(tmp_path, "import time; print('tiling'); time.sleep(1)")
    assert any("tiling" in line for line in lines)
    assert (tmp_path / "log").read_text() == "tiling\n"


def test_a_failed_compile_says_why(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=r"exit code 3(?s:.*)NCC_EVRF051"):
        supervise(tmp_path, "print('NCC_EVRF051'); raise SystemExit(3)")


def test_a_compile_over_its_limit_ends_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, time; child = subprocess.Popen(['sleep', '60'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    with pytest.raises(BackendError, match="stopped after 2 seconds"):
        supervise(tmp_path, code, limit=2.0)
    wait_for_the_end(int((tmp_path / "log").read_text()))


SUPERVISOR = """
import os, sys
from pathlib import Path
from neuron_minimax.backends.nxdi.supervise import run_supervised
command = [sys.executable, "-c", sys.argv[2]]
run_supervised(command, os.environ, Path(sys.argv[1]), print, limit=600.0)
"""
COMPILE = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def test_a_compile_ends_with_a_supervisor_that_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(log), COMPILE]) as supervisor:
        limit = time.monotonic() + 120
        while not log.exists() or not log.read_text().endswith("\n"):
            assert time.monotonic() < limit, "the compile did not begin"
            time.sleep(0.02)
        supervisor.kill()
    for process in map(int, log.read_text().split()):
        wait_for_the_end(process)


def wait_for_the_end(process: int) -> None:
    limit = time.monotonic() + 60  # the signal is sent; the kernel may take a moment
    while runs(process):
        assert time.monotonic() < limit, f"process {process} outlived its compile"
        time.sleep(0.02)


def runs(process: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


@WITHOUT_NXDI
def test_without_the_packages_there_is_one_message_with_the_install_line(tmp_path: Path) -> None:
    convert(write_tiny(tmp_path / "source"), tmp_path / "converted")
    one_rank = {"instance": "trn2.3xlarge", "tp_degree": 1}
    with pytest.raises(BackendError) as caught:
        compile_model(
            tmp_path / "converted", tmp_path / "traced", backend="neuron", options=one_rank
        )
    for sdk in SDKS.values():
        assert sdk.install_line in str(caught.value)
    assert "torch_neuronx, which is not installed" in str(caught.value)


@WITHOUT_NXDI
def test_the_placeholders_of_the_public_index_are_recognised(tmp_path: Path) -> None:
    for package in ("torch_neuronx", "neuronx_distributed", "neuronx_distributed_inference"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    code = "import neuron_minimax.backends.nxdi.imports"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(
        "neuron_minimax.errors.BackendError: the installed torch_neuronx cannot import"
    )
    assert "empty placeholder of the public package index" in last
    for sdk in SDKS.values():
        assert sdk.install_line in last


@WITHOUT_NXDI
def test_the_vllm_plugin_leaves_other_machines_alone(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert vllm_plugin.register() is False
    assert "not registered for Neuron" in caplog.text


def test_the_overrides_for_vllm_hold_the_quantization_of_the_converted_directory(
    tmp_path: Path,
) -> None:
    convert(write_tiny(tmp_path / "source"), tmp_path / "converted")
    made = vllm_plugin.override_neuron_config(
        tmp_path / "converted", moe_tp_degree=1, moe_ep_degree=64, buckets=(512, 1024)
    )
    listed = ModelConfig.from_dir(tmp_path / "converted").modules_to_not_convert
    assert json.loads(json.dumps(made)) == made
    assert (made["quantized"], made["quantization_block_axis"], made["moe_ep_degree"]) == (
        True,
        [1, 2],
        64,
    )
    assert made["modules_to_not_convert"] == list(listed)
    assert options.quantization_options(tmp_path / "source")["modules_to_not_convert"] == list(
        listed
    )
    assert options.quantization_options(write_tiny(tmp_path / "dense", dense=True)) == {}


def parameters(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def test_coverage_accepts_a_complete_checkpoint_and_the_second_name_of_a_weight() -> None:
    weight = torch.zeros(4, 4)
    # type: ignore[attr-defined]
    weight.tensor_model_parallel = True
    weight.partition_dim = 0
    weight.num_partitions = 2
    built = parameters(
        a__weight=weight, a__master_weight=weight, kv_mgr__past_key_values=torch.zeros(1)
    )
    coverage.check_checkpoint(built, {"a.weight": torch.zeros(8, 4)}, experts=1)
    coverage.check_loaded(built, ["a.weight"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "1 parameters of the model have no value in the checkpoint: a.weight"),
        (
            {"a.weight": torch.zeros(4), "b": torch.zeros(1)},
            "1 tensors of the checkpoint belong to no parameter",
        ),
        ({"a.weight": torch.zeros(5)}, r"a.weight has shape \[5\]"),
        (
            {"a.weight": torch.zeros(4, dtype=torch.float8_e4m3fn)},
            "FP8 codes would be read as weights",
        ),
        ({"a.weight": torch.zeros(4, dtype=torch.int32)}, "must not be rounded"),
    ],
)
def test_coverage_names_what_is_missing_unknown_or_of_the_wrong_kind(
    state: dict, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        coverage.check_checkpoint(parameters(a__weight=torch.zeros(4)), state, experts=1)


def test_float32_weights_are_not_loaded_into_bf16_parameters() -> None:
    built = parameters(gate=torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match="must not be rounded"):
        coverage.check_checkpoint(built, {"gate": torch.zeros(4)}, experts=1)


def test_a_parameter_that_loading_left_out_is_named() -> None:
    with pytest.raises(CheckpointError, match="no value in the weights of this rank: b"):
        coverage.check_loaded(parameters(a=torch.zeros(1), b=torch.zeros(1)), ["a"])
