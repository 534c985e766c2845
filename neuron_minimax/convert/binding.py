"""The family's rules bound to the tensors of one checkpoint, refused unless every source is used
exactly once.

R rows and C columns of a source weight, E experts. Arranging a grid of block scales is arranging
its weight: the same shapes serve both.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import HasSpec, TensorSpec
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.layout import FP8Range, Layout, check_module_names, kept_in_bf16
from neuron_minimax.errors import ConversionError, counted
from neuron_minimax.families import module_of, target_scale_name
from neuron_minimax.families.family import Operation, Rule, ScalePolicy, Weight
from neuron_minimax.fp8 import ScaleConvention
from neuron_minimax.inspection.modules import Framework, Module, needed

Specs = Mapping[str, TensorSpec]
# Source names of each piece of a tensor: one group per expert when stacked.
Groups = tuple[tuple[str, ...], ...]


class Transform(StrEnum):
    """The change of a source's elements on their way into the converted tensor."""

    KEEP = "kept"
    HALVE = "codes halved"
    SCALE = "scales as they are"
    SCALE_DOUBLED = "scales doubled"
    SCALE_INVERTED = "scales inverted (1/x)"
    SCALE_INVERTED_DOUBLED = "scales inverted (1/x) and doubled"
    DEQUANTIZE = "dequantized to BF16"
    WIDEN = "widened to float32"
    ROUND = "rounded to BF16"


SCALE_TRANSFORMS = {
    (ScaleConvention.MULTIPLIER, False): Transform.SCALE,
    (ScaleConvention.MULTIPLIER, True): Transform.SCALE_DOUBLED,
    (ScaleConvention.RECIPROCAL, False): Transform.SCALE_INVERTED,
    (ScaleConvention.RECIPROCAL, True): Transform.SCALE_INVERTED_DOUBLED,
}


def piece_shape(operation: Operation, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Shape of what is made of sources of these shapes: [R, C] as it is, or one expert's [C, sum of
    R].
    """
    return (
        shapes[0]
        if operation is Operation.COPY
        else (shapes[0][1], sum(rows for rows, _ in shapes))
    )


def arranged_shape(
    operation: Operation, shapes: Sequence[tuple[int, ...]], experts: int
) -> tuple[int, ...]:
    """Shape of the whole target: [E, C, sum of R] when stacked."""
    shape = piece_shape(operation, shapes)
    return shape if operation is Operation.COPY else (experts, *shape)


@dataclass(frozen=True, kw_only=True)
class ConvertedTensor(HasSpec):
    """One tensor of the result and how it is made.

    `groups` holds the source names of each piece, one group per expert when stacked, `scale_groups`
    the scales that dequantizing needs.
    """

    spec: TensorSpec
    rule: Rule
    layer: int | None
    groups: Groups
    transform: Transform
    scale_groups: Groups = ()

    @property
    def is_scale(self) -> bool:
        return self.transform in SCALE_TRANSFORMS.values()

    @property
    def source_templates(self) -> list[str]:
        """The sources with the layer filled in; experts stay `{e}`."""
        named = [source.replace("{l}", str(self.layer)) for source in self.rule.sources]
        return [schema.scale_name(name) for name in named] if self.is_scale else named


def bind_rules(
    sources: Specs,
    config: ModelConfig,
    layout: Layout,
    convention: ScaleConvention = ScaleConvention.MULTIPLIER,
    tolerated: Sequence[str] = (),
) -> tuple[ConvertedTensor, ...]:
    """The tensors of a conversion, in the order in which they are stored.

    Raises ConversionError naming the tensors when a source is missing, unused (but for the
    `tolerated`) or used twice, when experts of one layer differ in dtype, or when a module named in
    the layout does not exist.
    """
    check_module_names(layout.keep_in_bf16, config)
    outputs = tuple(
        output
        for layer in (None, *range(config.num_hidden_layers))
        for rule in config.family.rules
        if layer in config.layers_with(config.family.weight(rule.sources[0]))
        and not _is_left_out(rule, sources, config)
        for output in _bind(rule, layer, sources, config, layout, convention)
    )
    used = Counter(
        name
        for output in outputs
        for group in (*output.groups, *output.scale_groups)
        for name in group
    )
    known = used.keys() | set(tolerated)
    unused = [name for name in sources if name not in known]
    twice = [name for name, count in used.items() if count > 1]
    for names, what in ((unused, "used by no rule"), (twice, "used twice")):
        if names:
            raise ConversionError(
                f"found {counted(len(names), 'tensor')} {what}, the first {names[0]}; nothing may "
                "be dropped silently"
            )
    return outputs


def files_of(outputs: Iterable[ConvertedTensor], source: TensorDirectory) -> frozenset[str]:
    """Return the files that hold the sources of outputs."""
    return frozenset(
        source.entry(name).shard
        for output in outputs
        for group in (*output.groups, *output.scale_groups)
        for name in group
    )


def _is_left_out(rule: Rule, sources: Specs, config: ModelConfig) -> bool:
    """Return whether the rule makes a tied head that is not stored."""
    source = rule.sources[0]
    return schema.is_tied(config.family.weight(source), config) and source not in sources


def source_groups(rule: Rule, layer: int | None, config: ModelConfig) -> Groups:
    """Return the names of a rule's sources in the order of their pieces."""
    experts = range(config.num_local_experts) if rule.per_expert else (None,)
    return tuple(
        tuple(source.format(l=layer, e=expert) for source in rule.sources) for expert in experts
    )


