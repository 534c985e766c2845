"""One pass over every weight and scale of a checkpoint, checked and measured as it streams past.

Shapes: R rows, C columns of a weight; its scales and its block maxima are [ceil(R / block rows),
ceil(C / block columns)]. Every code is checked; the histogram and the norms come from one row of
each block, which is said where shown. It is another one in each: the first row of each block of
q_proj is a head's fastest rotary channel, which is not an average one. Scales are read as they are
stored, and what they mean is decided from all of them (not from samples, as a conversion does).
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count as counting
from math import prod
from typing import Any
from zlib import crc32

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.schema import Expected
from neuron_minimax.checkpoint.streaming import PageDropper, in_processes
from neuron_minimax.errors import CheckpointError, counted
from neuron_minimax.families import Role, module_of
from neuron_minimax.fp8 import ScaleConvention, bfloat16
from neuron_minimax.inspection.findings import Finding
from neuron_minimax.progress import Advance, nothing

SAMPLE = "one row of each block"  # what goes into the histogram and the norms
SAMPLE_STEP = 37  # rows on from one block row to the next; coprime to the usual heights of blocks
# A block whose largest code is below wastes two bits of range.
LOW_CODE = fp8.encode(np.array([fp8.OCP_MAX / 4], dtype=np.float32))[0]
AT_ONCE = 8  # tensors that a process measures before it reports on them
STRIP_BYTES = 1 << 20
# The bits of infinity, beyond which NaNs lie, by dtype.
INFINITIES = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
SQUARES = np.nan_to_num(fp8.DECODED.astype(np.float32) ** 2)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The result of one pass over one tensor; `maxima` are the largest codes of its blocks,
    `scales` its scales as stored.

    `medians` are `fp8.median_maxima`, None also where the tensor is faulty.
    """

    weight: Expected
    elements: int
    bad: int = 0
    all_zero: bool = False
    histogram: np.ndarray | None = None
    maxima: np.ndarray | None = None
    scales: np.ndarray | None = None
    medians: tuple[float, float] | None = None
    norms: tuple[float, float] = (0.0, 0.0)  # with the scales as multiplier, and as reciprocal
    low: float = 0.0
    high: float = 0.0
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ScaleRow:
    """Scales of one kind (`layer` None) or of one kind in one layer, those that are positive and
    finite.
    """

    kind: str
    layer: int | None
    blocks: int
    minimum: float
    median: float
    maximum: float
    low_range_blocks: int  # largest code of the block below 112, a quarter of 448


@dataclass(frozen=True, kw_only=True)
class ValueReport:
    """The values of a checkpoint in numbers. The histogram counts each of the 256 codes in one row
    of each block; maxima are over all.
    """

    bytes_read: int
    codes: int
    histogram: tuple[int, ...]
    scales: tuple[ScaleRow, ...]
    layer_scales: tuple[ScaleRow, ...]
    convention: str | None
    evidence: str
    router_bias: tuple[tuple[float, float], ...]
    # [layers][experts], Frobenius norm of an expert's weights, from sampled rows
    expert_norms: tuple[tuple[float, ...], ...]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, null for NaN; the keys are described in docs/inspect.md."""
        rows = {
            "scales": [vars(row) for row in self.scales],
            "layer_scales": [vars(row) for row in self.layer_scales],
        }
        return finite(
            {name: value for name, value in vars(self).items() if name != "findings"} | rows
        )


def finite(value: Any) -> Any:
    """A nested JSON value with None in place of NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def check_values(checkpoint: Checkpoint, advance: Advance = nothing) -> ValueReport:
    """Read every expected tensor once, on all cores; `advance` is called with bytes read.

    Faults are findings, not errors: each names its tensor. Tensors whose headers are wrong are left
    out.
    """
    broken = {problem.subject for problem in checkpoint.problems}
    wanted = [
        weight
        for weight in schema.expected(checkpoint.config)
        if not weight.is_scale and weight.name in checkpoint.entries and weight.name not in broken
    ]
    wanted.sort(
        key=lambda weight: (
            checkpoint.entry(weight.name).shard,
            checkpoint.entry(weight.name).start,
        )
    )
    tally = _Tally(checkpoint)
    dropper = PageDropper((checkpoint,), checkpoint.nbytes)
    tasks = [partial(_measure_and_unmap, checkpoint, weight, broken, dropper) for weight in wanted]
    for measurement in in_processes(
        tasks, sum(_nbytes(checkpoint, weight) for weight in wanted), AT_ONCE
    ):
        tally.add(measurement)
        advance(_nbytes(checkpoint, measurement.weight))
        dropper.advance(_nbytes(checkpoint, measurement.weight))
    dropper.finish()
    return tally.report()


def _measure_and_unmap(
    checkpoint: Checkpoint, weight: Expected, broken: Collection[str], dropper: PageDropper
) -> Measurement:
    found = measure(checkpoint, weight, broken)
    dropper.unmap()
    return found


