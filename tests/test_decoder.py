"""The decoder of every family, in every storage, against an oracle of its own in float32."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.convert.state_dict import (
    convert_hf_to_neuron_state_dict,
    neuron_to_hf_state_dict,
)
from neuron_minimax.families.family import LayerKind, RouterKind
from neuron_minimax.model.decoder import Decoder, initial_state
from tests.family_oracles import CASES, Pair

# Measured on these checkpoints: at most 7e-6, for logits of size 4.
TOLERANCE = 3e-5


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("decoder"))


@pytest.fixture(scope="module")
def decoder(pair) -> Decoder:
    return Decoder.from_checkpoint(pair.checkpoint)


def stored(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.tensor(name) for name in checkpoint.entries}


def some_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 160, (rows, tokens), generator=torch.Generator().manual_seed(5))


def test_every_checkpoint_is_complete_and_all_of_it_is_converted(pair):
    assert pair.checkpoint.problems == []
    outputs = plan_conversion(pair.checkpoint).outputs
    state = convert_hf_to_neuron_state_dict(stored(pair.checkpoint), pair.config)
    assert {output.name for output in outputs} == state.keys()
    assert ("lm_head.weight" in state) == (not pair.config.tie_word_embeddings)
    back = neuron_to_hf_state_dict(state, pair.config)
    assert back.keys() == pair.checkpoint.entries.keys()


@torch.no_grad()
def test_every_family_gives_the_logits_of_its_oracle(pair, decoder):
    ids = some_ids(2, 14)
    logits, cache = decoder(ids)
    wanted = pair.logits(ids)
    assert cache is None
    assert wanted.std() > 0.3, "logits that are all alike show nothing"
    assert (logits - wanted).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_converted_directory_gives_the_same_in_every_family(pair, decoder, tmp_path):
    """But for its codes, which are halved and rounded where they are tiny."""
    ids = some_ids(1, 8)
    plan_conversion(pair.checkpoint).write(tmp_path / "converted")
    converted = Decoder.from_converted(tmp_path / "converted")
    assert (converted(ids)[0] - pair.logits(ids)).abs().max() < TOLERANCE


@torch.no_grad()
def test_incremental_equals_full_in_every_family(pair, decoder):
    ids = some_ids(2, 14)
    cache = None
    parts = []
    for piece in ids.split([5, 1, 1, 7], dim=1):
        logits, cache = decoder(piece, cache, use_cache=True)
        parts.append(logits)
    assert cache.lengths.tolist() == [14, 14]
    assert (torch.cat(parts, dim=1) - decoder(ids)[0]).abs().max() < TOLERANCE


@torch.no_grad()
def test_sequences_of_unequal_length_give_what_each_gives_alone_in_every_family(pair, decoder):
    ids = some_ids(3, 9)
    lengths = torch.tensor([3, 9, 7])
    logits, cache = decoder(ids, use_cache=True, lengths=lengths)
    following = torch.tensor([[4], [5], [6]])
    next_logits, _ = decoder(following, cache)
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat([ids[row, :length], following[row]])[None]
        wanted = pair.logits(alone)[0]
        assert (logits[row, :length] - wanted[:-1]).abs().max() < TOLERANCE
        assert (next_logits[row, 0] - wanted[-1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_sixteen_greedy_steps_are_the_oracles(pair, decoder):
    prompt = some_ids(1, 5)[0].tolist()
    logits, cache = decoder(torch.tensor([prompt]), use_cache=True)
    tokens = []
    for _ in range(16):
        tokens.append(int(logits[0, -1].argmax()))
        logits, cache = decoder(torch.tensor([tokens[-1:]]), cache)
    assert tokens == pair.greedy(prompt, 16)


@torch.no_grad()
def test_a_stored_head_is_used_though_config_json_ties_it(tmp_path):
    pair = Pair(CASES["Qwen2, tied"], tmp_path)
    [shard] = pair.directory.glob("*.safetensors")
    published = load_file(shard)
    head = 2 * published["model.embed_tokens.weight"]
    save_file(published | {"lm_head.weight": head}, shard)
    checkpoint = Checkpoint(pair.directory)
    assert checkpoint.problems == []
    plan = plan_conversion(checkpoint)
    assert "lm_head.weight" in {output.name for output in plan.outputs}
    assert plan.converted_config()["tie_word_embeddings"] is False
    ids = some_ids(1, 8)
    logits, _ = Decoder.from_checkpoint(checkpoint)(ids)
    assert (logits - 2 * pair.logits(ids)).abs().max() < 2 * TOLERANCE


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_an_untied_head_and_an_embedding_must_be_there(tmp_path, name):
    pair = Pair(CASES["Qwen2"], tmp_path)
    [shard] = pair.directory.glob("*.safetensors")
    save_file({other: t for other, t in load_file(shard).items() if other != name}, shard)
    assert [(problem.subject, problem.kind) for problem in Checkpoint(pair.directory).problems] == [
        (name, "missing")
    ]


def test_every_router_has_a_bias_which_is_zero_where_the_family_has_none(pair, decoder):
    architecture = pair.config.family.architecture
    biases = [router.bias for router in decoder.routers]
    sparse = pair.config.layers_of(LayerKind.SPARSE)
    assert len(biases) == architecture.has_experts * len(sparse)
    for bias in biases:
        assert bias.shape == (pair.config.num_local_experts,)
        assert bias.any() == (architecture.router is RouterKind.SIGMOID_BIAS)


def test_the_state_dict_has_the_names_of_the_familys_layout(pair, decoder):
    state = convert_hf_to_neuron_state_dict(stored(pair.checkpoint), pair.config)
    assert decoder.state_dict().keys() == state.keys()
    weights = {name for name in state if not name.endswith(".scale")}
    assert initial_state(pair.config, seed=0).keys() == weights


# MiniMind's own tools export its third release as Qwen3: the same arithmetic.


@torch.no_grad()
@pytest.mark.parametrize("case", ["MiniMind", "MiniMind-MoE"])
def test_minimind_loads_strictly_into_transformers_qwen3(tmp_path, case):
    pair = Pair(CASES[case], tmp_path)
    raw = {**pair.config.raw, "tie_word_embeddings": True}
    if pair.config.family.architecture.has_experts:
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**raw, experts_implementation="eager"))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**raw))
    state = dict(pair.dense_state)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(_fused(state, raw), strict=True)
    ids = some_ids(2, 14)
    wanted = model.eval()(ids).logits
    assert (Decoder.from_checkpoint(pair.checkpoint)(ids)[0] - wanted).abs().max() < TOLERANCE


def _fused(state: dict[str, torch.Tensor], raw: dict) -> dict[str, torch.Tensor]:
    """The experts of a layer in two tensors, as transformers 5 has them in memory."""
    if not raw["use_moe"]:
        return state
    fused = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts."

        def stacked(kind: str, at: str = at) -> torch.Tensor:
            return torch.stack(
                [state[f"{at}{e}.{kind}_proj.weight"] for e in range(raw["num_experts"])]
            )

        fused[at + "gate_up_proj"] = torch.cat([stacked("gate"), stacked("up")], dim=1)
        fused[at + "down_proj"] = stacked("down")
    return fused
