"""The loading path step by step: shards, names, rules with values, scales, leftovers, result.

Nothing is computed here: what is shown is the conversion's own plan and its own pieces
(`convert/binding.py`, `convert/pieces.py`), so what this says is what a conversion does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.reader import Checkpoint, TensorDirectory
from neuron_minimax.checkpoint.schema import SCALE_SUFFIX
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.binding import ConvertedTensor, Transform
from neuron_minimax.convert.pieces import convert_piece
from neuron_minimax.convert.plan import ConversionPlan, Converted, plan_conversion
from neuron_minimax.errors import NeuronMiniMaxError, counted
from neuron_minimax.families import Role
from neuron_minimax.families.family import Operation
from neuron_minimax.inspection.document import Part, Rendered, to_text
from neuron_minimax.planner.memory import EXPANDED_SCALES, EXPERT_SCALES, settled_scales

PREFIX = "model."
SHOWN = 12
NOTHING_SHOWN = "Give --grep a part of a name, or --layer the number of a layer."
BAD_VALUES = (
    "`neuron-minimax inspect --check-values` names every such tensor; download its shard again."
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the path: what it does, what was found, and, where it is wrong, what to do."""

    title: str
    sentence: str
    wrong: str = ""
    advice: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()

    def as_part(self) -> Part:
        verdict = f"WRONG: {self.wrong.rstrip('.')}." if self.wrong else "Right."
        return Part(
            title=self.title,
            text=f"{self.sentence}\n\n{verdict} {self.advice}",
            head=self.head,
            rows=self.rows,
        )


@dataclass(frozen=True, kw_only=True)
class Walk(Rendered):
    """All stages that could be walked; the path ends at the first that is wrong."""

    stages: tuple[Stage, ...]

    @property
    def first_wrong(self) -> Stage | None:
        return next((stage for stage in self.stages if stage.wrong), None)

    def render(self, title: str = "Loading path") -> str:
        """The stages and the verdict as text."""
        return to_text(title, self.parts())

    def parts(self) -> list[Part]:
        """The stages, then the verdict."""
        wrong = self.first_wrong
        text = (
            f'Stage "{wrong.title}" is wrong. {wrong.advice}' if wrong else "Every stage is right."
        )
        return [*(stage.as_part() for stage in self.stages), Part(title="Verdict", text=text)]


def walk_state_dict(
    checkpoint: Checkpoint,
    converted: Path | None = None,
    layer: int | None = None,
    grep: str | None = None,
    moe_tp_degree: int | None = None,
) -> Walk:
    """Walk the loading path of an opened checkpoint; with `converted`, also compare that directory,
    and with `moe_tp_degree` say what so many ranks hold of the experts that they share.

    Shows the rules of the weights outside the layers and of one layer (`layer`, 0 when none is
    given), or those whose names contain `grep`, in all layers or in that one.
    """
    stages = list(_stages(checkpoint, converted, layer, grep))
    if moe_tp_degree is not None and not any(stage.wrong for stage in stages):
        stages.append(_shares(checkpoint.config, moe_tp_degree))
    return Walk(stages=tuple(stages))