def _nbytes(checkpoint: Checkpoint, weight: Expected) -> int:
    scale = checkpoint.entries.get(schema.scale_name(weight.name))
    return checkpoint.entry(weight.name).nbytes + (scale.nbytes if scale else 0)


def measure(checkpoint: Checkpoint, weight: Expected, broken: Collection[str] = ()) -> Measurement:
    """One pass over one tensor, and what is wrong with it."""
    if not checkpoint.is_fp8(weight.name):
        found = _measure_plain(weight, checkpoint)
        return replace(found, findings=tuple(_findings_of(found)))
    scale_name = schema.scale_name(weight.name)
    scaled = scale_name in checkpoint.entries and scale_name not in broken
    scales = checkpoint.scales(weight.name) if scaled else None
    found = _measure_codes(weight, checkpoint, scales)
    findings = tuple(_findings_of(found))
    medians = None
    if (
        found.maxima is not None
        and scales is not None
        and not any(each.severity == "error" for each in findings)
    ):
        medians = fp8.median_maxima(found.maxima, scales)
    return replace(found, findings=findings, medians=medians)


def _measure_plain(weight: Expected, checkpoint: Checkpoint) -> Measurement:
    """Measure a tensor that is no FP8: elements that are not numbers, whether all are zero, the
    bias's range.
    """
    entry = checkpoint.entry(weight.name)
    bad = 0
    all_zero = True
    low = np.inf
    high = -np.inf
    for strip in checkpoint.strips(
        weight.name, max(1, STRIP_BYTES * entry.shape[0] // entry.nbytes)
    ):
        if weight.weight.role is Role.ROUTER_BIAS:
            values = bfloat16.to_float32(strip)
            low = np.minimum(low, values.min())
            high = np.maximum(high, values.max())
        bits = strip.view(f"u{strip.itemsize}")
        magnitude = np.bitwise_and(bits, np.iinfo(bits.dtype).max >> 1, out=bits)
        infinity = INFINITIES[entry.dtype]
        largest = magnitude.max()
        bad += int(np.count_nonzero(magnitude >= infinity)) if largest >= infinity else 0
        all_zero = all_zero and bool(largest == 0)
    unseen = low > high  # False with NaN, which stays
    return Measurement(
        weight=weight,
        elements=prod(entry.shape),
        bad=bad,
        all_zero=all_zero,
        low=0.0 if unseen else float(low),
        high=0.0 if unseen else float(high),
    )


def _measure_codes(
    weight: Expected, checkpoint: Checkpoint, scales: np.ndarray | None
) -> Measurement:
    name = weight.name
    block = checkpoint.config.weight_block_size
    rows, columns = checkpoint.entry(name).shape
    in_block = np.diff([*range(0, rows, block[0]), rows])
    sampled = np.empty((len(in_block), columns), np.uint8)

    def magnitudes() -> Iterator[np.ndarray]:
        strips = checkpoint.strips(name, block[0])
        for row, sample, strip in zip(
            counting(crc32(name.encode()), SAMPLE_STEP), sampled, strips, strict=False
        ):
            sample[:] = strip[row % len(strip)]
            yield np.bitwise_and(strip, 0x7F, out=strip)

    maxima = fp8.largest_magnitudes(magnitudes(), block[1])
    norms = (0.0, 0.0)
    if scales is not None:
        seen = np.add.reduceat(np.take(SQUARES, sampled), np.arange(0, columns, block[1]), axis=1)
        squares = seen * in_block[:, None]
        squared_scales = scales.astype(np.float64) ** 2
        with np.errstate(all="ignore"):
            norms = (
                float(np.sqrt((squares * squared_scales).sum())),
                float(np.sqrt((squares[squares > 0] / squared_scales[squares > 0]).sum())),
            )
    bad = 0
    if maxima.max() == fp8.CODE_NAN:
        bad = sum(
            int(np.count_nonzero((strip & 0x7F) == fp8.CODE_NAN))
            for strip in checkpoint.strips(name, block[0])
        )
    return Measurement(
        weight=weight,
        elements=rows * columns,
        bad=bad,
        all_zero=not maxima.any(),
        histogram=np.bincount(sampled.reshape(-1), minlength=256),
        maxima=maxima,
        scales=scales,
        norms=norms,
    )


class _Tally:
    """Measurements added up into a report."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.findings: list[Finding] = []
        self.counts: Counter[str] = Counter()
        self.histogram = np.zeros(256, np.int64)
        self.medians: list[tuple[str, tuple[float, float] | None]] = []
        self.grids: dict[tuple[str, int], list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self.bias: dict[int, tuple[float, float]] = {}
        config = checkpoint.config
        self.squared_norms = np.zeros((2, config.num_hidden_layers, config.num_local_experts))
        self.dead: Counter[tuple[int, int]] = Counter()

    def add(self, found: Measurement) -> None:
        weight = found.weight
        self.counts["bytes"] += _nbytes(self.checkpoint, weight)
        self.findings += found.findings
        if weight.expert is not None and found.all_zero:
            self.dead[weight.layer or 0, weight.expert] += 1
        if weight.weight.role is Role.ROUTER_BIAS:
            self.bias[weight.layer or 0] = (found.low, found.high)
        if found.histogram is None or found.maxima is None:
            return
        self.counts["codes"] += found.elements
        self.histogram += found.histogram
        if found.scales is not None:
            scales = np.array(found.scales, np.float32)
            kind = self.checkpoint.config.family.kind(weight.weight)
            self.grids[kind, weight.layer or 0].append(
                (scales.reshape(-1), found.maxima.reshape(-1))
            )
            self.medians.append((weight.name, found.medians))
        if weight.expert is not None and np.isfinite(found.norms).all():
            self.squared_norms[:, weight.layer or 0, weight.expert] += np.square(found.norms)

    def report(self) -> ValueReport:
        convention, evidence = fp8.convention_of_medians(self.medians)
        findings = [*self.findings, *self._dead_experts()]
        if convention is None and self.counts["codes"]:
            message = (
                f"what weight_scale_inv means is unclear: {evidence.render()}"
                + (
                    f"; they disagree in {', '.join(evidence.dissenters)}"
                    if evidence.dissenters
                    else ""
                )
                + "; look at these tensors, or say it with --scale-convention when converting"
            )
            subject = evidence.dissenters[0] if evidence.dissenters else "weight_scale_inv"
            findings.append(
                Finding(severity="error", kind="convention", subject=subject, message=message)
            )
        norms = np.sqrt(self.squared_norms[int(convention is ScaleConvention.RECIPROCAL)])
        kinds = dict.fromkeys(kind for kind, _ in self.grids)
        by_kind = {
            kind: [pair for key in self.grids if key[0] == kind for pair in self.grids[key]]
            for kind in kinds
        }
        return ValueReport(
            bytes_read=self.counts["bytes"],
            codes=self.counts["codes"],
            histogram=tuple(int(count) for count in self.histogram),
            scales=tuple(_scale_row(kind, None, pairs) for kind, pairs in by_kind.items()),
            layer_scales=tuple(
                _scale_row(kind, layer, pairs)
                for (kind, layer), pairs in sorted(self.grids.items())
            ),
            convention=None if convention is None else str(convention),
            evidence=evidence.render() if self.counts["codes"] else "no FP8 weights",
            router_bias=tuple(self.bias[layer] for layer in sorted(self.bias)),
            expert_norms=tuple(tuple(float(x) for x in row) for row in norms),
            findings=tuple(findings),
        )

    def _dead_experts(self) -> Iterator[Finding]:
        family = self.checkpoint.config.family
        if not self.dead:
            return
        weights = sum(weight.per_expert for weight in family.weights)
        module = module_of(module_of(family.weight_of(Role.EXPERT_GATE).template))
        for (layer, expert), count in sorted(self.dead.items()):
            message = (
                f"expert {expert} of layer {layer} is dead: {count} of its {weights} weights are "
                "all zero; "
                "tokens routed to it get nothing from it"
            )
            subject = module.format(l=layer, e=expert)
            yield Finding(severity="warning", kind="dead expert", subject=subject, message=message)


def _findings_of(found: Measurement) -> Iterator[Finding]:
    name = found.weight.name
    if found.bad:
        codes = f"{counted(found.bad, 'NaN code')} (0x7f or 0xff)"
        elements = counted(found.bad, "NaN or infinite element")
        message = (
            f"{name} has {elements if found.histogram is None else codes} of {found.elements}; "
            "expected none: download its shard again"
        )
        yield Finding(severity="error", kind="values", subject=name, message=message)
    if found.all_zero and found.weight.expert is None:
        message = (
            f"{name} is all zero: was it ever written? Download its shard again, or expect a dead "
            "module"
        )
        yield Finding(severity="warning", kind="values", subject=name, message=message)
    if found.scales is None:
        return
    scale_name = schema.scale_name(name)
    try:
        fp8.check_scales(scale_name, found.scales, found.maxima)
    except CheckpointError as error:
        yield Finding(severity="error", kind="values", subject=scale_name, message=str(error))


def _scale_row(
    kind: str, layer: int | None, pairs: list[tuple[np.ndarray, np.ndarray]]
) -> ScaleRow:
    scales, maxima = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    good = scales[np.isfinite(scales) & (scales > 0)]
    low, median, high = (good.min(), fp8.median(good), good.max()) if good.size else (np.nan,) * 3
    return ScaleRow(
        kind=kind,
        layer=layer,
        blocks=int(scales.size),
        minimum=float(low),
        median=float(median),
        maximum=float(high),
        low_range_blocks=int(np.count_nonzero(maxima < LOW_CODE)),
    )
