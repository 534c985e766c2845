"""How alike experts are by their weights, and by their routers' rows, within a layer and between
layers.

Shapes: L layers, E experts, H hidden, D weights of one expert (14.2 million in the real model, so
that D is never held at once), S numbers of a sketch.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import bfloat16
from neuron_minimax.progress import Advance, nothing
from neuron_minimax.studies.experts.statistics import LayerSimilarity, layer_similarity

STRIP_ROWS = 16  # of every expert at a time: 256 x 16 x 3072 float32 are 50 MB
SKETCH_BYTES = 512 << 20  # of all experts' sketches: 8456 numbers for each of 62 x 256
SEED = 20  # of the signs, which are the same in every run


def router_similarity(weight_EH: np.ndarray) -> np.ndarray:
    """Return the cosine similarity [E,E] of the router's rows."""
    return _cosine(weight_EH.astype(np.float64) @ weight_EH.T.astype(np.float64))


def expert_similarity(checkpoint: Checkpoint, layer: int, jobs: int | None = None) -> np.ndarray:
    """Return the cosine similarity [E,E] of the experts' weights, all of one as one vector.

    The weights are read and dequantized strip by strip, `jobs` at a time. Raises CheckpointError
    when the layer does not exist or the meaning of the scales is unclear.
    """
    if not 0 <= layer < checkpoint.config.num_hidden_layers:
        last = checkpoint.config.num_hidden_layers - 1
        raise CheckpointError(f"{checkpoint.directory} has no layer {layer}; expected 0 to {last}")
    strips = _strips(checkpoint, layer)

    def gram(strip: tuple[list[str], slice]) -> np.ndarray:
        block = _block(checkpoint, *strip)
        return (block @ block.T).astype(np.float64)

    total = np.zeros((checkpoint.config.num_local_experts,) * 2)
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for part in pool.map(gram, strips):
            total += part
    return _cosine(total)


def expert_layer_similarity(
    checkpoint: Checkpoint,
    jobs: int | None = None,
    sketch_bytes: int = SKETCH_BYTES,
    advance: Advance = nothing,
) -> LayerSimilarity:
    """Return how alike the experts of two layers are, as `layer_similarity` has it of routers, from
    a sketch of every expert; it is exact where the experts take no more than `sketch_bytes` in
    float32.

    Memory is that of the sketches and of some strips, whatever the checkpoint's size; every weight
    is read once, `jobs` strips at a time. `advance` counts layers.
    """
    jobs = jobs or os.cpu_count() or 1
    layers = checkpoint.config.num_hidden_layers
    weights = sum(_widths(checkpoint, _strips(checkpoint, 0)))
    most = sketch_bytes // (4 * layers * checkpoint.config.num_local_experts)
    numbers = min(weights, max(1, most))
    sketches = []
    for layer in range(layers):
        sketches.append(expert_sketch(checkpoint, layer, numbers, jobs))
        advance(1)
    error = 0.0 if numbers == weights else numbers**-0.5
    return LayerSimilarity(layer_similarity(sketches), error)


def expert_sketch(checkpoint: Checkpoint, layer: int, numbers: int, jobs: int) -> np.ndarray:
    """Return a random projection [E,S] to S `numbers` of the experts' weights, the same for all
    layers.

    Weight i is added to number i modulo S with a sign drawn for i: inner products are kept in the
    mean, and cosines with a standard error of 1 / sqrt(S) (Charikar, Chen, Farach-Colton 2002,
    "Finding frequent items in data streams"; Weinberger et al. 2009, "Feature hashing").
    """
    strips = _strips(checkpoint, layer)
    starts = np.cumsum([0, *_widths(checkpoint, strips)]) % numbers

    def signed(number: int) -> tuple[slice, np.ndarray]:
        """A strip's part of some of the numbers."""
        block = _block(checkpoint, *strips[number])
        width = block.shape[1]
        draw = np.random.default_rng([SEED, number])
        block *= draw.choice(np.array([-1, 1], np.float32), width)
        start = int(starts[number])
        if start + width <= numbers:
            return slice(start, start + width), block
        folded = np.zeros((len(block), numbers), np.float32)
        while block.shape[1]:
            piece, block = np.split(block, [numbers - start], axis=1)
            folded[:, start : start + piece.shape[1]] += piece
            start = 0
        return slice(0, numbers), folded

    total = np.zeros((checkpoint.config.num_local_experts, numbers), np.float32)
    with ThreadPoolExecutor(jobs) as pool:
        for first in range(0, len(strips), 2 * jobs):  # no more parts wait to be added
            for place, part in pool.map(signed, range(first, min(first + 2 * jobs, len(strips)))):
                total[:, place] += part
    return total


def _widths(checkpoint: Checkpoint, strips: list[tuple[list[str], slice]]) -> list[int]:
    """Weights of one expert in each strip."""
    return [
        (rows.stop - rows.start) * checkpoint.entry(names[0]).shape[1] for names, rows in strips
    ]


def _block(checkpoint: Checkpoint, names: list[str], rows: slice) -> np.ndarray:
    """The rows of each weight as one row [E,...] of float32."""
    return np.stack([_rows(checkpoint, name, rows).reshape(-1) for name in names])


def _strips(checkpoint: Checkpoint, layer: int) -> list[tuple[list[str], slice]]:
    """The names of one kind of weight, and rows that lie within one row of blocks; all of both."""
    strips = list(_each_strip(checkpoint, layer))
    if any(checkpoint.is_fp8(names[0]) for names, _ in strips):
        _ = checkpoint.convention  # decided once, before the threads
    return strips


def _each_strip(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[list[str], slice]]:
    block_rows = checkpoint.config.weight_block_size[0]
    for weight in checkpoint.config.family.weights:
        if not weight.per_expert:
            continue
        experts = range(checkpoint.config.num_local_experts)
        names = [weight.template.format(l=layer, e=expert) for expert in experts]
        rows = checkpoint.entry(names[0]).shape[0]
        for block in range(0, rows, block_rows):
            end = min(block + block_rows, rows)
            for start in range(block, end, STRIP_ROWS):
                yield names, slice(start, min(start + STRIP_ROWS, end))


def _rows(checkpoint: Checkpoint, name: str, rows: slice) -> np.ndarray:
    stored = checkpoint.rows(name, rows)
    if not checkpoint.is_fp8(name):
        return bfloat16.to_float32(stored)
    block = checkpoint.config.weight_block_size
    return fp8.dequantize(stored, checkpoint.multipliers(name, rows), block)


def _cosine(gram_EE: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.diagonal(gram_EE))
    scale = np.outer(norms, norms)
    return np.divide(gram_EE, scale, out=np.zeros_like(gram_EE), where=scale > 0)
