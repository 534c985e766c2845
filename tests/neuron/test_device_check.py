"""The device check with real NxDI in CPU mode as the device: each probe in processes of its own,
one per rank.
"""

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from neuron_minimax.device_check.check import CheckRequest, run_checks
from neuron_minimax.device_check.verdicts import Report
from neuron_minimax.errors import BackendError
from tests.neuron.cases import MODELS, SEED
from tests.neuron.checks import OPTIONS
from tests.neuron.ranks import ROOT
from tests.opened import convert
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("device")
    convert(write_tiny(base / "source", seed=SEED, **MODELS["grouped"]), base / "converted")
    return base / "converted"


@dataclass(frozen=True, kw_only=True)
class CPUMode:
    """NxDI in CPU mode as a device; raises BackendError with what a failing rank said."""

    dtype: str
    tp_degree: int
    broken: bool = False

    def run_probe(self, probe: Path, asked: Path, logits: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        arguments = [
            str(probe),
            str(asked),
            str(logits),
            self.dtype,
            str(self.tp_degree),
            "broken" if self.broken else "right",
        ]
        command = [sys.executable, "-m", "tests.neuron.checks", "probe", *arguments]
        ranks = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(self.tp_degree)
        ]
        try:
            for rank in ranks:
                said, _ = rank.communicate(timeout=300)
                if rank.returncode:
                    raise BackendError(said[-4000:])
        finally:
            for rank in ranks:
                rank.kill()

    def run(self, traced: Path, asked: Path, logits: Path) -> None:
        raise BackendError("CPU mode has no compiled model")


def check(converted: Path, work: Path, device: CPUMode) -> Report:
    request = CheckRequest(
        layer=1,
        slots=OPTIONS["slots"],
        seq_len=OPTIONS["seq_len"],
        buckets=OPTIONS["buckets"],
        tp_degree=device.tp_degree,
        compute={"float32": "float32", "bfloat16": "bf16"}[device.dtype],
    )
    return run_checks(converted, work, request, device)


@pytest.mark.parametrize(("dtype", "tp_degree"), [("bfloat16", 1), ("float32", 2)])
def test_nxdi_passes_every_check(
    converted: Path, tmp_path: Path, dtype: str, tp_degree: int
) -> None:
    report = check(converted, tmp_path, CPUMode(dtype=dtype, tp_degree=tp_degree))
    assert [verdict.status for verdict in report.verdicts] == ["PASS"] * 4, report.render()


def test_faults_in_nxdis_own_modules_are_named(converted: Path, tmp_path: Path) -> None:
    report = check(converted, tmp_path, CPUMode(dtype="bfloat16", tp_degree=2, broken=True))
    router, value, norm, layer = report.verdicts
    assert [router.status, value.status, norm.status, layer.status] == [
        "FAIL",
        "PASS",
        "FAIL",
        "SKIPPED",
    ]
    assert "without e_score_correction_bias: it is missing on the device" in router.meaning
    assert "each of the 2 ranks takes the QK norm over its own heads" in norm.meaning
