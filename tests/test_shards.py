"""The model divided over ranks of gloo processes gives what transformers gives on one."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_minimax.backends.torch_neuron.weights import load_rank, shard_of
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import CheckpointError, ConfigError
from neuron_minimax.model.decoder import Decoder
from tests.family_oracles import BF16, CASES, Case, Pair
from tests.gloo_ranks import CUT, PROMPT, STEPS, WORLD, some_ids

ROOT = Path(__file__).parent.parent
# Measured: at most 8e-6, for logits of size 4.
TOLERANCE = 2e-5
SOME = ((1, 1), (2, 2), (4, 2))
RUN = {
    "MiniMax-M2 in FP8": (CASES["MiniMax-M2"], ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))),
    "MiniMax-M2 in BF16": (Case("minimax_m2", BF16), SOME),
    "MiniMax-M2, a vocabulary and heads that are padded": (
        Case("minimax_m2", {"vocab_size": 161, "num_attention_heads": 6}),
        ((4, 2),),
    ),
    # Heads of 32 channels and thirds of experts that end within a scale block.
    "Qwen3-MoE in FP8": (CASES["Qwen3-MoE in FP8"], (*SOME, (2, 1), (4, 1))),
    "Qwen3-MoE in BF16": (CASES["Qwen3-MoE in BF16, softmax as it is, dense layers"], SOME),
    "Qwen3 in FP8, tied": (CASES["Qwen3 in FP8, tied"], ((4, 1),)),
    "Qwen2": (CASES["Qwen2"], ((4, 1),)),
}
EVERY = [(name, tp, ep) for name, (_, degrees) in RUN.items() for tp, ep in degrees]


@dataclass
class Ranks:
    directory: Path
    pairs: dict[str, Pair]
    results: list[dict]

    def of(self, name: str, tp_degree: int, ep_degree: int) -> list[dict]:
        return [rank[f"{name} {tp_degree} {ep_degree}"] for rank in self.results[:tp_degree]]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Ranks:
    """Every case in every group, by four processes."""
    directory = tmp_path_factory.mktemp("ranks")
    pairs = {}
    for name, (case, _) in RUN.items():
        pairs[name] = Pair(case, directory / "pairs" / name)
        plan_conversion(pairs[name].checkpoint).write(directory / name)
    cases = {name: degrees for name, (_, degrees) in RUN.items()}
    (directory / "cases.json").write_text(json.dumps(cases))
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.gloo_ranks", str(rank), str(directory)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        for rank in range(WORLD)
    ]
    try:
        assert [process.wait() for process in running] == [0] * WORLD
    finally:
        for process in running:
            process.kill()
    results = [torch.load(directory / f"rank_{rank}.pt") for rank in range(WORLD)]
    return Ranks(directory, pairs, results)


@pytest.mark.parametrize(("name", "tp_degree", "ep_degree"), EVERY)
def test_every_rank_has_the_logits_of_transformers(ranks, name, tp_degree, ep_degree):
    wanted = ranks.pairs[name].logits(some_ids())
    assert wanted.std() > 0.3, "logits that are all alike show nothing"
    for result in ranks.of(name, tp_degree, ep_degree):
        assert (result["logits"] - wanted).abs().max() < TOLERANCE


@pytest.mark.parametrize(("name", "tp_degree", "ep_degree"), EVERY)
def test_a_cache_of_blocks_gives_the_same(ranks, name, tp_degree, ep_degree):
    wanted = ranks.pairs[name].logits(some_ids())
    for result in ranks.of(name, tp_degree, ep_degree):
        assert (result["block_logits"][0] - wanted[0, -1]).abs().max() < TOLERANCE
        assert (result["block_logits"][1] - wanted[1, -1 - CUT]).abs().max() < TOLERANCE


@pytest.mark.parametrize("name", RUN)
def test_greedy_tokens_are_those_of_transformers_in_every_group(ranks, name):
    wanted = ranks.pairs[name].greedy(some_ids()[0, :PROMPT].tolist(), STEPS)
    for tp_degree, ep_degree in RUN[name][1]:
        for result in ranks.of(name, tp_degree, ep_degree):
            assert result["tokens"] == wanted
