"""The choices of a user about a conversion, and which weights the modules named in them are."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from neuron_minimax.config import ModelConfig
from neuron_minimax.errors import ConversionError
from neuron_minimax.families import Family, module_of
from neuron_minimax.families.family import Rule

Choice = TypeVar("Choice", bound=StrEnum)


class AttentionPrecision(StrEnum):
    FP8 = "fp8"
    BF16 = "bf16"


class FP8Range(StrEnum):
    """Largest code: 240, which every Neuron chip reads, or OCP's 448, native from trn3 on."""

    NEURON = "neuron"
    OCP = "ocp"


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The options that change stored bytes. `tp_degree` adds the rank tensors, for a state dict in
    memory only.
    """

    attention: AttentionPrecision = AttentionPrecision.FP8
    fp8_range: FP8Range = FP8Range.NEURON
    keep_in_bf16: tuple[str, ...] = ()
    tp_degree: int | None = None

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> "Layout":
        """The layout that options describe, as a manifest or a command line has them: the inverse
        of `as_options`.

        Raises ConversionError naming an option with a value that does not exist.
        """
        return cls(
            attention=_choice("attention", AttentionPrecision, options["attention"]),
            fp8_range=_choice("fp8_range", FP8Range, options["fp8_range"]),
            keep_in_bf16=tuple(options["keep_in_bf16"]),
        )

    def as_options(self) -> dict[str, Any]:
        """The options as JSON values."""
        return {
            "attention": str(self.attention),
            "fp8_range": str(self.fp8_range),
            "keep_in_bf16": list(self.keep_in_bf16),
        }

    def bf16_modules(self, family: Family) -> tuple[str, ...]:
        """The modules whose weights become BF16: those named, and attention where it is chosen."""
        attention = self.attention is AttentionPrecision.BF16
        return (*self.keep_in_bf16, *((family.attention_module,) if attention else ()))


def _choice(name: str, choices: type[Choice], found: str) -> Choice:
    try:
        return choices(found)
    except ValueError:
        raise ConversionError(
            f"{name} is {found!r}; expected one of {', '.join(choices)}", usage=True
        ) from None


def check_module_names(modules: Sequence[str], config: ModelConfig) -> None:
    """Raise ConversionError with near matches when a name matches no module, or one that must stay
    float32.
    """
    known: set[str] = set()
    for rule in config.family.rules:
        for layer in config.layers_with(config.family.weight(rule.sources[0])):
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
