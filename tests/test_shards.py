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
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import FP8Range, Layout
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import CheckpointError, ConfigError
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.planner.memory import Deployment, rank_memory
from tests.family_oracles import BF16, CASES, Case, Pair
from tests.gloo_ranks import CUT, PROMPT, STEPS, WORLD, some_ids
from tests.tiny import tiny_config, write_tiny

U8 = torch.uint8
ROOT = Path(__file__).parent.parent
# Measured: at most 5e-6, for logits of up to 4.5.
TOLERANCE = 2e-5
RUN = {
    "MiniMax-M2 in FP8": (CASES["MiniMax-M2"], ((1, 1), (2, 1), (2, 2), (4, 2), (4, 4))),
    "MiniMax-M2 in BF16": (Case("minimax_m2", BF16), ((4, 2),)),
    "MiniMax-M2, a vocabulary and heads that are padded": (
        Case("minimax_m2", {"vocab_size": 161, "num_attention_heads": 6}),
        ((4, 2),),
    ),
    "MiniMax-M2, experts that the ranks do not divide": (
        Case("minimax_m2", {"num_local_experts": 6}),
        ((4, 4),),
    ),
    "Qwen3-MoE, experts that the ranks do not divide, softmax as it is": (
        Case("qwen3_moe", {"num_experts": 7, "norm_topk_prob": False}),
        ((4, 2),),
    ),
    # Heads of 32 channels and thirds of experts that end within a scale block.
    "Qwen3-MoE in FP8": (CASES["Qwen3-MoE in FP8"], ((2, 2), (4, 1))),
    "Qwen3-MoE in BF16": (CASES["Qwen3-MoE in BF16, softmax as it is, dense layers"], ((2, 2),)),
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
    subprocess.run(
        [sys.executable, "-m", "tests.gloo_ranks", str(directory)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
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


# A rank's weights, without the others: no process has to be there.
@pytest.fixture(scope="module")
def aligned(tmp_path_factory) -> Path:
    """MiniMax-M2 whose channels end with a scale block on every rank of two."""
    directory = tmp_path_factory.mktemp("aligned")
    pair = write_tiny(directory / "published", intermediate_size=256)
    plan_conversion(Checkpoint(pair)).write(directory / "converted")
    return directory / "converted"


def loaded(directory: Path, rank: int, *degrees: int):
    return load_rank(directory, shard_of(ModelConfig.from_dir(directory), rank, *degrees))


def test_codes_up_to_448_are_looked_up_as_those_up_to_240_are(tmp_path):
    """The published codes as they are, and halved with scales doubled."""
    source = Checkpoint(write_tiny(tmp_path / "published"))
    largest = {}
    logits = {}
    for name in FP8Range:
        plan_conversion(source, Layout(fp8_range=name)).write(tmp_path / name)
        part = loaded(tmp_path / name, 0, 1, 1)
        codes = [each for each in part.model.state_dict().values() if each.dtype == U8]
        largest[name] = max(int((each & 0x7F).max()) for each in codes)
        logits[name] = part.model(some_ids())[0]
    assert largest["neuron"] < 0x78 <= largest["ocp"] < 0x7F
    assert (logits["ocp"] - logits["neuron"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("degrees", [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_a_rank_reads_and_holds_the_bytes_that_the_planner_counts(aligned, degrees):
    config = ModelConfig.from_dir(aligned)
    deployment = Deployment(
        tp_degree=degrees[0],
        moe_tp_degree=degrees[0] // degrees[1],
        moe_ep_degree=degrees[1],
        batch_size=1,
        seq_len=32,
        context_length=8,
        smallest_context=8,
    )
    for rank in range(degrees[0]):
        part = loaded(aligned, rank, *degrees)
        assert part.bytes_read == rank_memory(config, deployment).weights
        assert part.bytes_read == sum(each.nbytes for each in part.model.state_dict().values())


def test_the_ranks_slices_are_the_whole(aligned):
    whole = load_file(next(iter(sorted(aligned.glob("model-00002*.safetensors")))))
    parts = [loaded(aligned, rank, 4, 2).model.state_dict() for rank in range(4)]
    for kind, width in (("weight", 256), ("scale", 2)):
        name = f"layers.0.block_sparse_moe.expert_mlps.mlp_op.down_proj.{kind}"
        experts = [torch.cat([parts[at][name], parts[at + 1][name]], dim=1) for at in (0, 2)]
        found = torch.cat(experts)
        assert found.shape[1] == width
        wanted = whole[name]
        assert torch.equal(found, wanted.view(found.dtype) if found.dtype == U8 else wanted)


def test_a_model_is_made_without_a_tensor_and_without_a_process(aligned):
    config = ModelConfig.from_dir(aligned)
    with torch.device("meta"):
        model = Decoder(config, shard=shard_of(config, 3, 4, 2, "a group"))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}


def rewritten(directory: Path, copy: Path, change) -> Path:
    """A copy of a converted directory in one file, its tensors changed."""
    copy.mkdir()
    (copy / "config.json").write_bytes((directory / "config.json").read_bytes())
    state = {}
    for shard in sorted(directory.glob("*.safetensors")):
        state |= load_file(shard)
    change(state)
    save_file(state, copy / "model.safetensors")
    return copy


ROUTER = "layers.0.block_sparse_moe.router.e_score_correction_bias"
NORM = "layers.1.input_layernorm.weight"
CHANGES = {
    "missing": (lambda state: state.pop(NORM), f"no tensor {NORM}"),
    "unknown": (lambda state: state.update(new=torch.zeros(2)), "1 tensor that no rank reads"),
    "rounded": (
        lambda state: state.update({ROUTER: state[ROUTER].bfloat16()}),
        r"is BF16 \[8\]; expected \[8\] in F32",
    ),
    "misshapen": (lambda state: state.update({NORM: torch.zeros(3)}), r"expected \[256\] in"),
    "unscaled": (
        lambda state: state.pop("layers.0.self_attn.o_proj.o_proj.scale"),
        "is FP8, but there is no scale",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_nothing_is_left_out_and_nothing_cast(aligned, tmp_path, name):
    change, message = CHANGES[name]
    with pytest.raises(CheckpointError, match=message):
        loaded(rewritten(aligned, tmp_path / "changed", change), 1, 2)


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ((4, 3), "moe_ep_degree 3 does not divide tp_degree 4"),
        ((16, 16), "moe_ep_degree 16 is more than the 8 experts"),
        ((512, 1), "intermediate_size 256 cannot be divided over 512 ranks"),
    ],
)
def test_a_group_that_cannot_hold_the_model_is_refused(aligned, degrees, message):
    with pytest.raises(ConfigError, match=message):
        shard_of(ModelConfig.from_dir(aligned), 0, *degrees)


@pytest.mark.parametrize(
    ("experts", "tp_degree", "moe_ep_degree"), [(8, 4, 2), (6, 4, 4), (7, 4, 2)]
)
def test_a_rank_in_a_tensor_has_the_experts_of_its_number(experts, tp_degree, moe_ep_degree):
    config = ModelConfig.from_dict(tiny_config(num_local_experts=experts))
    for rank in range(tp_degree):
        shard = shard_of(config, rank, tp_degree, moe_ep_degree)
        bounds = torch.tensor([rank, rank + shard.moe_tp_degree])
        first, behind = shard.first_expert(bounds).tolist()
        assert range(first, behind) == shard.experts
