"""The trainer: its losses against independent ones, batches that add up, exact resume, several
processes, its files.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.state_dict import neuron_to_hf_state_dict
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.model.moe import Routing
from neuron_minimax.training.command import TrainingRequest, read_dense, train
from neuron_minimax.training.data import DemoSource, JsonLines
from neuron_minimax.training.encoding import Encoder, Example, micro_batches, pad
from neuron_minimax.training.export import Precision, export_checkpoint
from neuron_minimax.training.objective import (
    losses,
    router_biases,
    sequence_balance_loss,
    update_router_bias,
)
from neuron_minimax.training.tokenizer import load_tokenizer
from neuron_minimax.training.trainer import STATE_NAME, Trainer, TrainingOptions
from tests.tiny import tiny_config

SMALL: dict[str, Any] = {
    "vocab_size": 1280,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
}
OPTIONS = TrainingOptions(
    steps=6, batch_size=6, warmup_steps=2, micro_batch_tokens=512, router_bias_start=8.0
)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(load_tokenizer(DEMO), 96)


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig.from_dict(tiny_config(**SMALL))


@pytest.fixture
def make_trainer(config: ModelConfig, encoder: Encoder, tmp_path: Path):
    def make(
        name: str = "run", options: TrainingOptions = OPTIONS, source: Any = None, **fields: Any
    ) -> Trainer:
        source = source or DemoSource(0)
        fields = {"save_every": 1000, **fields}
        return Trainer(
            config=config,
            options=options,
            source=source,
            encoder=encoder,
            directory=tmp_path / name,
            **fields,
        )

    return make


def fresh_model(config: ModelConfig, seed: int = 0) -> Decoder:
    return Decoder(config, initial_state(config, seed, 0.05)).requires_grad_()


def gradients(model: Decoder, batches: list) -> dict[str, torch.Tensor]:
    model.zero_grad()
    for batch in batches:
        found = losses(model, batch)
        (found.tokens + 0.1 * found.balance).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_the_token_loss_equals_transformers_cross_entropy(
    config: ModelConfig, encoder: Encoder, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = fresh_model(config)
    export_checkpoint(model.state_dict(), config, tmp_path, Precision.FLOAT32)
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    batch = pad([encoder(DemoSource(0).row(index)) for index in range(5)])
    labels = torch.where(batch.learned_BT, batch.ids_BT, -100)
    with torch.no_grad():
        logits = oracle(batch.ids_BT, attention_mask=batch.real_BT.long()).logits
        wanted = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        found = losses(model, batch).tokens
    assert found == pytest.approx(float(wanted), rel=1e-5)


def test_padding_and_prompts_do_not_count(config: ModelConfig) -> None:
    model = fresh_model(config)
    example = Example([5, 6, 7, 8], [False, False, True, True])
    alone = losses(model, pad([example]))
    beside_longer = losses(model, pad([example, Example(list(range(20, 40)), [False] * 20)]))
    assert alone.tokens.item() == pytest.approx(beside_longer.tokens.item(), rel=1e-5)
    with torch.no_grad():
        probabilities = model(torch.tensor([example.ids]))[0][0].softmax(-1)
    assert alone.tokens.item() == pytest.approx(
        -float(probabilities[1, 7].log() + probabilities[2, 8].log()), rel=1e-5
    )


def test_rows_without_tokens_contribute_zero_and_leave_the_weights_finite(
    make_trainer, tmp_path: Path
) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n')
    trainer = make_trainer(
        source=JsonLines(path, 0), options=replace(OPTIONS, steps=2, weight_decay=0.0)
    )
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    reports = list(trainer.run())
    assert [report.loss for report in reports] == [0.0, 0.0]
    assert [report.tokens for report in reports] == [0, 0]
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items()
    )


def test_a_batch_whose_tokens_are_all_prompt_has_zero_loss_and_gradient(
    config: ModelConfig,
) -> None:
    model = fresh_model(config)
    found = losses(model, pad([Example([1, 2, 3], [False] * 3)]))
    assert float(found.tokens.detach()) == 0.0
    found.tokens.backward()
    assert all(p.grad is None or float(p.grad.abs().sum()) == 0.0 for p in model.parameters())


def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(
    config: ModelConfig, encoder: Encoder
) -> None:
    model = fresh_model(config)
    examples = [encoder(DemoSource(0).row(index)) for index in range(12)]
    whole = gradients(model, list(micro_batches(examples, 100_000)))
    small = list(micro_batches(examples, 200))
    assert len(small) >= 6
    for name, gradient in gradients(model, small).items():
        assert float((gradient - whole[name]).norm()) <= 2e-6 * float(whole[name].norm()), name


def test_the_balance_loss_equals_a_slow_sum_over_sequences_and_ignores_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 5, 4, generator=generator)
    chosen = scores.topk(2).indices
    real = torch.tensor([[True] * 5, [True, True, True, False, False]])
    index = torch.where(real[..., None], chosen, -1)
    routing = Routing(scores.flatten(0, 1), index.flatten(0, 1), torch.zeros(10, 2))
    one_hot = torch.zeros(2, 5, 5).scatter_(2, index.where(index >= 0, torch.tensor(4)), 1.0)[
        ..., :4
    ]
    wanted = 0.0
    for sequence, count in ((0, 5), (1, 3)):
        for expert in range(4):
            times = sum(expert in chosen[sequence, token].tolist() for token in range(count))
            share = (
                sum(
                    float(scores[sequence, t, expert] / scores[sequence, t].sum())
                    for t in range(count)
                )
                / count
            )
            wanted += 4 / 2 * times / count * share
    assert float(sequence_balance_loss(routing, one_hot.flatten(0, 1), real)) == pytest.approx(
        wanted, rel=1e-5
    )


def test_the_router_bias_moves_towards_an_even_load_by_its_rate() -> None:
    bias = torch.tensor([8.0, 8.0, 8.0, 8.0])
    update_router_bias(bias, torch.tensor([10.0, 2.0, 6.0, 6.0]), 0.5)
    assert bias.tolist() == [7.5, 8.5, 8.0, 8.0]


def test_the_router_bias_gets_no_gradient_and_is_no_parameter_of_the_optimizer(
    make_trainer,
) -> None:
    trainer = make_trainer(options=replace(OPTIONS, steps=1, router_bias_rate=0.0))
    list(trainer.run())
    for bias in router_biases(trainer.model):
        assert not bias.requires_grad
        assert bias.tolist() == [8.0] * 4


def test_autocast_leaves_routing_in_float32(config: ModelConfig) -> None:
    router = fresh_model(config).layers[0].block_sparse_moe.router
    hidden = torch.randn(7, 128, generator=torch.Generator().manual_seed(1))
    exact = router(hidden).scores_TE
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(hidden, hidden).dtype == torch.bfloat16
        assert torch.equal(router(hidden).scores_TE, exact)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    options = TrainingOptions(steps=101, warmup_steps=10, final_learning_rate_share=0.1)
    shares = [options.learning_rate_share(step) for step in range(101)]
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert shares[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert shares[-1] == pytest.approx(0.1)
    assert shares[9:] == sorted(shares[9:], reverse=True)


def test_a_large_gradient_is_clipped_to_the_norm(make_trainer) -> None:
    trainer = make_trainer(options=replace(OPTIONS, clip_norm=1e-3))
    assert next(trainer.run()).gradient_norm > 1.0
    # After one step Adam's first moment is a tenth of the gradient that it was given.
    moments = [state["exp_avg"].flatten() for state in trainer.optimizer.state.values()]
    assert float(torch.cat(moments).norm()) == pytest.approx(1e-4, rel=1e-3)


def test_training_lowers_the_loss(make_trainer) -> None:
    history = [
        report.loss
        for report in make_trainer(options=replace(OPTIONS, steps=40, warmup_steps=5)).run()
    ]
    assert np.mean(history[-5:]) < 0.7 * np.mean(history[:3])


@pytest.mark.parametrize("autocast", [False, True])
def test_a_resumed_run_continues_to_the_bit(make_trainer, autocast: bool) -> None:
    options = replace(OPTIONS, autocast=autocast)
    whole = make_trainer("whole", options)
    list(whole.run())
    first = make_trainer("parts", options, save_every=3)
    for report in first.run():
        if report.step == 4:  # the step after the save is lost, as when a run is killed
            break
    resumed = make_trainer("parts", options)
    assert resumed.step == 3
    list(resumed.run())
    assert resumed.history == whole.history
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name


def test_a_run_stopped_on_the_way_is_the_same_run(make_trainer) -> None:
    whole = make_trainer("whole")
    parts = make_trainer("parts")
    list(whole.run())
    assert [report.step for report in parts.run(until=2)] == [1, 2]
    resumed = make_trainer("parts")
    assert [report.step for report in resumed.run()] == [3, 4, 5, 6]
    assert resumed.history == whole.history


def test_a_half_written_state_is_never_taken_for_a_state(
    make_trainer, tmp_path: Path, monkeypatch
) -> None:
    trainer = make_trainer(save_every=2)
    next(iter(trainer.run()))
    trainer.save()

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        trainer.save()
    monkeypatch.undo()
    assert (tmp_path / "run" / (STATE_NAME + ".partial")).exists()
    assert make_trainer().step == 1


def test_a_state_of_other_options_is_refused_by_name(make_trainer, tmp_path: Path) -> None:
    list(make_trainer(options=replace(OPTIONS, steps=1)).run())
    with pytest.raises(TrainingError, match=r"learning_rate 0\.0015, not 0\.1"):
        make_trainer(options=replace(OPTIONS, steps=1, learning_rate=0.1))
    (tmp_path / "run" / STATE_NAME).write_bytes(b"junk")
    with pytest.raises(TrainingError, match="cannot be read"):
        make_trainer(options=replace(OPTIONS, steps=1))


def test_two_processes_take_the_steps_of_one(make_trainer, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    source = DemoSource(0)
    rows.write_text("".join(json.dumps(source.row(index)) + "\n" for index in range(24)))
    config = tmp_path / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(tiny_config(**SMALL)))
    arguments = [
        "--data",
        str(rows),
        "--config",
        str(config),
        "--steps",
        "3",
        "--batch-size",
        "5",
        "--threads",
        "1",
    ]
    command = [sys.executable, "-m", "neuron_minimax", "train"]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "--local-addr",
    ]
    launcher += ["127.0.0.1", *command[1:]]
    histories = []
    for name, start in (("one", command), ("two", launcher)):
        subprocess.run(
            [*start, str(tmp_path / name), *arguments], check=True, capture_output=True, timeout=300
        )
        histories.append(json.loads((tmp_path / name / "training.json").read_text())["losses"])
    assert histories[1] == pytest.approx(histories[0], abs=2e-5)
    assert histories[0][0] > histories[0][2]


@pytest.mark.parametrize("precision", list(Precision))
def test_the_written_checkpoint_is_whole_and_holds_the_trained_weights(
    config: ModelConfig, tmp_path: Path, precision: Precision
) -> None:
    state = initial_state(config, 3, 0.05)
    export_checkpoint(state, config, tmp_path, precision)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.require_usable()
    wanted = neuron_to_hf_state_dict(state, config)
    dtypes = {
        Precision.FLOAT32: {"F32"},
        Precision.BF16: {"F32", "BF16"},
        Precision.FP8: {"F32", "BF16", "F8_E4M3"},
    }
    assert {entry.dtype for entry in checkpoint.entries.values()} == dtypes[precision]
    for expected in schema.expected(config):
        if expected.is_scale:
            assert (expected.name in checkpoint.entries) == (precision is Precision.FP8)
            continue
        values = wanted[expected.name].numpy()
        stored = checkpoint.entries[expected.name].dtype
        if expected.dtype == "F32" or precision is Precision.FLOAT32:
            assert stored == "F32"
            assert np.array_equal(checkpoint.array(expected.name), values)
        elif stored == "BF16":
            assert torch.equal(
                checkpoint.tensor(expected.name), wanted[expected.name].to(torch.bfloat16)
            )
        else:
            scales = checkpoint.array(schema.scale_name(expected.name))
            found = fp8.dequantize(
                checkpoint.array(expected.name), scales, config.weight_block_size
            )
            # Half a step of 3 mantissa bits, or half of the smallest subnormal step of the block.
            bound = np.maximum(np.abs(values) * 2**-4, scales.max() * 2**-10) * 1.0001
            assert (np.abs(found - values) <= bound).all()


def test_a_request_writes_checkpoint_tokenizer_curve_and_summary(
    config: ModelConfig, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(**SMALL)))
    lines: list[str] = []
    request = TrainingRequest(
        output=tmp_path / "out",
        config=tmp_path,
        options=replace(OPTIONS, steps=2),
        command=("train", "out"),
    )
    result = train(request, lines.append)
    assert result is not None
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (
        summary["final_loss"]
        == pytest.approx(result.final_loss, abs=1e-5)
        == pytest.approx(np.mean(summary["losses"]))
    )
    assert summary["command"] == "train out"
    assert "step 2/2" in lines[-1]
    assert "tokens/s" in lines[-1]
    Checkpoint(tmp_path / "out").require_usable()
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(DEMO).chat_template


def test_training_starts_from_a_dense_checkpoint_and_refuses_fp8(
    config: ModelConfig, tmp_path: Path
) -> None:
    state = initial_state(config, 5, 0.05)
    export_checkpoint(state, config, tmp_path / "dense", Precision.FLOAT32)
    found = read_dense(tmp_path / "dense", config)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    export_checkpoint(state, config, tmp_path / "fp8", Precision.FP8)
    with pytest.raises(TrainingError, match="neuron-minimax cache"):
        read_dense(tmp_path / "fp8", config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "absent.jsonl"], "absent.jsonl cannot be read"),
        (["--precision", "int8"], "expected float32, bf16, fp8"),
        (["--config", "absent"], "does not exist"),
        (["--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--device", "cuda"], "cannot be used"),
        (["--tokenizer", "absent"], "absent holds no tokenizer"),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "out", "--steps", "1", *arguments]) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(vocab_size=100)))
    with pytest.raises(TrainingError, match="1280 tokens, but the config's vocab_size is 100"):
        train(
            TrainingRequest(output=tmp_path / "out", config=tmp_path, options=OPTIONS),
            lambda line: None,
        )
