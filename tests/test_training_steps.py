"""Single steps of the trainer: which leave the weights alone, FP16's loss scale, the balance loss
of each kind, and gradients that add up.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.model.moe import Routing
from neuron_minimax.training.data.encoding import BATCH_TOKENS, Encoder, micro_batches
from neuron_minimax.training.data.sequences import DataOptions, encode_rows
from neuron_minimax.training.data.sources import JsonLines
from neuron_minimax.training.data.tokenizer import load_tokenizer
from neuron_minimax.training.data.windows import Example
from neuron_minimax.training.guard import LEAST, MOST_IN_A_ROW, Guard, OnBadStep
from neuron_minimax.training.objective import balance_loss
from neuron_minimax.training.options import Change, Schedule, TrainingOptions
from neuron_minimax.training.progress import Meter
from neuron_minimax.training.state import STATE_NAME
from neuron_minimax.training.trainer import StepReport, Trainer
from tests.test_training_endings import write_inputs
from tests.tiny import tiny_config

SKIP = Guard(on_bad_step=OnBadStep.SKIP)
OPTIONS = TrainingOptions(steps=6, batch_size=3, max_tokens=64, warmup_steps=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def make_trainer(inputs: Path, tmp_path: Path) -> Callable[..., Trainer]:
    encoder = Encoder(load_tokenizer(inputs), 64)
    config = ModelConfig.from_dir(inputs)

    def make(name: str = "run", options: TrainingOptions = OPTIONS, **fields: Any) -> Trainer:
        return Trainer(
            config=config,
            options=options,
            source=encode_rows(JsonLines.read(inputs / "rows.jsonl"), encoder, DataOptions()),
            encoder=encoder,
            directory=tmp_path / name,
            **{"save_every": 1, **fields},
        )

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def spoil(trainer: Trainer, monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the gradients of these steps (from 1) hold a NaN, as an overflow in the model leaves."""
    share = trainer._share_gradients

    def spoiled() -> None:
        share()
        if trainer.step + 1 in steps:
            parameter = next(trainer.model.parameters())
            assert parameter.grad is not None
            parameter.grad.view(-1)[0] = math.nan

    monkeypatch.setattr(trainer, "_share_gradients", spoiled)


def test_a_step_without_a_finite_gradient_is_skipped_where_asked_for(
    make_trainer, monkeypatch
) -> None:
    trainer = make_trainer(guard=SKIP)
    spoil(trainer, monkeypatch, {3})
    before = {}
    for report in trainer.run():
        if report.step == 2:
            before = weights(trainer)
        if report.step == 3:
            assert report.skipped == f"the loss is {report.loss:g} and the gradient's norm nan"
            after = weights(trainer)
            assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        else:
            assert report.skipped is None
    assert trainer.skipped == [3]
    assert len(trainer.history) == 6
    assert any(not torch.equal(tensor, weights(trainer)[n]) for n, tensor in before.items())
    assert all(bool(tensor.isfinite().all()) for tensor in weights(trainer).values())
    taken = [loss for step, loss in enumerate(trainer.history, 1) if step != 3]
    assert trainer.final_loss(100) == pytest.approx(sum(taken) / 5)


def test_skipped_steps_are_resumed_to_the_bit(make_trainer, monkeypatch) -> None:
    whole = make_trainer("whole", guard=SKIP)
    spoil(whole, monkeypatch, {2, 4})
    list(whole.run())
    first = make_trainer("parts", guard=SKIP)
    spoil(first, monkeypatch, {2, 4})
    list(first.run(3))
    resumed = make_trainer("parts", guard=SKIP)
    assert resumed.skipped == [2]
    spoil(resumed, monkeypatch, {2, 4})
    list(resumed.run())
    assert (resumed.skipped, resumed.history) == (whole.skipped, whole.history)
    assert all(torch.equal(t, weights(whole)[name]) for name, t in weights(resumed).items())


def test_a_run_that_only_skips_ends(make_trainer, monkeypatch) -> None:
    steps = MOST_IN_A_ROW + 5
    trainer = make_trainer(options=replace(OPTIONS, steps=steps), guard=SKIP)
    spoil(trainer, monkeypatch, {*range(3, steps + 1)})
    with pytest.raises(TrainingError, match=r"step 13: .* as 10 bad steps before were skipped"):
        list(trainer.run())
    assert trainer.skipped == [*range(3, 13)]


