"""How the C++ kernels are built, kept and loaded, and what they are on another processor."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from neuron_minimax.errors import BackendError
from neuron_minimax.kernels.cpu import library, operators
from neuron_minimax.kernels.reference import ExpertWeights

PROGRAM = """
import sys
from pathlib import Path

import torch

from neuron_minimax.kernels import reference
from neuron_minimax.kernels.cpu import library, operators
from tests.test_fp8_mlp import routing, weights

path = Path(sys.argv[1], "kernels.so")
library.build(path, sys.argv[2])
library.load(path.read_bytes())
assert hasattr(torch.ops.neuron_minimax, "has_pairs")  # as only a library that is loaded has it

stacked, chosen = weights(6, 192, 320), routing(40, 6, 2)
activations = torch.randn(40, 192, generator=torch.Generator().manual_seed(2))
found = operators.expert_mlp(activations, *chosen, stacked)
wanted = reference.expert_mlp(activations, *chosen, stacked)
assert (found - wanted).abs().max() < 1.4e-6 * wanted.abs().max()

for rows in (3, 60):
    hidden = torch.randn(rows, 192, generator=torch.Generator().manual_seed(rows))
    codes, scale = stacked.gate_up[0].T.contiguous(), torch.full((5, 2), 0.01)
    found = operators.linear(hidden, codes, scale, (128, 128))
    wanted = reference.linear(hidden, codes, scale, (128, 128))
    assert (found - wanted).abs().max() < 1.4e-6 * wanted.abs().max()

query = torch.randn(2, 1, 6, 64, generator=torch.Generator().manual_seed(3))
cached = torch.randn(2, 2, 2, 140, 64, generator=torch.Generator().manual_seed(4))
arguments = query, *cached, torch.tensor([[139], [6]])
assert (operators.attend(*arguments) - reference.attend(*arguments)).abs().max() < 1e-6

prompt = torch.randn(1, 5, 6, 64, generator=torch.Generator().manual_seed(5)).bfloat16()
rounded = prompt, *(each[:1].bfloat16() for each in cached), torch.arange(135, 140)[None]
wide = [each.float() for each in rounded[:3]]
off = operators.attend(*rounded).float() - reference.attend(*wide, rounded[3])
assert off.abs().max() < 0.004  # twice the error of rounding the result
"""


@pytest.mark.skipif(not library.compiler(), reason="there is no C++ compiler")
def test_a_plain_processor_computes_the_same(tmp_path):
    plain = "-march=x86-64" if platform.machine() in ("x86_64", "AMD64") else "-O3"
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path, plain], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


# Stands for a compiler: writes what it is called with, and makes a file that is no library.
COMPILER = """#!/bin/sh
echo "$@" >> {log}
case "$1" in --version) exit 0;; esac
while [ "$1" != -o ]; do shift; done
echo made > "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler whose calls are counted, and an empty cache of the user's."""
    log, path = tmp_path / "log", tmp_path / "compiler"
    path.write_text(COMPILER.format(log=log))
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda: sum("-shared" in line for line in log.read_text().splitlines())


