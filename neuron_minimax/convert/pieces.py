"""The elements of an output, piece by piece; a conversion to disk and one in memory both go through here."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import numpy as np

from neuron_minimax.checkpoint import dense, fp8
from neuron_minimax.checkpoint.fp8 import ScaleConvention
from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.convert import ops
from neuron_minimax.convert.ops import Treatment
from neuron_minimax.convert.plan import ConversionPlan, Output
from neuron_minimax.convert.rules import Operation

PIECE_BYTES = 4 << 20
STRIP_ROWS = 64  # of a weight with 3072 columns 192 KiB, which stay in the second-level cache from check to target


class ArraySource(Protocol):
    """Anything that gives stored elements by name: a checkpoint directory, or a state dict in memory."""

    def array(self, name: str) -> np.ndarray: ...


def pieces(
    conversion: ConversionPlan, output: Output, source: ArraySource
) -> Iterator[Callable[[], tuple[np.ndarray, int]]]:
    """Computations of the output's elements in order: one per expert, or row ranges of whole blocks for a copy."""
    for group in range(len(output.groups)):
        rows = output.shape[0] if output.rule.operation is Operation.COPY else None
        if rows is None or output.is_scale or len(output.shape) < 2:
            yield partial(convert_piece, conversion, output, source, group, slice(None))
            continue
        block = conversion.config.weight_block_size[0]
        step = max(1, PIECE_BYTES * rows // max(1, output.nbytes) // block) * block
        for start in range(0, rows, step):
            yield partial(convert_piece, conversion, output, source, group, slice(start, start + step))


def convert_piece(
    conversion: ConversionPlan, output: Output, source: ArraySource, group: int, rows: slice
) -> tuple[np.ndarray, int]:
    """The elements of one expert, or of a range of rows, and how many of their codes halving rounded.

    Values are checked on the way: CheckpointError names the tensor with NaN codes, bad scales or NaN elements.
    """
    operation, names = output.rule.operation, output.groups[group]
    sources = [source.array(name)[rows] for name in names]
    shape = ops.piece_shape(operation, [stored.shape for stored in sources])
    piece = np.empty(shape, dtype=STORED_DTYPES[output.dtype])
    before = rounded = 0
    for index, (name, stored) in enumerate(zip(names, sources, strict=True)):
        if output.treatment is Treatment.DEQUANTIZE:
            stored = _dequantized(conversion, name, stored, output.scale_groups[group][index], source, rows)
        elif output.is_scale:
            stored = _treated_scales(name, stored, output.treatment)
        elif output.dtype != "F8_E4M3":
            dense.check_finite(name, stored)
            stored = dense.round_to_bfloat16(stored) if output.treatment is Treatment.ROUND else stored
        for row in range(0, len(stored), STRIP_ROWS):
            strip = stored[row : row + STRIP_ROWS]
            if output.dtype == "F8_E4M3" and fp8.has_nan(strip):
                fp8.check_codes(name, stored)
            if output.treatment is Treatment.HALVE:
                rounded += fp8.count_rounded(strip)
                strip = fp8.halve(strip)
            ops.place(operation, piece, before + row, strip)
        before += len(stored)
    return piece, rounded


def _treated_scales(name: str, scales: np.ndarray, treatment: Treatment) -> np.ndarray:
    fp8.check_scales(name, scales)
    treated = ops.treat_scales(scales, treatment)
    fp8.check_scales(f"{name} ({treatment})", treated)
    return treated


def _dequantized(
    conversion: ConversionPlan, name: str, codes: np.ndarray, scale_name: str, source: ArraySource, rows: slice
) -> np.ndarray:
    """BF16 of code * scale; the product is float32, the rounding the only one."""
    block = conversion.config.weight_block_size
    scales = source.array(scale_name)
    if rows.start:
        scales = scales[rows.start // block[0] :]
    scales = scales[: -(-codes.shape[0] // block[0])]
    fp8.check_codes(name, codes)
    fp8.check_scales(scale_name, scales)
    if conversion.convention is ScaleConvention.RECIPROCAL:
        scales = np.float32(1) / scales
    return dense.round_to_bfloat16(fp8.dequantize(codes, scales, block))