def _shares(config: ModelConfig, moe_tp_degree: int) -> Stage:
    """What a rank holds of an expert, of those that NxD cuts along the intermediate channels."""
    title = "Experts on a rank"
    if not config.family.architecture.has_experts:
        sentence = f"{config.family.title} has no experts to share."
        return Stage(title=title, sentence=sentence, wrong=sentence, advice="Leave the degree out.")
    if moe_tp_degree < 1 or config.intermediate_size % moe_tp_degree:
        return Stage(
            title=title,
            sentence=f"Shares {config.intermediate_size} channels among {moe_tp_degree} ranks.",
            wrong="they do not divide",
            advice=f"Take a moe_tp_degree that divides {config.intermediate_size}.",
        )
    channels = config.intermediate_size // moe_tp_degree
    scales = settled_scales(EXPERT_SCALES[0], config, moe_tp_degree)
    rows, columns = config.weight_block_size
    along = 1 if scales == EXPANDED_SCALES else rows
    hidden = config.hidden_size
    hidden_blocks = fp8.ceil_div(hidden, columns)
    forms = (
        (Role.EXPERT_GATE, (hidden, 2 * channels), (hidden_blocks, 2 * channels // along)),
        (Role.EXPERT_DOWN, (channels, hidden), (channels // along, hidden_blocks)),
    )
    why = (
        f"not whole blocks of {rows}, so each channel gets the scales of its block"
        if scales == EXPANDED_SCALES
        else f"whole blocks of {rows}, which keep a scale each"
    )
    return Stage(
        title=title,
        sentence=f"NxD cuts {config.intermediate_size} channels for "
        f"{counted(moe_tp_degree, 'rank')}: "
        f"{channels} are {why} (--expert-scales auto: {scales}). Scales are of FP8 experts; those "
        "in BF16 have none.",
        head=("module", "a rank's weight of an expert", "its scales"),
        rows=tuple(
            (config.family.module(role), str(list(weight)), str(list(scale)))
            for role, weight, scale in forms
        ),
    )


def _stages(
    checkpoint: Checkpoint, directory: Path | None, layer: int | None, grep: str | None
) -> Iterator[Stage]:
    yield _reading(checkpoint)
    yield _prefix(checkpoint)
    if checkpoint.problems:
        return
    converted, complaint = _open_converted(directory)
    try:
        conversion = plan_conversion(checkpoint, converted.layout if converted else None)
    except NeuronMiniMaxError as error:
        advice = "Look at the tensors it names with `neuron-minimax inspect --check-values`."
        yield Stage(
            title="Rules",
            sentence="Binds every rule to this checkpoint's tensors.",
            wrong=str(error),
            advice=advice,
        )
        return
    shown = _selected(conversion, layer, grep)
    stage = _rules(conversion, checkpoint, shown)
    yield stage
    if stage.wrong:
        return
    yield _scales(conversion, checkpoint)
    yield _leftovers(conversion, checkpoint)
    if directory is not None:
        yield _result(conversion, directory, converted, complaint, shown)


def _open_converted(directory: Path | None) -> tuple[Converted | None, str]:
    """Return a converted directory, or what is wrong with its manifest."""
    if directory is None:
        return None, ""
    try:
        return Converted.open(directory), ""
    except NeuronMiniMaxError as error:
        return None, str(error)


def _reading(checkpoint: Checkpoint) -> Stage:
    counts: dict[str, int] = {}
    for entry in checkpoint.entries.values():
        counts[entry.shard] = counts.get(entry.shard, 0) + 1
    rows = [(shard, f"{counts.get(shard, 0):,}") for shard in checkpoint.shards[:SHOWN]]
    if len(checkpoint.shards) > SHOWN:
        rest = checkpoint.shards[SHOWN:]
        rows.append((f"and {len(rest)} more", f"{sum(counts.get(shard, 0) for shard in rest):,}"))
    first_of_kind = {problem.kind: str(problem) for problem in reversed(checkpoint.problems)}
    problems = "; ".join(reversed(first_of_kind.values()))
    rest_of_problems = len(checkpoint.problems) - len(first_of_kind)
    more = f"; and {rest_of_problems} more of these kinds" if rest_of_problems else ""
    return Stage(
        title="Shards",
        sentence="Reads the header of every file the index names and checks names, shapes and "
        "dtypes against "
        f"config.json; {counted(len(checkpoint.entries), 'tensor')} in "
        f"{counted(len(checkpoint.shards), 'file')}.",
        wrong=problems + more,
        advice="`neuron-minimax inspect` lists all of it; each message says what to do."
        if problems
        else "",
        head=("file", "tensors"),
        rows=tuple(rows),
    )


def _prefix(checkpoint: Checkpoint) -> Stage:
    names = list(checkpoint.entries)
    prefixed = [name for name in names if name.startswith(PREFIX)]
    examples = [*prefixed[:1], *[name for name in names if not name.startswith(PREFIX)][:1]]
    return Stage(
        title="Prefix",
        sentence=f"NxDI takes the leading `{PREFIX}` off every name before it loads; "
        f"{len(prefixed):,} of "
        f"{len(names):,} names have it. The names below are those of the files; targets have none.",
        head=("in the file", "as NxDI sees it"),
        rows=tuple((name, name.removeprefix(PREFIX)) for name in examples),
    )


def _selected(
    conversion: ConversionPlan, layer: int | None, grep: str | None
) -> list[ConvertedTensor]:
    wanted = layer if layer is not None or grep is not None else 0
    return [
        output
        for output in conversion.outputs
        if (wanted is None or output.layer in (None, wanted))
        and (
            grep is None
            or grep in output.name
            or any(grep in name for group in output.groups for name in group)
        )
    ]


def _rules(
    conversion: ConversionPlan, checkpoint: Checkpoint, shown: list[ConvertedTensor]
) -> Stage:
    rows: list[tuple[str, ...]] = []
    wrong = "" if shown else "no target or source has such a name or layer"
    advice = BAD_VALUES if shown else NOTHING_SHOWN
    for output in shown:
        try:
            before, after = _first_values(conversion, output)
        except NeuronMiniMaxError as error:
            wrong = wrong or str(error)
            before = "?"
            after = "?"
        for place, source in enumerate(output.source_templates):
            entry = checkpoint.entry(output.groups[0][place])
            times = f" x {len(output.groups)}" if output.rule.per_expert else ""
            rows.append(
                (
                    source,
                    f"{entry.spec.form}{times}",
                    before if place == 0 else "",
                    "",
                )
            )
        steps = ["copied" if output.rule.operation is Operation.COPY else "stacked"]
        steps += [str(output.transform)] if output.transform is not Transform.KEEP else []
        form = output.spec.form
        rows.append((f"-> {output.name}", form, after, ", ".join(steps)))
    family = conversion.config.family
    stacked = ""
    if family.architecture.has_experts:
        gate, up = (family.weight_of(role).module for role in (Role.EXPERT_GATE, Role.EXPERT_UP))
        stacked = f" Stacked: the experts {{e}} in one tensor, each transposed, {up} beside {gate}."
    sentence = (
        "One rule makes each target (->) from the sources above it; "
        f"{counted(len(conversion.outputs), 'target')} in all, {len(shown)} shown.{stacked} The "
        "value is the first of the first block; behind a scale, in brackets, the first "
        "weight: code times scale."
    )
    return Stage(
        title="Rules",
        sentence=sentence,
        wrong=wrong,
        advice=advice if wrong else "",
        head=("name", "form", "first value", "how"),
        rows=tuple(rows),
    )


def _first_values(conversion: ConversionPlan, output: ConvertedTensor) -> tuple[str, str]:
    """Return the first element in the file and in the result, made by the conversion's own code.

    Behind a scale stands the first weight.
    """
    checkpoint = conversion.source
    name = output.groups[0][0]
    if output.is_scale:
        before = f"{checkpoint.scales(name.removesuffix(SCALE_SUFFIX))[0, 0]:.4e}"
    else:
        stored = checkpoint.array(name).reshape(-1)[0]
        before = _element_text(stored, checkpoint.entry(name).dtype)
    made = _first_element(checkpoint, output)
    after = _element_text(made, output.dtype)
    if output.transform is Transform.DEQUANTIZE:
        before = f"{before} * {checkpoint.scales(name)[0, 0]:.4e}"
    if output.is_scale:
        weight = next(
            other
            for other in conversion.outputs
            if other.rule is output.rule and other.layer == output.layer
        )
        code = fp8.DECODED[checkpoint.array(weight.groups[0][0]).reshape(-1)[0]]
        factor = checkpoint.multipliers(name.removesuffix(SCALE_SUFFIX))[0, 0]
        new_code = fp8.DECODED[int(_first_element(checkpoint, weight))]
        before = f"{before} ({code * factor:.4e})"
        after = f"{after} ({new_code * made:.4e})"
    return before, after


def _first_element(checkpoint: Checkpoint, output: ConvertedTensor) -> Any:
    rows = slice(None) if output.is_scale else slice(0, checkpoint.config.weight_block_size[0])
    return convert_piece(output, checkpoint, 0, rows)[0].reshape(-1)[0]


def _element_text(element: np.generic, dtype: str) -> str:
    if dtype == "F8_E4M3":
        return f"0x{int(element):02x} ({fp8.DECODED[int(element)]:g})"
    if dtype == "BF16":
        return f"{np.array([int(element) << 16], np.uint32).view(np.float32)[0]:.4e}"
    return f"{float(element):.4e}"


def _scales(conversion: ConversionPlan, checkpoint: Checkpoint) -> Stage:
    if not conversion.scale_count:
        return Stage(title="Scales", sentence="No weight is stored as FP8, and so none has scales.")
    return Stage(
        title="Scales",
        sentence="weight_scale_inv becomes `.scale`, the factor of the codes. It is read as "
        f"{checkpoint.convention}: {checkpoint.scale_reading[1].render()}."
        f"\n\nFP8 scales converted: {conversion.scale_count}\n\nmodules_to_not_convert for NxDI: "
        f"{', '.join(conversion.modules_to_not_convert) or 'none'}.",
    )


def _leftovers(conversion: ConversionPlan, checkpoint: Checkpoint) -> Stage:
    used = {
        name
        for output in conversion.outputs
        for group in (*output.groups, *output.scale_groups)
        for name in group
    }
    left = [name for name in checkpoint.entries if name not in used]
    return Stage(
        title="Left over",
        sentence=f"{len(used):,} of {len(checkpoint.entries):,} tensors are used, each once; "
        f"left out on purpose (multi-token prediction): {len(left)}.",
        head=("left out",) if left else (),
        rows=tuple((name,) for name in left[:SHOWN]),
    )


def _result(
    conversion: ConversionPlan,
    directory: Path,
    converted: Converted | None,
    complaint: str,
    shown: list[ConvertedTensor],
) -> Stage:
    sentence = (
        f"Compares {directory} with the plan: its manifest, every name, shape and dtype, its "
        "config.json, and the first piece of each target shown above, byte by byte."
    )
    if converted is None:
        return Stage(title="Converted directory", sentence=sentence, wrong=complaint)
    try:
        found = _disagreements(conversion, converted, shown)
    except NeuronMiniMaxError as error:
        found = [str(error)]
    return Stage(
        title="Converted directory",
        sentence=sentence,
        wrong="; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else ""),
        advice="Convert again with --overwrite; `neuron-minimax verify` compares every byte."
        if found
        else "",
    )


def _disagreements(
    conversion: ConversionPlan, converted: Converted, shown: list[ConvertedTensor]
) -> list[str]:
    made_of = converted.manifest.identity.source_fingerprint
    if made_of != conversion.source.fingerprint:
        return [
            f"{converted.directory} was made of another checkpoint (its manifest names another "
            "source fingerprint)"
        ]
    stored = TensorDirectory(converted.directory)
    found = [str(problem) for problem in stored.problems]
    planned = {output.name: output for output in conversion.outputs}
    found += [f"{name} is in no rule" for name in stored.entries if name not in planned]
    for name, output in planned.items():
        entry = stored.entries.get(name)
        if entry is None:
            found.append(f"{name} is missing")
        elif entry.spec != output.spec:
            found.append(f"{name} is {entry.spec.form}, not {output.spec.form}")
        elif output in shown and not _same_first_piece(conversion.source, output, stored):
            found.append(f"{name} has other values than its sources give")
    listed = converted.config.modules_to_not_convert
    if stored.entries and listed != (
        conversion.modules_to_not_convert if _is_quantized(conversion) else ()
    ):
        found.append(
            f"config.json lists modules_to_not_convert {list(listed)}, not "
            f"{conversion.modules_to_not_convert}"
        )
    return found


def _is_quantized(conversion: ConversionPlan) -> bool:
    return any(output.dtype == "F8_E4M3" for output in conversion.outputs)


def _same_first_piece(
    checkpoint: Checkpoint, output: ConvertedTensor, stored: TensorDirectory
) -> bool:
    rows = (
        slice(None)
        if output.is_scale or output.rule.per_expert
        else slice(0, checkpoint.config.weight_block_size[0])
    )
    piece, _ = convert_piece(output, checkpoint, 0, rows)
    there = stored.array(output.name)
    there = there[0] if output.rule.per_expert else there[rows]
    return piece.shape == there.shape and piece.tobytes() == there.tobytes()
