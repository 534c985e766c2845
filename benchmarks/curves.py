"""A measured curve beside its law: the fit, the verdict, a table and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuron_minimax.fp8 import ceil_div

# A curve is superlinear in its law when its largest point is above it by more than this.
STEEPER = 1.25


@dataclass(frozen=True, kw_only=True)
class Point:
    at: float  # on the axis, such as a number of layers
    measured: float
    expected: float


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Points in ascending order; `law` says in words what is expected."""

    name: str
    axis: str
    unit: str
    law: str
    points: tuple[Point, ...]

    @property
    def worst(self) -> float:
        """The largest ratio of measured to expected."""
        return max(point.measured / point.expected for point in self.points)

    @property
    def superlinear(self) -> bool:
        """True when the largest point costs clearly more than the law fitted to all points."""
        return self.points[-1].measured > STEEPER * self.points[-1].expected

    def verdict(self) -> str:
        steep = "superlinear in its law" if self.superlinear else "not superlinear in its law"
        return f"worst measured / expected {self.worst:.2f}, {steep}"

    def render_markdown(self) -> str:
        lines = [
            f"## {self.name}",
            "",
            f"Law: {self.law}. {self.verdict()[0].upper()}{self.verdict()[1:]}.",
            "",
        ]
        lines += [
            f"| {self.axis} | measured, {self.unit} | expected | measured / expected |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {point.at:,.0f} | {point.measured:,.2f} | {point.expected:,.2f} | "
            f"{point.measured / point.expected:.2f} |"
            for point in self.points
        ]
        return "\n".join(lines)


def fitted(
    name: str,
    axis: str,
    unit: str,
    law: str,
    at: Sequence[float],
    measured: Sequence[float],
    work: Sequence[float],
) -> Curve:
    """Fit a + b * work, a and b not negative, with the smallest relative errors."""
    y = np.array(measured)
    x = np.array(work)
    offset, slope = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)[
        0
    ]
    if offset < 0:
        offset = 0.0
        slope = float(np.median(y / x))
    if slope < 0:
        offset = float(np.median(y))
        slope = 0.0
    expected = offset + slope * x
    points = [
        Point(at=float(place), measured=float(found), expected=float(wanted))
        for place, found, wanted in zip(at, y, expected, strict=True)
    ]
    return Curve(name=name, axis=axis, unit=unit, law=law, points=tuple(points))


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw all curves in one SVG, measured beside expected."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same picture is the same file
    from matplotlib import pyplot

    columns = 3
    lines = ceil_div(len(curves), columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.4 * columns, 3.3 * lines), layout="constrained"
    )
    for panel, curve in zip(axes.flat, curves, strict=False):
        at = [point.at for point in curve.points]
        panel.plot(
            at, [point.expected for point in curve.points], "--", color="0.5", label="expected"
        )
        panel.plot(at, [point.measured for point in curve.points], "o-", label="measured")
        panel.set(title=curve.name, xlabel=curve.axis, ylabel=curve.unit, ylim=(0, None), xticks=at)
        panel.set_xscale("log", base=2)
        panel.set_xticks(at, [f"{value:,.0f}" for value in at], fontsize=7)
        panel.legend(fontsize=8)
    for panel in list(axes.flat)[len(curves) :]:
        panel.axis("off")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
