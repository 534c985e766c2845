"""Every family through the trainer: its loss against its oracle's, export in every precision and
training on from it; and the sizes that models are trained in from nothing.
"""

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.families import FAMILIES
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.training.command import TrainingRequest, train
from neuron_minimax.training.data.encoding import Encoder, Example, pad
from neuron_minimax.training.data.sequences import DataOptions, encode_rows
from neuron_minimax.training.data.sources import JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.objective import losses
from neuron_minimax.training.options import TrainingOptions
from neuron_minimax.training.sizes import SIZES, config_of_size
from neuron_minimax.training.trainer import Trainer
from neuron_minimax.training.weights import (
    Precision,
    config_json,
    copy_tokenizer,
    export_checkpoint,
    precision_of,
    read_initial,
)
from tests import minimind
from tests.test_training_endings import write_inputs
from tests.tiny import tiny_config

OPTIONS = TrainingOptions(
    steps=4, batch_size=3, max_tokens=64, warmup_steps=1, micro_batch_tokens=100
)
PRECISIONS = {
    "qwen2": (Precision.FLOAT32, Precision.BF16),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def config_of(family: str, **overrides: Any) -> ModelConfig:
    fields = {"vocab_size": 384, "quantization_config": None, "num_hidden_layers": 2, **overrides}
    return ModelConfig.from_dict(tiny_config(family, **fields))


def make_trainer(
    config: ModelConfig, inputs: Path, directory: Path, options: TrainingOptions = OPTIONS
) -> Trainer:
    encoder = Encoder(load_tokenizer(inputs), 64)
    return Trainer(
        config=config,
        options=options,
        source=encode_rows(JsonLines.read(inputs / "rows.jsonl"), encoder, DataOptions()),
        encoder=encoder,
        directory=directory,
        save_every=2,
    )


def oracle_logits(config: ModelConfig, directory: Path, ids: list[int]) -> torch.Tensor:
    """Logits [T, V] of a float32 export by other code."""
    if config.family.model_type != "minimind":
        # transformers' grouped products take only sizes that are multiples of 16 bytes.
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, experts_implementation="eager"
        )
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]
    checkpoint = Checkpoint(directory)
    state = {name: checkpoint.tensor(name) for name in checkpoint.entries}
    return minimind.logits(config.raw, state, ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_of_a_family_is_its_oracles_and_falls(family, inputs, tmp_path) -> None:
    config = config_of(family)
    trainer = make_trainer(config, inputs, tmp_path / "run")
    ids = torch.randint(384, (9,), generator=torch.Generator().manual_seed(0)).tolist()
    example = Example(ids, [False] * 4 + [True] * 5)
    export_checkpoint(trainer.model.state_dict(), config, tmp_path / "out", Precision.FLOAT32)
    logits = oracle_logits(config, tmp_path / "out", ids)
    wanted = F.cross_entropy(logits[3:-1], torch.tensor(ids[4:]), reduction="sum")
    found = losses(trainer.model, pad([example])).tokens
    assert float(found.detach()) == pytest.approx(float(wanted), rel=1e-4)
    reports = list(trainer.run())
    assert reports[-1].loss < reports[0].loss
    if config.family.architecture.has_experts:
        assert reports[0].balance == pytest.approx(1.0, abs=0.7)
        assert 1 / config.num_local_experts <= (reports[0].busiest_expert_share or 0) <= 1
    else:
        assert reports[0].balance is None
        assert reports[0].busiest_expert_share is None
    resumed = make_trainer(config, inputs, tmp_path / "parts")
    list(resumed.run(2))
    resumed = make_trainer(config, inputs, tmp_path / "parts")
    list(resumed.run())
    states = [each.model.state_dict() for each in (trainer, resumed)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_in_every_precision_is_trained_on(family, tmp_path) -> None:
    config = config_of(family)
    state = initial_state(config, 1, 0.05)
    for precision in PRECISIONS.get(family, tuple(Precision)):
        directory = tmp_path / precision
        export_checkpoint(state, config, directory, precision)
        checkpoint = Checkpoint(directory)
        checkpoint.require_usable()
        fp8 = {name for name in checkpoint.entries if checkpoint.is_fp8(name)}
        quantized = [weight for weight in config.family.weights if weight.quantized]
        assert bool(fp8) == (precision is Precision.FP8 and bool(quantized))
        assert checkpoint.config.tie_word_embeddings == config.tie_word_embeddings
        found = read_initial(checkpoint, checkpoint.config)
        assert found.keys() == state.keys()
        bound = {Precision.FLOAT32: 0.0, Precision.BF16: 2**-8, Precision.FP8: 2**-4}[precision]
        for name, tensor in found.items():
            assert tensor.dtype == torch.float32
            error = (tensor - state[name]).abs().max()
            assert float(error) <= bound * float(state[name].abs().max()), name
        names = json.loads((directory / "config.json").read_text()).get("quantization_config", {})
        assert names.get("modules_to_not_convert", []) == (
            [*config.family.unconverted] if precision is Precision.FP8 else []
        )


@torch.no_grad()
def test_a_head_that_a_tied_checkpoint_stores_is_trained_on(inputs, tmp_path) -> None:
    """As transformers has it; the run's own checkpoint stores one again."""
    config = config_of("qwen2")
    state = initial_state(config, 1, 0.05)
    state["lm_head.weight"] = 2 * state["embed_tokens.weight"]
    start = tmp_path / "start"
    export_checkpoint(state, config, start, Precision.FLOAT32)
    tied = {**json.loads((start / "config.json").read_text()), "tie_word_embeddings": True}
    (start / "config.json").write_text(json.dumps(tied))
    request = TrainingRequest(
        output=tmp_path / "out",
        options=TrainingOptions(steps=1, batch_size=1, max_tokens=64),
        data=inputs / "rows.jsonl",
        initial=start,
        tokenizer=inputs,
        precision=Precision.FLOAT32,
    )
    taken = request.model_config(load_tokenizer(inputs), Checkpoint.open(start))
    ids = list(range(20))
    found = Decoder(taken, read_initial(Checkpoint.open(start), taken))(torch.tensor([ids]))[0][0]
    wanted = oracle_logits(config, start, ids)
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    with torch.enable_grad():
        train(request)
    assert not Checkpoint(tmp_path / "out").config.tie_word_embeddings


def test_weights_that_the_model_to_train_has_no_place_for_are_refused(tmp_path) -> None:
    config = config_of("qwen2")
    export_checkpoint(initial_state(config, 1), config, tmp_path, Precision.FLOAT32)
    tied = ModelConfig.from_dict({**config.raw, "tie_word_embeddings": True})
    with pytest.raises(TrainingError, match=r"no place for lm_head\.weight; leave --config out"):
        read_initial(Checkpoint.open(tmp_path), tied)
    shorter = ModelConfig.from_dict({**config.raw, "num_hidden_layers": 1})
    message = r"no place for model\.layers\.1\.\S+ and 11 more; leave --config out"
    with pytest.raises(TrainingError, match=message):
        read_initial(Checkpoint.open(tmp_path), shorter)


def test_a_family_without_fp8_is_stored_in_bf16(inputs) -> None:
    assert precision_of(FAMILIES["qwen2"], None) is Precision.BF16
    assert precision_of(FAMILIES["qwen3"], None) is Precision.FP8
    with pytest.raises(TrainingError, match="Qwen2 has no FP8 format; expected bf16 or float32"):
        precision_of(FAMILIES["qwen2"], Precision.FP8)


@pytest.mark.parametrize(
    ("family", "size"), [(family, size) for family, sizes in SIZES.items() for size in sizes]
)
def test_a_size_has_the_parameters_of_its_name(family, size, inputs) -> None:
    tokenizer = load_tokenizer(inputs)
    config = config_of_size(family, size, tokenizer)
    assert config.vocab_size == len(tokenizer)
    assert config.eos_token_ids == (tokenizer.eos_token_id,)
    published = 6400 if family.startswith("mini") else 151936
    fields = {**config.raw, "vocab_size": published}
    whole = ModelConfig.from_dict(fields)
    count = sum(prod(each.shape) for each in schema.expected(whole) if not each.is_scale)
    if size.startswith("tiny"):
        assert count < 25_000_000
    else:
        named = float(size[:-1]) * {"M": 1e6, "B": 1e9}[size[-1]]
        assert count == pytest.approx(named, rel=0.02)


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("gpt", "tiny", "there are no sizes of 'gpt'; expected minimind, minimind2, qwen3"),
        ("minimind", "3M", "minimind has no size '3M'; expected tiny, tiny-moe, 26M, 64M"),
    ],
)
def test_an_unknown_size_is_refused(family, size, message, inputs) -> None:
    with pytest.raises(TrainingError, match=message):
        config_of_size(family, size, load_tokenizer(inputs))


