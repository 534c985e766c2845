"""The training loop: AdamW over one global batch per step, resumable to the bit.

A run is one process or several. Its state on disk is one file with everything that the next step
depends on, replaced atomically.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from neuron_minimax.checkpoint.writer import make_directory
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.families import Role
from neuron_minimax.families.family import RouterKind
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.training.data.encoding import Encoder, micro_batches
from neuron_minimax.training.data.sequences import MadeSequences, Sequences
from neuron_minimax.training.guard import MOST_IN_A_ROW, Guard, OnBadStep, bad_in_a_row
from neuron_minimax.training.objective import losses, router_biases, update_router_bias
from neuron_minimax.training.options import Change, Schedule, TrainingOptions
from neuron_minimax.training.parallel import Processes
from neuron_minimax.training.state import (
    SCALER_STATE,
    WHAT_TO_TRY,
    TrainingState,
    differences,
    forget_states,
    keep_state,
    load_state,
    save_state,
)

FIRST_SCALE = 2.0**16  # of an FP16 loss; halved until no gradient overflows


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished step. `loss` is in nats per learned token; `tokens` leaves padding out.

    `balance` is the mean of the layers' balance losses, `busiest_expert_share` the largest part of
    a layer's choices; both are None without experts. `skipped` says why the weights stayed as they
    were. `evaluation` is the loss on the held-out rows, where this step has one.
    """

    step: int
    loss: float
    balance: float | None
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    busiest_expert_share: float | None
    skipped: str | None = None
    evaluation: float | None = None


