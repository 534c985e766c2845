"""One self-contained interactive HTML page of an analysis: no network, no libraries, numbers packed
as 16-bit steps.

Shapes: L layers, N tokens, K chosen per token, E experts.
"""

import base64
import html
import json
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import numpy as np

from neuron_minimax.studies.experts.analysis import SIGNIFICANT, Analysis
from neuron_minimax.studies.experts.stats import Tested

STEPS = 65534  # one more code means "no value"
CAP = 99.5  # percentile where the colours of one-sided maps end
SHOWN_EXPERTS = 64  # of a co-activation map, the busiest ones of the layer


def render_report(analysis: Analysis) -> str:
    """The page. Values in it are within 1 / 65534 of a map's range."""
    data = {
        "facts": list(_facts(analysis)),
        "figures": list(_figures(analysis)),
        "routing": _routing(analysis),
    }
    # "</" would end the script element that holds the data.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")
    page = (
        files("neuron_minimax.studies.experts").joinpath("report.html").read_text(encoding="utf-8")
    )
    return page.replace("__TITLE__", html.escape(analysis.trace.name)).replace("__DATA__", text)


def _facts(analysis: Analysis) -> Iterator[tuple[str, str]]:
    trace = analysis.trace
    balance = analysis.balance
    decode = int(trace.is_decode.sum())
    yield (
        "tokens",
        f"{len(trace.tokens) - decode} of the prompt, {decode} of the answer "
        f"({trace.finish_reason or 'none'})",
    )
    yield (
        "model",
        f"{trace.layers} layers, {trace.experts} experts, {trace.expert_index.shape[2]} per token",
    )
    yield (
        "load",
        f"entropy {balance.entropy.mean():.3f} of its maximum, Gini {balance.gini.mean():.3f}",
    )
    yield "never chosen", f"{sum(map(len, balance.dead))} of {trace.layers * trace.experts} experts"
    yield "bias", f"changes {100 * analysis.bias_effect.mean():.1f} % of the choices"
    if analysis.phase_distance is not None:
        yield (
            "prefill against decode",
            f"{analysis.phase_distance.mean():.3f} (0 the same, 1 no expert in common)",
        )


def _figures(analysis: Analysis) -> Iterator[dict[str, Any]]:
    layer = int(analysis.balance.gini.argmax())
    yield _map(
        "Activation",
        "Share of tokens that chose an expert.",
        analysis.frequency,
        "layer",
        "expert",
        "of tokens",
    )
    yield _map(
        "Weight", "Mean weight when chosen.", analysis.mean_weight, "layer", "expert", "mean weight"
    )
    yield _bars(analysis.by_distance, "Correlation by layer distance", "layers apart")
    yield _bars(analysis.periodicity, "Periodicity", "period in layers")
    note = "Pearson correlation of the activation patterns of two layers."
    yield _map(
        "Layer correlation",
        note,
        analysis.correlation,
        "layer",
        "layer",
        "correlation",
        diverging=True,
    )
    yield _load(analysis)
    busiest = np.sort(np.argsort(-analysis.counts[layer], kind="stable")[:SHOWN_EXPERTS])
    together = analysis.coactivation[layer][np.ix_(busiest, busiest)]
    note = (
        f"Tokens that chose both, in layer {layer} (the least even one), for its {len(busiest)} "
        "busiest experts."
    )
    together_map = _map("Co-activation", note, together, "expert", "expert", "tokens")
    yield together_map | {"names": busiest.tolist()}
    if analysis.router_similarity is not None:
        title = f"Router similarity, layer {layer}"
        yield _similarity(
            title, "Cosine of two experts' router rows.", analysis.router_similarity[layer]
        )
    for number, matrix in analysis.expert_similarity.items():
        yield _similarity(
            f"Expert similarity, layer {number}", "Cosine of two experts' weights.", matrix
        )

    if analysis.by_class:
        yield {"title": "Token classes", "choices": list(_classes(analysis))}


def _classes(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for name, frequency in analysis.by_class.items():
        note = (
            f"Activation on the {analysis.token_classes.count(name)} tokens of this class, minus "
            "that on all tokens."
        )
        difference = frequency - analysis.frequency
        yield _map(
            f"Tokens of class {name}",
            note,
            difference,
            "layer",
            "expert",
            "difference",
            diverging=True,
        )


def _similarity(title: str, note: str, matrix: np.ndarray) -> dict[str, Any]:
    shown = np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)
    return _map(title, note, shown, "expert", "expert", "cosine", diverging=True)


def _map(
    title: str,
    note: str,
    values: np.ndarray,
    down: str,
    across: str,
    what: str,
    *,
    diverging: bool = False,
) -> dict[str, Any]:
    return {
        "title": title,
        "note": note,
        "rows": values.shape[0],
        "columns": values.shape[1],
        "down": down,
        "across": across,
        "what": what,
        "diverging": diverging,
        # Colours end here, so that one outlier does not hide the rest; hovering shows the value
        # itself.
        "cap": float(np.nanpercentile(values, CAP)),
        "values": pack(values, zero_based=not diverging),
    }


def _bars(tested: Tested, title: str, across: str) -> dict[str, Any]:
    marked = tested.p_values < SIGNIFICANT
    return {
        "title": title,
        "note": "Highlighted where chance is ruled out at 5 %, for all bars together, by "
        "permutation.",
        "across": across,
        "labels": tested.labels.tolist(),
        "values": tested.observed.round(5).tolist(),
        "marked": marked.tolist(),
        "details": [f" (p = {p:.3f})" for p in tested.p_values],
    }


def _load(analysis: Analysis) -> dict[str, Any]:
    balance = analysis.balance
    details = zip(balance.gini, balance.entropy, balance.dead, strict=True)
    return {
        "title": "Load of the busiest expert",
        "note": "Over the mean of its layer; 1 would be even.",
        "across": "layer",
        "labels": list(range(analysis.trace.layers)),
        "values": balance.max_to_mean.round(4).tolist(),
        "marked": [False] * analysis.trace.layers,
        "details": [
            f" (Gini {gini:.3f}, entropy {entropy:.3f}, {len(dead)} dead)"
            for gini, entropy, dead in details
        ],
    }


def _routing(analysis: Analysis) -> dict[str, Any]:
    trace = analysis.trace
    return {
        "layers": trace.layers,
        "top_k": trace.expert_index.shape[2],
        "texts": list(trace.texts) or [f"{token} " for token in trace.tokens.tolist()],
        "decode": trace.is_decode.tolist(),
        "index": pack(trace.expert_index.astype(np.float64)),
        "weight": pack(trace.affinity),
    }


def pack(values: np.ndarray, zero_based: bool = False) -> dict[str, Any]:
    """16-bit steps between the lowest (or 0) and the highest value, little-endian, base64; NaN is
    the last code.
    """
    finite = values[np.isfinite(values)]
    low = 0.0 if zero_based or not finite.size else float(finite.min())
    high = float(finite.max()) if finite.size else 1.0
    span = (high - low) or 1.0
    steps = np.rint((np.nan_to_num(values, nan=low) - low) / span * STEPS)
    steps = np.where(np.isnan(values), STEPS + 1, steps).astype("<u2")
    return {"low": low, "high": low + span, "base64": base64.b64encode(steps.tobytes()).decode()}