def test_a_size_needs_its_family_and_no_other_config(tmp_path) -> None:
    request = {"output": tmp_path, "options": OPTIONS}
    with pytest.raises(TrainingError, match="only a size is given"):
        TrainingRequest(**request, size="26M")
    with pytest.raises(TrainingError, match="both a size and a config"):
        TrainingRequest(**request, family="minimind", size="26M", config=tmp_path)


@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
def test_a_minimind_is_qwen3_to_transformers(size, inputs, tmp_path) -> None:
    """Its config.json and its weights, strictly: the two compute the same."""
    config = config_of_size("minimind", size, load_tokenizer(inputs))
    state = initial_state(config, 0, 0.05)
    export_checkpoint(state, config, tmp_path, Precision.FLOAT32)
    raw = json.loads((tmp_path / "config.json").read_text())
    fields = {name: value for name, value in raw.items() if name != "model_type"}
    oracle: Any
    if size == "tiny":
        oracle = Qwen3ForCausalLM(Qwen3Config(**fields))
    else:
        moe = Qwen3MoeConfig(**fields, experts_implementation="eager")
        oracle = Qwen3MoeForCausalLM(moe)
    published = Checkpoint(tmp_path)
    tensors = {name: published.tensor(name) for name in published.entries}
    (tmp_path / "config.json").write_text(json.dumps(oracle.config.to_dict()))
    loaded, report = type(oracle).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[name] for name in ("unexpected_keys", "mismatched_keys"))
    assert set(report["missing_keys"]) <= {"lm_head.weight"}
    assert "lm_head.weight" not in tensors
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = loaded.float()(ids).logits
        found = Decoder(config, state)(ids)[0]
    assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_an_export_says_its_dtype_as_transformers_reads_it():
    """transformers 5 writes `dtype`, which goes before `torch_dtype`."""
    config = ModelConfig.from_dict(tiny_config("qwen3", dtype="bfloat16", torch_dtype="bfloat16"))
    assert Qwen3Config(**config_json(config, Precision.FLOAT32)).dtype is torch.float32
    assert Qwen3Config(**config_json(config, Precision.BF16)).dtype is torch.bfloat16


