"""Everything the statistics say about one trace, as values; rendering, plots and files are made
from these.

Shapes: L layers, N tokens, K chosen per token, E experts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.errors import GenerationError
from neuron_minimax.studies.experts import stats
from neuron_minimax.studies.experts.stats import LoadBalance, Tested
from neuron_minimax.studies.experts.token_classes import classify
from neuron_minimax.studies.experts.trace import Trace

RECORD_FORMATS = ("json", "jsonl", "parquet")
SIGNIFICANT = 0.05


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """Statistics of one trace. `router_similarity` [L,E,E] and `expert_similarity` (layer to [E,E])
    are there when the weights were looked at.
    """

    trace: Trace
    router_similarity: np.ndarray | None = None
    expert_similarity: dict[int, np.ndarray] = field(default_factory=dict)
    permutations: int = 199

    @cached_property
    def counts(self) -> np.ndarray:
        return stats.counts(self.trace.expert_index, self.trace.experts)

    @cached_property
    def frequency(self) -> np.ndarray:
        return stats.frequency(self.trace.expert_index, self.trace.experts)

    @cached_property
    def mean_weight(self) -> np.ndarray:
        return stats.mean_weight(self.trace.expert_index, self.trace.affinity, self.trace.experts)

    @cached_property
    def balance(self) -> LoadBalance:
        return stats.load_balance(self.counts)

    @cached_property
    def bias_effect(self) -> np.ndarray:
        return stats.bias_effect(
            self.trace.scores, self.trace.bias, self.trace.expert_index.shape[2]
        )

    @cached_property
    def correlation(self) -> np.ndarray:
        return stats.layer_correlation(self.frequency)

    @cached_property
    def by_distance(self) -> Tested:
        return stats.correlation_by_distance(self.frequency, self.permutations)

    @cached_property
    def periodicity(self) -> Tested:
        return stats.periodicity(self.frequency, self.permutations)

    @cached_property
    def coactivation(self) -> np.ndarray:
        return stats.coactivation(self.trace.expert_index, self.trace.experts)

    @cached_property
    def token_classes(self) -> tuple[str, ...]:
        return tuple(classify(text) for text in self.trace.texts)

    @cached_property
    def by_class(self) -> dict[str, np.ndarray]:
        """Frequency [L,E] over the tokens of each class; empty when the trace has no texts."""
        return (
            stats.by_group(self.trace.expert_index, self.token_classes, self.trace.experts)
            if self.trace.texts
            else {}
        )

    @cached_property
    def by_phase(self) -> dict[str, np.ndarray]:
        phases = ["decode" if decode else "prefill" for decode in self.trace.is_decode]
        return stats.by_group(self.trace.expert_index, phases, self.trace.experts)

    @cached_property
    def phase_distance(self) -> np.ndarray | None:
        """Total variation [L] between prefill and decode; None when one of them is missing."""
        phases = self.by_phase
        return (
            stats.total_variation(phases["prefill"], phases["decode"]) if len(phases) == 2 else None
        )

    def summary(self) -> dict[str, Any]:
        """JSON values, one row per layer where a statistic has layers."""
        trace = self.trace
        balance = self.balance
        period = self.periodicity
        found = {
            "name": trace.name,
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
            "correlation_by_distance": _tested(self.by_distance, "distance"),
            "periodicity": _tested(period, "period"),
            "prefill_decode_distance": self.phase_distance,
            "token_classes": {name: self.token_classes.count(name) for name in self.by_class},
            "top_pairs": [self.top_pairs(layer) for layer in range(trace.layers)],
        }
        return {name: _json_value(value) for name, value in found.items()}

    def top_pairs(self, layer: int, most: int = 5) -> list[dict[str, Any]]:
        """The pairs of experts chosen together most, with the lift over independent choices."""
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
        """A few lines for a terminal; a pattern is called one only where chance is ruled out at 5
        %.
        """
        trace = self.trace
        balance = self.balance
        dead = sum(map(len, balance.dead))
        all_experts = trace.layers * trace.experts
        lines = [
            f"{trace.name}: {len(trace.tokens)} tokens, {trace.layers} layers, {trace.experts} "
            "experts",
            f"  load: entropy {balance.entropy.mean():.3f} of its maximum, Gini "
            f"{balance.gini.mean():.3f}; the busiest expert has {balance.max_to_mean.mean():.1f} "
            f"times the mean; {dead} of {all_experts} never chosen",
            f"  the bias changes {100 * self.bias_effect.mean():.1f} % of the choices",
            f"  layers correlate beyond chance at distances: {_significant(self.by_distance)}",
            f"  periods beyond chance: {_significant(self.periodicity)}",
        ]
        if self.phase_distance is not None:
            lines.append(
                f"  prefill and decode differ by {self.phase_distance.mean():.3f} (0 the same, 1 "
                "disjoint)"
            )
        return "\n".join(lines)


def records(trace: Trace) -> Iterator[dict[str, Any]]:
    """One row per layer and token: position, token, text, phase, chosen experts, their weights and
    unbiased scores.
    """
    for layer in range(trace.layers):
        chosen = np.take_along_axis(
            trace.scores[layer], trace.expert_index[layer].astype(np.int64), axis=1
        )
        for position, token in enumerate(trace.tokens.tolist()):
            yield {
                "layer": layer,
                "position": position,
                "token": token,
                "text": trace.texts[position] if trace.texts else None,
                "phase": "decode" if trace.is_decode[position] else "prefill",
                "experts": trace.expert_index[layer, position].tolist(),
                "weights": [
                    round(weight, 6) for weight in trace.affinity[layer, position].tolist()
                ],
                "scores": [
                    round(score, 4) for score in chosen[position].astype(np.float32).tolist()
                ],
            }


def write_records(trace: Trace, directory: Path, form: str) -> Path:
    """`routing.json`, `.jsonl` or `.parquet`. Raises GenerationError for another format, or parquet
    without pyarrow.
    """
    path = directory / f"routing.{form}"
    if form == "json":
        path.write_text(
            json.dumps(list(records(trace)), ensure_ascii=False) + "\n", encoding="utf-8"
        )
    elif form == "jsonl":
        with path.open("w", encoding="utf-8") as file:
            for row in records(trace):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    elif form == "parquet":
        try:
            from pyarrow import Table, parquet
        except ImportError:
            raise GenerationError(
                "parquet needs pyarrow: `pip install pyarrow`, or choose json or jsonl"
            ) from None
        parquet.write_table(Table.from_pylist(list(records(trace))), path)
    else:
        raise GenerationError(
            f"the output format is {form!r}; expected one of {', '.join(RECORD_FORMATS)}"
        )
    return path


def _significant(tested: Tested) -> str:
    """Labels beyond chance, strongest first."""
    order = np.argsort(-tested.observed, kind="stable")
    found = [str(tested.labels[place]) for place in order if tested.p_values[place] < SIGNIFICANT]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more if found else "none"


def _tested(tested: Tested, label: str) -> list[dict[str, float]]:
    rows = zip(
        tested.labels.tolist(), tested.observed.tolist(), tested.p_values.tolist(), strict=True
    )
    return [{label: name, "value": round(value, 5), "p": round(p, 4)} for name, value, p in rows]


def _json_value(value: Any) -> Any:
    return [round(float(number), 6) for number in value] if isinstance(value, np.ndarray) else value
