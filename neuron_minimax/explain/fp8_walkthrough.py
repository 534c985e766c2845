"""One FP8 block step by step: codes, scale, both readings of it, what Neuron makes of it, and what each way costs."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from neuron_minimax.checkpoint import fp8
from neuron_minimax.explain.charts import horizontal_bars
from neuron_minimax.explain.document import Part, to_html, to_markdown, to_text
from neuron_minimax.explain.fp8_block import Alternative, Subject, alternatives, convention_of, ieee_e4m3, multipliers
from neuron_minimax.explain.inspection import write_text

CORNER = (4, 8)  # rows and columns of the block that are shown
TITLE = "FP8 block scales, one block step by step"
GUIDE, PAGE, FIGURE = "fp8_visual_guide.md", "fp8_visual_guide.html", "fp8_errors.svg"
READINGS = "scale_comparison.txt"


def explain(subject: Subject) -> list[Part]:
    """The walkthrough, one part for each step."""
    costs = alternatives(subject)
    return [
        _codes_part(subject),
        _scale_part(subject),
        _values_part(subject),
        _ieee_part(subject),
        _halving_part(subject),
        _alternatives_part(subject, costs),
    ]


def write_guide(subject: Subject, directory: Path) -> str:
    """Write the guide as Markdown (with its figure) and HTML, and the two readings as text; returns the guide as text.

    Raises NeuronMiniMaxError naming a file that cannot be written.
    """
    parts = explain(subject)
    readings = compare_readings(subject)
    write_text(directory / READINGS, to_text("scale_comparison", readings))
    write_text(directory / FIGURE, next(part.figure for part in parts if part.figure))
    write_text(directory / GUIDE, to_markdown(TITLE, [*parts, *readings]))
    write_text(directory / PAGE, to_html(TITLE, [*parts, *readings]))
    written = ", ".join(str(directory / name) for name in (READINGS, GUIDE, PAGE, FIGURE))
    return to_text(TITLE, [*parts, *readings]) + f"\nwritten: {written}\n"


def compare_readings(subject: Subject, shown: int = 12) -> list[Part]:
    """Both readings of weight_scale_inv side by side, block by block: the content of scale_comparison.txt."""
    as_multiplier, as_reciprocal = fp8.block_maxima(subject.codes, subject.scales, subject.block)
    used = subject.scales.reshape(-1)
    if as_multiplier.size != used.size:  # all-zero blocks say nothing
        used = np.full(as_multiplier.size, np.nan, np.float32)
    rows = tuple(
        (str(place), f"{used[place]:.6e}", f"{as_multiplier[place]:.4e}", f"{as_reciprocal[place]:.4e}")
        for place in range(min(shown, as_multiplier.size))
    )
    low, high = fp8.TRAINED_BLOCK_MAX
    right = convention_of(subject)
    text = (
        f"{subject.name}, block {list(subject.block)}, {subject.scales.size} blocks. The name says inverse, namely of "
        "the factor that the quantizer multiplied the weights with; the codes are to be multiplied with that inverse, "
        "the stored number itself. A file that stores the quantizer's factor would need the reciprocal. Which one it "
        f"is shows in the values: the largest of a block of a trained weight lies between {low:g} and {high:g}.\n\n"
        f"Read as multiplier, the median largest value is {np.median(as_multiplier):.3g}; read as reciprocal (divide "
        f"by it), {np.median(as_reciprocal):.3g}, {np.median(as_reciprocal) / np.median(as_multiplier):.1e} times as "
        f"much. Right here: the {right}."
    )
    head = ("block", "weight_scale_inv", "largest value as multiplier", "as reciprocal")
    return [Part(title="Two readings of weight_scale_inv", text=text, head=head, rows=rows)]


def _corner(values: np.ndarray) -> np.ndarray:
    return values[: CORNER[0], : CORNER[1]]


def _grid(cells: np.ndarray, form: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Head and rows of a table of the block's first values."""
    head = ("row", *(f"column {column}" for column in range(cells.shape[1])))
    return head, tuple((str(row), *(format(cell, form) for cell in line)) for row, line in enumerate(cells))


def _codes_part(subject: Subject) -> Part:
    code = int(subject.block_codes[0, 0])
    sign, exponent, mantissa = code >> 7, (code >> 3) & 15, code & 7
    formula = f"(1 + {mantissa}/8) * 2^({exponent} - 7)" if exponent else f"{mantissa}/8 * 2^-6"
    rows, columns = subject.rows_and_columns
    text = (
        f"{subject.name} is {subject.codes.shape[0]} x {subject.codes.shape[1]} codes of one byte. Block "
        f"{list(subject.place)} covers rows {rows.start} to {min(rows.stop, subject.codes.shape[0]) - 1} and columns "
        f"{columns.start} to {min(columns.stop, subject.codes.shape[1]) - 1}. A code is one sign bit, four exponent "
        f"bits (bias 7) and three mantissa bits. The first, 0x{code:02x}, is sign {sign}, exponent {exponent}, "
        f"mantissa {mantissa}: {'-' if sign else ''}{formula} = {fp8.DECODED[code]:g}."
    )
    head, cells = _grid(_corner(subject.block_codes), "#04x")
    return Part(title="1. Codes", text=text, head=head, rows=cells)


