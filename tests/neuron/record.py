"""Write tests/data/nxd_slices.json: which heads, experts and blocks NxD's own sharding gives each
rank.

Run where NxDI can be imported, from the repository root: `python -m tests.neuron.record`. NxD's
`ModelBuilder` shards one layer with the real head counts and expert sizes, rank by rank in one
process, as it does before a device load. Every weight and scale holds numbers that say where it
came from, so a rank's tensors can be read back as places.
"""

import importlib
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

SLICES = Path(__file__).parent.parent / "data" / "nxd_slices.json"
HEADS = 48
KEY_VALUE_HEADS = 8
EXPERTS = 256
INTERMEDIATE = 1536
HIDDEN = 384
BLOCK = 128
# Chip, and its tp, moe_tp and moe_ep degrees. (On trn1 and inf2 NxD has no moe_tp 4 with expert
# parallelism.)
DEGREES = {
    "trn1": ((8, 1, 8), (8, 2, 4), (16, 2, 8), (32, 1, 32), (32, 2, 16)),
    "inf2": ((24, 3, 8), (24, 6, 4), (24, 12, 2)),
    "trn2": ((32, 4, 8), (64, 1, 64), (64, 2, 32), (64, 4, 16)),
}
# Intermediate sizes of which 8 ranks get 24 and 64 channels each: the sixth rank of the first has
# channels of two blocks.
SPLIT_SIZES = (192, 512)
SPLIT_RANKS = 8
TINY = {
    "grouped at tp 4": ({}, (4, 2, 2)),
    "padded at tp 4": ({"num_attention_heads": 6}, (4, 2, 2)),
    "converted at tp 2": ({"num_attention_heads": 6, "num_key_value_heads": 3}, (2, 2, 1)),
}


def sizes() -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "vocab_size": 384,
    }


def marked_state(config: Any, torch: Any) -> dict[str, Any]:
    """Full tensors under converted names: heads count from 1 (0 is padding); experts and blocks are
    coded in scales.
    """
    attention = "layers.0.self_attn."
    experts = "layers.0.block_sparse_moe.expert_mlps.mlp_op."
    hidden_blocks = HIDDEN // BLOCK
    blocks = INTERMEDIATE // BLOCK
    heads = torch.arange(1, HEADS + 1)
    keys = torch.arange(1, KEY_VALUE_HEADS + 1)
    fp8 = torch.float8_e4m3fn
    expert = torch.arange(EXPERTS)

    def rows(count: Any, width: int) -> Any:
        return (
            count.repeat_interleave(BLOCK)[:, None].expand(-1, width).to(torch.uint8).contiguous()
        )

    def coded(block_numbers: Any) -> Any:
        """Expert and block in one float32 per block, [E, blocks]."""
        return (expert[:, None] * 100 + block_numbers + 1).float()

    gate_up = coded(torch.arange(2 * blocks))
    down = coded(torch.arange(blocks))
    place = (
        (torch.arange(2 * blocks) + 24 * (expert % 5)[:, None])
        .repeat_interleave(BLOCK, 1)
        .to(torch.uint8)
    )
    down_place = (
        (torch.arange(blocks) + 24 * (expert % 5)[:, None])
        .repeat_interleave(BLOCK, 1)
        .to(torch.uint8)
    )
    state = {
        attention + "qkv_proj.q_proj.weight": rows(heads, HIDDEN).view(fp8),
        attention + "qkv_proj.q_proj.scale": heads[:, None].float().repeat(1, hidden_blocks),
        attention + "q_norm.weight": heads.repeat_interleave(BLOCK).bfloat16(),
        attention + "k_norm.weight": keys.repeat_interleave(BLOCK).bfloat16(),
        attention + "o_proj.o_proj.weight": rows(heads, HIDDEN).T.contiguous().view(fp8),
        attention + "o_proj.o_proj.scale": heads[None].float().repeat(hidden_blocks, 1),
        experts + "gate_up_proj.weight": place[:, None]
        .expand(-1, HIDDEN, -1)
        .contiguous()
        .view(fp8),
        experts + "gate_up_proj.scale": gate_up[:, None].repeat(1, hidden_blocks, 1),
        experts + "down_proj.weight": down_place[:, :, None]
        .expand(-1, -1, HIDDEN)
        .contiguous()
        .view(fp8),
        experts + "down_proj.scale": down[:, :, None].repeat(1, 1, hidden_blocks),
        "layers.0.block_sparse_moe.router.linear_router.weight": torch.zeros(EXPERTS, HIDDEN),
        "layers.0.block_sparse_moe.router.e_score_correction_bias": torch.zeros(EXPERTS),
    }
    for name in "kv":
        state[attention + f"qkv_proj.{name}_proj.weight"] = rows(keys, HIDDEN).view(fp8)
        state[attention + f"qkv_proj.{name}_proj.scale"] = (
            keys[:, None].float().repeat(1, hidden_blocks)
        )
    for name in ("norm", "layers.0.input_layernorm", "layers.0.post_attention_layernorm"):
        state[f"{name}.weight"] = torch.zeros(HIDDEN, dtype=torch.bfloat16)
    for name in ("embed_tokens", "lm_head"):
        state[f"{name}.weight"] = torch.zeros(config.vocab_size, HIDDEN, dtype=torch.bfloat16)
    return state


