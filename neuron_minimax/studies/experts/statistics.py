"""Statistics of routing: of arrays, and of one trace.

Nothing here knows models or files; rendering, plots and pages are made from these values.

Shapes: L layers, N tokens, K chosen per token, E experts, D = L - 1 layer distances.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from neuron_minimax.errors import counted, shortened
from neuron_minimax.inspection.document import Rendered
from neuron_minimax.studies.experts.trace import Trace

HOT = 3.0  # times the mean of its layer; a dead expert was never chosen
SIGNIFICANT = 0.05
SHOWN_CHARACTERS = 100  # of a prompt, in a line

# Classes of tokens, by the characters of their spelling.
TAG = re.compile(r"\s*(\]~|\[e~\[|</?[\w:]+>?|<\||\]<)")
CODE = re.compile(r"[{}()\[\]<>=+*/\\|&^%$#@_;`~]|\w\.\w|[a-z][A-Z]|::|->")
CJK = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")


def counts(expert_index: np.ndarray, experts: int) -> np.ndarray:
    """Count the choices of each expert: [L,E] int64 from [L,N,K], without padding (-1)."""
    return np.stack(
        [np.bincount(_valid(layer, experts), minlength=experts) for layer in expert_index]
    )


def frequency(expert_index: np.ndarray, experts: int) -> np.ndarray:
    """Return the share of tokens that chose each expert: [L,E]; each row sums to K."""
    return counts(expert_index, experts) / max(1, expert_index.shape[1])


def mean_weight(expert_index: np.ndarray, affinity: np.ndarray, experts: int) -> np.ndarray:
    """Return the mean affinity [L,E] over the tokens that chose an expert, 0 where none did."""
    sums = np.zeros((len(expert_index), experts))
    for layer, (index, weight) in enumerate(zip(expert_index, affinity, strict=True)):
        here = (index >= 0) & (index < experts)
        sums[layer] = np.bincount(index[here], weights=weight[here], minlength=experts)
    return sums / np.maximum(counts(expert_index, experts), 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadBalance:
    """Per layer [L]: entropy over its maximum (1 is even), Gini (0 is even), maximum over mean.

    `dead` and `hot` are the experts of each layer that are never, or very often, chosen.
    """

    entropy: np.ndarray
    gini: np.ndarray
    max_to_mean: np.ndarray
    dead: tuple[tuple[int, ...], ...]
    hot: tuple[tuple[int, ...], ...]


def load_balance(counts_LE: np.ndarray) -> LoadBalance:
    """Measure how evenly the counts [L,E] spread over the experts of each layer."""
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
    """Return the share [L] of choices that differ between top-k of scores + bias and of scores."""
    changed = []
    for scores_NE, bias_E in zip(scores.astype(np.float32), bias, strict=True):
        with_bias, without = (_top(values, top_k) for values in (scores_NE + bias_E, scores_NE))
        kept = (with_bias[:, :, None] == without[:, None, :]).any(axis=2)
        changed.append(1.0 - kept.mean())
    return np.array(changed)


def layer_correlation(patterns_LE: np.ndarray) -> np.ndarray:
    """Correlate (Pearson, [L,L]) the layers' activation patterns; 0 where one is constant."""
    centred = patterns_LE - patterns_LE.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1, keepdims=True)
    unit = np.divide(centred, norms, out=np.zeros_like(centred, dtype=float), where=norms > 0)
    return unit @ unit.T


