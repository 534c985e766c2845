"""A whole training run from plain arguments: read, train, write checkpoint, summary and curve."""

import hashlib
import math
import os
import shlex
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from neuron_minimax.checkpoint.finished import held
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.files import sha256_of
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.processes import first_signal_noted
from neuron_minimax.progress import SILENT, Progress
from neuron_minimax.training.data.encoding import Encoder
from neuron_minimax.training.data.prepared import Length, Prepared, prepare
from neuron_minimax.training.data.tokenizer import (
    load_tokenizer,
    make_tokenizer,
    require_same_tokens,
)
from neuron_minimax.training.options import CHANGEABLE
from neuron_minimax.training.parallel import (
    Processes,
    device_of,
    is_first_process,
)
from neuron_minimax.training.progress import Meter, Sampler
from neuron_minimax.training.request import DEFAULT_EVERY, TOKENIZER_NAME, TrainingRequest
from neuron_minimax.training.results import (
    FINAL_STEPS,
    Results,
    changed_files,
    read_summary,
    remove_partial,
    require_matplotlib,
    require_ours,
)
from neuron_minimax.training.state import STATE_NAME
from neuron_minimax.training.trainer import Trainer
from neuron_minimax.training.weights import TOKENIZER_FILES, Precision, precision_of, read_initial


@dataclass(frozen=True, kw_only=True)
class TrainingResult(Rendered):
    """The end of a run. `final_loss`, in nats per learned token, is the mean of the last steps."""

    output: Path
    steps: int
    final_loss: float
    was_finished: bool = False

    def render(self) -> str:
        taken = f"{counted(self.steps, 'step')}, final loss {self.final_loss:.4f}"
        if self.was_finished:
            return f"{self.output} is up to date: {taken}"
        return f"{self.output}: {taken}; checkpoint and loss.png written"


def train(request: TrainingRequest, progress: Progress = SILENT) -> TrainingResult | None:
    """Train, or go on training; write the checkpoint, its tokenizer, training.json and loss.png.

    What an earlier run has finished is recognized, what of it is missing is written again. SIGINT
    and SIGTERM end a run after its step, with a saved state. `progress` gets a line now and
    then, and stages of what comes before the first step and after the last. Of several processes,
    the first alone writes, reports progress and returns a result.

    Raises TrainingError or ConfigError on input that cannot be used, before the first step, and
    TrainingError when a loss is not finite or something cannot be written, which keeps the last
    state; ConversionError when another run holds the directory.
    """
    require_matplotlib()
    require_ours(request.output)
    device_of(request.device)
    if not is_first_process():
        progress = SILENT
    try:
        with ExitStack() as stack:
            if request.tokenizer is None and request.family is not None:
                directory = request.output / TOKENIZER_NAME
                if not is_first_process():  # it alone writes there; the bytes are the same
                    directory = Path(stack.enter_context(TemporaryDirectory()))
                with progress.stage("making a tokenizer from the corpus"):
                    make_tokenizer(directory, [], request.family)
                request = replace(request, tokenizer=directory)
            return _run(request, progress)
    except KeyboardInterrupt as stop:
        if not getattr(stop, "__notes__", ()):
            stop.add_note(
                f"no step was taken, what {request.output} held is kept; {_same_again(request)}"
            )
        raise


def _run(request: TrainingRequest, progress: Progress) -> TrainingResult | None:
    """Train, the tokenizer of a model from nothing being made."""
    start = None
    if request.initial is not None:
        start = Checkpoint.open(request.initial, progress=progress)
    directory = _tokenizer_directory(request, start)
    tokenizer = load_tokenizer(directory)
    if start is not None and directory != start.directory:
        require_same_tokens(tokenizer, directory, start.directory)
    encoder = Encoder(tokenizer, request.options.max_tokens, request.read.stride)
    config = request.model_config(tokenizer, start)
    request.require_used(config)
    precision = precision_of(config.family, request.precision)
    if len(tokenizer) > config.vocab_size:
        raise TrainingError(
            f"{directory} has {len(tokenizer)} tokens, but the config's vocab_size is "
            f"{config.vocab_size}; make it at least as large"
        )
    initial = None
    if start is not None:
        with progress.stage(f"reading the weights of {start.directory}"):
            initial = read_initial(start, config)
    request = replace(request, tokenizer=directory, precision=precision)
    prepared, inputs = _read_inputs(request, encoder, start, progress)
    request = replace(request, options=replace(request.options, steps=prepared.steps))
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    processes = Processes(on_cuda=request.device != "cpu")
    with ExitStack() as stack:
        if processes.rank == 0:
            stack.enter_context(held(request.output, TrainingError))
            require_ours(request.output)
            remove_partial(request.output)
            for line in [*prepared.lines(), *request.options.warmup_warning()]:
                progress(line)
        with progress.stage(f"preparing the model of {request.output}"):
            trainer = Trainer(
                config=config,
                options=request.options,
                source=prepared.training,
                encoder=encoder,
                directory=request.output,
                initial=initial,
                device=device_of(request.device),
                save_every=request.save_every,
                keep=request.keep,
                from_step=request.from_step,
                guard=request.guard,
                held_out=prepared.held_out,
                evaluate_every=request.evaluate_every or DEFAULT_EVERY,
                processes=processes,
                inputs=inputs,
            )
        try:
            result = _finish(request, trainer, progress)
        except KeyboardInterrupt as stop:
            stop.add_note(_what_is_saved(request, trainer))
            raise
    processes.close()
    return result if processes.rank == 0 else None


