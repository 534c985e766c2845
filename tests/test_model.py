"""The model as a torch module: its names, its routing, its training side, and what it refuses."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MiniMaxM2Config
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2RotaryEmbedding

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError, ConfigError, GenerationError
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.model.rope import frequencies
from tests.opened import convert
from tests.tiny import tiny_config, write_tiny


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    convert(write_tiny(directory / "fp8"), directory / "converted")
    return directory / "converted"


@pytest.fixture(scope="module")
def model(converted):
    return Decoder.from_converted(converted)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A fresh float32 model, unlike in all weights, that can be trained."""
    config = ModelConfig.from_dict(tiny_config(num_local_experts=4))
    return Decoder(config, initial_state(config, seed=3, standard_deviation=0.05)).requires_grad_()


def some_ids(rows: int = 2, tokens: int = 12) -> torch.Tensor:
    return torch.randint(0, 160, (rows, tokens), generator=torch.Generator().manual_seed(5))


def test_the_state_dict_is_the_converted_checkpoint_itself(model, converted):
    stored = TensorDirectory(converted)
    state = model.state_dict()
    assert state.keys() == stored.entries.keys()
    for name, tensor in state.items():
        assert tensor.dtype == stored.tensor(name).dtype
    assert state["layers.1.self_attn.o_proj.o_proj.weight"].dtype == torch.float8_e4m3fn


def test_codes_as_uint8_give_the_same_logits(model):
    state = {
        name: tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        for name, tensor in model.state_dict().items()
    }
    assert torch.equal(Decoder(model.config, state)(some_ids())[0], model(some_ids())[0])


def test_rank_tensors_are_no_obstacle(model):
    ranks = {
        "rank_util.rank": torch.arange(4),
        "layers.0.self_attn.rank_util.rank": torch.arange(4),
    }
    assert torch.equal(
        Decoder(model.config, {**model.state_dict(), **ranks})(some_ids())[0],
        model(some_ids())[0],
    )


def change(state, name, tensor=None):
    left = {key: value for key, value in state.items() if key != name}
    return left if tensor is None else {**left, name: tensor}


