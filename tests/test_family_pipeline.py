"""Every family from its checkpoint to tokens of the CPU backend, and what refuses a family."""

from pathlib import Path

import pytest
import torch

from neuron_minimax import generate
from neuron_minimax.backends import compile_model, load
from neuron_minimax.cli import main
from neuron_minimax.generation.generate import answer
from neuron_minimax.studies.experts.trace import Trace
from tests.family_oracles import CASES, Pair
from tests.opened import convert
from tests.tiny_tokenizer import write_tokenizer

VOCAB = 384
STEPS = 16
PROMPTS = ([5, 6, 7, 8, 9], [11, 3, 2, 50, 60, 70, 80, 90, 100, 110, 120])
EAGER = (
    "Qwen3 in FP8, tied",
    "Qwen3-MoE in BF16, softmax as it is, dense layers",
    "Qwen2",
    "MiniMind in FP8, with YaRN",
)
# Dense layers, FP8 experts that a softmax chooses, and a shared one; test_backend compiles MiniMax.
COMPILED = ("MiniMind2-MoE in FP8, one of four",)


def tokens_of(pair: Pair, directory: Path, engine: str, slots: int) -> None:
    convert(pair.directory, directory / "converted")
    options = {"slots": slots, "seq_len": 32, "buckets": (16,), "engine": engine}
    compile_model(directory / "converted", directory / "traced", options=options)
    backend = load(directory / "traced")
    for number, prompt in enumerate(PROMPTS):
        slot = number % slots
        found = answer(generate(backend, prompt, slot=slot, max_new_tokens=STEPS))
        assert list(found.token_ids) == pair.greedy(prompt, STEPS)


@pytest.mark.parametrize("name", EAGER)
def test_the_eager_backend_gives_the_oracles_tokens(tmp_path, name):
    tokens_of(Pair(CASES[name], tmp_path), tmp_path, "eager", slots=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_the_compiled_backend_gives_the_oracles_tokens(tmp_path, name):
    """Dense layers run through the same linear kernels as attention; one slot needs no mask."""
    tokens_of(Pair(CASES[name], tmp_path), tmp_path, "compiled", slots=1)


def converted(directory: Path, name: str) -> Path:
    case = CASES[name]
    overrides = {**case.overrides, "vocab_size": VOCAB}
    pair = Pair(type(case)(case.family, overrides), directory)
    write_tokenizer(pair.directory, VOCAB)
    convert(pair.directory, directory / "converted")
    return directory / "converted"


def test_experts_of_a_softmax_router_are_shown(tmp_path, capsys):
    model = converted(tmp_path, "MiniMind2-MoE")
    command = ["experts", str(model), "--prompt", "one two", "--max-new-tokens", "4", "--greedy"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "2 layers, 4 experts" in said
    assert "bias" not in said
    [path] = (tmp_path / "out" / "prompt-1").glob("*.safetensors")
    trace = Trace.load(path)
    assert not trace.bias.any()
    assert torch.allclose(torch.from_numpy(trace.scores).float().sum(-1), torch.ones(()), atol=2e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen2", "is Qwen2, which has no experts to choose"),
        (
            "Qwen3-MoE in FP8, every second layer sparse",
            "has 2 layers without experts, the first 0; only models whose layers all have experts",
        ),
    ],
)
def test_a_study_of_experts_needs_them_in_every_layer(tmp_path, capsys, name, message):
    model = converted(tmp_path, name)
    assert main(["experts", str(model), "--prompt", "a", "--output", str(tmp_path / "out")]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_probes_are_of_routers_with_a_bias(tmp_path, capsys):
    model = converted(tmp_path, "Qwen3-MoE in FP8")
    command = ["check-device", str(model), str(tmp_path / "work"), "--backend", "cpu"]
    assert main(command) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "is Qwen3-MoE; the probes are of layers whose router has a bias" in said