def mean_by_distance(correlation_LL: np.ndarray) -> np.ndarray:
    """Return the mean correlation [D] of all pairs of layers that are d = 1 .. L-1 apart."""
    return np.array(
        [np.diagonal(correlation_LL, distance).mean() for distance in range(1, len(correlation_LL))]
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class PermutationTest:
    """Observed statistics, and for each the probability of a value this large by chance.

    It is corrected for having looked at all of them: the largest of every permutation is compared.
    """

    labels: np.ndarray
    observed: np.ndarray
    p_values: np.ndarray


def correlation_by_distance(
    patterns_LE: np.ndarray, permutations: int = 999, seed: int = 0
) -> PermutationTest:
    """Test the mean correlation at each layer distance.

    By chance means here: with the experts numbered at random in every layer.
    """
    generator = np.random.default_rng(seed)
    observed = mean_by_distance(layer_correlation(patterns_LE))
    largest = np.empty(permutations)
    for number in range(permutations):
        largest[number] = mean_by_distance(
            layer_correlation(generator.permuted(patterns_LE, axis=1))
        ).max(initial=-np.inf)
    return PermutationTest(
        labels=np.arange(1, len(patterns_LE)),
        observed=observed,
        p_values=_p_values(observed, largest),
    )


def periodicity(patterns_LE: np.ndarray, permutations: int = 999, seed: int = 0) -> PermutationTest:
    """Test the periods 2 .. L/2: correlation of layers a multiple of it apart minus the others'.

    By chance means here: with the layers in random order, which keeps how alike layers are and
    destroys where they are.
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
    p_values = _p_values(observed, largest)
    return PermutationTest(labels=periods, observed=observed, p_values=p_values)


def coactivation(expert_index: np.ndarray, experts: int) -> np.ndarray:
    """Count the tokens that chose both experts: [L,E,E] int32, zero on the diagonal."""
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
    """Return the frequency [L,E] over the tokens of each group, in order of first appearance."""
    names = np.array(groups)
    return {
        name: frequency(expert_index[:, names == name], experts) for name in dict.fromkeys(groups)
    }


def total_variation(first_LE: np.ndarray, second_LE: np.ndarray) -> np.ndarray:
    """Return the distance [L] of two normalized frequencies: 0 the same, 1 nothing in common."""
    first, second = (
        rows / np.maximum(rows.sum(axis=1, keepdims=True), 1e-12) for rows in (first_LE, second_LE)
    )
    return np.abs(first - second).sum(axis=1) / 2


def classify(text: str) -> str:
    """Return the class of a token by its spelling; a part of a character is `other`.

    The classes are tag, digits, code, latin, cjk, other script, punctuation, space and other.
    """
    stripped = text.strip()
    if not stripped:
        return "space" if text else "other"
    if TAG.match(text):
        return "tag"
    if any(character.isdigit() for character in stripped) and not any(map(str.isalpha, stripped)):
        return "digits"
    if CODE.search(stripped):
        return "code"
    letters = [character for character in stripped if character.isalpha()]
    if letters:
        return _script(letters[0])
    marks = all(unicodedata.category(character)[0] in "PS" for character in stripped)
    return "punctuation" if marks and "\ufffd" not in stripped else "other"


def _script(letter: str) -> str:
    name = unicodedata.name(letter, "")
    if name.startswith("LATIN"):
        return "latin"
    return "cjk" if name.startswith(CJK) else "other script"


def layer_similarity(rows_EH: Sequence[np.ndarray]) -> np.ndarray:
    """Return how alike the experts of two layers are by a row each, [L,L]: the cosine of an
    expert's row with the row of the other layer that is most like it, mean over the experts of
    both. Within a layer the row itself does not count.
    """
    smallest = np.finfo(np.float32).tiny  # a row of zeros is like no other
    norms = [np.linalg.norm(each, axis=1, keepdims=True) for each in rows_EH]
    rows = [each / np.maximum(norm, smallest) for each, norm in zip(rows_EH, norms, strict=True)]
    found = np.empty((len(rows), len(rows)))
    for first, one in enumerate(rows):
        for second, other in enumerate(rows[: first + 1]):
            cosine_EE = one @ other.T
            if first == second:
                np.fill_diagonal(cosine_EE, -1)
            nearest = (cosine_EE.max(axis=0).mean() + cosine_EE.max(axis=1).mean()) / 2
            found[first, second] = nearest
            found[second, first] = nearest
    return found


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """`matrix` [L,L] as `layer_similarity` makes it; `error` is the standard error of one of its
    cosines, 0 where they are exact.
    """

    matrix: np.ndarray
    error: float = 0.0

    @property
    def by_distance(self) -> list[float]:
        """Means of the layers that are so many apart, from 0, within a layer, on."""
        return [float(np.diagonal(self.matrix, apart).mean()) for apart in range(len(self.matrix))]

    def line(self, what: str) -> str:
        """The means in words."""
        within, *between = self.by_distance
        about = f" (each cosine to {self.error:.2g})" if self.error else ""
        return (
            f"{what}: an expert's nearest is at cosine {within:.3f} within its layer, "
            f"{between[0]:.3f} one layer on, {np.mean(between):.3f} at any distance{about}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis(Rendered):
    """Everything the statistics say about one trace.

    `router_similarity` [L,E,E], `layer_similarity` [L,L] of the routers, `expert_similarity` (layer
    to [E,E]) and `expert_layers` are there when the weights were looked at.
    """

    trace: Trace
    router_similarity: np.ndarray | None = None
    layer_similarity: np.ndarray | None = None
    expert_similarity: dict[int, np.ndarray] = field(default_factory=dict)
    expert_layers: LayerSimilarity | None = None
    permutations: int = 199

    @cached_property
    def counts(self) -> np.ndarray:
        return counts(self.trace.expert_index, self.trace.experts)

    @cached_property
    def frequency(self) -> np.ndarray:
        return frequency(self.trace.expert_index, self.trace.experts)

    @cached_property
    def mean_weight(self) -> np.ndarray:
        return mean_weight(self.trace.expert_index, self.trace.affinity, self.trace.experts)

    @cached_property
    def balance(self) -> LoadBalance:
        return load_balance(self.counts)

    @cached_property
    def bias_effect(self) -> np.ndarray:
        return bias_effect(self.trace.scores, self.trace.bias, self.trace.expert_index.shape[2])

    @cached_property
    def correlation(self) -> np.ndarray:
        return layer_correlation(self.frequency)

    @cached_property
    def by_distance(self) -> PermutationTest:
        return correlation_by_distance(self.frequency, self.permutations)

    @cached_property
    def periodicity(self) -> PermutationTest:
        return periodicity(self.frequency, self.permutations)

    @cached_property
    def coactivation(self) -> np.ndarray:
        return coactivation(self.trace.expert_index, self.trace.experts)

    @cached_property
    def token_classes(self) -> tuple[str, ...]:
        return tuple(classify(text) for text in self.trace.texts)

    @cached_property
    def by_class(self) -> dict[str, np.ndarray]:
        """Frequency [L,E] over the tokens of each class; empty when the trace has no texts."""
        if not self.trace.texts:
            return {}
        return by_group(self.trace.expert_index, self.token_classes, self.trace.experts)

    @cached_property
    def by_phase(self) -> dict[str, np.ndarray]:
        phases = ["decode" if decode else "prefill" for decode in self.trace.is_decode]
        return by_group(self.trace.expert_index, phases, self.trace.experts)

    @cached_property
    def phase_distance(self) -> np.ndarray | None:
        """Total variation [L] between prefill and decode; None when one of them is missing."""
        if len(self.by_phase) < 2:
            return None
        return total_variation(self.by_phase["prefill"], self.by_phase["decode"])

    @property
    def similar_layers(self) -> dict[str, LayerSimilarity]:
        """Of "routers" and "experts", what was looked at."""
        found = {"experts": self.expert_layers} if self.expert_layers else {}
        if self.layer_similarity is not None:
            found = {"routers": LayerSimilarity(self.layer_similarity), **found}
        return found

    def summary(self) -> dict[str, Any]:
        """Return JSON values, one per layer where a statistic has layers."""
        trace = self.trace
        balance = self.balance
        period = self.periodicity
        similar = self.similar_layers
        found = {
            "name": trace.name,
            "prompt": trace.prompt,
            "layers": trace.layers,
            "experts": trace.experts,
            "experts_per_token": trace.expert_index.shape[2],
            "prefill_tokens": int((~trace.is_decode).sum()),
            "decode_tokens": int(trace.is_decode.sum()),
            "answer": trace.answer,
            "finish_reason": trace.finish_reason,
            "entropy": balance.entropy,
            "gini": balance.gini,
            "max_to_mean": balance.max_to_mean,
            "dead_experts": [list(experts) for experts in balance.dead],
            "hot_experts": [list(experts) for experts in balance.hot],
            "choices_changed_by_bias": self.bias_effect,
            "correlation_by_distance": _test_rows(self.by_distance, "distance"),
            "periodicity": _test_rows(period, "period"),
            "prefill_decode_distance": self.phase_distance,
            "router_similarity_by_distance": similar["routers"].by_distance
            if "routers" in similar
            else None,
            "expert_similarity_by_distance": similar["experts"].by_distance
            if "experts" in similar
            else None,
            "expert_similarity_error": similar["experts"].error if "experts" in similar else None,
            "token_classes": {name: self.token_classes.count(name) for name in self.by_class},
            "top_pairs": [self.top_pairs(layer) for layer in range(trace.layers)],
        }
        return {name: _json_value(value) for name, value in found.items()}

    def top_pairs(self, layer: int, most: int = 5) -> list[dict[str, Any]]:
        """Return the pairs chosen together most, with the lift over independent choices."""
        together = np.triu(self.coactivation[layer])
        alone = self.frequency[layer]
        tokens = max(1, len(self.trace.tokens))
        pairs = []
        for place in np.argsort(-together, axis=None, kind="stable")[:most]:
            first, second = np.unravel_index(place, together.shape)
            expected = alone[first] * alone[second] * tokens
            if together[first, second]:
                lift = float(together[first, second] / expected)
                pairs.append(
                    {
                        "experts": [int(first), int(second)],
                        "tokens": int(together[first, second]),
                        "lift": lift,
                    }
                )
        return pairs

    def render(self) -> str:
        """Render a few lines; a pattern is called one only where chance is ruled out at 5 %."""
        trace = self.trace
        balance = self.balance
        dead = sum(map(len, balance.dead))
        prompt = " ".join(trace.prompt.split())
        all_experts = trace.layers * trace.experts
        distances = _significant_labels(self.by_distance)
        lines = [
            f"{trace.name}: {counted(len(trace.tokens), 'token')}, "
            f"{counted(trace.layers, 'layer')}, {counted(trace.experts, 'expert')}",
            *([f"  prompt: {shortened(prompt, SHOWN_CHARACTERS)}"] if prompt else []),
            *(
                f"  {line}".rstrip()
                for line in f"answer: {trace.answer}".splitlines()
                if trace.answer
            ),
            f"  load: entropy {balance.entropy.mean():.3f} of its maximum, Gini "
            f"{balance.gini.mean():.3f}; the busiest expert has {balance.max_to_mean.mean():.1f} "
            f"times the mean; {dead} of {all_experts} never chosen",
            *(
                [f"  the bias changes {100 * self.bias_effect.mean():.1f} % of the choices"]
                if trace.bias.any()
                else []
            ),
            f"  layers correlate beyond chance at distances: {distances}",
            f"  periods beyond chance: {_significant_labels(self.periodicity)}",
        ]
        if trace.layers > 1:
            lines += [f"  {found.line(what)}" for what, found in self.similar_layers.items()]
        if self.phase_distance is not None:
            lines.append(
                f"  prefill and decode differ by {self.phase_distance.mean():.3f} (0 the same, 1 "
                "disjoint)"
            )
        return "\n".join(lines)


def _significant_labels(tested: PermutationTest) -> str:
    """Name the labels beyond chance, strongest first."""
    order = np.argsort(-tested.observed, kind="stable")
    found = [str(tested.labels[place]) for place in order if tested.p_values[place] < SIGNIFICANT]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more if found else "none"


def _test_rows(tested: PermutationTest, label: str) -> list[dict[str, float]]:
    rows = zip(
        tested.labels.tolist(), tested.observed.tolist(), tested.p_values.tolist(), strict=True
    )
    return [{label: name, "value": round(value, 5), "p": round(p, 4)} for name, value, p in rows]


def _json_value(value: Any) -> Any:
    return [round(float(number), 6) for number in value] if isinstance(value, np.ndarray) else value


def _valid(index: np.ndarray, experts: int) -> np.ndarray:
    flat = index.ravel().astype(np.int64)
    return flat[(flat >= 0) & (flat < experts)]


def _top(values_NE: np.ndarray, top_k: int) -> np.ndarray:
    return np.argpartition(-values_NE, top_k - 1, axis=1)[:, :top_k]


def _p_values(observed: np.ndarray, largest: np.ndarray) -> np.ndarray:
    return (1 + (largest[None] >= observed[:, None]).sum(axis=1)) / (1 + len(largest))
