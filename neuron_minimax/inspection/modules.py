"""Judge the entries of `modules_to_not_convert` in transformers and in NxDI, and find the needed.

The two match differently. transformers (`should_convert_module`) takes an entry as a pattern from
the start of the module path up to a dot, or as the path's ending. Here an engine runs it that takes
linear time; what that cannot compile (a look around, a reference back) is judged as a name. NxDI
(`quantize.py:122` of NxD 0.18) looks for it anywhere in the path, so Hugging Face's `gate` also
reaches NxDI's `gate_up_proj`.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache, cached_property
from itertools import accumulate
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import TensorEntry
from neuron_minimax.config import MODULE_NAME, ModelConfig
from neuron_minimax.errors import counted
from neuron_minimax.families import Family, Role, module_of
from neuron_minimax.families.family import Weight


class Framework(StrEnum):
    """Whose module paths and whose matching."""

    HUGGING_FACE = "Hugging Face"
    NXDI = "NxDI"


# Neither framework of today swaps these for quantized modules; they are listed so that no other
# release does.
NEVER_SWAPPED = (Role.EMBEDDING, Role.ROUTER)


def module_paths(framework: Framework, family: Family) -> dict[Role, str]:
    """Path over `{l}` of the module that a framework could convert, for each matrix of a family.

    transformers never converts an embedding, and has all experts of a layer in one module.
    """
    matrices = [weight for weight in family.weights if weight.is_matrix]
    if framework is Framework.NXDI:
        return {weight.role: family.module(weight.role) for weight in matrices}
    return {
        weight.role: _published_module(weight)
        for weight in matrices
        if weight.role is not Role.EMBEDDING
    }


def _published_module(weight: Weight) -> str:
    before_expert, expert, _ = weight.template.partition(".{e}")
    return before_expert if expert else module_of(weight.template)


@dataclass(frozen=True, kw_only=True)
class Module:
    """One module: its path, its weights, how many are FP8 with scales, and whether the framework
    would swap it.

    `renamed` are the parts of the path that the framework spells differently.
    """

    path: str
    weights: int
    fp8: int
    swapped: bool = True
    is_attention: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)

    def spelled(self, text: str) -> str:
        """A path or an entry as the framework spells it."""
        return ".".join(self.renamed.get(part, part) for part in text.split("."))

    @cached_property
    def own_path(self) -> str:
        """The path as the framework spells it."""
        return self.spelled(self.path)


@dataclass(frozen=True, kw_only=True)
class EntryVerdict:
    """The effect of one entry: "breaks" (reaches FP8 weights), "right" (reaches only others), or
    "no effect".
    """

    entry: str
    framework: Framework
    verdict: str
    fp8_weights: int
    other_weights: int
    reason: str


def reaches(framework: Framework, entry: str, module: Module) -> bool:
    """Return whether an entry keeps a module from being converted."""
    return _reaches_any(framework, entry, [module])


def reached(framework: Framework, entry: str, modules: Sequence[Module]) -> list[Module]:
    """The modules that an entry keeps from being converted."""
    matches = _matcher(framework, entry, modules)
    return [module for module in modules if matches(module.own_path)]


def _unreached(framework: Framework, entry: str, modules: Sequence[Module]) -> list[Module]:
    matches = _matcher(framework, entry, modules)
    return [module for module in modules if not matches(module.own_path)]


def _reaches_any(framework: Framework, entry: str, modules: Sequence[Module]) -> bool:
    matches = _matcher(framework, entry, modules)
    return any(matches(module.own_path) for module in modules)


def _matcher(framework: Framework, entry: str, modules: Sequence[Module]) -> Callable[[str], bool]:
    """Return what says whether an entry reaches the path of one of these modules."""
    entry = modules[0].spelled(entry) if modules else entry
    if framework is Framework.NXDI:
        return lambda path: entry in path
    if MODULE_NAME.fullmatch(entry):
        match = _name_pattern(entry).match
        return lambda path: path.endswith(entry) or match(path) is not None
    return lambda path: path.endswith(entry) or _matches_beginning(entry, path)


@cache
def _name_pattern(name: str) -> re.Pattern[str]:
    """Return the pattern that transformers makes of an entry."""
    return re.compile(rf"(?:{name})(?:(?<=\.)|(?=\.|$))")


def _matches_beginning(entry: str, path: str) -> bool:
    """Return whether an entry matches the path from its start up to a dot, before or behind it."""
    up_to_dot = _acceptor(rf"^(?:{entry})(?:\.|$)")
    dot_included = _acceptor(rf"^(?:{entry})$")
    beginnings = accumulate(path.split(".")[:-1], "{}.{}".format)
    return up_to_dot(path) or any(dot_included(f"{beginning}.") for beginning in beginnings)


@cache
def _acceptor(pattern: str) -> Callable[[str], bool]:
    """Return what says whether a text has the pattern: no text where it is not one of linear
    time.
    """
    try:
        parser = TypeAdapter(Annotated[str, StringConstraints(pattern=pattern)])
    except SchemaError:
        return lambda text: False

    def accepts(text: str) -> bool:
        try:
            parser.validate_python(text)
        except ValidationError:
            return False
        return True

    return accepts


def modules_of(
    entries: Mapping[str, TensorEntry], config: ModelConfig
) -> dict[Framework, list[Module]]:
    """The modules that each framework could convert, in layer order, judged by the tensors that are
    there.
    """
    held: dict[Framework, dict[str, list[schema.Expected]]] = {each: {} for each in Framework}
    paths = {framework: module_paths(framework, config.family) for framework in Framework}
    for wanted in schema.expected(config):
        if wanted.is_scale or wanted.name not in entries:
            continue
        for framework in Framework:
            template = paths[framework].get(wanted.weight.role)
            if template is not None:
                held[framework].setdefault(template.format(l=wanted.layer), []).append(wanted)
    renamed = config.family.transformers_names
    return {
        framework: [
            _module(path, weights, entries, renamed if framework is Framework.HUGGING_FACE else {})
            for path, weights in by_path.items()
        ]
        for framework, by_path in held.items()
    }


def _module(
    path: str,
    wanted: Sequence[schema.Expected],
    entries: Mapping[str, TensorEntry],
    renamed: Mapping[str, str],
) -> Module:
    weights = [entries[each.name] for each in wanted]
    return Module(
        path=path,
        weights=len(weights),
        fp8=sum(
            weight.dtype == "F8_E4M3" and schema.scale_name(weight.name) in entries
            for weight in weights
        ),
        swapped=not any(each.weight.role in NEVER_SWAPPED for each in wanted),
        is_attention=wanted[0].weight.module_group == "attention",
        renamed=renamed,
    )


def judge(
    framework: Framework, entries: Sequence[str], modules: Sequence[Module]
) -> tuple[EntryVerdict, ...]:
    """One verdict for each entry, with the reason."""
    verdicts = []
    for entry in entries:
        kept = reached(framework, entry, modules)
        fp8 = sum(module.fp8 for module in kept)
        others = sum(module.weights for module in kept) - fp8
        verdict = "right" if kept else "no effect"
        verdicts.append(
            EntryVerdict(
                entry=entry,
                framework=framework,
                verdict="breaks" if fp8 else verdict,
                fp8_weights=fp8,
                other_weights=others,
                reason=_reason(framework, entry, kept, fp8, others),
            )
        )
    return tuple(verdicts)


def uncovered(
    framework: Framework, entries: Sequence[str], modules: Sequence[Module]
) -> list[Module]:
    """Modules without FP8 weights that no entry reaches: the framework would look for their
    scales.
    """
    left = [module for module in modules if module.swapped and not module.fp8]
    for entry in entries:
        left = _unreached(framework, entry, left)
    return left


def needed(framework: Framework, modules: Sequence[Module]) -> tuple[str, ...]:
    """The fewest, then shortest entries that reach every module without FP8 weights and none with
    them.
    """
    quantized = [module for module in modules if module.fp8]
    plain = [module for module in modules if not module.fp8]
    if not quantized:  # nothing is quantized, so nothing needs to be kept from it
        return ()
    chosen: list[str] = []
    while plain:
        covered = {
            entry: len(reached(framework, entry, plain))
            for entry in _parts_of(plain[0].path)
            if not _reaches_any(framework, entry, quantized)
        }
        best = max(covered, key=lambda entry: (covered[entry], -entry.count("."), -len(entry)))
        chosen.append(best)
        plain = _unreached(framework, best, plain)
    return tuple(sorted(chosen))


def _parts_of(path: str) -> Iterable[str]:
    """Runs of whole components that neither start nor end with a layer number: for a.b they are a,
    a.b, b.
    """
    parts = path.split(".")
    runs = [parts[i:j] for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)]
    return [".".join(run) for run in runs if not (run[0].isdigit() or run[-1].isdigit())]


def _reason(
    framework: Framework, entry: str, reached: Sequence[Module], fp8: int, others: int
) -> str:
    if not reached:
        where = "any part" if framework is Framework.NXDI else "the start or the end"
        return f"{entry} is not {where} of the path of a module that {framework} converts"
    if not fp8:
        weights = counted(others, "weight")
        return f"{entry} reaches {weights}, no FP8 among them (for one, {reached[0].path})"
    example = next(module for module in reached if module.fp8)
    return (
        f"{entry} reaches {counted(fp8, 'weight')} in FP8 with scales (for one, {example.path}); "
        f"listing it makes {_consequence(framework, example)}"
    )


def _consequence(framework: Framework, module: Module) -> str:
    if framework is Framework.HUGGING_FACE:
        return "a runtime that honours the list read raw FP8 codes as the weights"
    if module.is_attention:
        return (
            "NxDI load them into unquantized layers: a bare AssertionError at gqa.py:134, or "
            "garbage if per row"
        )
    return "NxDI load raw FP8 codes as the weights, silently: wrong logits"
