"""The logits of a checkpoint and of its conversion, both through the eager model."""

from dataclasses import dataclass

import torch

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range, Layout
from neuron_minimax.convert.plan import Converted
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.progress import SILENT, Progress

# Halving rounds 16 of 254 codes (0.011 % of a gaussian weight's elements); BF16 attention rounds
# all of its weights.
TOLERANCE = {"fp8": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class LogitComparison(Rendered):
    """Largest absolute difference of logits [T,V], by their standard deviation; equal argmaxes."""

    positions: int
    relative_error: float
    equal_choices: int
    tolerance: float

    @property
    def agrees(self) -> bool:
        return self.relative_error <= self.tolerance

    def render(self) -> str:
        return (
            f"logits of {self.positions} positions: largest difference {self.relative_error:.2e} "
            f"of their standard deviation (allowed {self.tolerance:g}); the same token is first at "
            f"{self.equal_choices}"
        )


def compare_logits(
    source: Checkpoint, converted: Converted, positions: int = 64, progress: Progress = SILENT
) -> LogitComparison:
    """Compare what the source (its codes as they are) and the converted directory give.

    The tokens are random and seeded.
    """
    with progress.stage(f"arranging {source.directory} in memory"):
        original = Decoder.from_checkpoint(
            source, Layout(fp8_range=FP8Range.OCP), scale_convention=converted.convention
        )
    positions = min(positions, source.config.max_position_embeddings)
    tokens = torch.randint(
        source.config.vocab_size, (1, positions), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        with progress.stage(f"running {source.directory}"):
            expected = original(tokens)[0]
        with progress.stage(f"running {converted.directory}"):
            found = Decoder.from_converted(converted)(tokens)[0]
    rounded = converted.layout.attention is AttentionPrecision.BF16 or converted.layout.keep_in_bf16
    return LogitComparison(
        positions=positions,
        relative_error=float((expected - found).abs().max() / expected.std()),
        equal_choices=int((expected.argmax(-1) == found.argmax(-1)).sum()),
        tolerance=TOLERANCE["bf16" if rounded else "fp8"],
    )
