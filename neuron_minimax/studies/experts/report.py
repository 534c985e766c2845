"""An analysis for people: one self-contained interactive HTML page, and static figures.

The page needs no network and no libraries; its numbers are packed as 16-bit steps. The figures are
PNG and SVG, in light and dark, in colours that do not rely on telling red from green.

Shapes: L layers, N tokens, K chosen per token, E experts.
"""

import base64
import html
import json
import math
import re
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.errors import GenerationError, counted, require_package, shortened
from neuron_minimax.inspection import charts
from neuron_minimax.inspection.document import html_table
from neuron_minimax.studies.experts.statistics import (
    SIGNIFICANT,
    Analysis,
    LayerSimilarity,
    PermutationTest,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Percentile where the colours of one-sided maps end, so that one outlier does not hide the rest
CAP = 99.5
STEPS = 65534  # one more code means "no value"
SHOWN_CHARACTERS = 600  # of the prompt and of the answer; all tokens stand at the end
SHOWN_BUSIEST = 4  # of a layer, without JavaScript
SHOWN_EXPERTS = 64  # of a co-activation map, the busiest ones of the layer
THEMES = {"light": "default", "dark": "dark_background"}
SEQUENTIAL = "cividis"
DIVERGING = "PuOr_r"
# of the Okabe-Ito palette
ACCENT = "#E69F00"
MUTED = "#56B4E9"
Drawing = Callable[["Axes"], None]


def render_report(analysis: Analysis) -> str:
    """Render the page. Values in it are within 1 / 65534 of a map's range."""
    data = {
        "figures": list(_page_figures(analysis)),
        "routing": _routing(analysis),
    }
    # A "<" could end the script element that holds the data, or open a comment in it.
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    page = (
        files("neuron_minimax.studies.experts").joinpath("report.html").read_text(encoding="utf-8")
    )
    facts = (
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(fact)}</dd>"
        for name, fact in _page_facts(analysis)
    )
    filled = {
        "__TITLE__": html.escape(analysis.trace.name),
        "__FACTS__": "".join(facts),
        "__STILL__": _still(analysis),
        "__DATA__": text,
    }
    return re.sub("|".join(filled), lambda mark: filled[mark[0]], page)


def _still(analysis: Analysis) -> str:
    """What a reader sees who lets no script run: the map of all layers, and a table of them."""
    balance = analysis.balance
    rows = []
    for layer, frequency_E in enumerate(analysis.frequency):
        busiest = np.argsort(-frequency_E, kind="stable")[:SHOWN_BUSIEST]
        cells = (
            str(layer),
            ", ".join(f"{expert} ({frequency_E[expert]:.0%})" for expert in busiest),
            f"{balance.entropy[layer]:.3f}",
            f"{balance.gini[layer]:.3f}",
            str(len(balance.dead[layer])),
        )
        rows.append(cells)
    head = ("layer", "busiest experts (share of tokens)", "entropy", "Gini", "never chosen")
    return (
        "<p>The maps that can be moved, and each token's experts, need JavaScript. Share of tokens "
        "that chose an expert, layers down, experts across, brighter for more:</p>"
        f'<img src="{charts.heat_map(analysis.frequency)}" alt="Activation of the experts of every '
        f'layer">{html_table(head, rows)}'
    )


def _page_facts(analysis: Analysis) -> Iterator[tuple[str, str]]:
    trace = analysis.trace
    balance = analysis.balance
    decode = int(trace.is_decode.sum())
    if trace.prompt:
        yield "prompt", shortened(trace.prompt.strip(), SHOWN_CHARACTERS)
    if trace.answer:
        yield "answer", shortened(trace.answer.strip(), SHOWN_CHARACTERS)
    yield (
        "tokens",
        f"{len(trace.tokens) - decode} of the prompt, {decode} of the answer "
        f"({trace.finish_reason or 'none'})",
    )
    yield (
        "model",
        f"{counted(trace.layers, 'layer')}, {counted(trace.experts, 'expert')}, "
        f"{trace.expert_index.shape[2]} per token",
    )
    yield (
        "load",
        f"entropy {balance.entropy.mean():.3f} of its maximum, Gini {balance.gini.mean():.3f}",
    )
    yield "never chosen", f"{sum(map(len, balance.dead))} of {trace.layers * trace.experts} experts"
    if trace.bias.any():
        yield "bias", f"changes {100 * analysis.bias_effect.mean():.1f} % of the choices"
    if analysis.phase_distance is not None:
        yield (
            "prefill against decode",
            f"{analysis.phase_distance.mean():.3f} (0 the same, 1 no expert in common)",
        )


