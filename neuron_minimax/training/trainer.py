"""The training loop: AdamW over one global batch per step, resumable to the bit.

A run is one process or several. Its state on disk is one file with everything that the next step
depends on, replaced atomically.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import TrainingError
from neuron_minimax.families import DEFAULT_FAMILY, Role
from neuron_minimax.model.decoder import Decoder, initial_state
from neuron_minimax.training.data import Source
from neuron_minimax.training.encoding import Encoder, micro_batches
from neuron_minimax.training.objective import losses, router_biases, update_router_bias

STATE_NAME = "training_state.pt"
# What a state says of a config's field that the version which saved it did not know.
CONFIG_DEFAULTS: dict[str, Any] = {
    "model_type": DEFAULT_FAMILY.model_type,
    **{each.name: each.default for each in fields(ModelConfig) if each.default is not MISSING},
}


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """Everything that decides the result of a run, except the data and the model's config.

    `batch_size` counts rows of data per step, over all processes; `micro_batch_tokens` only how
    many tokens, padding included, go through the model at once.
    """

    steps: int = 2000
    batch_size: int = 16
    micro_batch_tokens: int = 1024
    max_tokens: int = 512
    learning_rate: float = 1.5e-3
    final_learning_rate_share: float = 0.02
    warmup_steps: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    balance_coefficient: float = 1e-3
    router_bias_rate: float = 1e-3
    router_bias_start: float = 0.0
    initial_deviation: float = 0.04
    autocast: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_tokens", "max_tokens"):
            if getattr(self, name) < 1:
                raise TrainingError(f"{name} is {getattr(self, name)}; expected at least 1")
        for name in ("learning_rate", "clip_norm", "initial_deviation"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"{name} is {getattr(self, name)}; expected a positive number")

    def learning_rate_share(self, step: int) -> float:
        """Rise linearly to 1, then fall along a cosine to `final_learning_rate_share`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - 1 - self.warmup_steps)
        low = self.final_learning_rate_share
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One finished step. `loss` is in nats per learned token; `tokens` leaves padding out."""

    step: int
    loss: float
    balance: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    busiest_expert_share: float


class Processes:
    """The processes of one run: this one alone, or all that torchrun started.

    Rank and count come from the environment that torchrun sets; sums go over gloo or nccl.
    """

    def __init__(self, backend: str = "gloo") -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if self.count > 1 and not distributed.is_initialized():
            distributed.init_process_group(backend)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in place."""
        if self.count > 1:
            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Return when all processes are here."""
        if self.count > 1:
            distributed.barrier()

    def close(self) -> None:
        if self.count > 1:
            distributed.destroy_process_group()


@dataclass
class Trainer:
    """A run over `source` towards `directory`; it resumes where the last one left off.

    The state after step n is a function of options, config, data and n: stopping and resuming
    changes no bit on one machine with one number of threads and processes.
    """

    config: ModelConfig
    options: TrainingOptions
    source: Source
    encoder: Encoder
    directory: Path
    initial: dict[str, torch.Tensor] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    save_every: int = 200
    processes: Processes = field(default_factory=Processes)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        state = self._fresh_state() if self.initial is None else self.initial
        self.model = Decoder(
            self.config, {name: tensor.to(self.device) for name, tensor in state.items()}
        )
        self.model.requires_grad_()
        self.optimizer = self._make_optimizer()
        self.step = 0
        self.history: list[float] = []
        saved = load_state(self.directory, self.identity())
        if saved is not None:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.step = saved["step"]
            self.history = saved["history"]
            torch.set_rng_state(saved["random_state"])

    def run(self, until: int | None = None) -> Iterator[StepReport]:
        """Train to the last step or to step `until`, and yield a report per step.

        The state is saved every `save_every` steps and at the end.
        """
        last = min(until or self.options.steps, self.options.steps)
        while self.step < last:
            report = self._take_step()
            if self.step % self.save_every == 0 or self.step == last:
                self.save()
            yield report

    def save(self) -> None:
        """Replace the saved state on disk; only the first process writes."""
        if self.processes.rank == 0:
            state = {
                "step": self.step,
                "history": self.history,
                "options": self.identity(),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random_state": torch.get_rng_state(),
            }
            save_state(self.directory, state)
        self.processes.wait()

    def _fresh_state(self) -> dict[str, torch.Tensor]:
        state = initial_state(self.config, self.options.seed, self.options.initial_deviation)
        template = self.config.family.rule_of(Role.ROUTER_BIAS).target
        biases = {template.format(l=layer) for layer in range(self.config.num_hidden_layers)}
        for name, tensor in state.items():
            if name in biases:
                tensor.fill_(self.options.router_bias_start)
        return state

    def _take_step(self) -> StepReport:
        started = time.perf_counter()
        options = self.options
        share = options.learning_rate_share(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = options.learning_rate * share
        sums, loads_LE = self._accumulate()
        self._share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for bias_E, load_E in zip(router_biases(self.model), loads_LE, strict=True):
            update_router_bias(bias_E, load_E, options.router_bias_rate * share)
        self.step += 1
        loss, balance, tokens = sums.tolist()
        self.history.append(loss)
        return StepReport(
            step=self.step,
            loss=loss,
            balance=balance,
            gradient_norm=float(norm),
            learning_rate=options.learning_rate * share,
            tokens=int(tokens),
            seconds=time.perf_counter() - started,
            busiest_expert_share=float((loads_LE.amax(1) / loads_LE.sum(1).clamp(min=1)).max()),
        )

    def _accumulate(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Add up the gradients of this process's rows, divided by the counts of the whole batch.

        Returns [loss, balance, tokens] and the experts' loads [L,E], both summed over all
        processes.
        """
        options = self.options
        first = self.step * self.options.batch_size
        rows = range(first + self.processes.rank, first + options.batch_size, self.processes.count)
        batches = list(
            micro_batches(
                [self.encoder(self.source.row(index)) for index in rows], options.micro_batch_tokens
            )
        )
        counts = torch.tensor(
            [[int(b.learned_BT.sum()), len(b.ids_BT), int(b.real_BT.sum())] for b in batches]
            or [[0] * 3]
        )
        learned, sequences, tokens = self.processes.sum(counts.sum(0)).tolist()
        sums = torch.zeros(2, device=self.device)
        loads_LE = torch.zeros(
            len(self.model.layers), self.config.num_local_experts, device=self.device
        )
        for batch in batches:
            with self._precision():
                part = losses(self.model, batch.to(self.device))
            mean = torch.stack((part.tokens / max(1, learned), part.balance / max(1, sequences)))
            (mean[0] + options.balance_coefficient * mean[1]).backward()
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
        """Compute matrix products in BF16 where asked for; everything else stays float32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.autocast)

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
        options["source"] = self.source.name
        sizes = {n: v for n, v in vars(self.config).items() if n not in ("family", "raw")}
        return {**options, "config": {"model_type": self.config.family.model_type, **sizes}}


def save_state(directory: Path, state: dict[str, Any]) -> None:
    """Replace the state on disk; the final name only ever holds a whole, synced file."""
    path = directory / STATE_NAME
    with replacing(path) as file:
        torch.save(state, file)


def load_state(directory: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """Return the saved state, or None where there is none.

    Raises TrainingError when a run with other `options` saved it: going on would be neither run.
    """
    path = directory / STATE_NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise TrainingError(f"{path} cannot be read ({error}); remove it to start again") from None
    saved = {**state["options"], "config": CONFIG_DEFAULTS | state["options"].get("config", {})}
    differing = sorted(name for name in options if saved.get(name) != options[name])
    if differing:
        name = differing[0]
        raise TrainingError(
            f"{path} belongs to a run with {name} {saved.get(name)!r}, not {options[name]!r}; "
            "give the same options to resume it, or another output directory"
        )
    return state
