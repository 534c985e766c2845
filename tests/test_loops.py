"""Numba's loops on torch's threads, and where a machine lacks what they use elsewhere."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

import neuron_minimax
from neuron_minimax.kernels.cpu import operators
from neuron_minimax.kernels.cpu.jit import run_in_team
from neuron_minimax.kernels.reference import ExpertWeights

PROGRAM = """
import ctypes

import numba
import torch

library = ctypes.CDLL


def without_openmp(name, *arguments, **options):
    if "gomp" in str(name):
        raise OSError(f"{name}: no such file")
    return library(name, *arguments, **options)


ctypes.CDLL = without_openmp
from neuron_minimax.kernels import reference
from neuron_minimax.kernels.cpu import moe, operators
from tests.test_fp8_mlp import routing, weights

stacked, chosen = weights(6, 192, 320), routing(40, 6, 2)
activations = torch.randn(40, 192, generator=torch.Generator().manual_seed(2))
found = operators.expert_mlp(activations, *chosen, stacked)
wanted = reference.expert_mlp(activations, *chosen, stacked)
assert (found - wanted).abs().max() < 1.4e-6 * wanted.abs().max()
assert not moe.add_expert_products.stats.cache_path

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


def test_a_plain_processor_without_openmp_and_without_a_place_for_compiled_code_computes_the_same():
    environment = {
        **os.environ,
        "NUMBA_CACHE_LOCATOR_CLASSES": "UserProvidedCacheLocator",
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
    }
    environment.pop("NUMBA_CACHE_DIR", None)
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr


def test_code_kept_from_before_a_change_in_another_file_is_not_used(tmp_path):
    package = Path(neuron_minimax.__file__).parent
    ignore = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(package, tmp_path / "neuron_minimax", ignore=ignore)
    program = (
        "import numpy as np; from neuron_minimax.kernels.cpu import linear\n"
        "one = np.ones((1, 1), np.float32); out = np.zeros((1, 1), np.float32)\n"
        "code_of_one = np.full((1, 1), 0x38, np.int8)\n"
        "linear.linear_of_few(1, one, code_of_one, one, (1, 1), out)\n"
        "print(out[0, 0], sum(linear.linear_of_few.stats.cache_misses.values()))"
    )

    def result() -> tuple[float, bool]:
        """The product, and whether its code was compiled anew."""
        said = subprocess.check_output([sys.executable, "-c", program], cwd=tmp_path)
        product, misses = said.split()
        return float(product), int(misses) > 0

    assert result() == (1, True)
    assert result() == (1, False)
    other = tmp_path / "neuron_minimax" / "kernels" / "cpu" / "vectors.py"
    other.write_text(other.read_text() + "\nREBIAS = np.float32(2) * REBIAS\n")
    assert result() == (4, True)  # a factor of the input, and of the sum


FAILING = """
import torch

from neuron_minimax.kernels.cpu import jit

torch.library.define("neuron_minimax::failing", "(Tensor first) -> Tensor")


def failing(stack, inputs, outputs):
    words = jit.words_of(stack, 1)
    raise MemoryError("there is no more")


jit.register("failing", failing)
torch.ops.neuron_minimax.failing(torch.ones(1))
print("went on")
"""


def test_a_kernel_without_a_result_ends_the_process():
    finished = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True)
    assert finished.returncode
    assert "there is no more" in finished.stderr
    assert "went on" not in finished.stdout


MEMORY = Path("/proc/self/statm")  # in pages


@pytest.mark.skipif(not MEMORY.exists(), reason="asks Linux how much memory it takes")
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


@numba.njit
def mark(thread, threads, marks, fails_on):
    marks[thread] = threads
    if thread == fails_on:
        raise MemoryError


@numba.njit
def mark_all(team, marks, fails_on):
    run_in_team(mark, team, (marks, fails_on))


def test_every_thread_of_a_team_runs_and_a_failing_one_is_not_silent():
    marks = np.zeros(3, np.int64)
    mark_all(3, marks, -1)
    assert marks.tolist() == [3, 3, 3]
    with pytest.raises(RuntimeError, match="out of memory"):
        mark_all(3, marks, 2)
    mark_all(3, marks, -1)