def _tokenizer_directory(request: TrainingRequest, start: Checkpoint | None) -> Path:
    if request.tokenizer is not None:
        return request.tokenizer
    if start is None:
        return DEMO
    if not (start.directory / "tokenizer.json").exists():
        raise TrainingError(
            f"{start.directory} has no tokenizer.json; name the tokenizer that its weights were "
            "trained with: --tokenizer DIR"
        )
    return start.directory


def _read_inputs(
    request: TrainingRequest, encoder: Encoder, start: Checkpoint | None, progress: Progress
) -> tuple[Prepared, dict[str, str]]:
    """Return the data, and the digests of what is read."""
    assert request.tokenizer is not None
    inputs = {
        "tokenizer_sha256": _digest(request.tokenizer),
        "initial_fingerprint": "" if start is None else start.fingerprint,
    }
    options = request.options
    length = Length(steps=options.steps, batch_size=options.batch_size, seed=options.seed)
    prepared = prepare(request.source(), encoder, request.read, length, progress)
    return prepared, {**inputs, **prepared.inputs}


def _last_step(request: TrainingRequest) -> int:
    return min(request.until or request.options.steps, request.options.steps)


def _digest(tokenizer: Path) -> str:
    digest = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            digest.update(f"{name} {sha256_of(tokenizer / name)}\n".encode())
    return digest.hexdigest()


def _finish(request: TrainingRequest, trainer: Trainer, progress: Progress) -> TrainingResult:
    """Train to the end and write the results, as far as an earlier run has not done that."""
    last = _last_step(request)
    assert request.tokenizer is not None
    assert request.precision is not None
    tokenizer = request.tokenizer
    goes_back = request.from_step is not None
    summary = read_summary(request.output, trainer.identity(), CHANGEABLE if goes_back else ())
    goes_on = goes_back or trainer.new_changes
    if summary is not None and not goes_on and summary.steps >= max(last, trainer.step):
        changed = changed_files(request.output, summary, tokenizer)
        whole = not changed and summary.precision == request.precision
        if whole and summary.final_loss is not None:
            return TrainingResult(
                output=request.output,
                steps=summary.steps,
                final_loss=summary.final_loss,
                was_finished=True,
            )
        if trainer.saved_step == 0:
            progress(f"{request.output}: {STATE_NAME} is missing: trained again from the start")
        for name, phrase in changed.items():
            progress(f"{request.output}: {name} {phrase}: made again")
    for change in trainer.new_changes:
        progress(f"{request.output}: {change.render()}")
    results = Results(
        trainer=trainer,
        precision=request.precision,
        tokenizer=tokenizer,
        command=request.command,
    )
    if trainer.step < last:
        _train(request, trainer, results, progress)
    final_loss = trainer.final_loss(FINAL_STEPS)
    if math.isnan(final_loss):
        raise TrainingError(
            f"each step of {trainer.step} was skipped: nothing was learned; look at the data, and "
            "try a lower --learning-rate"
        )
    if trainer.processes.rank == 0:
        with progress.stage(f"writing the checkpoint to {request.output}"):
            results.write()
    return TrainingResult(output=request.output, steps=trainer.step, final_loss=final_loss)


def _train(
    request: TrainingRequest, trainer: Trainer, results: Results, progress: Progress
) -> None:
    last = _last_step(request)
    progress(_what_is_ahead(trainer, last))
    meter = Meter(last)
    sampler = Sampler(
        tokenizer=trainer.encoder.tokenizer,
        prompts=request.samples,
        every=request.sample_every or DEFAULT_EVERY,
        last=last,
    )
    first = trainer.processes.rank == 0
    with first_signal_noted() as noted:
        for step in trainer.run(last):
            for line in meter.lines(step):
                progress(line)
            if first:
                for line in sampler.lines(trainer.model, step.step):
                    progress(line)
            if first and trainer.saved_step == trainer.step < last:
                results.write_progress()
            # All processes stop after the same step, or some would wait for others for ever.
            if trainer.processes.any(noted.number is not None):
                if trainer.saved_step != trainer.step:
                    trainer.save()
                raise noted.interruption()


def _what_is_ahead(trainer: Trainer, last: int) -> str:
    millions = sum(weight.numel() for weight in trainer.model.parameters()) / 1e6
    place = (
        f"{counted(torch.get_num_threads(), 'thread')} of {counted(os.cpu_count() or 1, 'core')}"
    )
    if trainer.device.type != "cpu":
        place = str(trainer.device)
    if trainer.processes.count > 1:
        place += f" in each of {trainer.processes.count} processes"
    steps = counted(last - trainer.step, "step")
    return (
        f"{trainer.config.family.title} with {millions:.1f} million parameters: {steps} of "
        f"{counted(trainer.options.batch_size, 'sequence')} from step {trainer.step + 1} on, with "
        f"{place}; the first steps tell how long that takes, and Ctrl-C keeps what is done"
    )


def _what_is_saved(request: TrainingRequest, trainer: Trainer) -> str:
    saved = f"the state of step {trainer.saved_step} of {trainer.options.steps} is saved"
    return f"{saved if trainer.saved_step else 'no step is saved'}; {_same_again(request)}"


def _same_again(request: TrainingRequest) -> str:
    """Say with which command an interrupted run goes on."""
    words = [*request.command]
    if "--from-step" in words:  # the state that was just saved goes on from there
        chosen = words.index("--from-step")
        del words[chosen : chosen + 2]
    return f"to go on: {shlex.join(words) if words else 'the same request'}"


def parse_precision(name: str) -> Precision:
    """Return the precision of that name. Raises TrainingError when it is unknown."""
    try:
        return Precision(name)
    except ValueError:
        raise TrainingError(
            f"precision is {name!r}; expected {', '.join(Precision)}", usage=True
        ) from None
