"""The logits of a checkpoint and of its conversion, both through the eager model."""

from dataclasses import dataclass

import torch

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range, Layout
from neuron_minimax.convert.plan import Converted
from neuron_minimax.convert.state_dict import convert_hf_to_neuron_state_dict
from neuron_minimax.model.decoder import MiniMaxM2

# Halving rounds 16 of 254 codes (0.011 % of a gaussian weight's elements); BF16 attention rounds
# all of its weights.
TOLERANCE = {"fp8": 1e-3, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class LogitComparison:
    """Largest absolute difference of the logits [T,V], relative to their standard deviation, and
    equal argmaxes.
    """

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
    source: Checkpoint, converted: Converted, positions: int = 64
) -> LogitComparison:
    """Run seeded random tokens through the source (its codes as they are) and through the converted
    directory.
    """
    published = {name: source.tensor(name) for name in source.entries}
    layout = Layout(fp8_range=FP8Range.OCP)
    original = MiniMaxM2(
        source.config,
        convert_hf_to_neuron_state_dict(published, source.config, layout, converted.convention),
    )
    stored = {name: converted.tensors.tensor(name) for name in converted.tensors.entries}
    positions = min(positions, source.config.max_position_embeddings)
    tokens = torch.randint(
        source.config.vocab_size, (1, positions), generator=torch.Generator().manual_seed(0)
    )
    with torch.inference_mode():
        expected = original(tokens)[0]
        found = MiniMaxM2(converted.config, stored)(tokens)[0]
    rounded = converted.layout.attention is AttentionPrecision.BF16 or converted.layout.keep_in_bf16
    return LogitComparison(
        positions=positions,
        relative_error=float((expected - found).abs().max() / expected.std()),
        equal_choices=int((expected.argmax(-1) == found.argmax(-1)).sum()),
        tolerance=TOLERANCE["bf16" if rounded else "fp8"],
    )
