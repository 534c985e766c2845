"""The model that vLLM-Neuron calls, called as its runner does, gives what transformers gives."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from neuron_minimax.backends.torch_neuron import vllm_plugin
from neuron_minimax.backends.torch_neuron.vllm_plugin import (
    ConvertedForCausalLM,
    OnDeviceSampling,
    RankConfig,
)
from neuron_minimax.backends.torch_neuron.weights import shard_of
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.errors import BackendError, ConfigError, NeuronMiniMaxError
from tests import vllm_neuron_ranks
from tests.captured import capture
from tests.family_oracles import BF16, CASES, Case, Pair
from tests.tiny import write_tiny
from tests.vllm_neuron_ranks import loaded
from tests.vllm_neuron_runner import MixedPool, Request, Runner, serve

ROOT = Path(__file__).parent.parent
STANDIN = Path(__file__).parent / "vllm_neuron_standin"
# Measured: at most 5e-6.
TOLERANCE = 2e-5
SERVED = {
    "MiniMax-M2 in FP8": CASES["MiniMax-M2"],
    "MiniMax-M2 in BF16": Case("minimax_m2", BF16),
    "Qwen3-MoE in FP8": CASES["Qwen3-MoE in FP8"],
    "Qwen3 in FP8, tied": CASES["Qwen3 in FP8, tied"],
    # On some ranks zeros stand where others have an expert.
    "Qwen3-MoE of 7 experts": Case("qwen3_moe", {"num_experts": 7, "num_hidden_layers": 1}),
    "MiniMax-M2 of 6 experts": Case("minimax_m2", {"num_local_experts": 6, "num_hidden_layers": 1}),
}
DEGREES = [(name, degrees) for name, degrees in vllm_neuron_ranks.RUN]


@pytest.fixture(autouse=True)
def standin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STANDIN)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Every case, with its converted directory beside the published one."""
    made = {}
    for name, case in SERVED.items():
        made[name] = Pair(case, tmp_path_factory.mktemp("pair"))
        plan_conversion(made[name].checkpoint).write(converted(made[name]))
    return made


def converted(pair: Pair) -> Path:
    return pair.directory.parent / "converted"


@pytest.fixture(scope="module")
def ranks(
    pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, list[Request]]]]:
    """What each gloo process of a group of so many was given for every case and every degree."""
    out = tmp_path_factory.mktemp("ranks")
    directories = [str(converted(pairs[name])) for name, _ in DEGREES]
    subprocess.run(
        [sys.executable, "-m", "tests.vllm_neuron_ranks", str(out), *directories],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{STANDIN}"},
        check=True,
    )
    return {
        world: [torch.load(out / f"{world}_{rank}.pt", weights_only=False) for rank in range(world)]
        for world in vllm_neuron_ranks.WORLDS
    }


def require_oracles_rows(pair: Pair, requests: list[Request]) -> None:
    """Every row of logits is the oracle's, and every token its likeliest."""
    for request in requests:
        wanted = pair.logits(torch.tensor([request.tokens]))[0]
        for position, row in request.rows.items():
            assert (row - wanted[position]).abs().max() < TOLERANCE
        prompt = min(request.rows) + 1
        generated = [position for position in request.rows if position + 1 < len(request.tokens)]
        assert len(generated) >= 6
        assert all(
            wanted[at].argmax() == request.tokens[at + 1] for at in generated if at >= prompt
        )


@pytest.mark.parametrize("name", SERVED)
@torch.no_grad()
def test_every_step_has_the_logits_and_the_token_of_transformers(
    pairs: dict[str, Pair], name: str
) -> None:
    pair = pairs[name]
    model = loaded(converted(pair))
    require_oracles_rows(pair, serve(Runner(model, model, MixedPool())))


@pytest.mark.parametrize(("name", "degrees"), DEGREES, ids=str)
def test_so_has_every_rank_of_a_group(
    ranks: dict[int, list[dict[str, list[Request]]]],
    pairs: dict[str, Pair],
    name: str,
    degrees: tuple[int, int],
) -> None:
    for rank in ranks[degrees[0]]:
        require_oracles_rows(pairs[name], rank[f"{name} {degrees}"])