def test_overflows_of_fp16_are_none_of_the_bad_steps_that_end_a_run(
    make_trainer, monkeypatch
) -> None:
    overflows = MOST_IN_A_ROW + 2
    steps = overflows + MOST_IN_A_ROW + 5
    options = replace(OPTIONS, steps=steps, fp16=True)
    first = make_trainer(options=options, guard=SKIP)
    spoil(first, monkeypatch, {*range(1, steps + 1)})
    assert all("overflows" in (each.skipped or "") for each in first.run(overflows))
    trainer = make_trainer(options=options, guard=SKIP)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 1.0})
    spoil(trainer, monkeypatch, {*range(1, steps + 1)})
    with pytest.raises(TrainingError, match=r"step 23: .* as 10 bad steps before were skipped"):
        list(trainer.run())
    assert trainer.skipped == [*range(1, overflows + MOST_IN_A_ROW + 1)]


def test_a_spike_stops_the_run_by_name_and_the_states_stay(make_trainer, tmp_path) -> None:
    trainer = make_trainer(options=replace(OPTIONS, steps=LEAST + 5), keep=3)
    list(trainer.run(LEAST))
    before = (tmp_path / "run" / STATE_NAME).read_bytes()
    with torch.no_grad():
        trainer.model.embed_tokens.weight.mul_(-100)
        assert trainer.model.lm_head is not None
        trainer.model.lm_head.weight.mul_(100)
    with pytest.raises(
        TrainingError,
        match=r"step 21: the loss is [\d.e+]+, more than 3 times the median [\d.]+ of the last 20 "
        r"steps \(--spike-factor 0 takes it\); the state of step 20 stays: try --on-bad-step",
    ):
        list(trainer.run())
    assert (tmp_path / "run" / STATE_NAME).read_bytes() == before
    for step in (18, 19, 20):
        chosen = make_trainer(options=replace(OPTIONS, steps=LEAST + 5), keep=3, from_step=step)
        assert chosen.step == step


@pytest.mark.parametrize(
    ("loss", "factor", "recent", "bad"),
    [
        (6.1, 3.0, 2.0, True),
        (5.9, 3.0, 2.0, False),
        (0.9, 3.0, 0.01, False),  # ninety times as much, but no nat
        (1.1, 3.0, 0.01, True),
        (1e9, 0.0, 2.0, False),
        (math.inf, 0.0, 2.0, True),
        (math.nan, 3.0, 2.0, True),
    ],
)
def test_a_spike_is_a_multiple_of_the_median_and_a_nat_above_it(loss, factor, recent, bad) -> None:
    guard = Guard(spike_factor=factor)
    assert (guard.problem(loss, 1.0, [recent] * 30, ()) is not None) == bad
    assert guard.problem(1.0, math.inf, [], ()) is not None
    if math.isfinite(loss):
        assert guard.problem(loss, 1.0, [recent] * (LEAST - 1), ()) is None
        # What was skipped is nothing to be held against.
        assert guard.problem(loss, 1.0, [recent] * 30, {*range(1, 31)}) is None


@pytest.mark.parametrize("factor", [0.5, 1.0, math.nan, math.inf, -1.0])
def test_a_factor_that_calls_every_step_a_spike_is_refused(factor) -> None:
    with pytest.raises(TrainingError, match="expected more than 1, or 0 for none"):
        Guard(spike_factor=factor)


def test_fp16_halves_its_scale_until_no_gradient_overflows_and_resumes_to_the_bit(
    make_trainer,
) -> None:
    options = replace(OPTIONS, steps=8, fp16=True)
    trainer = make_trainer("whole", options)
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**40})
    before = weights(trainer)
    first = next(trainer.run(1))
    assert first.skipped is not None
    assert "overflows in FP16 with the loss times 1.09951e+12, now halved" in first.skipped
    assert trainer.scaler.get_scale() == 2.0**39
    assert all(torch.equal(tensor, before[n]) for n, tensor in weights(trainer).items())
    trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": 2.0**15})
    trainer.save()
    list(trainer.run(4))
    resumed = make_trainer("whole", options)
    assert resumed.scaler.state_dict() == trainer.scaler.state_dict()
    reports = list(trainer.run())
    assert [report.skipped for report in reports] == [None] * 4
    assert [report.loss for report in resumed.run()] == [report.loss for report in reports]
    assert all(torch.equal(t, weights(trainer)[name]) for name, t in weights(resumed).items())


