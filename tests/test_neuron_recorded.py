"""Sharding as NxD does it, recorded in tests/data, against the planner's rules, the conversion, and
a run by ranks.
"""

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from neuron_minimax.backends.nxdi.coverage import check_checkpoint
from neuron_minimax.backends.nxdi.padding import Padding
from neuron_minimax.backends.nxdi.scales import expand_scales
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig, expert_share
from neuron_minimax.errors import CheckpointError
from neuron_minimax.families import Role, target_scale_name
from neuron_minimax.fp8 import ceil_div
from neuron_minimax.kernels.reference import expand_scale
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.layers import Step
from neuron_minimax.model.rope import rope_table
from neuron_minimax.planner.memory import Deployment, rank_memory
from neuron_minimax.planner.sharding import head_layout
from tests import rank_simulation
from tests.full_size import PUBLISHED_SIZES
from tests.opened import convert
from tests.rank_simulation import Degrees, expert_shard
from tests.tiny import tiny_config, write_tiny

RECORDED = json.loads((Path(__file__).parent / "data" / "nxd_slices.json").read_text())
SLICES = RECORDED["slices by chip, tp, moe_tp and moe_ep degree"]
EXPERTS = (Role.EXPERT_GATE, Role.EXPERT_DOWN)
SPLIT = RECORDED["channels by intermediate size at tp 8"]
BYTES = {"float8_e4m3fn": 1, "bfloat16": 2, "float32": 4, "int32": 4}