def test_ranks_sample_the_same_tokens(ranks: dict[int, list[dict[str, list[Request]]]]) -> None:
    first, second = (
        [request.tokens for request in rank[vllm_neuron_ranks.SAMPLED]]
        for rank in ranks[vllm_neuron_ranks.SAMPLING_WORLD]
    )
    assert first == second


def test_tokens_of_the_device_are_the_likeliest_and_come_with_logits(
    pairs: dict[str, Pair],
) -> None:
    pair = pairs["MiniMax-M2 in FP8"]
    greedy = OnDeviceSampling(all_greedy=True)
    model = loaded(converted(pair), sampling=greedy, returns_logits=True)
    require_oracles_rows(
        pair, serve(Runner(model, model, MixedPool(), sampling=lambda rows: torch.ones(rows, 3)))
    )


def test_padding_writes_nowhere_that_a_sequence_has(pairs: dict[str, Pair]) -> None:
    model = loaded(converted(pairs["Qwen3-MoE in FP8"]))
    runner = Runner(model, model, MixedPool())
    request = Request([5, 6, 7])
    runner.prefill(request)  # padded to 4
    keys = model.graph.cached("keys")[0]
    written = (keys != 1e4).any(dim=3).any(dim=1)
    expected = torch.zeros_like(written)
    expected[request.blocks[0], :3] = True
    expected[0, 0] = True  # vLLM's null block
    assert torch.equal(written, expected)


def test_a_mask_keeps_tokens_from_being_sampled(pairs: dict[str, Pair]) -> None:
    model = loaded(converted(pairs["Qwen3-MoE in FP8"]), sampling=OnDeviceSampling(all_greedy=True))
    runner = Runner(model, model, MixedPool())
    mask = torch.zeros(1, model.config.shard.config.vocab_size, dtype=torch.bool)
    mask[0, 17] = True
    step = {
        "block_table_tensor": torch.tensor([[1, 0]], dtype=torch.int32),
        "slot_mapping": torch.tensor([4]),
    }
    tokens, logits = model(
        input_ids=torch.tensor([3]),
        positions=torch.tensor([0]),
        attn_metadata=dict.fromkeys(runner.names, step),
        sampling_positions=torch.tensor([0]),
        logit_mask=mask,
    )
    assert tokens.tolist() == [17]
    assert logits is None, "nobody asked for them"


def test_samples_have_the_shares_that_top_k_top_p_and_temperature_leave() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(1, 12, generator=generator) * 2
    rows = 40_000
    for top_k, top_p, temperature in ((-1, 1.0, 1.0), (5, 1.0, 0.7), (0, 0.6, 1.3), (6, 0.8, 0.9)):
        noise = torch.rand(rows, 8, generator=generator)
        params = torch.tensor([[top_k, top_p, temperature]]).expand(rows, 3)
        tokens = vllm_plugin.sampled_tokens(logits.expand(rows, -1), params, noise)
        found = np.bincount(tokens.numpy(), minlength=12) / rows
        # The eight candidates, one after another.
        scaled = logits[0].double().numpy() / temperature
        order = np.argsort(-scaled)[: 8 if top_k < 1 else top_k]
        shares = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
        kept = []
        for place, share in zip(order, shares, strict=True):
            if sum(each for _, each in kept) < top_p:
                kept.append((place, share))
        wanted = np.zeros(12)
        for place, share in kept:
            wanted[place] = share / sum(each for _, each in kept)
        assert np.abs(found - wanted).max() < 0.01
        assert not found[wanted == 0].any()


def test_temperature_zero_is_greedy_whatever_the_noise() -> None:
    logits = torch.tensor([[1.0, 4.0, 3.9]])
    noise = torch.tensor([[0.0, 1 - 2**-24, 0.5]])
    params = torch.tensor([[-1.0, 1.0, 0.0]])
    assert vllm_plugin.sampled_tokens(logits, params, noise).tolist() == [1]