O_PROJ = "layers.0.self_attn.o_proj.o_proj"
ROUTER = "layers.1.block_sparse_moe.router.linear_router.weight"
BIAS = "layers.1.block_sparse_moe.router.e_score_correction_bias"


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("norm.weight", None, r"norm\.weight is missing"),
        (f"{O_PROJ}.scale", None, r"o_proj\.weight is FP8, but there is no scale"),
        (
            f"{O_PROJ}.scale",
            torch.ones(4, 2),
            r"o_proj\.scale has shape \[4, 2\].*implies \[2, 4\]",
        ),
        (
            f"{O_PROJ}.weight",
            torch.zeros(512, 256),
            r"has shape \[512, 256\].*implies \[256, 512\]",
        ),
        (
            f"{O_PROJ}.weight",
            torch.zeros(256, 512),
            r"o_proj\.scale belongs to a weight in torch\.float32",
        ),
        (
            "norm.weight",
            torch.zeros(256, dtype=torch.uint8),
            r"norm\.weight is in uint8; expected float32 or bfloat16",
        ),
        ("embed_tokens.weight", torch.zeros(160, 256).half(), "is in float16; expected float32 or"),
        (f"{O_PROJ}.weight", torch.zeros(256, 512).int(), "is in int32; expected float32 or"),
        (f"{O_PROJ}.scale", torch.ones(2, 4).bfloat16(), "is in bfloat16; expected float32: "),
        (ROUTER, torch.zeros(8, 256).bfloat16(), "is in bfloat16; expected float32: "),
        (BIAS, torch.zeros(8).bfloat16(), "is in bfloat16; expected float32: "),
        (BIAS, None, "e_score_correction_bias is missing"),
        (BIAS, torch.zeros(7), r"has shape \[7\].*implies \[8\]"),
        (
            "layers.2.norm.weight",
            torch.zeros(1),
            r"1 tensor that .* such as layers\.2\.norm\.weight",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused_by_name(model, name, tensor, message):
    state = dict(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        Decoder(model.config, change(state, name, tensor))


@torch.no_grad()
def test_a_bias_difference_that_bf16_cannot_hold_still_decides(model):
    state = dict(model.state_dict())
    for layer in range(2):
        # All alike in bfloat16, whose steps are 0.03 here; in float32 the last two are ahead of any
        # sigmoid's span.
        router = f"layers.{layer}.block_sparse_moe.router"
        state[f"{router}.linear_router.weight"] = torch.zeros(8, 256)
        state[f"{router}.e_score_correction_bias"] = 7.0 + 0.001 * torch.arange(8.0)
    for compute in (torch.float32, torch.bfloat16):
        _, _, routing = Decoder(model.config, state, compute=compute)(
            some_ids(), return_routing=True
        )
        for layer in routing:
            assert set(layer.expert_index_TK.unique().tolist()) == {6, 7}
            assert layer.scores_TE.dtype == layer.affinity_TK.dtype == torch.float32


@torch.no_grad()
def test_routing_equals_the_definition_token_by_token(model):
    ids = some_ids()
    _, _, routing = model(ids, return_routing=True)
    assert len(routing) == 2
    for number, layer in enumerate(routing):
        bias = model.state_dict()[
            f"layers.{number}.block_sparse_moe.router.e_score_correction_bias"
        ]
        for token in range(ids.numel()):
            scores = layer.scores_TE[token]
            assert 0 < scores.min() <= scores.max() < 1
            best = sorted(range(8), key=lambda expert: -float(scores[expert] + bias[expert]))[:2]
            assert set(layer.expert_index_TK[token].tolist()) == set(best)
            chosen = scores[layer.expert_index_TK[token]]
            torch.testing.assert_close(layer.affinity_TK[token], chosen / chosen.sum())


@torch.no_grad()
def test_padding_reaches_no_expert_and_leaves_no_trace(model):
    lengths = torch.tensor([3, 12])
    _, cache, routing = model(some_ids(), use_cache=True, lengths=lengths, return_routing=True)
    real = (torch.arange(12) < lengths[:, None]).flatten()
    for layer in routing:
        assert (layer.expert_index_TK[~real] == -1).all()
        assert (layer.expert_index_TK[real] >= 0).all()
    assert cache.lengths.tolist() == [3, 12]


@torch.no_grad()
def test_a_truncated_cache_continues_like_a_shorter_one(model):
    ids = some_ids(1, 12)
    _, cache = model(ids, use_cache=True)
    cache.lengths[0] = 8
    again, _ = model(ids[:, 8:], cache)
    torch.testing.assert_close(again, model(ids)[0][:, 8:], atol=1e-5, rtol=0)


def test_a_cache_of_another_batch_size_is_refused(model):
    cache = KVCache.allocate(model.config, 3, 16, torch.float32)
    with pytest.raises(GenerationError, match="holds 3 sequences, but the batch has 2"):
        model(some_ids(), cache)


def hf_name(name: str) -> str:
    for ours, theirs in (
        (".qkv_proj.", "."),
        (".o_proj.o_proj.", ".o_proj."),
        ("block_sparse_moe.router.linear_router.", "mlp.gate."),
        ("block_sparse_moe.router.e_score", "mlp.e_score"),
        ("block_sparse_moe.expert_mlps.mlp_op.gate_up_proj.weight", "mlp.experts.gate_up_proj"),
        ("block_sparse_moe.expert_mlps.mlp_op.down_proj.weight", "mlp.experts.down_proj"),
    ):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head") else f"model.{name}"


def test_loss_and_every_gradient_equal_transformers(trained):
    config = MiniMaxM2Config(
        **{
            key: value
            for key, value in tiny_config(num_local_experts=4).items()
            if "quant" not in key
        }
    )
    oracle = AutoModelForCausalLM.from_config(config, experts_implementation="eager").float()
    ours = trained.state_dict()
    stacked = {
        name: tensor.transpose(1, 2) if "mlp_op" in name else tensor
        for name, tensor in ours.items()
    }
    oracle.load_state_dict({hf_name(name): tensor for name, tensor in stacked.items()})
    ids = some_ids(3, 20)
    losses = []
    for model in (trained, oracle):
        model.zero_grad()
        logits = model(ids)[0] if model is trained else model(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    theirs = dict(oracle.named_parameters())
    for name, parameter in trained.named_parameters():
        gradient = parameter.grad.transpose(1, 2) if "mlp_op" in name else parameter.grad
        wanted = theirs[hf_name(name)].grad
        torch.testing.assert_close(
            gradient, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-3, msg=name
        )


def test_router_scores_carry_a_gradient_and_the_bias_does_not(trained):
    _, _, routing = trained(some_ids(), return_routing=True)
    trained.zero_grad()
    sum(layer.scores_TE.mean() for layer in routing).backward()
    router = trained.layers[0].block_sparse_moe.router
    assert router.linear_router.weight.grad.abs().sum() > 0
    assert not router.e_score_correction_bias.requires_grad


def test_a_fresh_model_is_the_same_for_the_same_seed_only():
    config = ModelConfig.from_dict(tiny_config())
    one, same, other = (initial_state(config, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert one.keys() == Decoder(config).state_dict().keys()


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "yarn": YARN,
    "yarn, own ramp": YARN | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
    "yarn, given magnitude": YARN | {"attention_factor": 1.3},
    "yarn, two scales": YARN | {"mscale": 0.8, "mscale_all_dim": 0.5},
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
def test_rope_frequencies_equal_transformers_bit_for_bit(scaling):
    raw = tiny_config(
        rope_parameters={**scaling, "rope_theta": 5e6, "partial_rotary_factor": 0.5},
        max_position_embeddings=512,
    )
    raw = {
        key: value for key, value in raw.items() if key not in ("quantization_config", "rope_theta")
    }
    wanted = MiniMaxM2RotaryEmbedding(MiniMaxM2Config(**raw))
    found, magnitude = frequencies(ModelConfig.from_dict(raw))
    assert torch.equal(found, wanted.inv_freq)
    assert magnitude == pytest.approx(wanted.attention_scaling, rel=1e-12)


def test_a_rope_type_without_its_fields_is_refused():
    raw = tiny_config(rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(ConfigError, match="'yarn' lacks 'original_max_position_embeddings'"):
        frequencies(ModelConfig.from_dict(raw))