@pytest.mark.parametrize("option", ["autocast", "fp16"])
def test_half_precision_follows_float32(make_trainer, option) -> None:
    exact = [report.loss for report in make_trainer("exact").run()]
    trainer = make_trainer(option, replace(OPTIONS, **{option: True}))
    reports = list(trainer.run())
    assert [report.loss for report in reports] == pytest.approx(exact, rel=0.01)
    assert [report.skipped for report in reports] == [None] * 6
    assert {tensor.dtype for tensor in weights(trainer).values()} == {torch.float32}


def test_the_scale_of_an_fp16_loss_changes_no_gradient(make_trainer) -> None:
    norms = []
    for scale in (1.0, 2.0**16):
        trainer = make_trainer(f"run {scale}", replace(OPTIONS, fp16=True, steps=1))
        trainer.scaler.load_state_dict({**trainer.scaler.state_dict(), "scale": scale})
        norms.append(next(trainer.run()).gradient_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.02)


def test_two_half_precisions_at_once_are_refused() -> None:
    with pytest.raises(TrainingError, match="expected one of them"):
        TrainingOptions(autocast=True, fp16=True)


def minimind_loss(
    scores: torch.Tensor, chosen: torch.Tensor, alpha: float, seq_aux: bool
) -> torch.Tensor:
    """MiniMind's auxiliary loss of one layer, slowly: scores [B,T,E], chosen [B,T,K]."""
    sequences, tokens, experts = scores.shape
    places = chosen.shape[-1]
    if not seq_aux:
        scores = scores.reshape(1, -1, experts)
        chosen = chosen.reshape(1, -1, places)
        sequences, tokens = 1, scores.shape[1]
    total = torch.zeros(())
    for sequence in range(sequences):
        for expert in range(experts):
            times = sum(
                int(chosen[sequence, token, place] == expert)
                for token in range(tokens)
                for place in range(places)
            )
            fraction = times / (tokens * places) * experts
            mean = sum(scores[sequence, token, expert] for token in range(tokens)) / tokens
            total = total + fraction * mean
    return alpha * total / sequences


@pytest.mark.parametrize("seq_aux", [True, False])
def test_the_balance_loss_of_a_softmax_is_miniminds(seq_aux) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 4, generator=generator).requires_grad_()
    scores = logits.softmax(-1)
    chosen = scores.topk(2).indices
    one_hot = torch.zeros(3, 7, 4).scatter_(2, chosen, 1.0).long()
    wanted = minimind_loss(scores, chosen, 0.1, seq_aux)
    (slope,) = torch.autograd.grad(wanted, logits, retain_graph=True)
    routing = Routing(scores.flatten(0, 1), chosen.flatten(0, 1), torch.ones(21, 2))
    real = torch.ones(3, 7, dtype=torch.bool)
    found = 0.1 * balance_loss(routing, one_hot.flatten(0, 1), real, seq_aux)
    found = found / (3 if seq_aux else 21)
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert torch.allclose(torch.autograd.grad(found, logits)[0], slope, atol=1e-7)


def scaled_balance(
    config: ModelConfig, logits_LTE: list[torch.Tensor], real_BT: torch.Tensor
) -> torch.Tensor:
    """What a step adds to its loss by this config's own options, from the routers' logits."""
    options = TrainingOptions().of_model(config)
    assert options.aux_loss_alpha is not None
    assert options.seq_aux is False
    total = torch.zeros(())
    for logits_TE in logits_LTE:
        scores_TE = logits_TE.softmax(-1)
        chosen_TK = scores_TE.topk(config.num_experts_per_tok).indices
        one_hot_TE = torch.zeros_like(scores_TE).scatter_(1, chosen_TK, 1.0)
        routing = Routing(scores_TE, chosen_TK, torch.ones(chosen_TK.shape))
        chosen_TE = (one_hot_TE * real_BT.reshape(-1, 1)).long()
        total = total + balance_loss(routing, chosen_TE, real_BT, options.seq_aux)
    return options.aux_loss_alpha * total / real_BT.sum()


def random_logits(layers: int, experts: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layers)
    return [torch.randn(21, experts, generator=generator).requires_grad_() for _ in range(layers)]


def require_same(found: torch.Tensor, wanted: torch.Tensor, logits_LTE: list[torch.Tensor]) -> None:
    """Compare values, and gradients of the logits."""
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), rel=1e-5)
    slopes = [torch.autograd.grad(loss, logits_LTE) for loss in (found, wanted)]
    for slope, right in zip(*slopes, strict=True):
        assert float((slope - right).abs().max()) <= 1e-5 * float(right.abs().max())


