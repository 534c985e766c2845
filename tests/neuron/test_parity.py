"""NxDI's CPU mode against transformers: last prompt position and 12 greedy steps, from converted
directories.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.convert.layout import AttentionPrecision, Layout
from neuron_minimax.model.decoder import Decoder
from tests.neuron.cases import MODELS, REFERENCE, SEED, prompts
from tests.neuron.ranks import Run, run
from tests.opened import convert
from tests.tiny import write_tiny

TOLERANCE = 2e-5  # measured: at most 5e-6
SPLIT = {"tp_degree": 2, "moe_tp_degree": 2}
EXPERTS = {"tp_degree": 2, "moe_ep_degree": 2}
ONE_EACH = {"tp_degree": 4, "moe_ep_degree": 4}
BOTH = {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2}

Converted = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """A model of `cases.py`, converted as "dense", "fp8" or "bf16" (FP8 with BF16 attention); made
    once each.
    """
    base = tmp_path_factory.mktemp("models")

    def make(name: str, kind: str) -> Path:
        source = base / f"{name}-{kind}"
        output = base / f"{name}-{kind}-converted"
        if not output.exists():
            write_tiny(source, seed=SEED, dense=kind == "dense", **MODELS[name])
            attention = AttentionPrecision.BF16 if kind == "bf16" else AttentionPrecision.FP8
            convert(source, output, Layout(attention=attention))
        return output

    return make


def check_against_cpu_model(
    result: dict[str, Any], directory: Path, compute: torch.dtype, tolerance: float
) -> None:
    """The project's own model over the same converted directory, fed the same tokens, chooses each
    of them, or another whose logit is as close as the two may differ.
    """
    model = Decoder.from_converted(directory, compute=compute)
    for prompt, tokens, logits in zip(
        prompts(model.config.vocab_size), result["tokens"], result["logits"], strict=True
    ):
        ids = torch.tensor([[*prompt, *tokens[:-1].tolist()]])
        with torch.no_grad():
            own = model(ids)[0][0, len(prompt) - 1 :].float()
        assert (own - logits).abs().max() < tolerance
        chosen = own.gather(-1, tokens[:, None]).flatten()
        assert (own.max(-1).values - chosen).max() < 2 * tolerance


def check(result: dict[str, Any], name: str, variant: str = "") -> None:
    reference = load_file(REFERENCE)
    assert (result["logits"] - reference[f"{name}.logits{variant}"]).abs().max() < TOLERANCE
    assert torch.equal(result["tokens"], reference[f"{name}.tokens{variant}"])


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("grouped", {}),
        ("grouped", SPLIT),
        ("grouped", EXPERTS),
        ("grouped", {"tp_degree": 4, "moe_tp_degree": 4}),  # 2 key/value heads on 4 ranks
        ("padded", BOTH),  # 6 query heads over 2 key/value heads become 8 over 4
        ("6 experts", ONE_EACH),  # two ranks have two, two one and zeros
        ("converted", SPLIT),  # 3 key/value heads on 2 ranks become 6
    ],
)
def test_float32_equals_transformers(
    name: str, degrees: dict, converted: Converted, tmp_path: Path
) -> None:
    check(run(Run(directory=str(converted(name, "dense")), **degrees), tmp_path / "out"), name)


@pytest.mark.parametrize(
    ("name", "degrees"),
    [
        ("grouped", {}),
        ("grouped", SPLIT),
        ("grouped", EXPERTS),
        ("padded", BOTH),
        ("6 experts", {}),
        ("6 experts", ONE_EACH),
    ],
)
def test_fp8_equals_transformers_on_the_same_dequantized_weights(
    name: str, degrees: dict, converted: Converted, tmp_path: Path
) -> None:
    configuration = Run(directory=str(converted(name, "fp8")), through_load_module=True, **degrees)
    result = run(configuration, tmp_path / "out")
    check(result, name)
    check_against_cpu_model(result, converted(name, "fp8"), torch.float32, TOLERANCE)
    dtypes = {
        key.rpartition("self_attn.")[2]: dtype for key, (dtype, _) in result["parameters"].items()
    }
    assert (
        dtypes["qkv_proj.q_proj.weight"] == dtypes["o_proj.o_proj.weight"] == "torch.float8_e4m3fn"
    )
    assert dtypes["qkv_proj.k_proj.scale"] == "torch.float32"


@pytest.mark.parametrize(
    ("name", "degrees", "channels"),
    [
        ("128 channels", SPLIT, 64),
        ("48 channels", SPLIT, 24),
        ("grouped", {"tp_degree": 4, "moe_tp_degree": 4}, 64),
        ("96 channels", {"tp_degree": 4, "moe_tp_degree": 4}, 24),
        (
            "192 channels",
            {"tp_degree": 4, "moe_tp_degree": 4},
            48,
        ),  # a rank has two blocks' channels
        ("128 channels", BOTH, 64),
    ],
)
def test_expanded_scales_make_any_split_of_the_channels_exact(
    name: str, degrees: dict, channels: int, converted: Converted, tmp_path: Path
) -> None:
    configuration = Run(directory=str(converted(name, "fp8")), through_load_module=True, **degrees)
    result = run(configuration, tmp_path / "out")
    check(result, name)
    shapes = {
        key.partition("mlp_op.")[2]: (dtype, shape[1:])
        for key, (dtype, shape) in result["parameters"].items()
    }
    assert shapes["gate_up_proj.weight"] == ("torch.float8_e4m3fn", [256, 2 * channels])
    assert shapes["gate_up_proj.scale"] == ("torch.float32", [2, 2 * channels])
    assert shapes["down_proj.weight"] == ("torch.float8_e4m3fn", [channels, 256])
    assert shapes["down_proj.scale"] == ("torch.float32", [channels, 2])


def test_the_same_split_with_a_scale_per_block_is_refused(
    converted: Converted, tmp_path: Path
) -> None:
    directory = str(converted("128 channels", "fp8"))
    configuration = Run(
        directory=directory, through_load_module=True, expert_scales="block", **SPLIT
    )
    with pytest.raises(AssertionError, match="leaves 64 channels per rank, not whole blocks"):
        run(configuration, tmp_path / "out")


def test_expanded_scales_change_nothing_where_blocks_would_do(
    converted: Converted, tmp_path: Path
) -> None:
    configuration = Run(
        directory=str(converted("grouped", "fp8")), through_load_module=True, **SPLIT
    )
    results = [
        run(replace(configuration, expert_scales=scales), tmp_path / scales)
        for scales in ("block", "expanded")
    ]
    assert torch.equal(results[0]["logits"], results[1]["logits"])
    assert results[0]["parameters"] != results[1]["parameters"]


@pytest.mark.parametrize(
    ("name", "degrees"), [("grouped", {}), ("grouped", SPLIT), ("padded", BOTH)]
)
def test_fp8_experts_with_bf16_attention_equal_transformers(
    name: str, degrees: dict, converted: Converted, tmp_path: Path
) -> None:
    configuration = Run(directory=str(converted(name, "bf16")), through_load_module=True, **degrees)
    check(run(configuration, tmp_path / "out"), name, ".bf16_attention")


def test_bf16_keeps_the_router_in_float32_and_equals_a_model_with_the_same_casts(
    tmp_path: Path,
) -> None:
    # A seed without near-ties: elsewhere the order of BF16 sums flips an expert of one token in
    # fifty.
    converted = tmp_path / "converted"
    convert(write_tiny(tmp_path / "source", seed=7, **MODELS["grouped"]), converted)
    result = run(
        Run(directory=str(converted), through_load_module=True, dtype="bfloat16"), tmp_path / "out"
    )
    stored = TensorDirectory(converted)
    assert len(result["routers"]) == 4
    for name, tensor in result["routers"].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored.tensor(name))
    assert result["parameters"]["layers.0.self_attn.q_norm.weight"][0] == "torch.bfloat16"
    check_against_cpu_model(result, converted, torch.bfloat16, 0.1)  # measured: at most 0.0625


def test_a_hugging_face_checkpoint_loads_without_conversion_to_disk(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", seed=SEED, **MODELS["grouped"])
    check(run(Run(directory=str(source), through_load_module=True), tmp_path / "out"), "grouped")


def test_a_dense_checkpoint_loads_without_conversion_and_without_rounding(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", seed=SEED, dense=True, **MODELS["grouped"])
    check(run(Run(directory=str(source)), tmp_path / "out"), "grouped")


@pytest.mark.parametrize(
    ("vocabulary", "degrees"),
    [(161, SPLIT), (159, {"tp_degree": 4, "moe_tp_degree": 2, "moe_ep_degree": 2})],
)
def test_the_last_tokens_of_a_vocabulary_that_the_ranks_do_not_divide_keep_their_logits(
    vocabulary: int, degrees: dict, tmp_path: Path
) -> None:
    converted = tmp_path / "converted"
    convert(
        write_tiny(
            tmp_path / "source", seed=SEED, **MODELS["grouped"] | {"vocab_size": vocabulary}
        ),
        converted,
    )
    result = run(
        Run(directory=str(converted), through_load_module=True, **degrees), tmp_path / "out"
    )
    assert result["logits"].shape[-1] == vocabulary
    check_against_cpu_model(result, converted, torch.float32, TOLERANCE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "missing",
            "1 parameters of the model have no value in the checkpoint: "
            "layers.1.self_attn.q_norm.weight",
        ),
        (
            "extra",
            "1 tensors of the checkpoint belong to no parameter of the model: "
            "layers.1.self_attn.v_norm.weight",
        ),
        ("shape", "layers.1.self_attn.q_norm.weight has shape"),
        ("gate", "mlp_op.gate_up_proj.weight is torch.float8_e4m3fn in the checkpoint"),
    ],
)
def test_nothing_is_dropped_or_left_unset_silently(
    change: str, message: str, converted: Converted, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(converted("grouped", "fp8"), broken)
    name = "layers.1.self_attn.q_norm.weight"
    path = (
        broken
        / json.loads((broken / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(path)
    if change == "missing":
        del tensors[name]
    elif change == "extra":
        tensors["layers.1.self_attn.v_norm.weight"] = tensors[name].clone()
    elif change == "shape":
        tensors[name] = tensors[name][:128].clone()
    save_file(tensors, path)
    (broken / "model.safetensors.index.json").unlink()
    merge(broken)
    listed = ["gate", "lm_head"] if change == "gate" else ["lm_head"]
    configuration = Run(
        directory=str(broken), through_load_module=True, options={"modules_to_not_convert": listed}
    )
    with pytest.raises(AssertionError, match=re.escape(message)):
        run(configuration, tmp_path / "out")


def merge(directory: Path) -> None:
    """All shards as one file, so that the index does not notice the change first."""
    shards = sorted(directory.glob("*.safetensors"))
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    for shard in shards:
        shard.unlink()
    save_file(tensors, directory / "model.safetensors")
