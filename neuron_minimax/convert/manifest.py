"""conversion.json: what a converted directory was made of, with which options, and its digests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict

from neuron_minimax.checkpoint.finished import Recorded, read_recorded
from neuron_minimax.checkpoint.kinds import CONVERSION_NAME, Wanted, require
from neuron_minimax.convert.layout import AttentionPrecision, FP8Range
from neuron_minimax.errors import ConversionError
from neuron_minimax.fp8 import ScaleConvention

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """The options that change stored bytes, and what the source's scales were taken to mean."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    attention: AttentionPrecision
    fp8_range: FP8Range
    keep_in_bf16: tuple[str, ...]
    scale_convention: ScaleConvention


@dataclass(frozen=True, kw_only=True)
class ConversionIdentity:
    """What decides whether two conversions are the same; `probe` names one of a layer, made for a
    device check. Earlier versions have recorded here who made it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    source_fingerprint: str
    options: ConversionOptions
    format_version: int
    probe: str = ""
    made_by: str = ""


@dataclass(frozen=True, kw_only=True)
class TensorOrigin:
    """The sources of a converted tensor and what became of their elements."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sources: tuple[str, ...]
    operation: str
    treatment: str


@dataclass(frozen=True, kw_only=True)
class ConversionManifest(Recorded):
    """conversion.json. Fields with a default are missing in that of a probe, the last two in all
    others.
    """

    identity: ConversionIdentity
    scale_convention: Mapping[str, Any] = field(default_factory=dict)
    modules_to_not_convert: tuple[str, ...] = ()
    scales_converted: int = 0
    left_out: tuple[str, ...] = ()
    experts: int = 0
    rounded_codes: int = 0
    operations: Mapping[str, TensorOrigin] = field(default_factory=dict)
    probe: str = ""
    layer: int | None = None


def read_manifest(directory: str | Path) -> ConversionManifest:
    """conversion.json of a finished converted directory.

    Raises ConversionError when there is none: the directory does not exist, is not a converted
    checkpoint, or is an unfinished one; and when it is damaged or of another version.
    """
    require(Path(directory), Wanted.CONVERTED, ConversionError)
    path = Path(directory) / CONVERSION_NAME
    manifest = read_recorded(
        path, ConversionManifest, ConversionError, "convert again with --overwrite"
    )
    if manifest.identity.format_version != FORMAT_VERSION:
        raise ConversionError(
            f"{path} has another format version; run `neuron-minimax convert` again"
        )
    return manifest
