"""Statistics of routing: arrays in, arrays out, nothing about models or files.

Shapes: L layers, N tokens, K chosen per token, E experts, D = L - 1 layer distances.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A dead expert was never chosen; a hot one is chosen this many times as often as the mean of its
# layer.
HOT = 3.0


def counts(expert_index: np.ndarray, experts: int) -> np.ndarray:
    """How often each expert was chosen: [L,E] int64 from [L,N,K]; indices outside 0..E-1 (padding)
    do not count.
    """
    return np.stack(
        [np.bincount(_valid(layer, experts), minlength=experts) for layer in expert_index]
    )


def frequency(expert_index: np.ndarray, experts: int) -> np.ndarray:
    """Share of tokens that chose each expert: [L,E], each row sums to K."""
    return counts(expert_index, experts) / max(1, expert_index.shape[1])


def mean_weight(expert_index: np.ndarray, affinity: np.ndarray, experts: int) -> np.ndarray:
    """Mean affinity of each expert over the tokens that chose it: [L,E], 0 where none did."""
    sums = np.zeros((len(expert_index), experts))
    for row, index, weight in zip(sums, expert_index, affinity, strict=True):
        here = (index >= 0) & (index < experts)
        row += np.bincount(index[here], weights=weight[here], minlength=experts)
    return sums / np.maximum(counts(expert_index, experts), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadBalance:
    """Per layer [L]: entropy over its maximum (1 is even), Gini coefficient (0 is even), maximum
    over mean; and the dead and hot experts of each layer.
    """

    entropy: np.ndarray
    gini: np.ndarray
    max_to_mean: np.ndarray
    dead: tuple[tuple[int, ...], ...]
    hot: tuple[tuple[int, ...], ...]


def load_balance(counts_LE: np.ndarray) -> LoadBalance:
    """How evenly the counts [L,E] spread over the experts of each layer."""
    experts = counts_LE.shape[1]
    totals = np.maximum(counts_LE.sum(axis=1, keepdims=True), 1)
    shares = counts_LE / totals
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    ranks = 2 * np.arange(1, experts + 1) - experts - 1
    means = totals[:, 0] / experts
    return LoadBalance(
        entropy=-(shares * logs).sum(axis=1) / np.log(max(experts, 2)),
        gini=(np.sort(shares, axis=1) * ranks).sum(axis=1) / experts,
        max_to_mean=counts_LE.max(axis=1) / means,
        dead=tuple(tuple(np.flatnonzero(row == 0).tolist()) for row in counts_LE),
        hot=tuple(
            tuple(np.flatnonzero(row >= HOT * mean).tolist())
            for row, mean in zip(counts_LE, means, strict=True)
        ),
    )


def bias_effect(scores: np.ndarray, bias: np.ndarray, top_k: int) -> np.ndarray:
    """Share of choices that the bias changes, [L]: top-k of scores + bias [L,N,E] against top-k of
    the scores alone.
    """
    changed = []
    for scores_NE, bias_E in zip(scores.astype(np.float32), bias, strict=True):
        with_bias, without = (_top(values, top_k) for values in (scores_NE + bias_E, scores_NE))
        kept = (with_bias[:, :, None] == without[:, None, :]).any(axis=2)
        changed.append(1.0 - kept.mean())
    return np.array(changed)


def layer_correlation(patterns_LE: np.ndarray) -> np.ndarray:
    """Pearson correlation [L,L] of the layers' activation patterns; 0 where a pattern is
    constant.
    """
    centred = patterns_LE - patterns_LE.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, norms, out=np.zeros_like(centred, dtype=float), where=norms > 0)
    return unit @ unit.T


def mean_by_distance(correlation_LL: np.ndarray) -> np.ndarray:
    """Mean correlation of all pairs of layers that are d = 1 .. L-1 apart: [D]."""
    return np.array(
        [np.diagonal(correlation_LL, distance).mean() for distance in range(1, len(correlation_LL))]
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Tested:
    """Observed statistics, and for each the probability of a value this large by chance, corrected
    for having looked at all of them (the largest of every permutation is compared).
    """

    labels: np.ndarray
    observed: np.ndarray
    p_values: np.ndarray


def correlation_by_distance(
    patterns_LE: np.ndarray, permutations: int = 999, seed: int = 0
) -> Tested:
    """Mean correlation at each layer distance, tested against experts that are numbered at random
    in every layer.
    """
    generator = np.random.default_rng(seed)
    observed = mean_by_distance(layer_correlation(patterns_LE))
    largest = np.empty(permutations)
    for number in range(permutations):
        largest[number] = mean_by_distance(
            layer_correlation(generator.permuted(patterns_LE, axis=1))
        ).max()
    return Tested(
        labels=np.arange(1, len(patterns_LE)),
        observed=observed,
        p_values=_p_values(observed, largest),
    )


def periodicity(patterns_LE: np.ndarray, permutations: int = 999, seed: int = 0) -> Tested:
    """For each period 2 .. L/2: mean correlation of layers a multiple of it apart minus that of the
    others, tested against layers in random order (which keeps how alike layers are, and destroys
    where they are).
    """
    generator = np.random.default_rng(seed)
    correlation = layer_correlation(patterns_LE)
    layers = len(correlation)
    distances = np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))
    periods = np.arange(2, layers // 2 + 1)
    masks = [(distances % period == 0) & (distances > 0) for period in periods]

    def scores(matrix: np.ndarray) -> np.ndarray:
        others = distances > 0
        return np.array([matrix[mask].mean() - matrix[others & ~mask].mean() for mask in masks])

    observed = scores(correlation)
    largest = np.full(permutations, -np.inf)
    for number in range(permutations if len(periods) else 0):
        order = generator.permutation(layers)
        largest[number] = scores(correlation[np.ix_(order, order)]).max()
    return Tested(labels=periods, observed=observed, p_values=_p_values(observed, largest))


def coactivation(expert_index: np.ndarray, experts: int) -> np.ndarray:
    """How many tokens chose both experts: [L,E,E] int32, zero on the diagonal."""
    result = np.zeros((len(expert_index), experts, experts), dtype=np.int32)
    for layer, index_NK in enumerate(expert_index):
        chosen = np.zeros((len(index_NK), experts), dtype=np.float32)
        rows, places = np.nonzero((index_NK >= 0) & (index_NK < experts))
        chosen[rows, index_NK[rows, places]] = 1
        result[layer] = np.rint(chosen.T @ chosen)
        np.fill_diagonal(result[layer], 0)
    return result


def by_group(
    expert_index: np.ndarray, groups: Sequence[str], experts: int
) -> dict[str, np.ndarray]:
    """Frequency [L,E] over the tokens of each group (token class, phase), in order of first
    appearance.
    """
    names = np.array(groups)
    return {
        name: frequency(expert_index[:, names == name], experts) for name in dict.fromkeys(groups)
    }


def total_variation(first_LE: np.ndarray, second_LE: np.ndarray) -> np.ndarray:
    """Distance [L] of two routings, 0 (the same) to 1 (no expert in common), of their normalized
    frequencies.
    """
    first, second = (
        rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-12) for rows in (first_LE, second_LE)
    )
    return np.abs(first - second).sum(axis=1) / 2


def _valid(index: np.ndarray, experts: int) -> np.ndarray:
    flat = index.ravel().astype(np.int64)
    return flat[(flat >= 0) & (flat < experts)]


def _top(values_NE: np.ndarray, top_k: int) -> np.ndarray:
    return np.argpartition(-values_NE, top_k - 1, axis=1)[:, :top_k]


def _p_values(observed: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return (1 + (largest[None] >= observed[:, None]).sum(axis=1)) / (1 + len(largest))