def _bind(
    rule: Rule,
    layer: int | None,
    sources: Specs,
    config: ModelConfig,
    layout: Layout,
    convention: ScaleConvention,
) -> Iterator[ConvertedTensor]:
    groups = source_groups(rule, layer, config)
    target = rule.target.format(l=layer)
    dtype = _common_dtype(target, groups, sources)
    weight = config.family.weight(rule.sources[0])
    float32_only = weight.float32_only
    _require_dtype(groups[0][0], dtype, weight)
    _check_shapes(rule, groups, sources, config)
    modules = layout.bf16_modules(config.family)
    to_bf16 = not float32_only and kept_in_bf16(rule, layer, groups, modules, config.family)

    def output(
        name: str, dtype: str, transform: Transform, groups: Groups, scale_groups: Groups = ()
    ) -> ConvertedTensor:
        shapes = [sources[source].shape for source in groups[0]]
        shape = arranged_shape(rule.operation, shapes, len(groups))
        return ConvertedTensor(
            spec=TensorSpec(name, dtype, shape),
            rule=rule,
            layer=layer,
            groups=groups,
            transform=transform,
            scale_groups=scale_groups,
        )

    if dtype != "F8_E4M3":
        transform = Transform.KEEP
        if to_bf16 and dtype != "BF16":
            dtype = "BF16"
            transform = Transform.ROUND
        elif dtype == "F16" or (float32_only and dtype != "F32"):
            dtype = "F32"
            transform = Transform.WIDEN
        yield output(target, dtype, transform, groups)
        return
    if rule.scale is not ScalePolicy.BLOCK:
        raise ConversionError(f"{groups[0][0]} is FP8, but {target} has no place for block scales")
    scale_groups = tuple(tuple(schema.scale_name(name) for name in group) for group in groups)
    scale_dtype = _common_dtype(target_scale_name(target), scale_groups, sources)
    _require_dtype(scale_groups[0][0], scale_dtype, weight, is_scale=True)
    if to_bf16:
        yield output(target, "BF16", Transform.DEQUANTIZE, groups, scale_groups)
        return
    halved = layout.fp8_range is FP8Range.NEURON
    yield output(target, dtype, Transform.HALVE if halved else Transform.KEEP, groups)
    yield output(
        target_scale_name(target), "F32", SCALE_TRANSFORMS[convention, halved], scale_groups
    )


def _require_dtype(name: str, dtype: str, weight: Weight, is_scale: bool = False) -> None:
    wrong = schema.wrong_dtype(dtype, weight, is_scale)
    if wrong:
        raise ConversionError(f"{name} {wrong}")


def _check_shapes(rule: Rule, groups: Groups, sources: Specs, config: ModelConfig) -> None:
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
                if tensor in sources and sources[tensor].shape != expected:
                    found = list(sources[tensor].shape)
                    raise ConversionError(
                        f"{tensor} has shape {found}; config.json implies {list(expected)}"
                    )


def _common_dtype(target: str, groups: Groups, sources: Specs) -> str:
    names = [name for group in groups for name in group]
    missing = [name for name in names if name not in sources]
    if missing:
        raise ConversionError(
            f"{target} lacks {len(missing)} of its {len(names)} sources, the first {missing[0]}"
        )
    dtypes = Counter(sources[name].dtype for name in names)
    if len(dtypes) > 1:
        rarest = min(dtypes, key=lambda dtype: dtypes[dtype])
        odd = next(name for name in names if sources[name].dtype == rarest)
        found = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
        raise ConversionError(
            f"{target} is made of weights of different dtypes ({found}; {odd} is {rarest}); "
            "expected one"
        )
    return next(iter(dtypes))


def unquantized_modules(outputs: Sequence[ConvertedTensor]) -> tuple[str, ...]:
    """`modules_to_not_convert` for NxDI: entries that reach every matrix that is not FP8, and no
    other.
    """
    matrices = [output for output in outputs if not output.is_scale and len(output.shape) > 1]
    modules = [
        Module(path=module_of(output.name), weights=1, fp8=int(output.dtype == "F8_E4M3"))
        for output in matrices
    ]
    return needed(Framework.NXDI, modules)
