"""Everything that a run reads of its data, ready and counted before the first step."""

from dataclasses import dataclass, field
from pathlib import Path

from neuron_minimax.progress import SILENT, Progress
from neuron_minimax.training.data.corpus import CorpusSource
from neuron_minimax.training.data.encoding import Encoder
from neuron_minimax.training.data.sequences import (
    MADE_HELD_OUT,
    Counts,
    DataOptions,
    MadeSequences,
    Sequences,
    encode_rows,
)
from neuron_minimax.training.data.sources import DemoSource, JsonLines


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """The sequences to train on and, where a share is held out, those to evaluate on.

    `steps` is the length of the run; `inputs` are digests that a resumed run must agree with.
    """

    training: Sequences | MadeSequences
    held_out: Sequences | None
    steps: int
    inputs: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Say what became of the rows, a line for each part."""
        parts = [self.training, *([self.held_out] if self.held_out is not None else [])]
        return [part.counts.line() for part in parts]


@dataclass(frozen=True, kw_only=True)
class Length:
    """How long a run is: steps of `batch_size` sequences, in an order decided by `seed`."""

    steps: int
    batch_size: int
    seed: int


def prepare(
    data: Path | DemoSource | CorpusSource,
    encoder: Encoder,
    options: DataOptions,
    length: Length,
    progress: Progress = SILENT,
) -> Prepared:
    """Read and encode a JSON Lines file, or take rows that are made as they are needed.

    With `options.epochs` the file decides the number of steps. `progress` hears of rows read and
    encoded. Raises TrainingError when the file
    cannot be used, and when there is nothing to learn in a row or a step.
    """
    if not isinstance(data, Path):
        with progress.stage(f"encoding the first rows of {data.name}"):
            return _prepare_made(data, encoder, options, length)
    with progress.stage(f"reading {data}", None, "rows") as advance:
        source = JsonLines.read(data, advance)
    rows = len(source.rows)
    rest = None
    if options.held_out:
        source, rest = source.split(options.held_out)
    with progress.stage(f"encoding {data}", rows, "rows") as advance:
        training = encode_rows(source, encoder, options, length.seed, advance)
        held_out = None
        if rest is not None:
            held_out = encode_rows(rest, encoder, options, length.seed, advance)
    steps = length.steps
    if options.epochs is not None:
        steps = training.steps(length.batch_size, options.epochs)
    return Prepared(
        training=training, held_out=held_out, steps=steps, inputs={"data_sha256": source.sha256}
    )


def _prepare_made(
    source: DemoSource | CorpusSource, encoder: Encoder, options: DataOptions, length: Length
) -> Prepared:
    training = MadeSequences(source, encoder)
    training.count(length.steps, length.batch_size)
    held_out = None
    if options.held_out:
        rows = source.held_out(MADE_HELD_OUT)
        counts = Counts(name=f"{source.name}, held out", chats=len(rows))
        held_out = Sequences(
            [each for row in rows for each in encoder.encode(row).examples], counts
        )
    return Prepared(training=training, held_out=held_out, steps=length.steps)
