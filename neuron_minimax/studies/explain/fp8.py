"""One FP8 block step by step: codes, scale, its two readings, Neuron's reading, and costs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import CheckpointError
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.inspection.charts import horizontal_bars
from neuron_minimax.inspection.document import Part, to_html, to_markdown, to_text, write_text


@dataclass(frozen=True, kw_only=True)
class WeightBlock:
    """A block of an FP8 weight; `original` is there where the weight was quantized here."""

    name: str
    codes: np.ndarray
    scales: np.ndarray
    block: tuple[int, int]
    place: tuple[int, int]
    original: np.ndarray | None = None
    scale_dtype: str = "float32"

    @property
    def rows_and_columns(self) -> tuple[slice, slice]:
        row, column = (index * step for index, step in zip(self.place, self.block, strict=True))
        return slice(row, row + self.block[0]), slice(column, column + self.block[1])

    @property
    def block_codes(self) -> np.ndarray:
        return self.codes[self.rows_and_columns]

    @property
    def block_scale(self) -> np.float32:
        return self.scales[self.place]


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A way to a chip whose largest code is 240, and its error against the published weight."""

    name: str
    relative_rms: float
    largest_relative: float
    changed: float  # share of elements whose value differs
    from_original: float | None


def from_checkpoint(
    checkpoint: Checkpoint, tensor: str | None, place: tuple[int, int]
) -> WeightBlock:
    """Read a block of a checkpoint's weight, of the first FP8 weight where none is named.

    Raises CheckpointError naming the tensor when it is not there, not FP8, has no scales, or has no
    such block.
    """
    fp8_names = [name for name in checkpoint.entries if checkpoint.is_fp8(name)]
    if not fp8_names:
        raise CheckpointError(
            f"{checkpoint.directory} has no FP8 weights; there are no scales to explain"
        )
    name = tensor or fp8_names[0]
    if checkpoint.entry(name).dtype != "F8_E4M3":
        raise CheckpointError(
            f"{name} is {checkpoint.entry(name).dtype}; name an FP8 weight, such as {fp8_names[0]}"
        )
    codes = checkpoint.array(name)
    scales = checkpoint.scales(name)
    scale_dtype = checkpoint.entry(schema.scale_name(name)).dtype
    _check_place(name, scales, place)
    return WeightBlock(
        name=name,
        codes=codes,
        scales=scales,
        block=checkpoint.config.weight_block_size,
        place=place,
        scale_dtype="BF16" if scale_dtype == "BF16" else "float32",
    )


def made_here(seed: int = 0, place: tuple[int, int] = (0, 0)) -> WeightBlock:
    """Make and quantize a normal 256 x 384 weight of trained size, whose original is known.

    Raises CheckpointError when it has no such block.
    """
    original = np.random.default_rng(seed).normal(0, 0.02, (256, 384)).astype(np.float32)
    codes, scales = fp8.quantize(original, (128, 128))
    name = f"A normal weight made here (seed {seed})"
    _check_place(name, scales, place)
    return WeightBlock(
        name=name, codes=codes, scales=scales, block=(128, 128), place=place, original=original
    )


def _check_place(name: str, scales: np.ndarray, place: tuple[int, int]) -> None:
    if not (0 <= place[0] < scales.shape[0] and 0 <= place[1] < scales.shape[1]):
        raise CheckpointError(
            f"{name} has {scales.shape[0]} x {scales.shape[1]} blocks; there is no block {place}"
        )


def convention_of(subject: WeightBlock) -> ScaleConvention:
    """Return the reading under which this weight has trained size.

    Raises CheckpointError when neither reading does.
    """
    convention, evidence = fp8.decide_convention(
        [(subject.name, subject.codes, subject.scales)], subject.block
    )
    if convention is None:
        raise CheckpointError(
            f"{subject.name}: what its scales mean is unclear: {evidence.render()}"
        )
    return convention


