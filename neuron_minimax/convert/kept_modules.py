"""Find the weights of the modules that a user wants in BF16, and refuse names of none."""

import difflib
from collections.abc import Sequence

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConversionError
from neuron_minimax.families import Family, module_of
from neuron_minimax.families.family import Rule


def check_module_names(modules: Sequence[str], config: ModelConfig) -> None:
    """Raise ConversionError with near matches when a name matches no module, or one that must stay
    float32.
    """
    known: set[str] = set()
    for rule in config.family.rules:
        for layer in range(config.num_hidden_layers) if rule.per_layer else (None,):
            for template in (rule.target, *rule.sources):
                parts = module_of(template.format(l=layer, e=0)).split(".")
                known |= {
                    ".".join(parts[i:j])
                    for i in range(len(parts))
                    for j in range(i + 1, len(parts) + 1)
                }
    for module in modules:
        if module not in known:
            near = difflib.get_close_matches(module, sorted(known), n=3, cutoff=0.5)
            hint = (
                f"near matches: {', '.join(near)}"
                if near
                else f"give a whole module name such as {config.family.head_module} or "
                f"{config.family.attention_module}"
            )
            raise ConversionError(f"--keep-in-bf16 {module} is no module of this model; {hint}")
        if module.split(".")[-1] in config.family.routing_modules:
            raise ConversionError(
                f"--keep-in-bf16 {module}: routing stays in float32; BF16 flips experts"
            )


def _module_paths(
    rule: Rule, layer: int | None, groups: Sequence[tuple[str, ...]]
) -> list[tuple[str, list[str]]]:
    """The target's module path, and those of the sources, each with its dotted parts."""
    paths = [
        module_of(rule.target.format(l=layer)),
        *(module_of(name) for group in groups for name in group),
    ]
    return [(path, path.split(".")) for path in paths]


def _names_module(module: str, path: list[str]) -> bool:
    """Return whether a dotted name is whole consecutive parts of a path."""
    parts = module.split(".")
    return any(
        path[start : start + len(parts)] == parts for start in range(len(path) - len(parts) + 1)
    )


def kept_in_bf16(
    rule: Rule,
    layer: int | None,
    groups: Sequence[tuple[str, ...]],
    modules: Sequence[str],
    family: Family,
) -> bool:
    """Return whether one of the modules names this rule's target or all of its sources.

    Raises ConversionError when it names some of the weights that are stored in one tensor.
    """
    (target, target_parts), *sources = _module_paths(rule, layer, groups)
    for module in modules:
        if _names_module(module, target_parts):
            return True
        hits = [_names_module(module, parts) for _, parts in sources]
        if any(hits) and not all(hits):
            raise ConversionError(
                f"--keep-in-bf16 {module} names {sum(hits)} of the {len(hits)} weights that become "
                f"{target}; name `{family.experts_module}` (all experts) or one layer's, since its "
                "experts are stored together"
            )
        if all(hits):
            return True
    return False
