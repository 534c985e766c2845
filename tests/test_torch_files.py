"""Files of torch become checkpoints whose model is the one that was saved."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from neuron_minimax import Checkpoint, Decoder, import_torch
from neuron_minimax.cli import main
from neuron_minimax.errors import CheckpointError, ConfigError
from tests.family_oracles import CASES, Pair
from tests.tiny_tokenizer import write_tokenizer

MINIMIND = {
    name: case
    for name, case in CASES.items()
    if case.family.startswith("minimind") and not case.overrides
}
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


def state_of(pair: Pair) -> dict[str, torch.Tensor]:
    """As MiniMind saves it: the tied head stands there twice."""
    state = dict(pair.dense_state)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    return state


@pytest.fixture(params=MINIMIND.values(), ids=MINIMIND.keys())
def pair(request, tmp_path) -> Pair:
    return Pair(request.param, tmp_path / "made")


@torch.no_grad()
def test_a_pth_of_minimind_is_the_model_that_was_trained(pair, tmp_path):
    """Its config.json beside it, as in its Hugging Face form."""
    source = tmp_path / "pth"
    source.mkdir()
    torch.save(state_of(pair), source / "full_sft.pth")
    shutil.copy(pair.directory / "config.json", source)
    made = import_torch(source, tmp_path / "checkpoint")
    assert made.head_is_embedding
    assert made.assumed == {}
    checkpoint = Checkpoint(tmp_path / "checkpoint")
    assert checkpoint.config.family is pair.config.family
    logits, _ = Decoder.from_checkpoint(checkpoint)(IDS)
    assert (logits - pair.logits(IDS)).abs().max() < 3e-5


@torch.no_grad()
def test_a_config_is_derived_from_the_tensors_of_minimind(pair, tmp_path):
    """What tensors cannot say is told: here the number of heads is not MiniMind's eight."""
    torch.save(state_of(pair), tmp_path / "out.pth")
    older = pair.case.family.startswith("minimind2")
    made = import_torch(tmp_path / "out.pth", tmp_path / "checkpoint")
    assert ("num_attention_heads" in made.assumed) == older
    assert ("num_experts_per_tok" in made.assumed) == pair.case.family.endswith("moe")
    found = Checkpoint(tmp_path / "checkpoint").config
    coefficient = 5e-4 if pair.case.family == "minimind_moe" else None
    for fields in (found.raw, made.assumed):
        assert fields.get("router_aux_loss_coef") == coefficient
    assert found.family is pair.config.family
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    same += ("num_local_experts", "num_experts_per_tok", "tie_word_embeddings")
    assert all(getattr(found, name) == getattr(pair.config, name) for name in same)
    if older:
        assert "num_attention_heads 8" in made.render()
    else:
        logits, _ = Decoder.from_checkpoint(Checkpoint(tmp_path / "checkpoint"))(IDS)
        assert found.num_attention_heads == pair.config.num_attention_heads
        assert (logits - pair.logits(IDS)).abs().max() < 3e-5


def test_half_precision_is_widened_exactly(tmp_path):
    pair = Pair(CASES["MiniMind"], tmp_path / "made")
    halves = {name: tensor.half() for name, tensor in state_of(pair).items()}
    torch.save(halves, tmp_path / "half.pth")
    made = import_torch(
        tmp_path / "half.pth", tmp_path / "checkpoint", config=pair.directory / "config.json"
    )
    stored = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert made.widened == len(stored) == len(halves) - 1
    assert all(torch.equal(stored[name], halves[name].float()) for name in stored)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pytorch_model.bin", "float16 shards", "torch.compile", "resume"])
def test_the_other_forms_that_people_have(tmp_path, kind):
    pair = Pair(CASES["Qwen2"], tmp_path / "made")
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(pair.directory / "config.json", source)
    state = {name: tensor.bfloat16() for name, tensor in pair.dense_state.items()}
    match kind:
        case "pytorch_model.bin":
            names = sorted(state)
            for number, part in enumerate((names[:5], names[5:]), 1):
                path = source / f"pytorch_model-{number:05d}-of-00002.bin"
                torch.save({name: state[name] for name in part}, path)
        case "float16 shards":
            exact = {n: t.half() for n, t in state.items() if torch.equal(t.half().bfloat16(), t)}
            save_file({**state, **exact}, source / "model.safetensors")
        case "torch.compile":
            wrapped = {f"_orig_mod.{name}": tensor for name, tensor in state.items()}
            torch.save(wrapped, source / "model.pth")
        case "resume":
            torch.save({"model": state, "epoch": 3, "optimizer": {}}, source / "model.pth")
    import_torch(source, tmp_path / "checkpoint")
    logits, _ = Decoder.from_checkpoint(Checkpoint(tmp_path / "checkpoint"))(IDS)
    assert (logits - pair.logits(IDS)).abs().max() < 3e-5