def test_a_row_without_a_largest_logit_gives_a_token_that_there_is() -> None:
    logits = torch.tensor([[1.0, torch.nan, 2.0], [0.0, 7.0, 7.0]])
    assert vllm_plugin.first_largest(logits).tolist() == [2, 1]


def test_a_bucket_is_one_whole_graph_for_every_step_and_every_rank(tmp_path: Path) -> None:
    """A rank's number is an input: with it in the graph, each rank would be compiled for itself."""
    published = write_tiny(tmp_path / "published", num_hidden_layers=1)
    plan_conversion(Checkpoint(published)).write(tmp_path / "converted")
    texts = []
    for rank in range(2):
        with vllm_neuron_ranks.group_without_others(rank, 2) as group:
            model = loaded(tmp_path / "converted", rank, 2, 2, group)
            compiled, captured = capture(model)
            runner = Runner(model, compiled, MixedPool(), rank=rank)
            requests = [Request([3, 4, 5]), Request([6, 7])]
            for request in requests:
                runner.prefill(request)
            for _ in range(3):
                runner.decode(requests)
            texts.append([graph.code for graph in captured.graphs])
    assert len(texts[0]) == 2, "a bucket of prompts and one of sequences"
    assert texts[0] == texts[1]


def test_a_published_checkpoint_is_refused_with_the_command_that_converts_it(
    pairs: dict[str, Pair],
) -> None:
    pair = pairs["MiniMax-M2 in FP8"]
    model = ConvertedForCausalLM(RankConfig(shard=shard_of(pair.config, 0, 1)))
    with pytest.raises(NeuronMiniMaxError, match="neuron-minimax convert"):
        model.load_weights(pair.directory)
    with pytest.raises(NeuronMiniMaxError, match="does not exist"):
        model.load_weights("MiniMaxAI/MiniMax-M2")


def test_another_config_than_the_directory_has_is_refused(pairs: dict[str, Pair]) -> None:
    pair = pairs["MiniMax-M2 in FP8"]
    changed = ModelConfig.from_dict({**pair.config.raw, "rope_theta": 10_000.0})
    model = ConvertedForCausalLM(RankConfig(shard=shard_of(changed, 0, 1)))
    with pytest.raises(ConfigError, match="rope_theta 10000"):
        model.load_weights(converted(pair))


def test_a_cache_in_another_dtype_is_refused(pairs: dict[str, Pair]) -> None:
    model = loaded(converted(pairs["MiniMax-M2 in FP8"]))
    cache = [torch.zeros(4, 2, 4, 128, dtype=torch.float8_e4m3fn) for _ in range(2)]
    with pytest.raises(BackendError, match="--kv-cache-dtype"):
        model.bind_kv_cache(dict.fromkeys(model.layer_names, cache))
    with pytest.raises(BackendError, match=r"layers\.0.* has 0 tensors"):
        model.bind_kv_cache({})


def test_what_is_not_served_is_refused_by_name(pairs: dict[str, Pair]) -> None:
    model = loaded(converted(pairs["MiniMax-M2 in FP8"]))
    with pytest.raises(BackendError, match="--enable-prompt-embeds"):
        model(None, None, {}, None, inputs_embeds=torch.zeros(1))
    for settings in ({"mlp_dp_size": 2}, {"quantization": "mxfp4"}):
        with pytest.raises(BackendError, match=next(iter(settings))):
            vllm_plugin._require_defaults(
                SimpleNamespace(**settings), vllm_plugin.NEURON_SETTINGS, "neuron_config"
            )


def test_nothing_is_registered_where_there_is_no_vllm_neuron(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert vllm_plugin.has_own_models()
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each != str(STANDIN)])
    for name in [name for name in sys.modules if name.startswith("vllm_neuron")]:
        monkeypatch.delitem(sys.modules, name)
    assert not vllm_plugin.has_own_models()
    assert vllm_plugin.register() is False