def multipliers(subject: WeightBlock) -> np.ndarray:
    """Return the factors of the codes, under the right reading."""
    inverted = convention_of(subject) is ScaleConvention.RECIPROCAL
    return np.float32(1) / subject.scales if inverted else subject.scales


def ieee_e4m3(codes: np.ndarray) -> np.ndarray:
    """Decode as IEEE-style e4m3, largest finite 240: exponent 15 is infinity, or NaN."""
    magnitude = codes & 0x7F
    special = np.where(magnitude == 0x78, np.float32(np.inf), np.float32(np.nan))
    special = np.where(codes & 0x80, -special, special)
    return np.where(magnitude >= 0x78, special, fp8.decode(codes)).astype(np.float32)


def alternatives(subject: WeightBlock) -> list[Alternative]:
    """Compare halving, rescaling by 240/448, and one scale per row with the published weight."""
    factors = fp8.expand_scales(multipliers(subject), subject.codes.shape, subject.block)  # type: ignore[arg-type]
    published = fp8.decode(subject.codes) * factors
    halved = fp8.decode(fp8.halve(subject.codes)) * (factors * np.float32(2))
    ratio = np.float32(fp8.NEURON_MAX / fp8.OCP_MAX)
    rescaled = fp8.decode(fp8.encode(fp8.decode(subject.codes) * ratio)) * (factors / ratio)
    largest = np.abs(published).max(axis=1, keepdims=True)
    row_scales = np.where(largest > 0, largest / np.float32(fp8.NEURON_MAX), 1).astype(np.float32)
    per_row = fp8.decode(fp8.encode(published / row_scales)) * row_scales
    return [
        _alternative(
            "codes halved, scales doubled (this project)", halved, published, subject.original
        ),
        _alternative("values times 240/448, rounded again", rescaled, published, subject.original),
        _alternative("one scale per row, rounded again", per_row, published, subject.original),
    ]


def _alternative(
    name: str, values: np.ndarray, published: np.ndarray, original: np.ndarray | None
) -> Alternative:
    return Alternative(
        name=name,
        relative_rms=_relative_rms(values, published),
        largest_relative=float(np.abs(values - published).max() / np.abs(published).max()),
        changed=float(np.mean(values != published)),
        from_original=None if original is None else _relative_rms(values, original),
    )


def _relative_rms(values: np.ndarray, reference: np.ndarray) -> float:
    reference = reference.astype(np.float64)
    return float(np.sqrt(np.sum((values - reference) ** 2) / np.sum(reference**2)))


CORNER = (4, 8)  # rows and columns of the block that are shown
TITLE = "FP8 block scales, one block step by step"
GUIDE = "fp8_visual_guide.md"
PAGE = "fp8_visual_guide.html"
FIGURE = "fp8_errors.svg"
READINGS = "scale_comparison.txt"


def explain(subject: WeightBlock) -> list[Part]:
    """Return the walkthrough, one part for each step."""
    costs = alternatives(subject)
    return [
        _codes_part(subject),
        _scale_part(subject),
        _values_part(subject),
        _ieee_part(subject),
        _halving_part(subject),
        _alternatives_part(subject, costs),
    ]