def _page_figures(analysis: Analysis) -> Iterator[dict[str, Any]]:
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
    yield _load_bars(analysis)
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
        yield _similarity_map(
            title, "Cosine of two experts' router rows.", analysis.router_similarity[layer]
        )
    if analysis.layer_similarity is not None:
        note = (
            "Cosine of an expert's router row with the row most like it of another layer (on the "
            "diagonal of its own), mean over the experts."
        )
        yield _map(
            "Router similarity of layers",
            note,
            analysis.layer_similarity,
            "layer",
            "layer",
            "cosine",
        )
    if analysis.expert_layers is not None:
        yield _map(
            "Expert similarity of layers",
            expert_layers_note(analysis.expert_layers, analysis.trace.experts),
            analysis.expert_layers.matrix,
            "layer",
            "layer",
            "cosine",
        )
    for number, matrix in analysis.expert_similarity.items():
        yield _similarity_map(
            f"Expert similarity, layer {number}", "Cosine of two experts' weights.", matrix
        )

    if analysis.by_class:
        yield {"title": "Token classes", "choices": list(_class_maps(analysis))}


def expert_layers_note(found: LayerSimilarity, experts: int) -> str:
    note = (
        "Cosine of an expert's weights with those most like them of another layer (on the diagonal "
        "of its own), mean over the experts."
    )
    if not found.error:
        return note
    # The largest of so many normal numbers, about.
    chance = found.error * math.sqrt(2 * math.log(experts))
    return (
        f"{note} From a random projection of all weights: a cosine's standard error is "
        f"{found.error:.2g}, and the nearest of {experts} unrelated experts is at about "
        f"{chance:.2g}."
    )


def _class_maps(analysis: Analysis) -> Iterator[dict[str, Any]]:
    for name, frequency in analysis.by_class.items():
        note = (
            f"Activation on the {counted(analysis.token_classes.count(name), 'token')} of this "
            "class, minus that on all tokens."
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


def _similarity_map(title: str, note: str, matrix: np.ndarray) -> dict[str, Any]:
    return _map(
        title, note, _without_diagonal(matrix), "expert", "expert", "cosine", diverging=True
    )


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
        # Hovering shows the value itself.
        "cap": float(np.nanpercentile(values, CAP)),
        "values": pack(values, zero_based=not diverging),
    }


def _bars(tested: PermutationTest, title: str, across: str) -> dict[str, Any]:
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


def _load_bars(analysis: Analysis) -> dict[str, Any]:
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
        "experts": trace.experts,
        "top_k": trace.expert_index.shape[2],
        "texts": list(trace.texts) or [f"{token} " for token in trace.tokens.tolist()],
        "decode": trace.is_decode.tolist(),
        "index": pack(trace.expert_index.astype(np.float64)),
        "weight": pack(trace.affinity),
    }


def pack(values: np.ndarray, zero_based: bool = False) -> dict[str, Any]:
    """Pack values as 16-bit steps between the lowest (or 0) and the highest; NaN is the last.

    The steps are little-endian, in base64.
    """
    finite = values[np.isfinite(values)]
    low = 0.0 if zero_based or not finite.size else float(finite.min())
    high = float(finite.max()) if finite.size else 1.0
    span = (high - low) or 1.0
    steps = np.rint((np.nan_to_num(values, nan=low) - low) / span * STEPS)
    steps = np.where(np.isnan(values), STEPS + 1, steps).astype("<u2")
    return {"low": low, "high": low + span, "base64": base64.b64encode(steps.tobytes()).decode()}


def write_plots(
    analysis: Analysis, directory: Path, themes: tuple[str, ...] = tuple(THEMES)
) -> list[Path]:
    """Write every figure as NAME.THEME.png and .svg, and return the paths.

    Raises GenerationError without matplotlib.
    """
    require_package("matplotlib", "drawing figures", GenerationError)
    import matplotlib
    from matplotlib import style
    from matplotlib.figure import Figure

    paths = []
    for theme in themes:
        with style.context([THEMES[theme], {"font.size": 11, "svg.hashsalt": "neuron-minimax"}]):
            for name, size, draw in _plots(analysis):
                figure = Figure(
                    figsize=size,
                    layout="constrained",
                    facecolor=matplotlib.rcParams["figure.facecolor"],
                )
                draw(figure.subplots())
                for form in ("png", "svg"):
                    paths.append(directory / f"{name}.{theme}.{form}")
                    metadata = {"Date": None} if form == "svg" else None
                    with replacing(paths[-1]) as file:
                        figure.savefig(file, format=form, dpi=130, metadata=metadata)
                    # The layout found for the first form serves the second.
                    figure.set_layout_engine("none")
    return paths


