"""What an entry of `modules_to_not_convert` reaches, in transformers and in NxDI, and which entries
are needed.

The two match differently. transformers (`should_convert_module`) takes an entry as a pattern from
the start of the module path up to a dot, or as the path's ending. NxDI (`quantize.py:122` of NxD
0.18) looks for it anywhere in the path, so Hugging Face's `gate` also reaches NxDI's
`gate_up_proj`.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.header import TensorEntry
from neuron_minimax.config import ModelConfig


class Framework(StrEnum):
    """Whose module paths and whose matching."""

    HUGGING_FACE = "Hugging Face"
    NXDI = "NxDI"


# Neither framework of today swaps these for quantized modules; they are listed so that no other
# release does.
NEVER_SWAPPED = ("embed_tokens", "gate")
# Kind of weight -> path of its module.
MODULE_PATHS: dict[Framework, dict[str, str]] = {
    Framework.HUGGING_FACE: {
        **{
            name: f"model.layers.{{l}}.self_attn.{name}"
            for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        },
        **{name: "model.layers.{l}.block_sparse_moe.experts" for name in ("w1", "w2", "w3")},
        "gate": "model.layers.{l}.block_sparse_moe.gate",
        "lm_head": "lm_head",
    },
    Framework.NXDI: {
        **{
            name: f"layers.{{l}}.self_attn.qkv_proj.{name}"
            for name in ("q_proj", "k_proj", "v_proj")
        },
        "o_proj": "layers.{l}.self_attn.o_proj.o_proj",
        "w1": "layers.{l}.block_sparse_moe.expert_mlps.mlp_op.gate_up_proj",
        "w3": "layers.{l}.block_sparse_moe.expert_mlps.mlp_op.gate_up_proj",
        "w2": "layers.{l}.block_sparse_moe.expert_mlps.mlp_op.down_proj",
        "gate": "layers.{l}.block_sparse_moe.router.linear_router",
        "embed_tokens": "embed_tokens",
        "lm_head": "lm_head",
    },
}


@dataclass(frozen=True, kw_only=True)
class Module:
    """One module: its path, its weights, how many are FP8 with scales, and whether the framework
    would swap it.

    `odd_weight` is the first weight of the rarest dtype where its weights have several.
    """

    path: str
    weights: int
    fp8: int
    swapped: bool = True
    dtypes: tuple[tuple[str, int], ...] = ()
    odd_weight: str | None = None


@dataclass(frozen=True, kw_only=True)
class EntryVerdict:
    """What one entry does: "breaks" (reaches FP8 weights), "right" (reaches only others), or "no
    effect".
    """

    entry: str
    framework: Framework
    verdict: str
    fp8_weights: int
    other_weights: int
    reason: str


def reaches(framework: Framework, entry: str, path: str) -> bool:
    """Whether an entry keeps the module at `path` from being converted."""
    if framework is Framework.NXDI:
        return entry in path
    entry, path = (
        f".{text}.".replace(".block_sparse_moe.", ".mlp.")[1:-1] for text in (entry, path)
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
    held: dict[Framework, dict[str, list[TensorEntry]]] = {framework: {} for framework in Framework}
    never_swapped: set[str] = set()
    for wanted in schema.expected(config):
        entry = entries.get(wanted.name)
        if wanted.is_scale or entry is None:
            continue
        for framework, paths in MODULE_PATHS.items():
            template = paths.get(wanted.weight.kind)
            if template is not None:
                path = template.format(l=wanted.layer)
                held[framework].setdefault(path, []).append(entry)
                never_swapped |= {path} if wanted.weight.kind in NEVER_SWAPPED else set()
    return {
        framework: [
            _module(path, weights, entries, path not in never_swapped)
            for path, weights in by_path.items()
        ]
        for framework, by_path in held.items()
    }


def _module(
    path: str, weights: list[TensorEntry], entries: Mapping[str, TensorEntry], swapped: bool
) -> Module:
    dtypes = Counter(weight.dtype for weight in weights)
    rarest = min(dtypes, key=lambda dtype: dtypes[dtype])
    return Module(
        path=path,
        weights=len(weights),
        fp8=sum(
            weight.dtype == "F8_E4M3" and schema.scale_name(weight.name) in entries
            for weight in weights
        ),
        swapped=swapped,
        dtypes=tuple(dtypes.most_common()),
        odd_weight=next(weight.name for weight in weights if weight.dtype == rarest)
        if len(dtypes) > 1
        else None,
    )


def judge(
    framework: Framework, entries: Sequence[str], modules: Sequence[Module]
) -> tuple[EntryVerdict, ...]:
    """One verdict for each entry, with the reason."""
    verdicts = []
    for entry in entries:
        reached = [module for module in modules if reaches(framework, entry, module.path)]
        fp8 = sum(module.fp8 for module in reached)
        others = sum(module.weights for module in reached) - fp8
        verdict = "breaks" if fp8 else "right" if reached else "no effect"
        verdicts.append(
            EntryVerdict(
                entry=entry,
                framework=framework,
                verdict=verdict,
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
        and not any(reaches(framework, entry, module.path) for entry in entries)
    ]


def needed(framework: Framework, modules: Sequence[Module]) -> tuple[str, ...]:
    """The fewest, then shortest entries that reach every module without FP8 weights and none with
    them.
    """
    quantized = [module.path for module in modules if module.fp8]
    plain = [module.path for module in modules if not module.fp8]
    if not quantized:  # nothing is quantized, so nothing needs to be kept from it
        return ()
    chosen: list[str] = []
    while plain:
        covered = {
            entry: sum(reaches(framework, entry, path) for path in plain)
            for entry in _parts_of(plain[0])
            if not any(reaches(framework, entry, path) for path in quantized)
        }
        best = max(covered, key=lambda entry: (covered[entry], -entry.count("."), -len(entry)))
        chosen.append(best)
        plain = [path for path in plain if not reaches(framework, best, path)]
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
    example = next(module.path for module in reached if module.fp8)
    start = (
        f"{entry} reaches {_count(fp8)} in FP8 with scales (for one, {example}); listing it makes "
    )
    consequence: Callable[[str], str] = (
        _nxdi_consequence if framework is Framework.NXDI else _hugging_face_consequence
    )
    return start + consequence(example)


def _count(weights: int) -> str:
    return "1 weight" if weights == 1 else f"{weights:,} weights"


def _nxdi_consequence(path: str) -> str:
    if ".self_attn." in path:
        return (
            "NxDI load them into unquantized layers: a bare AssertionError at gqa.py:134, or "
            "garbage if per row"
        )
    return "NxDI load raw FP8 codes as the weights, silently: wrong logits"


def _hugging_face_consequence(path: str) -> str:
    return "a runtime that honours the list read raw FP8 codes as the weights"