def shard(
    directory: Path, degrees: tuple[int, int, int], state: Any = None
) -> list[dict[str, Any]]:
    """Every rank's tensors, by the real ModelBuilder. `state` maps a config to full tensors, else
    they are loaded.
    """
    import torch

    from neuron_minimax.backends.nxdi import imports
    from neuron_minimax.backends.nxdi.config import NeuronModelConfig, read_config
    from neuron_minimax.backends.nxdi.model import NeuronForCausalLM
    from neuron_minimax.backends.nxdi.options import quantization_options
    from neuron_minimax.planner import blockwise

    class Recorded(NeuronForCausalLM):
        def checkpoint_loader_fn(self, mmap: bool = False) -> dict:
            if state is None:
                return super().checkpoint_loader_fn(mmap)
            return self.convert_hf_to_neuron_state_dict(
                state(self.config.model_config, torch), self.config
            )

    tp_degree, moe_tp_degree, moe_ep_degree = degrees
    cores = 2 if tp_degree == 64 else 1
    settings = blockwise.blockwise_matmul(blockwise.DEFAULT).settings
    options = imports.MoENeuronConfig(
        torch_dtype=torch.bfloat16,
        logical_nc_config=cores,
        blockwise_matmul_config=settings | {"logical_nc_config": cores},
        tp_degree=tp_degree,
        moe_tp_degree=moe_tp_degree,
        moe_ep_degree=moe_ep_degree,
        batch_size=32,
        seq_len=64,
        max_context_length=64,
        **quantization_options(directory),
    )
    config = NeuronModelConfig(options, load_config=read_config(directory))
    ranks = Recorded(str(directory), config).get_builder().shard_checkpoint()
    from neuronx_distributed.modules.moe.moe_process_group import destroy_moe_model_parallel

    destroy_moe_model_parallel()
    return ranks


