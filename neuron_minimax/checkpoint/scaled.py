"""Weights with block scales, in files or in memory, and what their stored scales mean."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TypeVar

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import TensorSpec
from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import CheckpointError, ScaleConventionError
from neuron_minimax.fp8 import (
    ConventionChoice,
    ScaleConvention,
    ScaleEvidence,
    bfloat16,
    ceil_div,
)

Item = TypeVar("Item")
Result = TypeVar("Result")


class ScaledWeights:
    """Weights whose FP8 codes have block scales, in files or in memory.

    What a stored `weight_scale_inv` means is decided here, once: `multipliers` gives the factors of
    the codes, whatever is stored. A subclass sets the fields and gives `array`.
    """

    title: str  # begins an error message
    config: ModelConfig
    convention_choice: ConventionChoice

    @cached_property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor, by name."""
        raise NotImplementedError

    def array(self, name: str) -> np.ndarray:
        """The stored elements; see TensorDirectory.array."""
        raise NotImplementedError

    def rows(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Some rows of them; see TensorDirectory.rows."""
        return self.array(name)[rows]

    def is_fp8(self, name: str) -> bool:
        """Read off the tensor, never off config.json."""
        return self.specs[name].dtype == "F8_E4M3"

    def sample_scales(self, most: int = 512) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """(name, codes of the first block row, their scales [1, blocks]) of FP8 weights spread over
        the model.
        """
        names = [
            name
            for name in self.specs
            if self.is_fp8(name) and schema.scale_name(name) in self.specs
        ]
        sampled = names[:: max(1, ceil_div(len(names), most))]
        return self.overlapped(self._sample_of, sampled)

    def _sample_of(self, name: str) -> tuple[str, np.ndarray, np.ndarray]:
        codes = self.rows(name, slice(self.config.weight_block_size[0]))
        return name, codes, self.scales(name, slice(1))

    def overlapped(
        self, function: Callable[[Item], Result], items: Iterable[Item]
    ) -> Iterator[Result]:
        """Yield what a function that reads gives for each item, in order; reads that take long
        overlap.
        """
        return map(function, items)

    def scales(self, name: str, block_rows: slice = slice(None)) -> np.ndarray:
        """The stored block scales of an FP8 weight, widened to float32, which is exact.

        Raises CheckpointError for scales of a dtype that are none.
        """
        scales = schema.scale_name(name)
        dtype = self.specs[scales].dtype
        if dtype not in schema.SCALE_DTYPES:
            raise CheckpointError(
                f"{scales} is {dtype}; expected {' or '.join(schema.SCALE_DTYPES)}"
            )
        return bfloat16.scales_to_float32(self.rows(scales, block_rows))

    @cached_property
    def scale_reading(self) -> tuple[ScaleConvention | None, ScaleEvidence]:
        """The meaning of `weight_scale_inv` that its values show, with the evidence; None when it
        is mixed. Raises CheckpointError naming sampled scales that are not positive numbers.
        """
        return fp8.decide_convention(self.sample_scales(), self.config.weight_block_size)

    @cached_property
    def convention(self) -> ScaleConvention:
        """The meaning of `weight_scale_inv`: what the user chose, or else what its values show.

        Raises ScaleConventionError when the evidence is mixed.
        """
        if self.convention_choice is not ConventionChoice.AUTO:
            return ScaleConvention(self.convention_choice)
        found, evidence = self.scale_reading
        if found is None and any(spec.dtype == "F8_E4M3" for spec in self.specs.values()):
            raise ScaleConventionError(
                f"{self.title}: what weight_scale_inv means is unclear: {evidence.render()} "
                f"(such as {', '.join(evidence.dissenters) or 'none'}); look at these tensors; "
                "`neuron-minimax convert` takes --scale-convention"
            )
        return found or ScaleConvention.MULTIPLIER

    def multipliers(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """The float32 factors of an FP8 weight's codes, one for each block that these rows of the
        weight touch; 0 where the stored scale of a block without a code but 0 is 0.

        Raises CheckpointError naming stored scales that are not positive finite numbers.
        """
        block = self.config.weight_block_size
        start, stop, _ = rows.indices(self.specs[name].shape[0])
        first = start // block[0]
        last = ceil_div(stop, block[0])
        stored = self.scales(name, slice(first, last))
        zero = stored == 0
        maxima = None
        if zero.any():
            codes = self.rows(name, slice(first * block[0], last * block[0]))
            maxima = fp8.largest_codes(codes, block)
        fp8.check_scales(schema.scale_name(name), stored, maxima)
        if self.convention is ScaleConvention.RECIPROCAL:
            return np.divide(1, stored, out=np.zeros_like(stored), where=~zero)
        return stored
