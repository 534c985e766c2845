"""Small charts as SVG and PNG text for pages without network or scripts; colours come from the
page's style sheet.
"""

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np

# Dark to light, so that a bright cell stands out in both colour schemes (control points of
# matplotlib's viridis).
RAMP = np.array(
    [(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float64
)


def stretched(content: str, width: float, height: float, label: str, css: str = "") -> str:
    """An SVG that fills its box, whatever its shape; `label` is its text alternative."""
    return (
        f'<svg class="chart {css}" viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" '
        f'role="img" aria-label="{escape(label)}">{content}</svg>'
    )


def cell_row(classes: Sequence[str], titles: Sequence[str], label: str) -> str:
    """One cell for each class, side by side, each with a tooltip."""
    cells = "".join(
        f'<rect class="{css}" x="{x + 0.06:g}" y="0" width="0.88" '
        f'height="1"><title>{escape(title)}</title></rect>'
        for x, (css, title) in enumerate(zip(classes, titles, strict=True))
    )
    return stretched(cells, max(1, len(classes)), 1, label, "cells")


def log_band(
    minima: Sequence[float],
    medians: Sequence[float],
    maxima: Sequence[float],
    limits: tuple[float, float],
    label: str,
) -> str:
    """A band from minimum to maximum with the median as a line, over positions, on a logarithmic
    axis.
    """
    low, high = (math.log10(limit) for limit in limits)
    span = max(high - low, 1e-9)

    def points(values: Sequence[float]) -> list[tuple[float, float]]:
        return [
            (x + 0.5, 100 * (high - math.log10(value)) / span) for x, value in enumerate(values)
        ]

    if len(medians) == 1:  # one layer still needs an area
        minima, medians, maxima = (list(values) * 2 for values in (minima, medians, maxima))
    area = [*points(maxima), *reversed(points(minima))]
    text = (
        f'<polygon class="band" points="{" ".join(f"{x:g},{y:.2f}" for x, y in area)}"/><polyline '
        f'class="line" points="{" ".join(f"{x:g},{y:.2f}" for x, y in points(medians))}"/>'
    )
    return stretched(text, len(medians), 100, label, "bands")


def bars(heights: Sequence[float], classes: Sequence[str], label: str) -> str:
    """Vertical bars of heights 0 to 1."""
    text = "".join(
        f'<rect class="{css}" x="{x + 0.05:g}" y="{1 - height:.4f}" width="0.9" '
        f'height="{height:.4f}"/>'
        for x, (height, css) in enumerate(zip(heights, classes, strict=True))
    )
    return stretched(text, max(1, len(heights)), 1, label, "bars")


def heat_map(values: np.ndarray) -> str:
    """A PNG as a data address: [rows, columns] values scaled to their own range; what is not a
    number is grey.
    """
    good = np.isfinite(values)
    low, high = (float(values[good].min()), float(values[good].max())) if good.any() else (0.0, 1.0)
    place = np.where(good, (values - low) / ((high - low) or 1.0), 0.0) * (len(RAMP) - 1)
    index = np.minimum(place.astype(int), len(RAMP) - 2)
    part = (place - index)[..., None]
    colours = (RAMP[index] * (1 - part) + RAMP[index + 1] * part).round().astype(np.uint8)
    colours[~good] = 128
    return "data:image/png;base64," + base64.b64encode(encode_png(colours)).decode()


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file of uint8 [rows, columns, 3] pixels (PNG specification, ISO/IEC 15948)."""
    rows, columns, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    filtered = np.concatenate(
        [np.zeros((rows, 1), np.uint8), pixels.reshape(rows, -1)], axis=1
    )  # filter 0: none
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # 8 bits, RGB
    body = (
        chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(filtered.tobytes(), 9))
        + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + body


def horizontal_bars(rows: Sequence[tuple[str, float]], label: str) -> str:
    """A standalone SVG of labelled bars on a logarithmic axis of whole decades; a zero gets no
    bar.
    """
    positive = [value for _, value in rows if value > 0] or [1.0]
    low = math.floor(math.log10(min(positive))) - 1
    high = math.ceil(math.log10(max(positive)))
    left = 10
    width = 700
    step = 52
    height = 34 + step * len(rows) + 24
    style = (
        'text{font:13px system-ui,"Segoe UI",Roboto,"DejaVu '
        'Sans",sans-serif;fill:#16191d}.axis{stroke:#c3cad3}'
        ".bar{fill:#2b6cb0}.page{fill:#fff}@media(prefers-color-scheme:dark){text{fill:#e8ebef}.axis{stroke:#3a434e}"
        ".bar{fill:#5aa2e8}.page{fill:#191e24}}"
    )
    parts = [f'<text x="{left}" y="20">{escape(label)}</text>']
    for decade in range(low, high + 1):
        x = left + (width - left) * (decade - low) / (high - low)
        parts.append(f'<line class="axis" x1="{x:.1f}" y1="30" x2="{x:.1f}" y2="{height - 24}"/>')
        anchor = {low: "start", high: "end"}.get(decade, "middle")
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="{anchor}">1e{decade}</text>')
    for place, (name, value) in enumerate(rows):
        y = 38 + place * step
        length = (width - left) * (math.log10(value) - low) / (high - low) if value > 0 else 0
        parts.append(
            f'<rect class="bar" x="{left}" y="{y + 20}" width="{length:.1f}" height="16" rx="3"/>'
        )
        parts.append(f'<text x="{left + 4}" y="{y + 14}">{escape(name)}: {value:.2e}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 10} {height}" role="img" '
        f'aria-label="{escape(label)}"><style>{style}</style><rect class="page" '
        f'width="{width + 10}" height="{height}"/>{"".join(parts)}</svg>'
    )
