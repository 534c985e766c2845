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
from neuron_minimax.checkpoint.index import SINGLE_NAME
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.cli import main
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.state_dict import neuron_to_hf_state_dict
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.model.moe import Routing
from neuron_minimax.training.command import TrainingRequest, parse_precision, train
from neuron_minimax.training.data.encoding import Encoder, Example, micro_batches, pad
from neuron_minimax.training.data.sequences import MadeSequences
from neuron_minimax.training.data.sources import DemoSource
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.guard import OnBadStep
from neuron_minimax.training.objective import (
    balance_loss,
    losses,
    router_biases,
    update_router_bias,
)
from neuron_minimax.training.options import Schedule, TrainingOptions
from neuron_minimax.training.state import STATE_NAME
from neuron_minimax.training.trainer import Trainer
from neuron_minimax.training.weights import Precision, export_checkpoint, read_initial
from tests.heard import Heard
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
        source = source or MadeSequences(DemoSource(0), encoder)
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
    found = balance_loss(routing, one_hot.flatten(0, 1), real, seq_aux=True)
    assert float(found) == pytest.approx(wanted, rel=1e-5)


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
    shares = [Schedule(options).share(step) for step in range(101)]
    assert shares[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert shares[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert shares[-1] == pytest.approx(0.1)
    assert shares[9:] == sorted(shares[9:], reverse=True)


def test_sequences_in_which_nothing_could_be_learned_are_refused() -> None:
    with pytest.raises(TrainingError, match="max_tokens is 1; expected at least 2"):
        TrainingOptions(max_tokens=1)


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


def test_a_state_of_other_options_is_refused_by_name(make_trainer, tmp_path: Path) -> None:
    list(make_trainer(options=replace(OPTIONS, steps=1)).run())
    with pytest.raises(TrainingError, match=r"learning_rate 0\.0015, not 0\.1"):
        make_trainer(options=replace(OPTIONS, steps=1, learning_rate=0.1))
    (tmp_path / "run" / STATE_NAME).write_bytes(b"junk")
    with pytest.raises(TrainingError, match="cannot be read"):
        make_trainer(options=replace(OPTIONS, steps=1))


def test_two_processes_take_the_steps_of_one_and_resume_to_the_bit(tmp_path: Path) -> None:
    """With a router's bias, and with dense layers and a tied head; the last step is a partial one.
    In FP16 the second process has no rows.

    One launch trains all of them, as starting processes takes longest.
    """
    rows = tmp_path / "rows.jsonl"
    source = DemoSource(0)
    rows.write_text("".join(json.dumps(source.row(index)) + "\n" for index in range(13)))
    dense = {"vocab_size": 1280, "mlp_only_layers": [0], "tie_word_embeddings": True}
    configs = {
        "bias": tiny_config(**SMALL),
        "mixed": tiny_config("qwen3_moe", **dense, quantization_config=None),
    }
    runs = []
    for name, raw in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        arguments = ["--data", str(rows), "--config", str(tmp_path / name)]
        arguments += ["--threads", "1", "--precision", "float32", "--warmup-steps", "1"]
        runs.append((name, [*arguments, "--epochs", "1", "--batch-size", "5"]))
    runs.append(("fp16", [*arguments, "--steps", "2", "--batch-size", "1", "--fp16"]))
    calls = [["train", str(tmp_path / "two" / name), *arguments] for name, arguments in runs]
    parts = ["train", str(tmp_path / "two" / "parts"), *runs[1][1]]
    calls += [[*parts, "--until", "2"], parts]
    script = tmp_path / "script.py"
    script.write_text(
        "from neuron_minimax.cli import main\n"
        "from neuron_minimax.training.parallel import Processes\n"
        "Processes.close = Processes.wait\n"  # a launch has one group
        f"for call in {calls!r}:\n"
        "    assert main(call) == 0, call\n"
    )
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launcher += ["--local-addr", "127.0.0.1", str(script)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-m", *launcher],
        check=True, capture_output=True, timeout=300, env=environment,
    )  # fmt: skip

    def losses_of(directory: Path) -> list[float]:
        return json.loads((directory / "training.json").read_text())["losses"]

    for name, arguments in runs:
        assert main(["train", str(tmp_path / "one" / name), *arguments]) == 0
        one = losses_of(tmp_path / "one" / name)
        assert losses_of(tmp_path / "two" / name) == pytest.approx(one, abs=2e-5)
        assert name == "fp16" or one[0] > one[1]
    weights = [(tmp_path / "two" / name / SINGLE_NAME).read_bytes() for name in ("mixed", "parts")]
    assert weights[0] == weights[1]


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
    heard = Heard()
    request = TrainingRequest(
        output=tmp_path / "out",
        config=tmp_path,
        options=replace(OPTIONS, steps=2),
        command=("train", "out"),
    )
    result = train(request, heard)
    assert result is not None
    summary = json.loads((tmp_path / "out" / "training.json").read_text())
    assert (
        summary["final_loss"]
        == pytest.approx(result.final_loss, abs=1e-5)
        == pytest.approx(np.mean(summary["losses"]))
    )
    assert summary["command"] == "train out"
    assert "step 2/2" in heard.lines[-1]
    assert "tokens/s" in heard.lines[-1]
    Checkpoint(tmp_path / "out").require_usable()
    assert (tmp_path / "out" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert load_tokenizer(tmp_path / "out").chat_template == load_tokenizer(DEMO).chat_template


@pytest.mark.parametrize("precision", list(Precision))
def test_training_starts_from_a_checkpoint_of_any_precision(
    config: ModelConfig, tmp_path: Path, precision: Precision
) -> None:
    """FP8 against transformers' own reading of it."""
    from transformers import AutoModelForCausalLM

    export_checkpoint(initial_state(config, 5, 0.05), config, tmp_path, precision)
    found = read_initial(Checkpoint.open(tmp_path), config)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        wanted = oracle(ids).logits
        logits = Decoder(config, found)(ids)[0]
    assert float((logits - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    if precision is Precision.FLOAT32:
        state = initial_state(config, 5, 0.05)
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_a_checkpoint_of_another_shape_is_no_start(config: ModelConfig, tmp_path: Path) -> None:
    export_checkpoint(initial_state(config, 5), config, tmp_path, Precision.FP8)
    with pytest.raises(TrainingError, match=r"is \[1280, 128\], but .* implies \[1281, 128\]"):
        read_initial(Checkpoint.open(tmp_path), replace(config, vocab_size=1281))


TINY_MINIMIND = ["--family", "minimind", "--size", "tiny", "--tokenizer", str(DEMO)]
USAGE = [
    (["--precision", "int8"], "'int8' is not one of 'fp8', 'bf16', 'float32'"),
    (["--learning-rate", "-1"], "learning_rate is -1.0"),
    (["--on-bad-step", "go on"], "'go on' is not one of 'stop', 'skip'"),
    (["--focus", "sums"], "no kind of question 'sums'; expected capital"),
    (["--focus", "python", "--data", "rows.jsonl"], "but rows.jsonl is trained on"),
    (
        ["--focus", "python", "--family", "minimind", "--size", "tiny"],
        "but the corpus of a minimind is trained on; leave --focus out",
    ),
    (["--family", "minimind"], "only a family is given"),
    (["--family", "minimind", "--size", "3M"], "minimind has no size '3M'; expected tiny"),
    (["--family", "mini", "--size", "26M"], "no sizes of 'mini'; expected minimind"),
    (["--family", "qwen2", "--size", "tiny", "--precision", "fp8"], "Qwen2 has no FP8 format"),
    (["--family", "qwen2", "--size", "tiny", "--initial", "first"], "expected one of them"),
    (["--skip-rows"], "--skip-rows would do nothing: without --data"),
    (["--pack"], "--pack would do nothing: without --data"),
    (["--stride", "20"], "--stride would do nothing: without --data"),
    (["--evaluate-every", "5"], "--evaluate-every would do nothing: without --held-out"),
    (["--sample-every", "5"], "--sample-every would do nothing: without --sample"),
    (["--until", "2"], "--until 2 would do nothing: the run has 1 step"),
    (["--max-tokens", "64", "--stride", "64", "--data", "rows.jsonl"], "less than a window's"),
    (["--autocast", "--fp16"], "expected one of them"),
]
# Where config.json decides.
UNUSED = [
    (["--aux-loss-alpha", "0.1"], "--aux-loss-alpha would do nothing: the model has no experts"),
    (["--batch-aux"], "--seq-aux or --batch-aux would do nothing: the model has no experts"),
    (["--router-bias-start", "8"], "the routers of MiniMind have no bias"),
]
INPUT = [
    (["--data", "absent.jsonl"], "absent.jsonl cannot be read"),
    (["--config", "absent"], "does not exist"),
    (["--device", "cuda"], "cannot be used"),
    (["--tokenizer", "absent"], "absent holds no tokenizer"),
]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        *((*case, 2) for case in USAGE),
        *(([*TINY_MINIMIND, *arguments], said, 2) for arguments, said in UNUSED),
        *((*case, 1) for case in INPUT),
    ],
)
def test_bad_input_is_one_clear_message(
    arguments: list[str], message: str, code: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    if arguments[-1] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    assert main(["train", "out", "--steps", "1", *arguments]) == code
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.lower().count("error: ") == 1
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())  # above all no tokenizer, which takes a while


def test_an_unknown_name_is_a_fault_of_the_call_with_those_there_are() -> None:
    with pytest.raises(TrainingError, match="'int8'; expected float32, bf16, fp8") as refusal:
        parse_precision("int8")
    assert refusal.value.usage
    with pytest.raises(TrainingError, match="'go on'; expected stop, skip") as refusal:
        OnBadStep.of("go on")
    assert refusal.value.usage


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(vocab_size=100)))
    with pytest.raises(TrainingError, match="1280 tokens, but the config's vocab_size is 100"):
        train(TrainingRequest(output=tmp_path / "out", config=tmp_path, options=OPTIONS))
