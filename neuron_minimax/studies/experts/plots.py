"""Static figures of an analysis, PNG and SVG, in light and dark; colours that do not rely on
telling red from green.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neuron_minimax.errors import GenerationError
from neuron_minimax.studies.experts.analysis import SIGNIFICANT, Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THEMES = {"light": "default", "dark": "dark_background"}
# Percentile where the colours of one-sided maps end, so that one outlier does not hide the rest
CAP = 99.5
SEQUENTIAL = "cividis"
DIVERGING = "PuOr_r"
# of the Okabe-Ito palette
ACCENT = "#E69F00"
MUTED = "#56B4E9"
Drawing = Callable[["Axes"], None]


def write_plots(
    analysis: Analysis, directory: Path, themes: tuple[str, ...] = tuple(THEMES)
) -> list[Path]:
    """Write every figure as NAME.THEME.png and .svg; gives the paths. Raises GenerationError
    without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise GenerationError(
            "plots need matplotlib: `pip install 'neuron-minimax[plots]'`"
        ) from None
    paths = []
    for theme in themes:
        with style.context([THEMES[theme], {"font.size": 11, "svg.hashsalt": "neuron-minimax"}]):
            for name, size, draw in figures(analysis):
                figure = Figure(
                    figsize=size,
                    layout="constrained",
                    facecolor=matplotlib.rcParams["figure.facecolor"],
                )
                draw(figure.subplots())
                for form in ("png", "svg"):
                    paths.append(directory / f"{name}.{theme}.{form}")
                    figure.savefig(
                        paths[-1], dpi=130, metadata={"Date": None} if form == "svg" else None
                    )
                    figure.set_layout_engine(
                        "none"
                    )  # the layout found for the first form serves the second
    return paths


def figures(analysis: Analysis) -> Iterator[tuple[str, tuple[float, float], Drawing]]:
    """Name, size in inches and drawing of each figure."""
    layer = int(analysis.balance.gini.argmax())
    yield (
        "activation",
        (11, 6),
        lambda axes: _heat(axes, analysis.frequency, "share of tokens", "expert", "layer"),
    )
    yield "correlation_by_distance", (9, 5), lambda axes: _distances(axes, analysis)
    yield (
        "layer_correlation",
        (7, 6),
        lambda axes: _heat(axes, analysis.correlation, "correlation", "layer", "layer", True),
    )
    yield "load", (9, 5), lambda axes: _load(axes, analysis)
    together = analysis.coactivation[layer]
    yield (
        "coactivation",
        (7, 6),
        lambda axes: _heat(
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
            lambda axes: _heat(axes, similar, "cosine", "expert", "expert", True, title),
        )
    for number, matrix in analysis.expert_similarity.items():
        yield f"expert_similarity_{number}", (7, 6), _similarity(_without_diagonal(matrix), number)


def _similarity(matrix: np.ndarray, layer: int) -> Drawing:
    return lambda axes: _heat(
        axes, matrix, "cosine", "expert", "expert", True, f"expert weights, layer {layer}"
    )


def _without_diagonal(matrix: np.ndarray) -> np.ndarray:
    return np.where(np.eye(len(matrix), dtype=bool), np.nan, matrix)


def _heat(
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


def _distances(axes: "Axes", analysis: Analysis) -> None:
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


def _load(axes: "Axes", analysis: Analysis) -> None:
    """Each layer's shares, largest first, over the even share."""
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
