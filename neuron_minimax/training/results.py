"""What a run leaves: the curve of the loss and training.json while it trains; at its end the
checkpoint with its tokenizer, and training.json, which is written last and records every file.
"""

import io
import math
import os
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from neuron_minimax.checkpoint.finished import (
    Files,
    compare_files,
    files_as_json,
    record_of,
)
from neuron_minimax.checkpoint.index import INDEX_NAME, SINGLE_NAME
from neuron_minimax.checkpoint.kinds import CONFIG_NAME
from neuron_minimax.checkpoint.writer import PARTIAL_SUFFIX, replacing, require_place, write_json
from neuron_minimax.errors import TrainingError, require_package
from neuron_minimax.files import read_json
from neuron_minimax.training.state import STATE_NAME, require_same_run
from neuron_minimax.training.trainer import Trainer
from neuron_minimax.training.weights import (
    TOKENIZER_FILES,
    Precision,
    copy_tokenizer,
    export_checkpoint,
)

SUMMARY_NAME = "training.json"
PLOT_NAME = "loss.png"
FINAL_STEPS = 100  # the final loss is the mean of so many last steps
WRITTEN = (SINGLE_NAME, CONFIG_NAME, PLOT_NAME, *TOKENIZER_FILES, SUMMARY_NAME)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """training.json, as far as it is read again. That of an earlier version, and of a run that has
    not written its checkpoint, has no `files`.
    """

    __pydantic_config__ = ConfigDict(extra="ignore", allow_inf_nan=False)

    options: Mapping[str, Any]
    precision: Precision
    steps: int
    final_loss: float | None
    files: Files = field(default_factory=dict)


def require_ours(directory: Path) -> None:
    """Raise TrainingError when the output is no directory, or holds a checkpoint that no training
    has written.
    """
    require_place(directory, TrainingError)
    if not any(os.path.lexists(directory / name) for name in (STATE_NAME, SUMMARY_NAME)):
        for name in (SINGLE_NAME, INDEX_NAME):
            if os.path.lexists(directory / name):
                raise TrainingError(
                    f"{directory} holds a checkpoint ({name}) that no training has written; choose "
                    "another directory"
                )


def remove_partial(directory: Path) -> None:
    """Take away what a killed run has left half-written."""
    for name in (STATE_NAME, *WRITTEN):
        (directory / (name + PARTIAL_SUFFIX)).unlink(missing_ok=True)


def read_summary(
    directory: Path, identity: Mapping[str, Any], may_differ: Collection[str] = ()
) -> Summary | None:
    """Return what training.json says, or None where there is none that can be read: then all is
    written anew.

    Raises TrainingError when it is of a run with other options than those that may differ.
    """
    path = directory / SUMMARY_NAME
    try:
        summary = read_json(path, Summary, TrainingError, "")
    except (FileNotFoundError, TrainingError):
        return None
    require_same_run(path, summary.options, identity, may_differ)
    return summary


def changed_files(directory: Path, summary: Summary, tokenizer: Path) -> dict[str, str]:
    """Return what is not as training.json says: file name to a phrase such as "is missing"."""
    _, found = compare_files(directory, summary.files)
    for name in _exported(tokenizer):
        if name not in summary.files:
            found[name] = "is not recorded"
    return found


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a trainer's run leaves beside its states, and how it is written."""

    trainer: Trainer
    precision: Precision
    tokenizer: Path
    command: Sequence[str]

    def write_progress(self) -> None:
        """Write the curve and training.json of the steps so far, which records no file yet.

        Raises TrainingError when that is impossible.
        """
        trainer = self.trainer
        try:
            plot_losses(trainer.history, trainer.directory / PLOT_NAME, trainer.evaluations)
            self._write_summary({})
        except OSError as error:
            raise TrainingError(
                f"{trainer.directory}: the curve cannot be written ({error.strerror}); "
                f"{self._how_to_go_on()}"
            ) from None

    def write(self) -> None:
        """Write the checkpoint and its tokenizer, the curve, and last training.json.

        Raises TrainingError when that is impossible; the trainer's saved state stays.
        """
        trainer = self.trainer
        directory = trainer.directory
        try:
            export_checkpoint(trainer.model.state_dict(), trainer.config, directory, self.precision)
            copy_tokenizer(self.tokenizer, directory)
            plot_losses(trainer.history, directory / PLOT_NAME, trainer.evaluations)
            names = _exported(self.tokenizer)
            self._write_summary({name: record_of(directory / name) for name in names})
        except OSError as error:
            raise TrainingError(
                f"{directory}: the checkpoint cannot be written ({error.strerror}); "
                f"{self._how_to_go_on()}"
            ) from None

    def _how_to_go_on(self) -> str:
        return (
            f"the state of step {self.trainer.saved_step} is kept: mend it and run the same "
            "command again"
        )

    def _write_summary(self, files: Files) -> None:
        trainer = self.trainer
        summary = {
            "command": shlex.join(self.command),
            "options": trainer.identity(),
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "processes": trainer.processes.count,
            "torch": torch.__version__,
            "cpu_threads_available": os.cpu_count(),
            "steps": trainer.step,
            "final_loss": _rounded(trainer.final_loss(FINAL_STEPS)),
            "losses": [_rounded(loss) for loss in trainer.history],
            "skipped_steps": trainer.skipped,
            "evaluation_losses": {step: _rounded(loss) for step, loss in trainer.evaluations},
            "changes": [asdict(change) for change in trainer.changes],
            "files": files_as_json(files),
        }
        write_json(trainer.directory / SUMMARY_NAME, summary)


def _rounded(loss: float) -> float | None:
    """Return five digits behind the point; JSON has no numbers that are none."""
    return round(loss, 5) if math.isfinite(loss) else None


def _exported(tokenizer: Path) -> tuple[str, ...]:
    copied = (name for name in TOKENIZER_FILES if (tokenizer / name).exists())
    return (SINGLE_NAME, CONFIG_NAME, PLOT_NAME, *copied)


def require_matplotlib() -> None:
    """Raise TrainingError before a long run rather than after it."""
    require_package("matplotlib", "the loss curve", TrainingError)


def plot_losses(
    losses: Sequence[float],
    path: Path,
    evaluations: Sequence[tuple[int, float]] = (),
    window: int = 50,
) -> None:
    """Write a PNG of the loss per step, its running mean over `window` steps and the loss on
    held-out rows, on a log scale. Steps without a finite loss are left out.

    Raises OSError.
    """
    from matplotlib.figure import Figure

    taken = [(step, loss) for step, loss in enumerate(losses, 1) if math.isfinite(loss)]
    steps = [step for step, _ in taken]
    values = [loss for _, loss in taken]
    parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
    means = [sum(part) / len(part) for part in parts]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, values, color="0.75", linewidth=0.7, label="per step")
    axes.plot(steps, means, color="tab:blue", linewidth=1.5, label=f"mean of {window} steps")
    if evaluations:
        at, held_out = zip(*evaluations, strict=True)
        axes.plot(at, held_out, color="tab:orange", marker=".", label="held-out rows")
    axes.set(xlabel="step", ylabel="loss (nats per learned token)", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    with replacing(path) as file:
        file.write(image.getbuffer())