@dataclass
class Trainer:
    """A run over `source` towards `directory`; it resumes where the last one left off.

    `inputs` are digests of what the run is made from, which a resumed run must agree with. The
    state after step n is a function of options, config, data, guard and n: stopping and resuming
    changes no bit on one machine with one number of threads and processes. `keep` states stay,
    those of the last multiples of `save_every`; `from_step` chooses the one to go on from. Every
    `evaluate_every` steps and after the last one the loss on the `held_out` sequences is taken.
    """

    config: ModelConfig
    options: TrainingOptions
    source: Sequences | MadeSequences
    encoder: Encoder
    directory: Path
    initial: dict[str, torch.Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    save_every: int = 200
    keep: int = 2
    from_step: int | None = None
    guard: Guard = field(default_factory=Guard)
    held_out: Sequences | None = None
    evaluate_every: int = 0
    processes: Processes = field(default_factory=Processes)
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        make_directory(self.directory)
        self.options = self.options.of_model(self.config)
        state = self._fresh_state() if self.initial is None else self.initial
        self.model = Decoder(
            self.config, {name: tensor.to(self.device) for name, tensor in state.items()}
        )
        self.model.requires_grad_()
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=FIRST_SCALE, enabled=self.options.fp16
        )
        # Its scale is made by the first loss, which a process without rows in a step does not have.
        self.scaler.scale(torch.zeros((), device=self.device))
        self.step = 0
        self.history: list[float] = []
        self.skipped: list[int] = []
        self.overflows: list[int] = []
        self.evaluations: list[tuple[int, float]] = []
        self.changes: list[Change] = []
        saved = load_state(
            self.directory,
            self.identity(),
            self.model.state_dict(),
            self.optimizer,
            self.from_step,
        )
        self.saved_step = 0 if saved is None else saved.step
        self.new_changes: list[Change] = []
        if saved is not None:
            self._restore(saved)
        self.schedule = Schedule(self.options, self.changes)

    def run(self, until: int | None = None) -> Iterator[StepReport]:
        """Train to the last step or to step `until`, and yield a report per step.

        The state is saved every `save_every` steps and at the end. Raises TrainingError naming a
        step that the guard stops at.
        """
        last = min(until or self.options.steps, self.options.steps)
        while self.step < last:
            report = self._take_step()
            every = self.evaluate_every
            if (
                self.held_out is not None
                and every
                and (self.step % every == 0 or self.step == last)
            ):
                self.evaluations.append((self.step, self.evaluate()))
                report = replace(report, evaluation=self.evaluations[-1][1])
            if self.step % self.save_every == 0 or self.step == last:
                self.save()
            yield report

    def save(self) -> None:
        """Replace the saved state on disk; only the first process writes.

        Raises TrainingError when it is not finite or cannot be written; the last one stays.
        """
        if self.processes.rank == 0:
            state = TrainingState(
                step=self.step,
                history=self.history,
                options=self.identity(),
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                random_state=torch.get_rng_state(),
                skipped=self.skipped,
                overflows=self.overflows,
                evaluations=self.evaluations,
                changes=self.changes,
                scaler=self._scaler_state(),
            )
            saved = self.saved_step
            if saved and saved != self.from_step:
                forget_states(self.directory, saved, self.keep - 1)
            if self.keep > 1 and saved and saved % self.save_every == 0 and saved < self.step:
                keep_state(self.directory, saved)
            save_state(self.directory, state, saved)
            forget_states(self.directory, self.step, self.keep - 1)
        self.saved_step = self.step
        self.processes.wait()

    @torch.no_grad()
    def evaluate(self) -> float:
        """Return the loss on the held-out sequences, in nats per learned token."""
        assert self.held_out is not None
        mine = list(islice(self.held_out, self.processes.rank, None, self.processes.count))
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for batch in micro_batches(mine, self.options.micro_batch_tokens):
            with self._precision():
                part = losses(self.model, batch.to(self.device))
            sums[0] += part.tokens
            sums[1] += batch.learned_BT.sum()
        loss, tokens = self.processes.sum(sums).tolist()
        return loss / max(1, tokens)

    def final_loss(self, steps: int) -> float:
        """Return the mean loss of the last steps, those left out that were skipped; NaN without
        any.
        """
        skipped = {*self.skipped}
        taken = [loss for step, loss in enumerate(self.history, 1) if step not in skipped]
        recent = taken[-steps:]
        return sum(recent) / len(recent) if recent else math.nan

    def _restore(self, saved: TrainingState) -> None:
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state_dict(saved.optimizer)
        self.step = saved.step
        self.history = saved.history
        self.skipped = saved.skipped
        self.overflows = saved.overflows
        self.evaluations = saved.evaluations
        self.new_changes = [
            replace(change, step=saved.step)
            for change in differences(saved.options, self.identity())
        ]
        self.changes = [*saved.changes, *self.new_changes]
        for change in self.changes:
            lengthens = change.name == "epochs" and isinstance(change.before, int)
            if lengthens and isinstance(self.source, Sequences):  # rows that are made have none
                self.source.go_on(change.step, change.before, self.options.batch_size)
        if saved.scaler and self.options.fp16:
            self.scaler.load_state_dict({**self.scaler.state_dict(), **saved.scaler})
        torch.set_rng_state(saved.random_state)

    def _scaler_state(self) -> dict[str, float]:
        state = self.scaler.state_dict()
        return {name: state[name] for name in SCALER_STATE if name in state}

    def _fresh_state(self) -> dict[str, torch.Tensor]:
        state = initial_state(self.config, self.options.seed, self.options.initial_deviation)
        family = self.config.family
        if family.architecture.router is RouterKind.SIGMOID_BIAS:
            template = family.rule_of(Role.ROUTER_BIAS).target
            for layer in range(self.config.num_hidden_layers):
                state[template.format(l=layer)].fill_(self.options.router_bias_start)
        return state

    def _take_step(self) -> StepReport:
        started = time.perf_counter()
        options = self.options
        share = self.schedule.share(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * share
        sums, loads_LE = self._accumulate()
        self._share_gradients()
        self.scaler.unscale_(self.optimizer)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm))
        loss, balance, tokens = sums.tolist()
        checked = loss if math.isfinite(balance) else balance
        overflow = self._overflow(checked, norm)
        skipped = overflow or self._why_skipped(checked, norm)
        if skipped is None:
            self.scaler.step(self.optimizer)
            biases = router_biases(self.model)
            for bias_E, load_E in zip(biases, loads_LE[: len(biases)], strict=True):
                update_router_bias(bias_E, load_E, options.router_bias_rate * share)
        else:
            self.skipped.append(self.step + 1)
            self.overflows += [] if overflow is None else [self.step + 1]
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.history.append(loss)
        layers = len(loads_LE)
        shares_L = loads_LE.amax(1) / loads_LE.sum(1).clamp(min=1) if layers else None
        return StepReport(
            step=self.step,
            loss=loss,
            balance=balance / layers if layers else None,
            gradient_norm=norm,
            learning_rate=options.learning_rate * share,
            tokens=int(tokens),
            seconds=time.perf_counter() - started,
            busiest_expert_share=None if shares_L is None else float(shares_L.max()),
            skipped=skipped,
        )

    def _overflow(self, loss: float, norm: float) -> str | None:
        """Return what is said of a step whose gradient overflows by FP16's scale, else None.

        The scale is found by overflowing: it is halved, and the next step tried.
        """
        scale = self.scaler.get_scale()
        if self.options.fp16 and math.isfinite(loss) and not math.isfinite(norm) and scale > 1:
            return f"a gradient overflows in FP16 with the loss times {scale:g}, now halved"
        return None

    def _why_skipped(self, loss: float, norm: float) -> str | None:
        """Return why this step is to leave the weights alone, None when it is not.

        Raises TrainingError when the guard stops at such a step, or too many come in a row.
        """
        skipped = {*self.skipped}
        problem = self.guard.problem(loss, norm, self.history, skipped)
        if problem is None:
            return None
        stays = f"step {self.step + 1}: {problem}; the state of step {self.saved_step} stays"
        if self.guard.on_bad_step is OnBadStep.STOP:
            raise TrainingError(f"{stays}: {WHAT_TO_TRY}")
        in_a_row = bad_in_a_row(self.step, skipped, {*self.overflows})
        if in_a_row >= MOST_IN_A_ROW:
            raise TrainingError(
                f"{stays}, as {in_a_row} bad steps before were skipped: {WHAT_TO_TRY}"
            )
        return problem

    def _accumulate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up the gradients of this process's rows, divided by the counts of the whole batch.

        Returns [loss, balance, tokens] and the experts' loads [L,E], both summed over all
        processes. The gradients are those of the loss times the scaler's scale.
        """
        options = self.options
        indices = self.source.indices(self.step, options.batch_size)
        mine = indices[self.processes.rank :: self.processes.count]
        batches = list(
            micro_batches(
                [self.source.example(index) for index in mine], options.micro_batch_tokens
            )
        )
        counts = torch.tensor(
            [[int(b.learned_BT.sum()), b.documents, int(b.real_BT.sum())] for b in batches]
            or [[0] * 3]
        )
        learned, sequences, tokens = self.processes.sum(counts.sum(0)).tolist()
        balanced = sequences if options.seq_aux else tokens
        alpha = options.aux_loss_alpha or 0.0
        sums = torch.zeros(2, device=self.device)
        loads_LE = torch.zeros(
            len(self.model.routers), self.config.num_local_experts, device=self.device
        )
        for batch in batches:
            with self._precision():
                part = losses(self.model, batch.to(self.device), bool(options.seq_aux))
            mean = torch.stack((part.tokens / max(1, learned), part.balance / max(1, balanced)))
            self.scaler.scale(mean[0] + alpha * mean[1]).backward()
            sums += mean.detach()
            loads_LE += part.loads_LE
        totals = torch.cat((self.processes.sum(sums).cpu(), torch.tensor([float(tokens)])))
        return totals, self.processes.sum(loads_LE)

    def _share_gradients(self) -> None:
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        # A parameter has no gradient when no token of this process's rows reached it.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if self.processes.count > 1:
            flat = self.processes.sum(torch.cat([gradient.flatten() for gradient in gradients]))
            gradients = list(flat.split([parameter.numel() for parameter in parameters]))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)

    def _precision(self) -> AbstractContextManager[Any]:
        """Compute matrix products in BF16 or FP16 where asked for; all else stays float32."""
        options = self.options
        dtype = torch.float16 if options.fp16 else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=options.autocast or options.fp16)

    def _make_optimizer(self) -> torch.optim.AdamW:
        parameters = list(self.model.parameters())
        groups = [
            {
                "params": [p for p in parameters if p.dim() > 1],
                "weight_decay": self.options.weight_decay,
            },
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups, lr=self.options.learning_rate, betas=self.options.betas, fused=True
        )

    def identity(self) -> dict[str, Any]:
        """Return what a saved state must agree with, in types that a state file holds."""
        options = {**asdict(self.options), "betas": list(self.options.betas)}
        options |= {"source": self.source.name, "epochs": self.source.epochs, **self.inputs}
        sizes = {n: v for n, v in vars(self.config).items() if n not in ("family", "raw")}
        family = self.config.family
        named = {"model_type": family.model_type, "family": family.name}
        return {**options, "config": {**named, **sizes}}
