"""How alike experts are: cosine similarity of their router rows and of their weights, streamed from
the checkpoint.

Shapes: E experts, H hidden, D weights of one expert (14.2 million in the real model, so D is never
held at once).
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import bfloat16

STRIP_ROWS = 16  # of every expert at a time: 256 x 16 x 3072 float32 are 50 MB


def router_similarity(weight_EH: np.ndarray) -> np.ndarray:
    """Cosine similarity [E,E] of the router's rows."""
    return _cosine(weight_EH.astype(np.float64) @ weight_EH.T.astype(np.float64))


def expert_similarity(checkpoint: Checkpoint, layer: int, jobs: int | None = None) -> np.ndarray:
    """Cosine similarity [E,E] of the experts' weights (w1, w2, w3 as one vector), dequantized strip
    by strip.

    `jobs` strips are computed at a time. Raises CheckpointError when there is no such layer or the
    meaning of the scales is unclear.
    """
    if not 0 <= layer < checkpoint.config.num_hidden_layers:
        last = checkpoint.config.num_hidden_layers - 1
        raise CheckpointError(f"{checkpoint.directory} has no layer {layer}; expected 0 to {last}")
    strips = list(_strips(checkpoint, layer))
    if any(checkpoint.is_fp8(names[0]) for names, _ in strips):
        _ = checkpoint.convention  # decided once, before the threads

    def gram(strip: tuple[list[str], slice]) -> np.ndarray:
        names, rows = strip
        block = np.stack([_rows(checkpoint, name, rows).reshape(-1) for name in names])
        return (block @ block.T).astype(np.float64)

    total = np.zeros((checkpoint.config.num_local_experts,) * 2)
    with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
        for part in pool.map(gram, strips):
            total += part
    return _cosine(total)


def _strips(checkpoint: Checkpoint, layer: int) -> Iterator[tuple[list[str], slice]]:
    """Names of one kind of weight of every expert, and rows that lie within one row of blocks."""
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
    stored = checkpoint.array(name)[rows]
    if not checkpoint.is_fp8(name):
        return bfloat16.to_float32(stored)
    block = checkpoint.config.weight_block_size
    return fp8.dequantize(stored, checkpoint.multipliers(name, rows), block)


def _cosine(gram_EE: np.ndarray) -> np.ndarray:
    norms = np.sqrt(np.diagonal(gram_EE))
    scale = np.outer(norms, norms)
    return np.divide(gram_EE, scale, out=np.zeros_like(gram_EE), where=scale > 0)
