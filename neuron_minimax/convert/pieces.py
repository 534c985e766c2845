"""The elements of an output, piece by piece; a conversion to disk and one in memory both go through
here.
"""

from collections.abc import Iterator
from functools import partial
from typing import Protocol

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.checkpoint.writer import Piece
from neuron_minimax.convert import ops
from neuron_minimax.convert.ops import Treatment
from neuron_minimax.convert.plan import ConversionPlan, Output
from neuron_minimax.fp8 import ScaleConvention, bfloat16, ceil_div

PIECE_BYTES = 4 << 20
# Of a weight with 3072 columns 192 KiB, which stay in the second-level cache from check to target
STRIP_ROWS = 64


class ArraySource(Protocol):
    """Anything that gives stored elements by name: a checkpoint directory, or a state dict in
    memory.
    """

    def array(self, name: str) -> np.ndarray: ...


def pieces(conversion: ConversionPlan, output: Output, source: ArraySource) -> Iterator[Piece]:
    """Computations of the output's elements in order: one per expert, or row ranges of whole blocks
    for a copy.
    """
    if output.rule.per_expert:
        for group in range(len(output.groups)):
            fill = partial(_fill, conversion, output, source, group, slice(None))
            yield Piece(output.nbytes // len(output.groups), fill)
        return
    rows = output.shape[0]
    block = conversion.config.weight_block_size[0]
    whole = output.is_scale or len(output.shape) < 2
    step = rows if whole else max(1, PIECE_BYTES * rows // output.nbytes // block) * block
    for start in range(0, rows, step):
        taken = slice(start, min(start + step, rows))
        fill = partial(_fill, conversion, output, source, 0, taken)
        yield Piece(output.nbytes // rows * (taken.stop - taken.start), fill)


def _fill(
    conversion: ConversionPlan,
    output: Output,
    source: ArraySource,
    group: int,
    rows: slice,
    memory: np.ndarray,
) -> int:
    return convert_piece(conversion, output, source, group, rows, memory)[1]


def convert_piece(
    conversion: ConversionPlan,
    output: Output,
    source: ArraySource,
    group: int,
    rows: slice,
    memory: np.ndarray | None = None,
) -> tuple[np.ndarray, int]:
    """The elements of one expert, or of a range of rows, and how many of their codes halving
    rounded.

    They are put into `memory` (uint8, of their size) when it is given. Values are checked on the
    way: CheckpointError names the tensor with NaN codes, bad scales or NaN elements.
    """
    operation = output.rule.operation
    names = output.groups[group]
    sources = [source.array(name)[rows] for name in names]
    shape = ops.piece_shape(operation, [stored.shape for stored in sources])
    dtype = STORED_DTYPES[output.dtype]
    piece = np.empty(shape, dtype) if memory is None else memory.view(dtype).reshape(shape)
    before = rounded = 0
    strips = np.empty((2, STRIP_ROWS, max(stored.shape[-1] for stored in sources)), np.uint8)
    for index, (name, stored) in enumerate(zip(names, sources, strict=True)):
        if output.treatment is Treatment.DEQUANTIZE:
            stored = _dequantized(
                conversion, name, stored, output.scale_groups[group][index], source, rows
            )
        elif output.is_scale:
            stored = _treated_scales(name, stored, output.treatment)
        elif output.dtype != "F8_E4M3":
            bfloat16.check_finite(name, stored)
            stored = (
                bfloat16.round_to_bfloat16(stored)
                if output.treatment is Treatment.ROUND
                else stored
            )
        if output.dtype == "F8_E4M3" and output.treatment is not Treatment.HALVE:
            fp8.check_codes(name, stored)
        for row in range(0, len(stored), STRIP_ROWS):
            strip = stored[row : row + STRIP_ROWS]
            if output.treatment is Treatment.HALVE:
                halved, spare = strips[:, : len(strip), : strip.shape[1]]
                count, nan = fp8.halve_into(halved, strip, spare)
                if nan:
                    fp8.check_codes(name, stored)
                rounded += count
                strip = halved
            ops.place(operation, piece, before + row, strip)
        before += len(stored)
    return piece, rounded


def _treated_scales(name: str, scales: np.ndarray, treatment: Treatment) -> np.ndarray:
    fp8.check_scales(name, scales)
    treated = ops.treat_scales(scales, treatment)
    fp8.check_scales(f"{name} ({treatment})", treated)
    return treated


def _dequantized(
    conversion: ConversionPlan,
    name: str,
    codes: np.ndarray,
    scale_name: str,
    source: ArraySource,
    rows: slice,
) -> np.ndarray:
    """BF16 of code * scale; the product is float32, the rounding the only one."""
    block = conversion.config.weight_block_size
    scales = source.array(scale_name)
    if rows.start:
        scales = scales[rows.start // block[0] :]
    scales = scales[: ceil_div(codes.shape[0], block[0])]
    fp8.check_codes(name, codes)
    fp8.check_scales(scale_name, scales)
    if conversion.convention is ScaleConvention.RECIPROCAL:
        scales = np.float32(1) / scales
    return bfloat16.round_to_bfloat16(fp8.dequantize(codes, scales, block))
