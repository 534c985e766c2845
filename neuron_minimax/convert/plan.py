"""The conversion as data: the rules bound to one checkpoint, refused unless every source is used
exactly once.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import STORED_DTYPES
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.kept_modules import check_module_names, kept_in_bf16
from neuron_minimax.convert.ops import SCALE_TREATMENTS, Treatment, arranged_shape
from neuron_minimax.errors import ConversionError
from neuron_minimax.families import Family, module_of, target_scale_name
from neuron_minimax.families.family import Rule, ScalePolicy
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.inspection.modules import Framework, Module, needed

# (dtype as safetensors spells it, shape) by name.
Sources = Mapping[str, tuple[str, tuple[int, ...]]]
# Source names of each piece of an output: one group per expert when stacked.
Groups = tuple[tuple[str, ...], ...]


class AttentionPrecision(StrEnum):
    FP8 = "fp8"
    BF16 = "bf16"


class FP8Range(StrEnum):
    """Largest code: 240, which every Neuron chip reads, or OCP's 448, native from trn3 on."""

    NEURON = "neuron"
    OCP = "ocp"


class ConventionChoice(StrEnum):
    AUTO = "auto"
    MULTIPLIER = "multiplier"
    RECIPROCAL = "reciprocal"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What the user chooses about a conversion. `tp_degree` adds the rank tensors, for a state dict
    in memory only.
    """

    attention: AttentionPrecision = AttentionPrecision.FP8
    fp8_range: FP8Range = FP8Range.NEURON
    scale_convention: ConventionChoice = ConventionChoice.AUTO
    keep_in_bf16: tuple[str, ...] = ()
    tp_degree: int | None = None

    def __post_init__(self) -> None:
        # Options also come as plain strings, from a command line or a manifest.
        for name, choice in (
            ("attention", AttentionPrecision),
            ("fp8_range", FP8Range),
            ("scale_convention", ConventionChoice),
        ):
            try:
                object.__setattr__(self, name, choice(getattr(self, name)))
            except ValueError:
                found = getattr(self, name)
                allowed = ", ".join(choice)
                raise ConversionError(f"{name} is {found!r}; expected one of {allowed}") from None
        object.__setattr__(self, "keep_in_bf16", tuple(self.keep_in_bf16))

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Layout":
        """The layout that a manifest's options describe."""
        return cls(
            **{
                name: options[name]
                for name in ("attention", "fp8_range", "scale_convention", "keep_in_bf16")
            }
        )

    def bf16_modules(self, family: Family) -> tuple[str, ...]:
        attention = self.attention is AttentionPrecision.BF16
        return (*self.keep_in_bf16, *((family.attention_module,) if attention else ()))

    def as_options(self) -> dict[str, Any]:
        """What a manifest records: the options that change stored bytes."""
        return {
            "attention": str(self.attention),
            "fp8_range": str(self.fp8_range),
            "keep_in_bf16": list(self.keep_in_bf16),
        }


