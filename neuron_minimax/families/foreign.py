"""Formats in which others store weights of these families, and which are not read: how config.json,
names and dtypes show one, and what to do.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from neuron_minimax.errors import ConfigError, shown
from neuron_minimax.families.family import Family

SECTION = "quantization_config"
OWN_METHOD = "fp8"
# What config.json calls a format -> what it is known as.
METHODS: Mapping[str, str] = {
    "auto-round": "AutoRound",
    "awq": "AWQ, in 4 bits",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors (llm-compressor)",
    "exl2": "EXL2",
    "exl3": "EXL3",
    "fbgemm_fp8": "FBGEMM's FP8, with a scale for each row",
    "gptq": "GPTQ",
    "mlx": "MLX, in a few bits",
    "modelopt": "NVIDIA ModelOpt",
    "mxfp4": "MXFP4",
    "quark": "AMD Quark",
    "torchao": "torchao",
}


class Sign(NamedTuple):
    """What shows a format: the ends of names of which each has to be there, and, where it matters,
    the dtypes of the tensors with the first of them.
    """

    title: str
    ends: tuple[str, ...]
    dtypes: tuple[str, ...] = ()


# The first that fits is said.
SIGNS = (
    Sign("GPTQ", (".qweight", ".g_idx")),
    Sign("AWQ, in 4 bits", (".qweight", ".qzeros")),
    Sign("a packed quantization (GPTQ's or AWQ's kind)", (".qweight",)),
    Sign("NVFP4, of compressed-tensors", (".weight_packed", ".weight_global_scale")),
    Sign("compressed-tensors, packed", (".weight_packed",)),
    Sign("NVFP4, of NVIDIA ModelOpt", (".weight", ".weight_scale", ".weight_scale_2"), ("U8",)),
    Sign("FP8 of NVIDIA ModelOpt", (".weight_scale_2",)),
    Sign("MXFP4", ("_blocks", "_scales"), ("U8",)),
    Sign("MXFP4", (".weight", ".weight_scale"), ("U8", "F4")),
    Sign("MLX, in a few bits", (".weight", ".scales"), ("U32",)),
    Sign("bitsandbytes", (".weight.absmax",)),
    Sign("bitsandbytes", (".SCB",)),
    Sign("GGUF's names (llama.cpp)", ("token_embd.weight",)),
    Sign(
        "FP8 or INT8 with scales named weight_scale (compressed-tensors', FBGEMM's or ModelOpt's), "
        "one for each row or tensor",
        (".weight_scale",),
    ),
)


def require_own(raw: Mapping[str, Any], family: Family) -> None:
    """Raise ConfigError naming the format that a config.json declares, and what to take instead,
    unless it is the published FP8 format or none.
    """
    section = raw.get(SECTION) or {}
    if not section and isinstance(raw.get("quantization"), Mapping):
        section = {"quant_method": "mlx"}  # MLX's own section, of bits and group_size
    method = section.get("quant_method", OWN_METHOD)
    algorithm = section.get("quant_algo")
    if algorithm is None and method == OWN_METHOD:
        return
    title = METHODS.get(method, method)
    found = f"quant_method is {shown(method)}"
    if algorithm is not None:
        title = METHODS["modelopt"]
        found = f"quant_algo is {shown(algorithm)}"
    kind = f", format {shown(section['format'])}" if section.get("format") else ""
    raise ConfigError(
        f"config.json: {found}: the weights are stored as {title}{kind}, which is not read; "
        f"{take(family)}"
    )


def take(family: Family) -> str:
    """Return the next step of somebody who has another format."""
    return (
        "expected the published FP8, with a scale for each block, or BF16: take "
        f"{family.published_as}"
    )


def recognized(dtypes: Mapping[str, str], known: Iterable[str]) -> tuple[str, str] | None:
    """Return the format that tensors (name to dtype) are in and one tensor that shows it, or None.

    `known` are names that the model has itself.
    """
    own = set(known)
    others = [name for name in dtypes if name not in own]
    for sign in SIGNS:
        shown_by = [
            [name for name in (dtypes if end == ".weight" else others) if name.endswith(end)]
            for end in sign.ends
        ]
        first = [name for name in shown_by[0] if not sign.dtypes or dtypes[name] in sign.dtypes]
        if first and all(shown_by):
            return sign.title, (shown_by[-1] if sign.ends[0] == ".weight" else first)[0]
    return None


def renamed(names: Iterable[str], known: Iterable[str]) -> tuple[str, str] | None:
    """Return the prefixes (found, expected) by which names differ from those that the model has:
    of a model within another one, or of one without its head.
    """
    own = set(known)
    found = list(names)
    for there, wanted in (
        ("model.language_model.", "model."),
        ("language_model.model.", "model."),
        ("language_model.", ""),
        ("transformer.", "model."),
        ("model.model.", "model."),
        ("base_model.model.", ""),
        ("module.", ""),
        ("_orig_mod.", ""),
        ("", "model."),
    ):
        renaming = [wanted + name.removeprefix(there) for name in found if name.startswith(there)]
        hits = sum(name in own for name in renaming)
        if hits > sum(name in own for name in found) and 2 * hits > len(own) // 2:
            return there, wanted
    return None
