"""Compare logits, and state the verdict of a check.

Shapes: N rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from textwrap import fill
from typing import Any

import torch

from neuron_minimax.device_check.reference import Fault
from neuron_minimax.device_check.schedule import Phase, Row
from neuron_minimax.errors import counted
from neuron_minimax.inspection.document import Rendered

# Least relative error that counts as one, per compute dtype: the order of sums alone gives less.
LEAST_TOLERANCE = {"float32": 1e-4, "bf16": 0.01}
# The device and the CPU's BF16 each lie about one rounding error away from float32, in different
# directions; the largest of other rows may be twice as far away.
ROUNDING_ERRORS = 4


class Status(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


@dataclass(frozen=True, kw_only=True)
class ProbeMeasurement(Rendered):
    """A difference and what is allowed, in the unit that `what` names, and where the tolerance
    comes from.
    """

    what: str
    difference: float
    tolerance: float
    source: str

    def render(self) -> str:
        return f"{self.what}: {self.difference:.3g}, allowed {self.tolerance:.3g} ({self.source})"


@dataclass(frozen=True, kw_only=True)
class Verdict(Rendered):
    """The outcome of one check: what was found, and for a failure what it means and what to do."""

    check: str
    status: Status
    finding: str
    measured: ProbeMeasurement | None = None
    meaning: str = ""
    next_step: str = ""

    def render(self) -> str:
        lines = [f"{self.status:7} {self.check}: {self.finding}"]
        if self.measured is not None:
            lines.append(self.measured.render())
        if self.meaning:
            lines.append(f"what it means: {self.meaning}")
        if self.next_step:
            lines.append(f"next step: {self.next_step}")
        indent = " " * 8
        first, *others = lines
        wrapped = [fill(first, 100, subsequent_indent=indent)]
        wrapped += [
            fill(line, 100, initial_indent=indent, subsequent_indent=indent) for line in others
        ]
        return "\n".join(wrapped)


@dataclass(frozen=True, kw_only=True)
class Report(Rendered):
    """All verdicts, in the order of the checks, and what was checked."""

    title: str
    verdicts: tuple[Verdict, ...]

    @property
    def passed(self) -> bool:
        """True when something was checked and nothing failed."""
        statuses = [verdict.status for verdict in self.verdicts]
        return Status.PASS in statuses and Status.FAIL not in statuses

    def render(self) -> str:
        passed = sum(verdict.status is Status.PASS for verdict in self.verdicts)
        end = f"{passed} of {counted(len(self.verdicts), 'check')} passed"
        return "\n".join([self.title, *(verdict.render() for verdict in self.verdicts), end])

    def to_json(self) -> dict[str, Any]:
        verdicts = [asdict(verdict) for verdict in self.verdicts]
        return {"title": self.title, "passed": self.passed, "verdicts": verdicts}


def relative_error(found_NV: torch.Tensor, expected_NV: torch.Tensor) -> torch.Tensor:
    """Root mean square of the difference over that of the expected logits, [N]; infinite where
    nothing is finite.
    """
    difference_NV = found_NV.double() - expected_NV.double()
    error_N = difference_NV.norm(dim=1) / expected_NV.double().norm(dim=1).clamp_min(1e-30)
    return torch.where(error_N.isfinite(), error_N, torch.inf)


@dataclass(frozen=True, kw_only=True)
class KnownFault:
    """A fault, its logits [N,V] in both phases, and a way to those with the fault in token
    generation alone.
    """

    fault: Fault
    logits_NV: torch.Tensor
    only_steps: Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """The CPU's side of one check. Rows that are not `compared_N` are left out, because
    experts nearly tie there.
    """

    check: str
    rows: Sequence[Row]
    logits_NV: torch.Tensor
    float32_NV: (
        torch.Tensor
    )  # the same in float32; equal to `logits_NV` when that is the compute dtype
    compute: str
    compared_N: torch.Tensor
    faults: Sequence[KnownFault]
    if_wrong: str  # what a failure without a known cause means
    next_step: str
    minimum_rows: int = field(default=4)

    @property
    def tolerance(self) -> float:
        rounding = relative_error(self.logits_NV, self.float32_NV)[self.compared_N]
        largest = float(rounding.max()) if len(rounding) else 0.0
        return max(LEAST_TOLERANCE[self.compute], ROUNDING_ERRORS * largest)

    @property
    def tolerance_source(self) -> str:
        if self.tolerance == LEAST_TOLERANCE[self.compute]:
            return f"the least for {self.compute}"
        return (
            f"{ROUNDING_ERRORS} times what the CPU in {self.compute} differs from the CPU in "
            "float32"
        )


def tool_failure(check: str, finding: str, next_step: str) -> Verdict:
    """A check that cannot tell right from wrong, which must not pass."""
    return Verdict(
        check=check,
        status=Status.FAIL,
        finding=finding,
        meaning="the check itself cannot tell right from wrong here; this says nothing about the "
        "device",
        next_step=next_step,
    )


def unusable_logits(
    check: str, found_NV: torch.Tensor, expected_NV: torch.Tensor
) -> Verdict | None:
    """A failure when logits are of another shape, not finite, or all alike; None when they can
    be compared.
    """
    if found_NV.shape != expected_NV.shape:
        return Verdict(
            check=check,
            status=Status.FAIL,
            finding=f"the logits are {list(found_NV.shape)}, expected {list(expected_NV.shape)}",
            meaning="the device ran another model than the probe",
            next_step="remove the work directory and run again",
        )
    bad = int((~found_NV.isfinite()).any(dim=1).sum())
    if bad:
        return Verdict(
            check=check,
            status=Status.FAIL,
            finding=f"NaN or infinity in {bad} of {counted(len(found_NV), 'row')} of logits",
            meaning="codes above 240 that the chip reads as infinity, or a padding that reaches "
            "a product",
            next_step="see that the directory was converted with --fp8-range neuron, then look "
            "at graphs/compile.log",
        )
    if len(found_NV) > 1 and bool((found_NV == found_NV[0]).all()):
        return Verdict(
            check=check,
            status=Status.FAIL,
            finding="the device's logits are the same for every prompt",
            meaning="tokens do not reach the model: left padding, or weights that were never "
            "loaded",
            next_step="look at run.log for warnings of the loader",
        )
    return None


def judge_logits(expectation: Expectation, found_NV: torch.Tensor) -> Verdict:
    """Compare row by row, and name the cause of a difference where a known fault gives the same
    logits.
    """
    blind = _why_blind(expectation)
    if blind is not None:
        return blind
    unusable = unusable_logits(expectation.check, found_NV, expectation.logits_NV)
    if unusable is not None:
        return unusable
    error_N = relative_error(found_NV, expectation.logits_NV)
    wrong_N = (error_N > expectation.tolerance) & expectation.compared_N
    compared = int(expectation.compared_N.sum())
    left_out = len(error_N) - compared
    rows = counted(left_out, "row")
    tail = f"; {rows} left out, where experts nearly tie" if left_out else ""
    measured = ProbeMeasurement(
        what="largest relative difference of a row of logits",
        difference=float(error_N[expectation.compared_N].max()),
        tolerance=expectation.tolerance,
        source=expectation.tolerance_source,
    )
    if not wrong_N.any():
        finding = f"{counted(compared, 'row')} of logits as the CPU's{tail}"
        return Verdict(
            check=expectation.check, status=Status.PASS, finding=finding, measured=measured
        )
    where = _where(expectation, wrong_N)
    cause = _cause(expectation, found_NV, wrong_N)
    return Verdict(
        check=expectation.check,
        status=Status.FAIL,
        finding=f"{where}{tail}",
        measured=measured,
        meaning=f"the device's logits are those of a model where {cause}"
        if cause
        else expectation.if_wrong,
        next_step=expectation.next_step,
    )


def _why_blind(expectation: Expectation) -> Verdict | None:
    compared = int(expectation.compared_N.sum())
    if compared < expectation.minimum_rows:
        return tool_failure(
            expectation.check,
            f"only {counted(compared, 'row')} of logits can be compared; expected at least "
            f"{expectation.minimum_rows}",
            "choose another layer with --layer, where fewer tokens have experts that nearly tie",
        )
    if bool((expectation.logits_NV == expectation.logits_NV[0]).all()):
        return tool_failure(
            expectation.check,
            "the CPU's logits are the same for every prompt",
            "choose another layer with --layer; verify the converted directory",
        )
    for known in expectation.faults:
        error_N = relative_error(known.logits_NV, expectation.logits_NV)[expectation.compared_N]
        if float(error_N.max()) <= 2 * expectation.tolerance:
            return tool_failure(
                expectation.check,
                f"it would not see that {known.fault.says}: a relative difference of "
                f"{float(error_N.max()):.3g}, with a tolerance of {expectation.tolerance:.3g}",
                "choose another layer with --layer, or longer --buckets",
            )
    return None


def _where(expectation: Expectation, wrong_N: torch.Tensor) -> str:
    """Which phase is right and which wrong, in words."""
    counts = {}
    for phase in Phase:
        here_N = (
            torch.tensor([row.phase is phase for row in expectation.rows]) & expectation.compared_N
        )
        if here_N.any():
            counts[phase] = (int((wrong_N & here_N).sum()), int(here_N.sum()))
    parts = [
        f"{phase} wrong ({wrong} of {counted(total, 'row')})"
        if wrong
        else f"{phase} right ({counted(total, 'row')})"
        for phase, (wrong, total) in counts.items()
    ]
    return ", ".join(parts)


def _cause(expectation: Expectation, found_NV: torch.Tensor, wrong_N: torch.Tensor) -> str | None:
    """The known fault whose logits are the device's, if one is; in token generation alone when
    the rest is right.
    """
    steps_N = torch.tensor([row.phase is Phase.TOKEN_GENERATION for row in expectation.rows])
    only_steps = bool(steps_N.any()) and not bool((wrong_N & ~steps_N).any())
    for known in expectation.faults:
        logits_NV = known.only_steps() if only_steps else known.logits_NV
        error_N = relative_error(found_NV, logits_NV)[expectation.compared_N]
        if float(error_N.max()) <= 2 * expectation.tolerance:
            return known.fault.says + (", in token generation alone" if only_steps else "")
    return None