@pytest.mark.parametrize(("layers", "dense"), [(1, []), (3, []), (4, [1])])
def test_the_coefficient_of_a_qwen3_is_that_of_transformers(layers, dense) -> None:
    """In every layer the same load, where transformers' pool of all layers is their mean."""
    raw = {"num_hidden_layers": layers, "mlp_only_layers": dense, "router_aux_loss_coef": 0.3}
    config = ModelConfig.from_dict(tiny_config("qwen3_moe", **raw))
    (first,) = random_logits(1, config.num_local_experts)
    logits_LTE = [first.detach().clone().requires_grad_() for _ in range(layers - len(dense))]
    real_BT = torch.arange(7) < torch.tensor([[7], [4], [6]])
    wanted = 0.3 * load_balancing_loss_func(
        tuple(logits_LTE), config.num_local_experts, config.num_experts_per_tok, real_BT
    )
    require_same(scaled_balance(config, logits_LTE, real_BT), wanted, logits_LTE)


@pytest.mark.parametrize("places", [1, 3])
def test_the_coefficient_of_a_minimind_3_is_that_of_its_code(places) -> None:
    """Of each layer: over experts, how often one is chosen per token times its mean score."""
    raw = {"num_hidden_layers": 3, "num_experts_per_tok": places, "router_aux_loss_coef": 0.3}
    config = ModelConfig.from_dict(tiny_config("minimind_moe", **raw))
    experts = config.num_local_experts
    logits_LTE = random_logits(3, experts)
    wanted = torch.zeros(())
    for logits_TE in logits_LTE:
        scores_TE = logits_TE.softmax(-1)
        chosen = scores_TE.topk(places).indices.tolist()
        for expert in range(experts):
            per_token = sum(expert in each for each in chosen) / 21
            mean = sum(scores_TE[token, expert] for token in range(21)) / 21
            wanted = wanted + 0.3 * experts * per_token * mean
    real_BT = torch.ones(3, 7, dtype=torch.bool)
    require_same(scaled_balance(config, logits_LTE, real_BT), wanted, logits_LTE)


def test_config_json_says_how_strong_the_balance_loss_is(inputs) -> None:
    config = ModelConfig.from_dir(inputs)
    named = replace(config, raw={"aux_loss_alpha": 0.1, "seq_aux": False})
    resolved = TrainingOptions().of_model(named)
    assert (resolved.aux_loss_alpha, resolved.seq_aux) == (0.1, False)
    both = replace(named, raw={**named.raw, "router_aux_loss_coef": 0.5})
    assert TrainingOptions().of_model(both).aux_loss_alpha == 0.1
    unnamed = TrainingOptions().of_model(replace(config, raw={}))
    assert (unnamed.aux_loss_alpha, unnamed.seq_aux) == (2.5e-4, True)
    without = {"mlp_only_layers": [0, 1], "num_hidden_layers": 2, "router_aux_loss_coef": 0.1}
    dense = ModelConfig.from_dict(tiny_config("qwen3_moe", **without))
    assert math.isfinite(TrainingOptions().of_model(dense).aux_loss_alpha or 0.0)
    given = TrainingOptions(aux_loss_alpha=0.0, seq_aux=True).of_model(named)
    assert (given.aux_loss_alpha, given.seq_aux) == (0.0, True)
    with pytest.raises(TrainingError, match="aux_loss_alpha is 'x'; expected a number"):
        TrainingOptions().of_model(replace(config, raw={"aux_loss_alpha": "x"}))


@pytest.mark.parametrize("rows", [5, 6, 7])
def test_a_partial_last_micro_batch_weighs_as_much_as_its_tokens(make_trainer, rows) -> None:
    """One step of several micro batches against one of a single batch: the same weights after it,
    whatever is left over for the last one.
    """
    options = replace(OPTIONS, steps=1, batch_size=rows, learning_rate=1e-2, warmup_steps=0)
    whole = make_trainer("whole", replace(options, micro_batch_tokens=100_000))
    parts = make_trainer("parts", replace(options, micro_batch_tokens=70))
    one = next(whole.run())
    several = next(parts.run())
    assert several.loss == pytest.approx(one.loss, rel=1e-6)
    assert several.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-5)
    for parameter, other in zip(
        whole.optimizer.state.values(), parts.optimizer.state.values(), strict=True
    ):
        wanted = parameter["exp_avg"]
        assert float((other["exp_avg"] - wanted).norm()) <= 1e-5 * float(wanted.norm()) + 1e-12


