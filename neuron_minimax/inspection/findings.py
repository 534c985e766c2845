"""Rows and findings of an inspection: kinds of weights, files and module lists, and where
config.json, a list of modules and the tensors disagree.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import ADVICE
from neuron_minimax.checkpoint.kinds import CONFIG_NAME
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.tokenizer_file import (
    GENERATION_NAME,
    NO_TEMPLATE,
    NO_TOKENIZER,
    TEMPLATE_NAMES,
    GenerationFields,
    broken_companions,
    has_template,
    has_tokenizer,
)
from neuron_minimax.errors import CheckpointError, counted, some_of
from neuron_minimax.families import Role
from neuron_minimax.families.fields import unused_fields
from neuron_minimax.files import read_json
from neuron_minimax.inspection.modules import EntryVerdict, Framework, Module, uncovered

Severity = Literal["error", "warning", "note"]
STEPS_AT_8 = {"BF16": "0.06", "F16": "0.008"}  # between numbers that the dtype has
ABSENT = "absent"  # from a layer that is of another kind
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to know: an error makes the checkpoint unusable as it is, a warning does not."""

    severity: Severity
    kind: str
    subject: str
    message: str


@dataclass(frozen=True, kw_only=True)
class KindRow:
    """All weights of one kind (q_proj, w1, ...): counts by dtype, shapes and bytes of what is
    there.
    """

    kind: str
    group: str
    expected: int
    found: int
    dtypes: dict[str, int]
    shapes: tuple[tuple[int, ...], ...]
    scaled: int
    scale_shapes: tuple[tuple[int, ...], ...]
    bytes: int
    scale_bytes: int
    # Dtype of each layer's weights, "F8_E4M3", "mixed", "missing", or ABSENT where the layer is of
    # another kind; one entry when not per layer.
    layers: tuple[str, ...]
    per_layer: bool = True

    @property
    def precision(self) -> str:
        """The dtypes of this kind's weights in words."""
        if not self.found:
            return "missing"
        if set(self.dtypes) == {"F8_E4M3"}:
            return (
                "FP8 with scales"
                if self.scaled == self.found
                else f"FP8, {self.found - self.scaled} WITHOUT scale"
            )
        return (
            " + ".join(f"{count} {dtype}" for dtype, count in self.dtypes.items())
            if len(self.dtypes) > 1
            else next(iter(self.dtypes))
        )


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One file: tensors and bytes of data in it, and the file's size."""

    name: str
    tensors: int
    bytes: int
    file_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModuleList:
    """A `modules_to_not_convert`, where it came from, and the verdict on each entry for each
    framework.
    """

    origin: str
    entries: tuple[str, ...]
    verdicts: tuple[EntryVerdict, ...]

    @property
    def is_given(self) -> bool:
        """Whether the list is for a run of one's own, and not the checkpoint's."""
        return self.origin != "config.json"

    @property
    def note(self) -> str:
        """What to know about the whole list, or nothing."""
        if self.is_given or not self.entries:
            return ""
        return "This list is for transformers; `neuron-minimax convert` writes NxDI's own."

    def is_rewritten(self, verdict: EntryVerdict) -> bool:
        """Whether the verdict is of what a conversion does not take over."""
        return not self.is_given and verdict.framework is Framework.NXDI


def kind_rows(checkpoint: Checkpoint) -> Iterator[KindRow]:
    """Yield one row for each kind of weight in the family's table."""
    entries = checkpoint.entries
    config = checkpoint.config
    rows: dict[str, dict[str, Any]] = {}
    for wanted in schema.expected(config):
        row = rows.setdefault(
            config.family.kind(wanted.weight),
            {"weight": wanted.weight, "expected": 0, "scales": [], "found": []},
        )
        entry = entries.get(wanted.name)
        if wanted.is_scale:
            row["scales"] += [entry] if entry else []
        else:
            row["expected"] += 1
            row["found"] += [(wanted.layer or 0, entry)] if entry else []
    for kind, row in rows.items():
        found = [entry for _, entry in row["found"]]
        by_layer: dict[int, set[str]] = {}
        for layer, entry in row["found"]:
            by_layer.setdefault(layer, set()).add(entry.dtype)
        weight = row["weight"]
        layers = range(config.num_hidden_layers) if weight.per_layer else range(1)
        absent = set(layers) - set(config.layers_with(weight)) if weight.per_layer else set()
        yield KindRow(
            kind=kind,
            group=weight.module_group,
            expected=row["expected"],
            found=len(found),
            dtypes=dict(Counter(entry.dtype for entry in found).most_common()),
            shapes=_by_frequency(entry.shape for entry in found),
            scaled=len(row["scales"]),
            scale_shapes=_by_frequency(entry.shape for entry in row["scales"]),
            bytes=sum(entry.nbytes for entry in found),
            scale_bytes=sum(entry.nbytes for entry in row["scales"]),
            layers=tuple(
                ABSENT if layer in absent else _one_dtype(by_layer.get(layer, set()))
                for layer in layers
            ),
            per_layer=weight.per_layer,
        )