def _scale_part(subject: Subject) -> Part:
    stored = subject.block_scale
    largest = float(np.nanmax(np.abs(fp8.decode(subject.block_codes))))
    right = convention_of(subject)
    low, high = fp8.TRAINED_BLOCK_MAX
    text = (
        f"The block has one float32 number, weight_scale_inv = {stored:.8g}. Its largest code is worth {largest:g} (a "
        f"quantizer puts it at 448). Only one of the two readings gives a weight of trained size, between {low:g} and "
        f"{high:g}."
    )
    rows = (
        ("multiplier", "code * x", f"{largest * stored:.6g}", "right" if right == "multiplier" else "wrong"),
        ("reciprocal", "code / x", f"{largest / stored:.6g}", "right" if right == "reciprocal" else "wrong"),
    )
    head = ("reading", "weight", "largest value of the block", "here")
    return Part(title="2. The scale", text=text, head=head, rows=rows)


def _values_part(subject: Subject) -> Part:
    factor = multipliers(subject)[subject.place]
    values = fp8.decode(subject.block_codes) * factor
    code = fp8.decode(subject.block_codes[0, 0])
    text = (
        f"Every weight of the block is its code's value times {factor:.8g}, rounded once to float32. The first: "
        f"{code:g} * {factor:.8g} = {values[0, 0]:.8g}. Over the block the values go from {values.min():.4g} to "
        f"{values.max():.4g}."
    )
    head, rows = _grid(_corner(values), ".5f")
    return Part(title="3. Dequantized values", text=text, head=head, rows=rows)


def _ieee_part(subject: Subject) -> Part:
    read = ieee_e4m3(subject.block_codes)
    lost, all_lost = int(np.count_nonzero(~np.isfinite(read))), ~np.isfinite(ieee_e4m3(subject.codes))
    grid_rows = np.arange(0, subject.codes.shape[0], subject.block[0])
    grid_columns = np.arange(0, subject.codes.shape[1], subject.block[1])
    blocks = np.logical_or.reduceat(np.logical_or.reduceat(all_lost, grid_rows, axis=0), grid_columns, axis=1)
    text = (
        "trn1, inf2 and trn2 read the same byte as IEEE-style e4m3: exponent 15 means infinity or NaN there, so the "
        f"largest finite value is 240 and the codes 0x78 to 0x7e (256 to 448) are lost. In this block {lost} of "
        f"{read.size} codes are; in the whole weight {100 * all_lost.mean():.2f} % of the codes, in "
        f"{int(blocks.sum())} of its {blocks.size} blocks."
    )
    counts = np.bincount((subject.codes & 0x7F).reshape(-1), minlength=128)
    on_neuron = ieee_e4m3(np.arange(128, dtype=np.uint8))
    rows = tuple(
        (f"0x{code:02x}", f"{fp8.DECODED[code]:g}", f"{on_neuron[code]:g}", f"{counts[code]:,}")
        for code in range(0x76, 0x7F)
    )
    head = ("code", "OCP e4m3fn", "IEEE e4m3", "in this weight, either sign")
    return Part(title="4. The same bytes on Neuron", text=text, head=head, rows=rows)


def _halving_part(subject: Subject) -> Part:
    codes, factor = subject.block_codes, multipliers(subject)[subject.place]
    before = fp8.decode(codes) * factor
    after = fp8.decode(fp8.halve(codes)) * (factor * np.float32(2))
    text = (
        "Half of every value is again a code, except for the odd subnormals below 16 * 2^-9, so each code is replaced "
        f"by that of half its value and the scale is doubled, to {factor * 2:.8g}. The largest code is then "
        f"{float(np.abs(fp8.decode(fp8.halve(codes))).max()):g}. {int(np.count_nonzero(before != after))} of the "
        f"{codes.size} values of this block change, {fp8.count_rounded(subject.codes)} of the {subject.codes.size:,} "
        "of the whole weight."
    )
    head = ("place", "code", "value", "weight", "halved code", "value", "weight")
    flat = np.argsort(-np.abs(before), axis=None)[: CORNER[1]]
    rows = tuple(
        (
            f"{row}, {column}",
            f"0x{codes[row, column]:02x}",
            f"{fp8.decode(codes[row, column]):g}",
            f"{before[row, column]:.8g}",
            f"0x{fp8.halve(codes)[row, column]:02x}",
            f"{fp8.decode(fp8.halve(codes)[row, column]):g}",
            f"{after[row, column]:.8g}",
        )
        for row, column in zip(*np.unravel_index(flat, codes.shape), strict=True)
    )
    return Part(title="5. Halving", text=text + " The largest of the block:", head=head, rows=rows)


def _alternatives_part(subject: Subject, costs: Sequence[Alternative]) -> Part:
    text = (
        "Every way to stay below 240, over the whole weight, against the published one: root mean square of the "
        "difference relative to that of the weight, largest difference relative to the largest weight, and how many "
        "elements change at all."
    )
    head: tuple[str, ...] = ("way", "relative RMS error", "largest", "elements changed")
    rows: list[tuple[str, ...]] = [
        (cost.name, f"{cost.relative_rms:.2e}", f"{cost.largest_relative:.2e}", f"{100 * cost.changed:.3f} %")
        for cost in costs
    ]
    if subject.original is not None:
        head = (*head, "from the original")
        rows = [(*row, f"{cost.from_original:.2e}") for row, cost in zip(rows, costs, strict=True)]
    figure = horizontal_bars([(cost.name, cost.relative_rms) for cost in costs], "Relative RMS error, logarithmic")
    return Part(
        title="6. What each way costs", text=text, head=head, rows=tuple(rows), figure=figure, figure_file=FIGURE
    )