def places(tensors: dict[str, Any]) -> dict[str, Any]:
    """Read one rank's tensors back: head numbers from 0, None for padding; the weights must agree
    with their scales.
    """
    attention = "layers.0.self_attn."
    experts = "layers.0.block_sparse_moe.expert_mlps.mlp_op."
    found: dict[str, Any] = {}
    for name in ("qkv_proj.q_proj", "qkv_proj.k_proj", "qkv_proj.v_proj", "o_proj.o_proj"):
        weight, scale = (tensors[f"{attention}{name}.{part}"] for part in ("weight", "scale"))
        weight = weight.view(_uint8())
        if name.startswith("o_"):
            weight = weight.T
            scale = scale.T
        assert (weight == scale[:, :1].repeat_interleave(BLOCK, 0)).all(), name
        found[name.rpartition(".")[2]] = [int(head) - 1 if head else None for head in scale[:, 0]]
    for name in "qk":
        norm = tensors[f"{attention}{name}_norm.weight"].float().reshape(-1, BLOCK)
        assert (norm == norm[:, :1]).all()
        assert [int(head) - 1 if head else None for head in norm[:, 0]] == found[f"{name}_proj"]
    gate_up = tensors[f"{experts}gate_up_proj.scale"][:, 0]
    down = tensors[f"{experts}down_proj.scale"][:, :, 0]
    found["experts"] = [int(number) // 100 for number in gate_up[:, 0]]
    assert found["experts"] == [int(number) // 100 for number in down[:, 0]]
    found["gate_up_blocks"] = [int(number) % 100 - 1 for number in gate_up[0]]
    found["down_blocks"] = [int(number) % 100 - 1 for number in down[0]]
    for name, scale in (("gate_up_proj", gate_up), ("down_proj", down)):
        weight = tensors[f"{experts}{name}.weight"].view(_uint8())
        lines = weight[:, 0] if name == "gate_up_proj" else weight[:, :, 0]
        coded = (scale % 100 - 1) + 24 * ((scale // 100) % 5)
        assert (lines.float() == coded.repeat_interleave(BLOCK, 1)).all(), name
    return found


def _uint8() -> Any:
    import torch

    return torch.uint8


def channels(tensors: dict[str, Any], torch: Any) -> dict[str, Any]:
    """Read back which channels a rank has and which block's scales they come with, of a tiny
    checkpoint whose experts `numbered` marked.
    """
    experts = "layers.0.block_sparse_moe.expert_mlps.mlp_op."
    weight, scale, down, down_scale = (
        tensors[experts + name]
        for name in (
            "gate_up_proj.weight",
            "gate_up_proj.scale",
            "down_proj.weight",
            "down_proj.scale",
        )
    )
    found = {
        "gate_up": weight.view(torch.uint8)[0, 0].tolist(),
        "gate_up_blocks": scale[0, 0].int().tolist(),
        "down": down.view(torch.uint8)[0, :, 0].tolist(),
        "down_blocks": down_scale[0, :, 0].int().tolist(),
    }
    assert (weight.view(torch.uint8) == weight.view(torch.uint8)[:1, :1]).all()
    assert (down.view(torch.uint8) == down.view(torch.uint8)[:1, :, :1]).all()
    assert (scale == scale[:1, :1]).all()
    assert (down_scale == down_scale[:1, :, :1]).all()
    return found


def numbered(directory: Path) -> Any:
    """The converted tensors of a directory, but for layer 0's experts: a channel's codes are its
    number (of gate and of up), its stored scale the number of its block (of gate, then of up).
    """
    from neuron_minimax.checkpoint.reader import TensorDirectory

    def state(config: Any, torch: Any) -> dict[str, Any]:
        stored = TensorDirectory(directory)
        tensors = {name: stored.tensor(name) for name in stored.entries}
        experts = "layers.0.block_sparse_moe.expert_mlps.mlp_op."
        number = torch.arange(config.intermediate_size).to(torch.uint8)
        shape = tensors[experts + "down_proj.weight"].shape
        down = number[None, :, None].expand(shape).contiguous()
        both = torch.cat([number, number]).expand(shape[0], shape[2], -1).contiguous()
        tensors[experts + "down_proj.weight"] = down.view(torch.float8_e4m3fn)
        tensors[experts + "gate_up_proj.weight"] = both.view(torch.float8_e4m3fn)
        for name, dimension in (("gate_up_proj", 2), ("down_proj", 1)):
            scale = tensors[f"{experts}{name}.scale"]
            blocks = torch.arange(scale.shape[dimension], dtype=torch.float32)
            by_block = blocks if dimension == 2 else blocks[:, None]
            tensors[f"{experts}{name}.scale"] = by_block.expand(scale.shape).contiguous()
        return tensors

    return state


def split_channels(base: Path) -> dict[str, Any]:
    """Every rank's channels of tiny models whose blocks ranks share, at tp 8."""
    import torch

    from tests.opened import convert
    from tests.tiny import write_tiny

    recorded = {}
    for size in SPLIT_SIZES:
        converted = base / f"{size}-converted"
        convert(write_tiny(base / str(size), intermediate_size=size), converted)
        ranks = shard(converted, (SPLIT_RANKS, SPLIT_RANKS, 1), numbered(converted))
        recorded[str(size)] = [channels(rank, torch) for rank in ranks]
    return recorded


def tiny_parameters(base: Path) -> dict[str, Any]:
    """Names, dtypes and shapes of rank 0 for three tiny converted checkpoints, through the real
    loading path.
    """
    from tests.opened import convert
    from tests.tiny import write_tiny

    recorded = {}
    for name, (changed, degrees) in TINY.items():
        overrides = {"intermediate_size": 256, **changed}
        converted = base / f"{name}-converted"
        convert(write_tiny(base / name, **overrides), converted)
        tensors = shard(converted, degrees)[0]
        recorded[name] = {
            "overrides": overrides,
            "degrees": degrees,
            "rank 0": {
                key: [str(value.dtype).removeprefix("torch."), list(value.shape)]
                for key, value in sorted(tensors.items())
            },
        }
    return recorded


def main() -> None:
    import tempfile

    from tests.neuron import standins

    os.environ.pop("NXD_CPU_MODE", None)
    standins.install()
    from tests.tiny import tiny_config

    with tempfile.TemporaryDirectory() as directory:
        base = Path(directory)
        raw = tiny_config(**sizes()) | {"neuron_minimax": {}}
        raw["quantization_config"]["modules_to_not_convert"] = [
            "lm_head",
            "embed_tokens",
            "router",
            "norm",
        ]
        (base / "config.json").write_text(json.dumps(raw))
        slices = {}
        for chip, all_degrees in DEGREES.items():
            os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = chip
            for degrees in all_degrees:
                key = " ".join([chip, *map(str, degrees)])
                slices[key] = [places(rank) for rank in shard(base, degrees, marked_state)]
        os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"] = "trn1"
        split = split_channels(base)
        tiny = tiny_parameters(base)
    versions = {name: metadata.version(name) for name in ("torch", "transformers")}
    for name in ("neuronx_distributed", "neuronx_distributed_inference"):
        versions[name] = importlib.import_module(f"{name}._version").__version__
    document = {
        "command": "python -m tests.neuron.record",
        "versions": versions,
        "sizes": sizes(),
        "slices by chip, tp, moe_tp and moe_ep degree": slices,
        "channels by intermediate size at tp 8": split,
        "tiny": tiny,
    }
    SLICES.write_text(
        json.dumps(document, separators=(",", ":"))
        .replace("},{", "},\n{")
        .replace('":[{', '":[\n{')
        + "\n"
    )


if __name__ == "__main__":
    main()