class Payload:
    """What would run while it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = str(directory)

    def __reduce__(self):
        return os.mkdir, (self.directory,)


def test_nothing_in_a_file_of_torch_is_run(tmp_path):
    torch.save({"model.embed_tokens.weight": Payload(tmp_path / "planted")}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="nothing else in it is run"):
        import_torch(tmp_path / "evil.pth", tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "holds no tensors"),
        ([1, 2], "holds list, no state dict"),
        ({"a": 1}, "holds 'a', which is int, beside tensors"),
        ({"a": torch.zeros(2, dtype=torch.int64)}, "is torch.int64; expected float16"),
        ({"a": torch.zeros(2)}, "its tensors are not those of MiniMind"),
    ],
)
def test_what_is_no_state_dict_of_a_model_is_refused_by_name(tmp_path, contents, message):
    torch.save(contents, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        import_torch(tmp_path / "x.pth", tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.pth"]


def test_a_missing_tensor_leaves_nothing_behind(tmp_path):
    pair = Pair(CASES["MiniMind"], tmp_path / "made")
    state = state_of(pair)
    del state["model.layers.1.mlp.up_proj.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing"):
        import_torch(tmp_path / "x.pth", tmp_path / "checkpoint")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "x.pth"]


def test_a_config_beside_a_file_is_its_own(tmp_path):
    pair = Pair(CASES["MiniMind2"], tmp_path / "made")
    shutil.copy(pair.directory / "config.json", tmp_path)
    torch.save(state_of(pair), tmp_path / "x.pth")
    made = import_torch(tmp_path / "x.pth", tmp_path / "checkpoint")
    assert made.assumed == {}
    assert Checkpoint(made.directory).config.num_attention_heads == 4


def test_a_flipped_bit_is_found(tmp_path):
    """The records of a file of torch have checksums, which torch does not look at."""
    pair = Pair(CASES["MiniMind"], tmp_path / "made")
    torch.save(state_of(pair), tmp_path / "x.pth")
    data = bytearray((tmp_path / "x.pth").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged in .*; download it again"):
        import_torch(tmp_path / "x.pth", tmp_path / "checkpoint")
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((2,), float("nan")), "holds NaN or infinite elements"),
        (torch.eye(3).to_sparse(), "is sparse; expected dense tensors"),
    ],
)
def test_tensors_that_no_model_has_are_refused(tmp_path, value, message):
    torch.save({"a": value}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=message):
        import_torch(tmp_path / "x.pth", tmp_path / "out")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    pair = Pair(CASES["MiniMind"], tmp_path / "made")  # 160 tokens
    torch.save(state_of(pair), tmp_path / "x.pth")
    tokenizer = write_tokenizer(tmp_path / "tokenizer", 384)
    with pytest.raises(CheckpointError, match=r"has token .*, but the model has vocab_size 160"):
        import_torch(tmp_path / "x.pth", tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_not_there_is_refused(tmp_path):
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"nowhere has no tokenizer\.json"):
        import_torch(tmp_path / "x.pth", tmp_path / "out", tokenizer=tmp_path / "nowhere")


def test_a_tensor_that_is_there_twice_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1), "module.a": torch.ones(1)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="holds 'a' twice, once wrapped"):
        import_torch(tmp_path / "x.pth", tmp_path / "out")


def test_files_that_are_not_there_or_no_files(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        import_torch(tmp_path / "none.pth", tmp_path / "checkpoint")
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(CheckpointError, match="it is no regular file"):
        import_torch(tmp_path / "pipe.pth", tmp_path / "checkpoint")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"is empty; expected PyTorch's own files"):
        import_torch(tmp_path / "empty", tmp_path / "checkpoint")
    for name in ("a.pth", "b.pth"):
        torch.save({}, tmp_path / "empty" / name)
    with pytest.raises(CheckpointError, match=r"has several models \(a\.pth, b\.pth\)"):
        import_torch(tmp_path / "empty", tmp_path / "checkpoint")
    (tmp_path / "text.pth").write_text("a text")
    with pytest.raises(CheckpointError, match="cannot be read as tensors alone"):
        import_torch(tmp_path / "text.pth", tmp_path / "checkpoint")


def test_a_directory_that_holds_something_is_not_written_into(tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "notes").write_text("mine")
    torch.save({}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="is there already; choose another"):
        import_torch(tmp_path / "x.pth", tmp_path / "checkpoint")


def test_a_config_of_an_unsupported_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ConfigError, match="model_type is 'llama'"):
        import_torch(tmp_path / "x.pth", tmp_path / "out", config=tmp_path / "config.json")


def test_the_command_says_what_it_made(tmp_path, capsys):
    pair = Pair(CASES["MiniMind-MoE"], tmp_path / "made")
    torch.save({n: t.half() for n, t in state_of(pair).items()}, tmp_path / "x.pth")
    assert main(["import", str(tmp_path / "x.pth"), str(tmp_path / "checkpoint")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "widened from float16 to float32, exactly" in said
    assert "num_experts_per_tok 1" in said
    assert main(["inspect", str(tmp_path / "checkpoint")]) == 0
    assert main(["import", str(tmp_path / "x.pth"), str(tmp_path / "checkpoint")]) == 1