def write_guide(subject: WeightBlock, directory: Path) -> str:
    """Write the guide as Markdown and HTML, and the two readings as text; return it as text.

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


def compare_readings(subject: WeightBlock, shown: int = 12) -> list[Part]:
    """Show both readings of weight_scale_inv block by block, as in scale_comparison.txt."""
    as_multiplier, as_reciprocal = fp8.block_maxima(subject.codes, subject.scales, subject.block)
    used = subject.scales.reshape(-1)
    if as_multiplier.size != used.size:  # all-zero blocks say nothing
        used = np.full(as_multiplier.size, np.nan, np.float32)
    rows = tuple(
        (
            str(place),
            f"{used[place]:.6e}",
            f"{as_multiplier[place]:.4e}",
            f"{as_reciprocal[place]:.4e}",
        )
        for place in range(min(shown, as_multiplier.size))
    )
    low, high = fp8.TRAINED_BLOCK_MAX
    right = convention_of(subject)
    text = (
        f"{subject.name}, block {list(subject.block)}, {subject.scales.size} blocks. The name "
        "says inverse, namely of "
        "the factor that the quantizer multiplied the weights with; the codes are to be "
        "multiplied with that inverse, "
        "the stored number itself. A file that stores the quantizer's factor would need the "
        "reciprocal. Which one it "
        "is shows in the values: the largest of a block of a trained weight lies between "
        f"{low:g} and {high:g}.\n\n"
        f"Read as multiplier, the median largest value is {np.median(as_multiplier):.3g}; read "
        "as reciprocal (divide "
        f"by it), {np.median(as_reciprocal):.3g}, "
        f"{np.median(as_reciprocal) / np.median(as_multiplier):.1e} times as "
        f"much. Right here: the {right}."
    )
    head = ("block", "weight_scale_inv", "largest value as multiplier", "as reciprocal")
    return [Part(title="Two readings of weight_scale_inv", text=text, head=head, rows=rows)]


def _corner(values: np.ndarray) -> np.ndarray:
    return values[: CORNER[0], : CORNER[1]]


def _grid(cells: np.ndarray, form: str) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Return head and rows of a table of the block's first values."""
    head = ("row", *(f"column {column}" for column in range(cells.shape[1])))
    return head, tuple(
        (str(row), *(format(cell, form) for cell in line)) for row, line in enumerate(cells)
    )


def _codes_part(subject: WeightBlock) -> Part:
    code = int(subject.block_codes[0, 0])
    sign = code >> 7
    exponent = (code >> 3) & 15
    mantissa = code & 7
    formula = f"(1 + {mantissa}/8) * 2^({exponent} - 7)" if exponent else f"{mantissa}/8 * 2^-6"
    rows, columns = subject.rows_and_columns
    text = (
        f"{subject.name} is {subject.codes.shape[0]} x {subject.codes.shape[1]} codes of one byte. "
        f"Block {list(subject.place)} covers rows {rows.start} to "
        f"{min(rows.stop, subject.codes.shape[0]) - 1} and columns {columns.start} to "
        f"{min(columns.stop, subject.codes.shape[1]) - 1}. A code is one sign bit, four exponent "
        f"bits (bias 7) and three mantissa bits. The first, 0x{code:02x}, is sign {sign}, exponent "
        f"{exponent}, mantissa {mantissa}: {'-' if sign else ''}{formula} = {fp8.DECODED[code]:g}."
    )
    head, cells = _grid(_corner(subject.block_codes), "#04x")
    return Part(title="1. Codes", text=text, head=head, rows=cells)


def _scale_part(subject: WeightBlock) -> Part:
    stored = subject.block_scale
    largest = float(np.nanmax(np.abs(fp8.decode(subject.block_codes))))
    right = convention_of(subject)
    low, high = fp8.TRAINED_BLOCK_MAX
    text = (
        f"The block has one {subject.scale_dtype} number, weight_scale_inv = {stored:.8g}. Its "
        f"largest code is worth {largest:g} (a quantizer puts it at 448). Only one of the two "
        f"readings gives a weight of trained size, between {low:g} and {high:g}."
    )
    rows = (
        (
            "multiplier",
            "code * x",
            f"{largest * stored:.6g}",
            "right" if right == "multiplier" else "wrong",
        ),
        (
            "reciprocal",
            "code / x",
            f"{largest / stored:.6g}",
            "right" if right == "reciprocal" else "wrong",
        ),
    )
    head = ("reading", "weight", "largest value of the block", "here")
    return Part(title="2. The scale", text=text, head=head, rows=rows)


