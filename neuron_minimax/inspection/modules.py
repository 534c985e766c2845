"""Judge the entries of `modules_to_not_convert` in transformers and in NxDI, and find the needed.

The two match differently. transformers (`should_convert_module`) takes an entry as a pattern from
the start of the module path up to a dot, or as the path's ending. NxDI (`quantize.py:122` of NxD
0.18) looks for it anywhere in the path, so Hugging Face's `gate` also reaches NxDI's
`gate_up_proj`.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import TensorEntry
from neuron_minimax.config import ModelConfig
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

    `odd_weight` is the first weight of the rarest dtype where its weights have several; `renamed`
    are the parts of the path that the framework spells differently.
    """

    path: str
    weights: int
    fp8: int
    swapped: bool = True
    dtypes: tuple[tuple[str, int], ...] = ()
    odd_weight: str | None = None
    is_attention: bool = False
    renamed: Mapping[str, str] = field(default_factory=dict)


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
    if framework is Framework.NXDI:
        return entry in module.path
    entry, path = (
        ".".join(module.renamed.get(part, part) for part in text.split("."))
        for text in (entry, module.path)
    )
    try:
        pattern = re.compile(rf"(?:{entry})(?:(?<=\.)|(?=\.|$))")
    except re.error:
        pattern = re.compile(re.escape(entry))
    return bool(pattern.match(path)) or path.endswith(entry)


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
    dtypes = Counter(weight.dtype for weight in weights)
    rarest = min(dtypes, key=lambda dtype: dtypes[dtype])
    return Module(
        path=path,
        weights=len(weights),
        fp8=sum(
            weight.dtype == "F8_E4M3" and schema.scale_name(weight.name) in entries
            for weight in weights
        ),
        swapped=not any(each.weight.role in NEVER_SWAPPED for each in wanted),
        dtypes=tuple(dtypes.most_common()),
        odd_weight=next(weight.name for weight in weights if weight.dtype == rarest)
        if len(dtypes) > 1
        else None,
        is_attention=wanted[0].weight.module_group == "attention",
        renamed=renamed,
    )


def judge(
    framework: Framework, entries: Sequence[str], modules: Sequence[Module]
) -> tuple[EntryVerdict, ...]:
    """One verdict for each entry, with the reason."""
    verdicts = []
    for entry in entries:
        reached = [module for module in modules if reaches(framework, entry, module)]
        fp8 = sum(module.fp8 for module in reached)
        others = sum(module.weights for module in reached) - fp8
        verdict = "right" if reached else "no effect"
        verdicts.append(
            EntryVerdict(
                entry=entry,
                framework=framework,
                verdict="breaks" if fp8 else verdict,
                fp8_weights=fp8,
                other_weights=others,
                reason=_reason(framework, entry, reached, fp8, others),
            )
        )
    return tuple(verdicts)


def uncovered(
    framework: Framework, entries: Sequence[str], modules: Sequence[Module]
) -> list[Module]:
    """Modules without FP8 weights that no entry reaches: the framework would look for their
    scales.
    """
    return [
        module
        for module in modules
        if module.swapped
        and not module.fp8
        and not any(reaches(framework, entry, module) for entry in entries)
    ]


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
            entry: sum(reaches(framework, entry, module) for module in plain)
            for entry in _parts_of(plain[0].path)
            if not any(reaches(framework, entry, module) for module in quantized)
        }
        best = max(covered, key=lambda entry: (covered[entry], -entry.count("."), -len(entry)))
        chosen.append(best)
        plain = [module for module in plain if not reaches(framework, best, module)]
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
        return f"{entry} reaches {_count(others)}, no FP8 among them (for one, {reached[0].path})"
    example = next(module for module in reached if module.fp8)
    return (
        f"{entry} reaches {_count(fp8)} in FP8 with scales (for one, {example.path}); listing it "
        f"makes {_consequence(framework, example)}"
    )


def _count(weights: int) -> str:
    return "1 weight" if weights == 1 else f"{weights:,} weights"


def _consequence(framework: Framework, module: Module) -> str:
    if framework is Framework.HUGGING_FACE:
        return "a runtime that honours the list read raw FP8 codes as the weights"
    if module.is_attention:
        return (
            "NxDI load them into unquantized layers: a bare AssertionError at gqa.py:134, or "
            "garbage if per row"
        )
    return "NxDI load raw FP8 codes as the weights, silently: wrong logits"