@pytest.mark.parametrize("key", SLICES)
def test_every_rank_gets_the_heads_and_experts_that_nxd_gives_it(key: str) -> None:
    tp, moe_tp, moe_ep = map(int, key.split()[1:])
    config = ModelConfig.from_dict(tiny_config(**RECORDED["sizes"]))
    layout = head_layout(config.num_attention_heads, config.num_key_value_heads, tp)
    blocks = config.intermediate_size // 128
    assert len(SLICES[key]) == tp
    for rank, recorded in enumerate(SLICES[key]):
        assert recorded["q_proj"] == recorded["o_proj"] == list(layout.query_slots_of(rank))
        assert recorded["k_proj"] == recorded["v_proj"] == list(layout.key_value_slots_of(rank))
        shard = expert_shard(config, moe_tp_degree=moe_tp, moe_ep_degree=moe_ep, rank=rank)
        held = [channel // 128 for channel in shard.intermediate[::128]]
        assert recorded["experts"] == list(shard.experts)
        assert recorded["down_blocks"] == held
        assert recorded["gate_up_blocks"] == held + [blocks + block for block in held]


@pytest.mark.parametrize("key", SLICES)
def test_the_ranks_together_hold_the_whole_model_and_pair_queries_with_their_keys(key: str) -> None:
    moe_tp = int(key.split()[2])
    recorded = SLICES[key]
    heads = [head for rank in recorded for head in rank["q_proj"] if head is not None]
    assert sorted(heads) == list(range(48))
    for rank in recorded:
        keys_per_query = len(rank["q_proj"]) // len(rank["k_proj"])
        for place, head in enumerate(rank["q_proj"]):
            assert head is None or rank["k_proj"][place // keys_per_query] == head // 6
    pieces = [
        (expert, block)
        for rank in recorded
        for expert in rank["experts"]
        for block in rank["gate_up_blocks"]
    ]
    assert sorted(pieces) == [(expert, block) for expert in range(256) for block in range(24)]
    assert len({tuple(rank["down_blocks"]) for rank in recorded}) == moe_tp


@pytest.mark.parametrize("size", SPLIT)
def test_expanded_scales_stay_with_their_channels_however_nxd_cuts_them(size: str) -> None:
    """Of 192 channels the sixth of 8 ranks has 8 of one block and 16 of the next."""
    config = ModelConfig.from_dict(tiny_config(intermediate_size=int(size)))
    blocks = ceil_div(int(size), 128)
    assert len(SPLIT[size]) == 8
    for rank, recorded in enumerate(SPLIT[size]):
        shard = expert_shard(config, moe_tp_degree=8, moe_ep_degree=1, rank=rank)
        held = [channel % 256 for channel in shard.intermediate]
        of_block = [channel // 128 for channel in shard.intermediate]
        assert recorded["gate_up"] == held + held
        assert recorded["down"] == held
        assert recorded["gate_up_blocks"] == of_block + [blocks + block for block in of_block]
        assert recorded["down_blocks"] == of_block


def test_repeating_scales_is_expanding_them_along_the_channels_alone() -> None:
    """The oracle is the dequantized weight: codes times block scales, and times expanded ones."""
    generator = torch.Generator().manual_seed(3)
    config = ModelConfig.from_dict(tiny_config(intermediate_size=192))
    names = [target_scale_name(config.family.rule_of(role).target) for role in EXPERTS]
    gate_up, down = (torch.rand(shape, generator=generator) for shape in ((8, 2, 4), (8, 2, 2)))
    state = {names[0].format(l=1): gate_up, names[1].format(l=1): down}
    expand_scales(state, config, [1])
    wide, tall = state.values()
    assert torch.equal(
        expand_scale(wide, 256, 384, (128, 1)), expand_scale(gate_up, 256, 384, (128, 128), parts=2)
    )
    assert torch.equal(
        expand_scale(tall, 192, 256, (1, 128)), expand_scale(down, 192, 256, (128, 128))
    )


@pytest.mark.parametrize(("experts", "ranks"), [(6, 4), (7, 2), (154, 64), (5, 5), (3, 1)])
def test_each_rank_of_padded_experts_has_its_share_and_then_zeros(experts: int, ranks: int) -> None:
    padding = Padding(experts, ranks)
    numbered = torch.arange(1, experts + 1)
    size = ceil_div(experts, ranks)
    shares = [list(expert_share(experts, rank, ranks)) for rank in range(ranks)]
    assert list(chain(*shares)) == list(range(experts))
    held = [[1 + expert for expert in share] + [0] * (size - len(share)) for share in shares]
    padded = padding.pad(numbered, 0)
    assert padded.tolist() == list(chain(*held))
    assert padding.held == len(padded)
    assert torch.equal(padding.pad(numbered.expand(2, -1), 1), padded.expand(2, -1))
    # Every expert is found at its place.
    index = torch.arange(experts).view(1, -1)
    assert torch.equal(padded[padding.places(index)], 1 + index)


def test_codes_and_scales_of_experts_are_padded_and_routers_are_not() -> None:
    config = ModelConfig.from_dict(tiny_config(num_local_experts=3))
    names = [rule.target for rule in config.family.rules if rule.per_expert]
    codes = torch.arange(6, dtype=torch.uint8).view(3, 2).view(torch.float8_e4m3fn)
    scales = torch.ones(3, 1)
    router = config.family.rule_of(Role.ROUTER).target.format(l=0)
    state = {router: torch.ones(3, 2)}
    for name in names:
        state |= {name.format(l=0): codes, target_scale_name(name).format(l=0): scales}
    Padding(3, 2).pad_experts(state, config, [0, 1])
    assert len(state) == 1 + 2 * len(names)
    assert len(state[router]) == 3
    for name in names:
        padded = state[name.format(l=0)].view(torch.uint8)
        assert padded.tolist() == [[0, 1], [2, 3], [4, 5], [0, 0]]
        assert state[target_scale_name(name).format(l=0)].tolist() == [[1], [1], [1], [0]]


@pytest.mark.parametrize(
    "shape",
    [(1,), (8,), (8, 1), (8, 2, 2), (8, 4, 2), (8, 2, 6), (8, 2, 384), (8, 384, 2)],
    ids=str,
)
def test_scales_that_are_not_one_for_each_block_are_left_for_coverage_to_name(
    shape: tuple[int, ...],
) -> None:
    config = ModelConfig.from_dict(tiny_config(intermediate_size=192))
    names = [target_scale_name(config.family.rule_of(role).target).format(l=0) for role in EXPERTS]
    state = {names[0]: torch.ones(shape), names[1]: torch.ones(8, 2, 3)}
    given = dict(state)
    expand_scales(state, config, [0, 1])
    assert state.keys() == given.keys()
    assert all(state[name] is given[name] for name in given)
    parameters = {name: torch.nn.Parameter(torch.ones(8, 3, 3)) for name in names}
    with pytest.raises(CheckpointError, match=re.escape(f"{names[1]} has shape [8, 2, 3], but")):
        check_checkpoint(parameters, state, 8)


@pytest.mark.parametrize("name", RECORDED["tiny"])
def test_the_conversion_makes_exactly_the_tensors_that_nxdi_loads(
    name: str, tmp_path: Path
) -> None:
    case = RECORDED["tiny"][name]
    tp, moe_tp, moe_ep = case["degrees"]
    convert(write_tiny(tmp_path / "source", **case["overrides"]), tmp_path / "converted")
    config = ModelConfig.from_dir(tmp_path / "converted")
    stored = {
        entry.name: entry.shape
        for entry in TensorDirectory(tmp_path / "converted").entries.values()
    }
    local = {
        key: shape
        for key, (_, shape) in case["rank 0"].items()
        if "rank_util" not in key and "spmd" not in key
    }
    assert stored.keys() == local.keys()
    layout = head_layout(config.num_attention_heads, config.num_key_value_heads, tp)
    placed_queries = len(layout.query_slots) / config.num_attention_heads
    placed_keys = len(layout.key_value_slots) / config.num_key_value_heads
    shrink = {
        "q_proj": placed_queries / tp,
        "o_proj": placed_queries / tp,
        "q_norm": placed_queries / tp,
        "k_proj": placed_keys / tp,
        "v_proj": placed_keys / tp,
        "k_norm": placed_keys / tp,
        "gate_up_proj": 1 / (moe_tp * moe_ep),
        "down_proj": 1 / (moe_tp * moe_ep),
        "embed_tokens": 1 / tp,
        "lm_head": 1 / tp,
    }
    for key, shape in stored.items():
        factor = shrink.get(key.split(".")[-2], 1)
        assert torch.Size(local[key]).numel() == torch.Size(shape).numel() * factor, key


@pytest.mark.parametrize("name", RECORDED["tiny"])
def test_the_planner_counts_the_bytes_that_nxdi_holds(name: str) -> None:
    case = RECORDED["tiny"][name]
    tp, moe_tp, moe_ep = case["degrees"]
    config = ModelConfig.from_dict(tiny_config(**case["overrides"]))
    deployment = Deployment(
        tp_degree=tp,
        moe_tp_degree=moe_tp,
        moe_ep_degree=moe_ep,
        batch_size=1,
        seq_len=64,
        context_length=64,
        smallest_context=64,
    )
    held = sum(
        BYTES[dtype] * torch.Size(shape).numel()
        for key, (dtype, shape) in case["rank 0"].items()
        if "rank_util" not in key and "spmd" not in key
    )
    assert rank_memory(config, deployment).weights == held


@pytest.mark.parametrize(
    ("overrides", "degrees"),
    [
        ({}, Degrees(2, 1, 2)),
        ({}, Degrees(4, 2, 2)),
        ({"num_attention_heads": 6}, Degrees(4, 2, 2)),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, Degrees(2, 2, 1)),
    ],
)
def test_a_run_by_ranks_gives_the_logits_of_one_rank(
    overrides: dict, degrees: Degrees, tmp_path: Path
) -> None:
    convert(
        write_tiny(tmp_path / "source", intermediate_size=256, **overrides), tmp_path / "converted"
    )
    model = Decoder.from_converted(tmp_path / "converted")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        alone = model(ids)[0]
        hidden = model.embed_tokens.weight[ids[0]].float()
        for layer in model.layers:
            state = layer.state_dict()
            normed = layer.input_layernorm(hidden)
            hidden = hidden + rank_simulation.attention(state, model.config, normed, degrees.tp)
            normed = layer.post_attention_layernorm(hidden)
            hidden = hidden + rank_simulation.experts(state, model.config, normed, degrees)
        by_ranks = torch.nn.functional.linear(model.norm(hidden), model.lm_head.weight.float())
    assert (by_ranks - alone[0]).abs().max() < 2e-5


@pytest.fixture(scope="module")
def real_layer() -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """One layer of the published dimensions but for 16 experts and a small vocabulary; random codes
    and scales.
    """
    sizes = PUBLISHED_SIZES | {"num_hidden_layers": 1, "num_local_experts": 16, "vocab_size": 384}
    config = ModelConfig.from_dict(tiny_config(**sizes))
    generator = torch.Generator().manual_seed(0)
    experts = 16
    hidden = config.hidden_size
    inner = config.intermediate_size

    def weight(name: str, *shape: int) -> dict[str, torch.Tensor]:
        codes = torch.randint(0, 0x70, shape, generator=generator, dtype=torch.uint8)
        codes += 0x80 * torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8)
        grid = (*shape[:-2], shape[-2] // 128, shape[-1] // 128)
        scale = (0.5 + torch.rand(grid, generator=generator)) * 1e-3
        return {f"{name}.weight": codes.view(torch.float8_e4m3fn), f"{name}.scale": scale}

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    attention = "layers.0.self_attn."
    moe = "layers.0.block_sparse_moe."
    state: dict[str, Any] = {
        **weight(attention + "qkv_proj.q_proj", config.query_size, hidden),
        **weight(attention + "qkv_proj.k_proj", config.key_value_size, hidden),
        **weight(attention + "qkv_proj.v_proj", config.key_value_size, hidden),
        **weight(attention + "o_proj.o_proj", hidden, config.query_size),
        **weight(moe + "expert_mlps.mlp_op.gate_up_proj", experts, hidden, 2 * inner),
        **weight(moe + "expert_mlps.mlp_op.down_proj", experts, inner, hidden),
        attention + "q_norm.weight": 1 + 0.1 * normal(config.query_size),
        attention + "k_norm.weight": 1 + 0.1 * normal(config.key_value_size),
        moe + "router.linear_router.weight": normal(experts, hidden) / hidden**0.5,
        moe + "router.e_score_correction_bias": 7 + 0.5 * normal(experts),
        "embed_tokens.weight": normal(384, hidden),
        "lm_head.weight": normal(384, hidden),
    }
    for name in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"):
        state[f"{name}.weight"] = torch.ones(hidden)
    return config, state


@pytest.mark.parametrize("degrees", [Degrees(8, 2, 4), Degrees(24, 3, 8), Degrees(64, 4, 16)])
def test_a_layer_of_the_real_dimensions_is_the_same_by_ranks(
    degrees: Degrees, real_layer: tuple[ModelConfig, dict[str, torch.Tensor]]
) -> None:
    config, state = real_layer
    model = Decoder(config, state)
    layer = model.layers[0]
    hidden = torch.randn(3, config.hidden_size, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(3)[None]
    rope = rope_table(config, positions, torch.float32)
    step = Step(positions_BT=positions, rope=rope)
    with torch.no_grad():
        attended = layer.self_attn(hidden[None], step)[0]
        mixed = layer.block_sparse_moe(hidden[None], step)[0][0]
        by_ranks = rank_simulation.attention(layer.state_dict(), config, hidden, degrees.tp)
        experts_by_ranks = rank_simulation.experts(layer.state_dict(), config, hidden, degrees)
    for whole, parts in ((attended, by_ranks), (mixed, experts_by_ranks)):
        assert (whole - parts).abs().max() < 1e-5 * whole.abs().max()