@dataclass(frozen=True, kw_only=True)
class Output:
    """One tensor of the result. `groups` holds the source names of each piece, one group per expert
    when stacked; `scale_groups` the scales that dequantizing needs.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    rule: Rule
    layer: int | None
    groups: Groups
    treatment: Treatment
    scale_groups: Groups = ()

    @property
    def is_scale(self) -> bool:
        return self.treatment in SCALE_TREATMENTS.values()

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * STORED_DTYPES[self.dtype].itemsize

    @property
    def source_templates(self) -> list[str]:
        """The sources with the layer filled in; experts stay `{e}`."""
        named = [source.replace("{l}", str(self.layer)) for source in self.rule.sources]
        return [schema.scale_name(name) for name in named] if self.is_scale else named


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """Every output of a conversion, in order, and what of the source is left out on purpose."""

    config: ModelConfig
    layout: Layout
    convention: ScaleConvention
    outputs: tuple[Output, ...]
    left_out: tuple[str, ...] = ()
    modules_to_not_convert: tuple[str, ...] = field(default=())

    @property
    def scale_count(self) -> int:
        """How many `weight_scale_inv` tensors are converted: 47,864 for the real model."""
        return sum(
            len(group)
            for output in self.outputs
            for group in (output.groups if output.is_scale else output.scale_groups)
        )

    @property
    def nbytes(self) -> int:
        return sum(output.nbytes for output in self.outputs)

    def render(self) -> str:
        """A table with one row per kind of output."""
        rows: dict[tuple[str, ...], list[Output]] = {}
        for output in self.outputs:
            name = (
                output.name
                if output.layer is None
                else output.name.replace(f".{output.layer}.", ".N.", 1)
            )
            key = (name, output.dtype, str(list(output.shape)), str(output.treatment))
            rows.setdefault(key, []).append(output)
        width = max(len(key[0]) for key in rows)
        lines = [
            f"{name:{width}}  {dtype:8} {shape:20} x {len(outputs):<4} "
            f"{sum(output.nbytes for output in outputs) / 1e9:9.3f} GB  {what}"
            for (name, dtype, shape, what), outputs in rows.items()
        ]
        tail = (
            [f"left out: {len(self.left_out)} multi-token-prediction tensors"]
            if self.left_out
            else []
        )
        return "\n".join(
            [*lines, f"{len(self.outputs)} tensors, {self.nbytes / 1e9:.3f} GB", *tail]
        )


def plan(
    sources: Sources,
    config: ModelConfig,
    layout: Layout,
    convention: ScaleConvention = ScaleConvention.MULTIPLIER,
    tolerated: Sequence[str] = (),
) -> ConversionPlan:
    """Bind the rules to a checkpoint's tensors.

    Raises ConversionError naming the tensors when a source is missing, unused or used twice, when
    experts of one layer differ in dtype, or when a module named in the layout does not exist.
    """
    check_module_names(layout.keep_in_bf16, config)
    outputs = tuple(
        output
        for layer in (None, *range(config.num_hidden_layers))
        for rule in config.family.rules
        if rule.per_layer == (layer is not None)
        for output in _bind(rule, layer, sources, config, layout, convention)
    )
    used = Counter(
        name
        for output in outputs
        for group in (*output.groups, *output.scale_groups)
        for name in group
    )
    unused = [name for name in sources if name not in used and name not in tolerated]
    twice = [name for name, count in used.items() if count > 1]
    for names, what in ((unused, "used by no rule"), (twice, "used twice")):
        if names:
            raise ConversionError(
                f"{len(names)} tensors are {what}, the first {names[0]}; nothing may be dropped "
                "silently"
            )
    return ConversionPlan(
        config=config,
        layout=layout,
        convention=convention,
        outputs=outputs,
        left_out=tuple(name for name in tolerated if name in sources),
        modules_to_not_convert=unquantized_modules(outputs),
    )


def _bind(
    rule: Rule,
    layer: int | None,
    sources: Sources,
    config: ModelConfig,
    layout: Layout,
    convention: ScaleConvention,
) -> Iterator[Output]:
    experts = range(config.num_local_experts) if rule.per_expert else (None,)
    groups = tuple(
        tuple(source.format(l=layer, e=expert) for source in rule.sources) for expert in experts
    )
    target = rule.target.format(l=layer)
    dtype = _common_dtype(target, groups, sources)
    float32_only = config.family.weight(rule.sources[0]).float32_only
    if float32_only and dtype != "F32":
        raise ConversionError(
            f"{groups[0][0]} is {dtype}; expected F32: routing in less flips experts"
        )
    _check_shapes(rule, groups, sources, config)
    modules = layout.bf16_modules(config.family)
    to_bf16 = not float32_only and kept_in_bf16(rule, layer, groups, modules, config.family)

    def output(
        name: str, dtype: str, treatment: Treatment, groups: Groups, scale_groups: Groups = ()
    ) -> Output:
        shapes = [sources[source][1] for source in groups[0]]
        return Output(
            name=name,
            dtype=dtype,
            shape=arranged_shape(rule.operation, shapes, len(groups)),
            rule=rule,
            layer=layer,
            groups=groups,
            treatment=treatment,
            scale_groups=scale_groups,
        )

    if dtype != "F8_E4M3":
        rounded = to_bf16 and dtype == "F32"
        yield output(
            target,
            "BF16" if rounded else dtype,
            Treatment.ROUND if rounded else Treatment.KEEP,
            groups,
        )
        return
    if rule.scale is not ScalePolicy.BLOCK:
        raise ConversionError(f"{groups[0][0]} is FP8, but {target} has no place for block scales")
    scale_groups = tuple(tuple(schema.scale_name(name) for name in group) for group in groups)
    _common_dtype(target_scale_name(target), scale_groups, sources)
    if to_bf16:
        yield output(target, "BF16", Treatment.DEQUANTIZE, groups, scale_groups)
        return
    halved = layout.fp8_range is FP8Range.NEURON
    yield output(target, dtype, Treatment.HALVE if halved else Treatment.KEEP, groups)
    yield output(
        target_scale_name(target), "F32", SCALE_TREATMENTS[convention, halved], scale_groups
    )


def _check_shapes(rule: Rule, groups: Groups, sources: Sources, config: ModelConfig) -> None:
    """Raise ConversionError for a weight whose shape config.json does not imply, or FP8 scales that
    miss its blocks.
    """
    for group in groups:
        for template, name in zip(rule.sources, group, strict=True):
            shape = schema.shape_of(config.family.weight(template), config)
            wanted = {name: shape}
            if len(shape) == 2:
                wanted[schema.scale_name(name)] = fp8.block_grid(shape, config.weight_block_size)
            for tensor, expected in wanted.items():
                if tensor in sources and tuple(sources[tensor][1]) != expected:
                    found = list(sources[tensor][1])
                    raise ConversionError(
                        f"{tensor} has shape {found}; config.json implies {list(expected)}"
                    )


def _common_dtype(target: str, groups: Groups, sources: Sources) -> str:
    names = [name for group in groups for name in group]
    missing = [name for name in names if name not in sources]
    if missing:
        raise ConversionError(
            f"{target} lacks {len(missing)} of its {len(names)} sources, the first {missing[0]}"
        )
    dtypes = Counter(sources[name][0] for name in names)
    if len(dtypes) > 1:
        rarest = min(dtypes, key=lambda dtype: dtypes[dtype])
        odd = next(name for name in names if sources[name][0] == rarest)
        found = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
        raise ConversionError(
            f"{target} is made of weights of different dtypes ({found}; {odd} is {rarest}); "
            "expected one"
        )
    return next(iter(dtypes))


def unquantized_modules(outputs: Sequence[Output]) -> tuple[str, ...]:
    """`modules_to_not_convert` for NxDI: entries that reach every matrix that is not FP8, and no
    other.
    """
    matrices = [output for output in outputs if not output.is_scale and len(output.shape) > 1]
    modules = [
        Module(path=module_of(output.name), weights=1, fp8=int(output.dtype == "F8_E4M3"))
        for output in matrices
    ]
    return needed(Framework.NXDI, modules)