def _plots(analysis: Analysis) -> Iterator[tuple[str, tuple[float, float], Drawing]]:
    """Yield name, size in inches and drawing of each figure."""
    layer = int(analysis.balance.gini.argmax())
    yield (
        "activation",
        (11, 6),
        lambda axes: _draw_heat(axes, analysis.frequency, "share of tokens", "expert", "layer"),
    )
    yield "correlation_by_distance", (9, 5), lambda axes: _draw_distances(axes, analysis)
    yield (
        "layer_correlation",
        (7, 6),
        lambda axes: _draw_heat(axes, analysis.correlation, "correlation", "layer", "layer", True),
    )
    yield "load", (9, 5), lambda axes: _draw_load(axes, analysis)
    together = analysis.coactivation[layer]
    yield (
        "coactivation",
        (7, 6),
        lambda axes: _draw_heat(
            axes,
            together,
            "tokens that chose both",
            "expert",
            "expert",
            title=f"layer {layer}, least even",
        ),
    )
    if analysis.router_similarity is not None:
        similar = _without_diagonal(analysis.router_similarity[layer])
        title = f"router rows, layer {layer}"
        yield (
            "router_similarity",
            (7, 6),
            lambda axes: _draw_heat(axes, similar, "cosine", "expert", "expert", True, title),
        )
    for number, matrix in analysis.expert_similarity.items():
        yield (
            f"expert_similarity_{number}",
            (7, 6),
            _similarity_plot(_without_diagonal(matrix), number),
        )


def _similarity_plot(matrix: np.ndarray, layer: int) -> Drawing:
    return lambda axes: _draw_heat(
        axes, matrix, "cosine", "expert", "expert", True, f"expert weights, layer {layer}"
    )


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _draw_heat(
    axes: "Axes",
    values: np.ndarray,
    what: str,
    across: str,
    down: str,
    diverging: bool = False,
    title: str = "",
) -> None:
    largest = float(np.nanmax(np.abs(values)))
    limit = largest if diverging else float(np.nanpercentile(values, CAP)) or largest or 1.0
    image = axes.imshow(
        values,
        aspect="auto",
        interpolation="nearest",
        cmap=DIVERGING if diverging else SEQUENTIAL,
        vmin=-limit if diverging else 0.0,
        vmax=limit,
    )
    axes.set(xlabel=across, ylabel=down, title=title)
    axes.figure.colorbar(image, ax=axes, label=what, extend="max" if largest > limit else "neither")


def _draw_distances(axes: "Axes", analysis: Analysis) -> None:
    tested = analysis.by_distance
    beyond = tested.p_values < SIGNIFICANT
    axes.bar(tested.labels, tested.observed, color=[ACCENT if found else MUTED for found in beyond])
    axes.scatter(
        [], [], marker="s", color=ACCENT, label="beyond chance (5 %, all distances together)"
    )
    axes.scatter([], [], marker="s", color=MUTED, label="not told from chance")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set(xlabel="layers apart", ylabel="mean correlation of activation patterns")
    axes.legend(frameon=False)


def _draw_load(axes: "Axes", analysis: Analysis) -> None:
    """Draw each layer's shares, largest first, over the even share."""
    shares = -np.sort(-analysis.counts, axis=1) / np.maximum(
        analysis.counts.mean(axis=1, keepdims=True), 1e-12
    )
    low, middle, high = np.percentile(shares, [0, 50, 100], axis=0)
    ranks = np.arange(1, shares.shape[1] + 1)
    axes.fill_between(ranks, low, high, color=MUTED, alpha=0.5, label="all layers")
    axes.plot(ranks, middle, color=ACCENT, linewidth=2, label="median layer")
    axes.axhline(1, color="grey", linewidth=0.8, linestyle="--", label="even load")
    axes.set(xlabel="experts of a layer, busiest first", ylabel="load over the mean")
    axes.legend(frameon=False)