def _by_frequency(shapes: Iterator[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(shape for shape, _ in Counter(shapes).most_common())


def _one_dtype(dtypes: set[str]) -> str:
    if not dtypes:
        return "missing"
    return "mixed" if len(dtypes) > 1 else next(iter(dtypes))


def shard_rows(checkpoint: Checkpoint) -> Iterator[ShardRow]:
    """Yield one row for each file."""
    counts = Counter(entry.shard for entry in checkpoint.entries.values())
    sizes: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        sizes[entry.shard] += entry.nbytes
    for shard in checkpoint.shards:
        stamp = checkpoint.stamps.get(shard)
        yield ShardRow(
            name=shard,
            tensors=counts[shard],
            bytes=sizes[shard],
            file_bytes=stamp.nbytes if stamp else 0,
        )


def configuration_findings(checkpoint: Checkpoint, kinds: Sequence[KindRow]) -> Iterator[Finding]:
    """Yield where config.json and the tensors disagree, and what is unusual without being wrong."""
    fp8 = sum(row.dtypes.get("F8_E4M3", 0) for row in kinds)
    if fp8 and not checkpoint.config.declares_fp8:
        message = (
            "config.json has no quantization_config, but the dtype of "
            f"{counted(fp8, 'weight')} is FP8: transformers would load the codes as values, "
            "silently; the tensors decide here. Restore the section from the published config.json"
        )
        yield Finding(severity="warning", kind="config", subject="config.json", message=message)
    if checkpoint.config.declares_fp8 and not fp8 and any(row.found for row in kinds):
        message = (
            "config.json declares FP8, but no weight is FP8: NxDI would look for scales that do "
            "not exist; the tensors decide here. Remove quantization_config"
        )
        yield Finding(severity="warning", kind="config", subject="config.json", message=message)
    yield from _widened_findings(checkpoint, kinds)
    for row in kinds:
        if len(row.dtypes) > 1:
            message = f"{row.kind} is {row.precision}: not the same everywhere"
            yield Finding(severity="note", kind="dtype", subject=row.kind, message=message)
    if checkpoint.mtp_names:
        message = (
            f"{counted(len(checkpoint.mtp_names), 'tensor')} of multi-token prediction (for one "
            f"{checkpoint.mtp_names[0]}), no part of the model, will be left out of a conversion"
        )
        yield Finding(severity="note", kind="mtp", subject=checkpoint.mtp_names[0], message=message)
    if checkpoint.cache_scale_names:
        first = checkpoint.cache_scale_names[0]
        message = (
            f"{counted(len(checkpoint.cache_scale_names), 'scale')} for a server's FP8 key/value "
            f"cache (for one {first}), no part of the model, will be left out of a conversion"
        )
        yield Finding(severity="note", kind="cache scales", subject=first, message=message)
    for name, message, is_note in unused_fields(checkpoint.config.raw, checkpoint.config.family):
        severity: Severity = "note" if is_note else "warning"
        yield Finding(severity=severity, kind="config", subject=name, message=message)
    for leftover in checkpoint.leftovers:
        yield Finding(
            severity="warning",
            kind=leftover.kind,
            subject=leftover.subject,
            message=leftover.message,
        )


def _widened_findings(checkpoint: Checkpoint, kinds: Sequence[KindRow]) -> Iterator[Finding]:
    """Yield which kinds of weights and scales are stored in a dtype that is widened to float32."""
    family = checkpoint.config.family
    float32_only = {family.kind(weight): weight for weight in family.weights if weight.float32_only}
    halves = []
    for row in kinds:
        narrow = [dtype for dtype in row.dtypes if dtype in ("BF16", "F16")]
        if row.kind in float32_only and narrow:
            rounded = "it may have been rounded by whoever wrote it"
            if float32_only[row.kind].role is Role.ROUTER_BIAS:
                steps = " and ".join(f"of {dtype} is {STEPS_AT_8[dtype]}" for dtype in narrow)
                rounded += f", which flips experts: at 8 a step {steps}"
            message = (
                f"{row.kind} is {' and '.join(narrow)}, where F32 is published: it is widened to "
                f"float32, which is exact, but {rounded}; take the published checkpoint where you "
                "can"
            )
            yield Finding(severity="warning", kind="dtype", subject=row.kind, message=message)
        elif "F16" in row.dtypes:
            halves.append(row.kind)
    if halves:
        message = (
            f"{', '.join(halves)} {'are' if len(halves) > 1 else 'is'} F16: widened to float32, "
            "which is exact and twice as large"
        )
        yield Finding(severity="note", kind="dtype", subject=halves[0], message=message)
    scales = Counter(
        checkpoint.entries[name].dtype
        for wanted in schema.expected(checkpoint.config)
        if wanted.is_scale and (name := wanted.name) in checkpoint.entries
    )
    for dtype, count in scales.items():
        if dtype in schema.SCALE_DTYPES and dtype not in checkpoint.config.family.scale_dtypes:
            powers = " (as exponents of two)" if dtype in ("F8_E8M0", "U8") else ""
            message = (
                f"{counted(count, 'block scale')} of dtype {dtype}{powers}, where "
                f"{checkpoint.config.family.scale_dtypes[0]} is published: widened to float32, "
                "which is exact"
            )
            yield Finding(severity="note", kind="dtype", subject=dtype, message=message)


def companion_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """Yield what is wrong with the tokenizer and the other small files."""
    for found in broken_companions(checkpoint.directory, checkpoint.config):
        yield Finding(
            severity="error", kind=found.kind, subject=found.subject, message=found.message
        )
    if not has_tokenizer(checkpoint.directory):
        yield Finding(
            severity="warning", kind="tokenizer", subject="tokenizer.json", message=NO_TOKENIZER
        )
    elif not has_template(checkpoint.directory):
        subject = TEMPLATE_NAMES[0]
        yield Finding(severity="warning", kind="tokenizer", subject=subject, message=NO_TEMPLATE)


def end_token_findings(checkpoint: Checkpoint) -> Iterator[Finding]:
    """A note when no file of the checkpoint names the token that ends an answer, and one when a
    file names a token that the model does not have. A file that cannot be read is one of
    `companion_findings`.
    """
    path = checkpoint.directory / GENERATION_NAME
    in_generation: tuple[int, ...] = ()
    try:
        in_generation = read_json(path, GenerationFields, CheckpointError, ADVICE).end_tokens
    except FileNotFoundError:
        pass
    except CheckpointError:
        return
    tokens = checkpoint.config.vocab_size
    for file, ids in (
        (CONFIG_NAME, checkpoint.config.eos_token_ids),
        (path.name, in_generation),
    ):
        unknown = [str(token) for token in ids if not 0 <= token < tokens]
        if unknown:
            message = (
                f"{file}: eos_token_id is {' and '.join(unknown)}, and the model has tokens 0 to "
                f"{tokens - 1}: it is passed over, and an answer ends where the others, the other "
                "file or the tokenizer say"
            )
            yield Finding(
                severity="note", kind="generation", subject="eos_token_id", message=message
            )
    if not checkpoint.config.eos_token_ids and not in_generation:
        message = (
            f"neither config.json nor {path.name} names eos_token_id: transformers would not stop; "
            "here an answer ends at the tokenizer's end-of-turn token"
        )
        yield Finding(severity="note", kind="generation", subject="eos_token_id", message=message)


def list_findings(
    lists: Sequence[ModuleList], modules: Mapping[Framework, list[Module]]
) -> Iterator[Finding]:
    """Yield what a list breaks, and which modules without FP8 weights no entry of it reaches."""
    for listed in lists:
        given = listed.is_given
        if not given and not listed.entries:
            continue  # nothing is said, so nothing is wrong: `needed` says what to list
        for verdict in listed.verdicts:
            if verdict.verdict != "breaks" or (given and verdict.framework is not Framework.NXDI):
                continue
            is_rewritten = listed.is_rewritten(verdict)
            advice = (
                "nothing to do, since `neuron-minimax convert` writes NxDI's own list"
                if is_rewritten
                else "take it off the list"
            )
            message = f"{listed.origin}, {verdict.framework}: {verdict.reason}; {advice}"
            own: Severity = "note" if is_rewritten else "warning"
            severity: Severity = "error" if given else own
            yield Finding(
                severity=severity,
                kind="modules_to_not_convert",
                subject=verdict.entry,
                message=message,
            )
        unreached = uncovered(Framework.NXDI, listed.entries, modules[Framework.NXDI])
        lacking = [module.path for module in unreached]
        if lacking and any(module.fp8 for module in modules[Framework.NXDI]):
            message = (
                f"{listed.origin}, NxDI: no entry reaches {some_of(lacking)}"
                ", which has no scales: NxDI stops with `Cannot find ... .scale`; add the "
                "entries listed as needed"
            )
            yield Finding(
                severity="error" if given else "warning",
                kind="modules_to_not_convert",
                subject=lacking[0],
                message=message,
            )