def test_a_lengthened_run_rises_from_where_it_was_to_the_cosine_of_its_new_length() -> None:
    options = TrainingOptions(steps=200, warmup_steps=10, final_learning_rate_share=0.1)
    short = Schedule(replace(options, steps=100))
    long = Schedule(options)
    found = Schedule(options, [Change(step=100, name="steps", before=100, after=200)])
    shares = [found.share(step) for step in range(200)]
    assert shares[:100] == [short.share(step) for step in range(100)]
    assert shares[109:] == pytest.approx([long.share(step) for step in range(109, 200)])
    assert shares[99:110] == sorted(shares[99:110])
    assert shares[99] == pytest.approx(0.1)
    steps = [later - earlier for earlier, later in pairwise(shares[99:110])]
    assert max(steps) < 1.2 * (shares[109] - shares[99]) / 10
    assert shares[-1] == pytest.approx(0.1)
    twice = Schedule(
        replace(options, steps=300),
        [
            Change(step=100, name="steps", before=100, after=200),
            Change(step=150, name="learning_rate", before=1, after=2),
            Change(step=200, name="steps", before=200, after=300),
        ],
    )
    assert [twice.share(step) for step in range(200)] == shares


def test_micro_batches_leave_the_least_padding() -> None:
    """Against every way to part a few examples that are sorted by length."""
    generator = torch.Generator().manual_seed(0)
    for limit in (60, 100, 400):
        sizes = torch.randint(2, 60, (9,), generator=generator).tolist()
        examples = [Example(list(range(size)), [True] * size) for size in sizes]
        batches = list(micro_batches(examples, limit))
        assert sorted(int(n) for b in batches for n in b.real_BT.sum(1)) == sorted(sizes)
        assert all(b.ids_BT.numel() <= limit for b in batches)
        ordered = sorted(sizes)
        costs = []
        for cuts in product([False, True], repeat=8):
            ends = [*(place for place, cut in enumerate(cuts, 1) if cut), 9]
            parts = [ordered[a:b] for a, b in pairwise([0, *ends])]
            if all(len(part) * part[-1] <= limit for part in parts):
                costs.append(sum(len(part) * part[-1] + BATCH_TOKENS for part in parts))
        assert sum(b.ids_BT.numel() + BATCH_TOKENS for b in batches) == min(costs)
    assert list(micro_batches([Example([], [])], 10)) == []


def reports(count: int) -> list[StepReport]:
    common: dict[str, Any] = {"balance": None, "busiest_expert_share": None, "gradient_norm": 1.0}
    return [
        StepReport(step=step, loss=1.0, learning_rate=1e-3, tokens=100, seconds=2.0, **common)
        for step in range(1, count + 1)
    ]


def test_a_run_says_after_three_steps_how_long_it_takes_and_then_ever_more_rarely() -> None:
    """Steps of 2 s, the first of which takes 10 s."""
    times = iter([0.0, *(8.0 + 2.0 * step for step in range(1, 2001))])
    meter = Meter(2000, clock=lambda: next(times))
    lines = [line for report in reports(2000) for line in meter.lines(report)]
    assert lines[0].startswith("step 3/2000  loss 1.0000")
    assert lines[0].endswith("50 tokens/s  14 s so far, about 1 h 7 min left")  # 1997 steps of 2 s
    assert lines[-1].endswith("50 tokens/s  1 h 7 min so far")
    said = [int(line.split("/")[0].removeprefix("step ")) for line in lines]
    assert said[:4] == [3, 6, 9, 12]
    assert [after - before for before, after in pairwise(said[-5:-1])] == [30] * 3
    assert 60 < len(lines) < 120


def test_slow_steps_say_how_long_a_run_takes_before_there_are_three() -> None:
    times = iter([0.0, 40.0, 70.0, 100.0])
    meter = Meter(10, clock=lambda: next(times))
    lines = [line for report in reports(3) for line in meter.lines(report)]
    assert [line.split(" so far, ")[1] for line in lines] == [
        "about 6 min 0 s left", "about 4 min 0 s left", "about 3 min 30 s left"
    ]  # fmt: skip


def test_a_run_of_few_steps_says_its_last_one() -> None:
    times = iter([0.0, 1.0, 2.0])
    meter = Meter(2, clock=lambda: next(times))
    [line] = [line for report in reports(2) for line in meter.lines(report)]
    assert line.endswith("2 s so far")
