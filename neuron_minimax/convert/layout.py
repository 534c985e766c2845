"""The choices of a user about a conversion."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from neuron_minimax.errors import ConversionError
from neuron_minimax.families import Family

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
            f"{name} is {found!r}; expected one of {', '.join(choices)}"
        ) from None
