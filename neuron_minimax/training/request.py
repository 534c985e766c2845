"""What a training run is asked for, judged before anything is read or made."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.demo import DEMO
from neuron_minimax.errors import TrainingError, counted
from neuron_minimax.families.family import LayerKind, RouterKind
from neuron_minimax.training.data.conversations import require_kinds
from neuron_minimax.training.data.corpus import CorpusSource
from neuron_minimax.training.data.sequences import DataOptions
from neuron_minimax.training.data.sources import DemoSource
from neuron_minimax.training.guard import Guard
from neuron_minimax.training.options import TrainingOptions
from neuron_minimax.training.sizes import config_of_size, family_of_size
from neuron_minimax.training.weights import Precision, precision_of

TOKENIZER_NAME = "tokenizer"  # in the output: one that was made for the run
DEFAULT_EVERY = 100  # steps between losses on held-out rows, and between samples


@dataclass(frozen=True, kw_only=True)
class TrainingRequest:
    """A run: its data, its model and where the result goes.

    `data` None stands for the demo's own conversations, every other one of a kind in `focus`;
    `read` says what is made of the rows of a file, whose epochs go before the options' steps.
    `initial` is a checkpoint to start from, in any precision. The model is of a `size` of a
    `family` (sizes.py), or that of `config`, a directory with a config.json, or else of `initial`,
    or else the demo's; the `tokenizer` is that of `initial`, or else the demo's. A `family` without
    `data` and `tokenizer` is trained on the project's own corpus (corpus.py), with a tokenizer made
    from it. `precision` None stands for FP8 where the family has it, else BF16. `until` stops the
    schedule at an earlier step. `keep` saved states stay, `from_step` chooses the one to go on
    from. Every `evaluate_every` steps (100) the loss on what `read` holds out is taken, every
    `sample_every` steps (100) and after the last replies to the `samples` are shown.

    Raises TrainingError for what does not go together, and what would do nothing.
    """

    output: Path
    options: TrainingOptions
    data: Path | None = None
    read: DataOptions = field(default_factory=DataOptions)
    focus: tuple[str, ...] = ()
    initial: Path | None = None
    config: Path | None = None
    family: str | None = None
    size: str | None = None
    tokenizer: Path | None = None
    precision: Precision | None = None
    device: str = "cpu"
    threads: int | None = None
    save_every: int = 200
    keep: int = 2
    from_step: int | None = None
    guard: Guard = field(default_factory=Guard)
    evaluate_every: int | None = None
    samples: tuple[str, ...] = ()
    sample_every: int | None = None
    until: int | None = None
    command: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("save_every", "keep", "evaluate_every", "sample_every", "until"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise TrainingError(f"{name} is {value}; expected at least 1", usage=True)
        require_kinds(self.focus)
        problem = next(self._problems(), None)
        if problem is not None:
            raise TrainingError(problem, usage=True)
        if self.family is not None and self.size is not None:
            precision_of(family_of_size(self.family, self.size), self.precision)

    def _problems(self) -> Iterator[str]:
        """Yield what does not go together."""
        if (self.family is None) != (self.size is None):
            given = "family" if self.size is None else "size"
            yield f"only a {given} is given; expected a family and one of its sizes"
        other = self.config or self.initial
        if self.family is not None and other is not None:
            yield "both a size and a config or initial checkpoint are given; expected one of them"
        if self.family is not None and self.data is not None and self.tokenizer is None:
            yield (
                f"{self.data} needs a tokenizer with the chat format of {self.family}; make one: "
                f"neuron-minimax tokenizer DIR --family {self.family} --data {self.data}"
            )
        if self.focus and (self.data is not None or self.family is not None):
            trained = self.data or f"the corpus of a {self.family}"
            yield (
                f"the focus is on {', '.join(self.focus)}, kinds of the demo's conversations, but "
                f"{trained} is trained on; leave --focus out"
            )
        yield from self._ignored()

    def _ignored(self) -> Iterator[str]:
        """Yield what would do nothing."""
        read = self.read
        made = self.data is None
        why_made = "without --data rows are made as they are needed, without an end"
        steps = self.options.steps
        beyond = self.until is not None and read.epochs is None and self.until > steps
        for option, is_given, why in (
            ("--epochs", made and read.epochs is not None, why_made),
            ("--pack", made and read.pack, why_made),
            ("--stride", made and read.stride is not None, why_made),
            ("--skip-rows", made and read.skip_rows, why_made),
            ("--evaluate-every", self.evaluate_every and not read.held_out, "without --held-out"),
            ("--sample-every", self.sample_every and not self.samples, "without --sample"),
            (f"--until {self.until}", beyond, f"the run has {counted(steps, 'step')}"),
        ):
            if is_given:
                yield f"{option} would do nothing: {why}"

    def require_used(self, config: ModelConfig) -> None:
        """Raise TrainingError when an option has nothing to act on in a model of this config."""
        options = self.options
        family = config.family
        sparse = family.architecture.has_experts and config.layers_of(LayerKind.SPARSE)
        dense = None if sparse else "the model has no experts to balance"
        fixed = None if self.initial is None else f"the biases are those of {self.initial}"
        if family.architecture.router is not RouterKind.SIGMOID_BIAS:
            fixed = f"the routers of {family.title} have no bias"
        for option, is_given, why in (
            ("--aux-loss-alpha", options.aux_loss_alpha is not None, dense),
            ("--seq-aux or --batch-aux", options.seq_aux is not None, dense),
            ("--router-bias-start", options.router_bias_start != 0, fixed),
        ):
            if is_given and why is not None:
                raise TrainingError(f"{option} would do nothing: {why}", usage=True)

    def source(self) -> Path | DemoSource | CorpusSource:
        """Return where the rows come from."""
        if self.data is not None:
            return self.data
        seed = self.options.seed
        return CorpusSource(seed) if self.family is not None else DemoSource(seed, self.focus)

    def model_config(
        self, tokenizer: PreTrainedTokenizerBase, start: Checkpoint | None
    ) -> ModelConfig:
        """Return the config of the model to train; that of `start`, which `initial` names, says
        whether it stores a head. Raises ConfigError.
        """
        if self.family is not None and self.size is not None:
            return config_of_size(self.family, self.size, tokenizer)
        if self.config is None and start is not None:
            return start.config
        return ModelConfig.from_dir(self.config or DEMO)
