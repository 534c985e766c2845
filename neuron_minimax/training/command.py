"""A whole training run from plain arguments: read, train, write checkpoint, summary and curve."""

import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.writer import write_json
from neuron_minimax.config import ModelConfig
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.training.data import DemoSource, JsonLines, Source
from neuron_minimax.training.encoding import Encoder
from neuron_minimax.training.export import Precision, copy_tokenizer, export_checkpoint
from neuron_minimax.training.tokenizer import load_tokenizer
from neuron_minimax.training.trainer import Processes, StepReport, Trainer, TrainingOptions

FINAL_STEPS = 100  # the final loss is the mean of so many last steps


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """A run: its data, its model and where the result goes.

    `data` None stands for the demo's own conversations, every other one of a kind in `focus`;
    `initial` is a float32 or BF16 checkpoint to start from; `until` stops the schedule at an
    earlier step.
    """

    output: Path
    options: TrainingOptions
    data: Path | None = None
    focus: tuple[str, ...] = ()
    initial: Path | None = None
    config: Path = DEMO
    tokenizer: Path = DEMO
    precision: Precision = Precision.FP8
    device: str = "cpu"
    threads: int | None = None
    save_every: int = 200
    until: int | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Rendered):
    """The end of a run. `final_loss`, in nats per learned token, is the mean of the last steps."""

    output: Path
    steps: int
    final_loss: float

    def render(self) -> str:
        return (
            f"{self.output}: {self.steps} steps, final loss {self.final_loss:.4f}; checkpoint and "
            "loss.png written"
        )


class Meter:
    """Turns step reports into a line every `every` steps: mean loss, rate and time left."""

    def __init__(self, steps: int, every: int = 25) -> None:
        self.steps = steps
        self.every = every
        self._waiting: list[StepReport] = []

    def line(self, report: StepReport) -> str | None:
        self._waiting.append(report)
        if report.step % self.every and report.step != self.steps:
            return None
        seconds = sum(step.seconds for step in self._waiting)
        count = len(self._waiting)
        text = (
            f"step {report.step}/{self.steps}  loss "
            f"{sum(step.loss for step in self._waiting) / count:.4f}  balance {report.balance:.3f} "
            f" busiest expert {report.busiest_expert_share:.0%}  gradient norm "
            f"{report.gradient_norm:.2f}  learning rate {report.learning_rate:.2e}  "
            f"{sum(step.tokens for step in self._waiting) / seconds:.0f} tokens/s  "
            f"{(self.steps - report.step) * seconds / count / 60:.1f} min left"
        )
        self._waiting = []
        return text


def train(request: TrainingRequest, progress: Callable[[str], None]) -> TrainingResult | None:
    """Train, or go on training; write the checkpoint, its tokenizer, training.json and loss.png.

    Of several processes, the first alone writes, reports progress and returns a result.

    Raises TrainingError or ConfigError on input that cannot be used, before the first step.
    """
    require_matplotlib()
    config = ModelConfig.from_dir(request.config)
    encoder = Encoder(load_tokenizer(request.tokenizer), request.options.max_tokens)
    if len(encoder.tokenizer) > config.vocab_size:
        raise TrainingError(
            f"{request.tokenizer} has {len(encoder.tokenizer)} tokens, but the config's vocab_size "
            f"is {config.vocab_size}; make it at least as large"
        )
    seed = request.options.seed
    source: Source = (
        DemoSource(seed, request.focus) if request.data is None else JsonLines(request.data, seed)
    )
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    processes = Processes("gloo" if request.device == "cpu" else "nccl")
    trainer = Trainer(
        config=config,
        options=request.options,
        source=source,
        encoder=encoder,
        directory=request.output,
        initial=None if request.initial is None else read_dense(request.initial, config),
        device=_device(request.device, processes),
        save_every=request.save_every,
        processes=processes,
    )
    meter = Meter(min(request.until or request.options.steps, request.options.steps))
    for step in trainer.run(request.until):
        line = meter.line(step)
        if line and processes.rank == 0:
            progress(line)
    last = trainer.history[-FINAL_STEPS:]
    result = TrainingResult(
        output=request.output, steps=trainer.step, final_loss=sum(last) / len(last)
    )
    if processes.rank == 0:
        _write(request, trainer, result)
    processes.close()
    return result if processes.rank == 0 else None


def read_dense(directory: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Read a dense checkpoint as a float32 state dict of converted names.

    Raises TrainingError when it is FP8, and ConversionError when its shapes are not those of
    `config`.
    """
    checkpoint = Checkpoint.open(directory)
    checkpoint.require_usable()
    if any(checkpoint.is_fp8(name) for name in checkpoint.entries):
        raise TrainingError(
            f"{directory} holds FP8 weights, which have no gradient; expand it: neuron-minimax "
            "cache"
        )
    state = Decoder.from_checkpoint(checkpoint, config=config).state_dict()
    return {name: tensor.float() for name, tensor in state.items()}


def parse_precision(name: str) -> Precision:
    """Return the precision of that name. Raises TrainingError when it is unknown."""
    try:
        return Precision(name)
    except ValueError:
        raise TrainingError(f"precision is {name!r}; expected {', '.join(Precision)}") from None


def _device(name: str, processes: Processes) -> torch.device:
    try:
        device = torch.device(name, processes.local_rank) if name == "cuda" else torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try cpu"
        ) from None
    return device


def _write(request: TrainingRequest, trainer: Trainer, result: TrainingResult) -> None:
    export_checkpoint(trainer.model.state_dict(), trainer.config, request.output, request.precision)
    copy_tokenizer(request.tokenizer, request.output)
    plot_losses(trainer.history, request.output / "loss.png")
    summary = {
        "command": shlex.join(request.command),
        "options": trainer.identity(),
        "precision": request.precision,
        "threads": torch.get_num_threads(),
        "processes": trainer.processes.count,
        "torch": torch.__version__,
        "cpu_threads_available": os.cpu_count(),
        "steps": result.steps,
        "final_loss": round(result.final_loss, 5),
        "losses": [round(loss, 5) for loss in trainer.history],
    }
    write_json(request.output / "training.json", summary)


def require_matplotlib() -> None:
    """Raise TrainingError before a long run rather than after it."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrainingError(
            "the loss curve needs matplotlib; pip install 'neuron-minimax[plots]'"
        ) from None


def plot_losses(losses: Sequence[float], path: Path, window: int = 50) -> None:
    """Write a PNG of the loss per step and its running mean over `window` steps, on a log scale."""
    from matplotlib.figure import Figure

    steps = range(1, len(losses) + 1)
    means = [sum(part := losses[max(0, step - window) : step]) / len(part) for step in steps]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="0.75", linewidth=0.7, label="per step")
    axes.plot(steps, means, color="tab:blue", linewidth=1.5, label=f"mean of {window} steps")
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=110)
