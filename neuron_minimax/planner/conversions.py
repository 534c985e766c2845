"""The conversions that a deployment could be of instead: what `convert` and `cache` would write, as
far as a plan depends on it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from neuron_minimax.config import CONVERTED_SECTION, ModelConfig
from neuron_minimax.convert.cache import DTYPES
from neuron_minimax.errors import ConfigError, shown
from neuron_minimax.families import Role
from neuron_minimax.planner.cases import Case
from neuron_minimax.planner.memory import NEURON_E4M3_MAX, largest_code

QUANTIZATION = "quantization_config"
LISTED = "modules_to_not_convert"
BF16_CACHE = next(name for name, stored in DTYPES.items() if stored == "BF16")
DENSE_CACHE = f"convert a cache in BF16 (neuron-minimax cache CKPT CACHE --dtype {BF16_CACHE})"


def stored_as(config: ModelConfig) -> dict[str, Any]:
    """Whether attention and MLPs are FP8 on the device, as settings of a Deployment.

    Raises ConfigError for a config.json whose record of its conversion is none.
    """
    converted = config.raw.get(CONVERTED_SECTION) or {}
    if not isinstance(converted, Mapping):
        raise ConfigError(
            f"config.json: {CONVERTED_SECTION} is {shown(converted)}; expected the object that a "
            "conversion writes: take the section out of a checkpoint, or convert it again"
        )
    return {
        "fp8_attention": config.declares_fp8 and converted.get("attention", "fp8") == "fp8",
        "fp8_experts": config.declares_fp8,
    }


def conversions(case: Case) -> Iterator[tuple[str, Case]]:
    """The case as it is, then of other conversions, those that change least first, each with what
    to do.
    """
    yield "", case
    raw = case.config.raw
    if not case.config.declares_fp8:
        return
    attention = {"--attention bf16": case.config.family.attention_module}
    mlp: dict[str, str] = {}
    if not case.config.family.architecture.has_experts:
        name = case.config.family.module(Role.MLP_GATE).split(".")[-2]
        mlp = {f"--keep-in-bf16 {name}": name}
    codes = () if case.fp8_max == NEURON_E4M3_MAX else ("--fp8-range neuron",)
    for kept in ({}, attention, mlp, attention | mlp):
        options = (*codes, *kept)
        if options:
            yield f"convert with {' '.join(options)}", _of(case, _converted(raw, kept))
    dense = {name: raw[name] for name in raw if name not in (QUANTIZATION, CONVERTED_SECTION)}
    yield DENSE_CACHE, _of(case, dense)


def _converted(raw: Mapping[str, Any], kept: Mapping[str, str]) -> dict[str, Any]:
    """A converted directory's config.json; `kept` are options of the conversion and the modules
    that they keep in BF16.
    """
    earlier = raw.get(CONVERTED_SECTION) or {}
    listed = (raw[QUANTIZATION].get(LISTED) or []) if earlier else []
    fp8_attention = earlier.get("attention", "fp8") == "fp8" and "--attention bf16" not in kept
    return {
        **raw,
        QUANTIZATION: {**raw[QUANTIZATION], LISTED: [*listed, *kept.values()]},
        CONVERTED_SECTION: {
            **earlier,
            "attention": "fp8" if fp8_attention else "bf16",
            "fp8_range": "neuron",
        },
    }


def _of(case: Case, raw: Mapping[str, Any]) -> Case:
    config = ModelConfig.from_dict(raw)
    deployment = replace(case.deployment, **stored_as(config))
    return replace(case, config=config, deployment=deployment, fp8_max=largest_code(config))