def test_a_tokenizer_with_other_tokens_than_the_initial_checkpoint_s_is_refused(
    inputs, tmp_path, capsys
) -> None:
    config = config_of("qwen2")
    start = tmp_path / "start"
    export_checkpoint(initial_state(config, 1, 0.05), config, start, Precision.FLOAT32)
    sizes = ["--steps", "1", "--batch-size", "1", "--max-tokens", "64"]
    arguments = ["train", str(tmp_path / "out"), "--data", str(inputs / "rows.jsonl"), *sizes]
    arguments += ["--initial", str(start)]
    assert main(arguments) == 1
    assert "start has no tokenizer.json; name the tokenizer" in capsys.readouterr().err
    copy_tokenizer(inputs, start)
    given = tmp_path / "given"
    given.mkdir()
    copy_tokenizer(inputs, given)
    path = given / "tokenizer.json"
    tokens = json.loads(path.read_text())
    swapped = tokens["model"]["vocab"]
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    path.write_text(json.dumps(tokens))
    assert main([*arguments, "--tokenizer", str(given)]) == 1
    said = capsys.readouterr().err
    assert "given has other tokens than " in said
    assert "2 numbers of " in said
    assert "leave --tokenizer out" in said
    assert not (tmp_path / "out").exists()
    # The same tokens with another template are none.
    copy_tokenizer(inputs, given)
    (given / "chat_template.jinja").write_text("{{ messages }}")
    assert main([*arguments, "--tokenizer", str(given)]) == 0


def test_transformers_says_nothing_of_a_model_type_that_it_does_not_know(inputs, tmp_path) -> None:
    copy_tokenizer(inputs, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "minimind"}')
    program = "import sys; from neuron_minimax.training.data.tokenizer import load_tokenizer as l; "
    done = subprocess.run(
        [sys.executable, "-c", f"{program} print(len(l(sys.argv[1])))", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert int(done.stdout) == len(AutoTokenizer.from_pretrained(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TrainingError, match=r"the tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path)