def _values_part(subject: WeightBlock) -> Part:
    factor = multipliers(subject)[subject.place]
    values = fp8.decode(subject.block_codes) * factor
    code = fp8.decode(subject.block_codes[0, 0])
    text = (
        f"Every weight of the block is its code's value times {factor:.8g}, rounded once to "
        f"float32. The first: {code:g} * {factor:.8g} = {values[0, 0]:.8g}. Over the block the "
        f"values go from {values.min():.4g} to {values.max():.4g}."
    )
    head, rows = _grid(_corner(values), ".5f")
    return Part(title="3. Dequantized values", text=text, head=head, rows=rows)


def _ieee_part(subject: WeightBlock) -> Part:
    read = ieee_e4m3(subject.block_codes)
    lost = int(np.count_nonzero(~np.isfinite(read)))
    all_lost = ~np.isfinite(ieee_e4m3(subject.codes))
    grid_rows = np.arange(0, subject.codes.shape[0], subject.block[0])
    grid_columns = np.arange(0, subject.codes.shape[1], subject.block[1])
    blocks = np.logical_or.reduceat(
        np.logical_or.reduceat(all_lost, grid_rows, axis=0), grid_columns, axis=1
    )
    text = (
        "trn1, inf2 and trn2 read the same byte as IEEE-style e4m3: exponent 15 means infinity or "
        "NaN there, so the largest finite value is 240 and the codes 0x78 to 0x7e (256 to 448) are "
        f"lost. In this block {lost} of {read.size} codes are; in the whole weight "
        f"{100 * all_lost.mean():.2f} % of the codes, in {int(blocks.sum())} of its {blocks.size} "
        "blocks."
    )
    counts = np.bincount((subject.codes & 0x7F).reshape(-1), minlength=128)
    on_neuron = ieee_e4m3(np.arange(128, dtype=np.uint8))
    rows = tuple(
        (f"0x{code:02x}", f"{fp8.DECODED[code]:g}", f"{on_neuron[code]:g}", f"{counts[code]:,}")
        for code in range(0x76, 0x7F)
    )
    head = ("code", "OCP e4m3fn", "IEEE e4m3", "in this weight, either sign")
    return Part(title="4. The same bytes on Neuron", text=text, head=head, rows=rows)


def _halving_part(subject: WeightBlock) -> Part:
    codes = subject.block_codes
    factor = multipliers(subject)[subject.place]
    before = fp8.decode(codes) * factor
    after = fp8.decode(fp8.halve(codes)) * (factor * np.float32(2))
    text = (
        "Half of every value is again a code, except for the odd subnormals below 16 * 2^-9, so "
        "each code is replaced by that of half its value and the scale is doubled, to "
        f"{factor * 2:.8g}. The largest code is then "
        f"{float(np.abs(fp8.decode(fp8.halve(codes))).max()):g}. "
        f"{int(np.count_nonzero(before != after))} of the {codes.size} values of this block "
        f"change, {fp8.count_rounded(subject.codes)} of the {subject.codes.size:,} of the whole "
        "weight."
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


def _alternatives_part(subject: WeightBlock, costs: Sequence[Alternative]) -> Part:
    text = (
        "Every way to stay below 240, over the whole weight, against the published one: root mean "
        "square of the difference relative to that of the weight, largest difference relative to "
        "the largest weight, and how many elements change at all."
    )
    head: tuple[str, ...] = ("way", "relative RMS error", "largest", "elements changed")
    rows: list[tuple[str, ...]] = []
    for cost in costs:
        errors = (f"{cost.relative_rms:.2e}", f"{cost.largest_relative:.2e}")
        rows.append((cost.name, *errors, f"{100 * cost.changed:.3f} %"))
    if subject.original is not None:
        head = (*head, "from the original")
        rows = [(*row, f"{cost.from_original:.2e}") for row, cost in zip(rows, costs, strict=True)]
    figure = horizontal_bars(
        [(cost.name, cost.relative_rms) for cost in costs], "Relative RMS error, logarithmic"
    )
    return Part(
        title="6. What each way costs",
        text=text,
        head=head,
        rows=tuple(rows),
        figure=figure,
        figure_file=FIGURE,
    )