def test_a_library_is_built_once_and_again_when_others_could_have_written_it(compiler, tmp_path):
    for _ in range(2):
        library.copy_built(tmp_path / "kernels.so")
        assert (tmp_path / "kernels.so").read_text() == "made\n"
    assert compiler() == 1
    (kept,) = (tmp_path / "cache" / "neuron-minimax").iterdir()
    kept.write_text("another's")
    kept.chmod(0o666)
    library.copy_built(tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").read_text() == "made\n"
    assert compiler() == 2


def test_a_change_of_the_sources_or_the_compiler_is_another_library(
    compiler, tmp_path, monkeypatch
):
    library.copy_built(tmp_path / "kernels.so")
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DANOTHER"))
    library.copy_built(tmp_path / "kernels.so")
    assert compiler() == 2
    for source in library.HERE.glob("*.[hc]*"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(library, "HERE", tmp_path)
    library.copy_built(tmp_path / "kernels.so")
    assert compiler() == 2
    (tmp_path / "lanes.h").write_text("// changed")
    library.copy_built(tmp_path / "kernels.so")
    assert compiler() == 3


def test_without_a_place_for_it_a_library_is_built_each_time(compiler, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        library.copy_built(tmp_path / "kernels.so")
    assert compiler() == 2


def test_what_a_compiler_says_is_one_message(tmp_path, monkeypatch):
    path = tmp_path / "compiler"
    path.write_text("#!/bin/sh\necho 'x.h:1: error: no such standard' >&2\nexit 1\n")
    path.chmod(0o700)
    monkeypatch.setenv("CXX", str(path))
    with pytest.raises(
        BackendError, match=r"could not compile the kernels \(x.h:1: error: no such"
    ):
        library.build(tmp_path / "kernels.so")


def test_a_library_that_is_none_is_refused(monkeypatch):
    monkeypatch.setattr(library, "_loaded", [])
    with pytest.raises(BackendError, match="the kernels cannot be loaded"):
        library.load(b"no library")


def test_without_a_compiler_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(library, "_loaded", [])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not library.load_built()


FALLBACK = """
import torch

from neuron_minimax.kernels import reference
from neuron_minimax.kernels.cpu import operators
from tests.test_fp8_mlp import routing, weights

assert not operators.has_pairs()
stacked, chosen = weights(3, 192, 64), routing(5, 3, 2)
for dtype in (torch.float32, torch.bfloat16):
    activations = torch.randn(5, 192, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = operators.expert_mlp(activations, *chosen, stacked)
    assert torch.equal(found, reference.expert_mlp(activations.float(), *chosen, stacked).to(dtype))
    codes, scale = stacked.gate_up[0].T.contiguous(), torch.full((1, 2), 0.01)
    found = operators.linear(activations, codes, scale, (128, 128))
    wanted = reference.linear(activations.float(), codes, scale, (128, 128))
    assert torch.equal(found, wanted.to(dtype))
    shapes = ((2, 4), (2, 9), (2, 9))
    query, keys, values = (torch.randn(1, n, m, 64).to(dtype) for n, m in shapes)
    found = operators.attend(query, keys, values, torch.tensor([[8, 9]]))
    wanted = reference.attend(query.float(), keys.float(), values.float(), torch.tensor([[8, 8]]))
    assert torch.equal(found[:, 0], wanted[:, 0].to(dtype))
    assert not found[:, 1].any()  # behind what is filled
"""


def test_without_a_library_the_operators_are_torch():
    finished = subprocess.run([sys.executable, "-c", FALLBACK], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


MEMORY = Path("/proc/self/statm")  # in pages


@pytest.mark.skipif(not MEMORY.exists(), reason="asks Linux how much memory it takes")
@pytest.mark.usefixtures("kernels")
def test_kernels_release_what_they_take():
    hidden = torch.zeros(64, 1 << 14)
    weight = torch.zeros(128, 1 << 14, dtype=torch.uint8)
    stacked = torch.zeros(1, 1 << 14, 256, dtype=torch.uint8), torch.ones(1, 128, 2)
    down = torch.zeros(1, 128, 1 << 14, dtype=torch.uint8), torch.ones(1, 1, 128)
    chosen = (torch.zeros(64, 1, dtype=torch.int64), torch.ones(64, 1))
    cached = torch.zeros(2, 64, 4, 64, 64)

    def use_all() -> int:
        operators.linear(hidden * 1, weight, torch.ones(1, 128), (128, 128))
        operators.expert_mlp(hidden * 1, *chosen, ExpertWeights(*stacked, *down))
        operators.attend(
            torch.zeros(64, 1, 256, 64), *cached, torch.zeros(64, 1, dtype=torch.int64)
        )
        operators.attend(torch.zeros(64, 4, 64, 64), *cached, torch.zeros(64, 4, dtype=torch.int64))
        return int(MEMORY.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = max(use_all() for _ in range(3))
    assert max(use_all() for _ in range(30)) < before + 60e6  # each takes 4 MB or more per call
