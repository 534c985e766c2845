"""Export of a trained model in the published format: float32, BF16, or FP8 with block scales."""

import shutil
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.writer import write_checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.state_dict import neuron_to_hf_state_dict
from neuron_minimax.fp8.bfloat16 import round_to_bfloat16

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


class Precision(StrEnum):
    """The precision of stored weights; routing is float32 in all of them."""

    FLOAT32 = "float32"
    BF16 = "bf16"
    FP8 = "fp8"


def export_checkpoint(
    state_dict: Mapping[str, torch.Tensor],
    config: ModelConfig,
    directory: Path,
    precision: Precision,
) -> None:
    """Write model.safetensors and config.json from a float32 state dict of converted names."""
    published = neuron_to_hf_state_dict(
        {name: tensor.detach().cpu() for name, tensor in state_dict.items()}, config
    )
    write_checkpoint(
        directory, config_json(config, precision), stored_tensors(published, config, precision)
    )


def stored_tensors(
    published: Mapping[str, torch.Tensor], config: ModelConfig, precision: Precision
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (name, safetensors dtype, array of stored elements) of every tensor.

    `published` holds float32 tensors of published names.
    """
    for wanted in schema.expected(config):
        if wanted.is_scale:
            continue
        values = published[wanted.name].contiguous().numpy()
        if precision is Precision.FLOAT32 or wanted.dtype == "F32":
            yield wanted.name, "F32", values
        elif precision is Precision.FP8 and wanted.weight.quantized:
            codes, scales = fp8.quantize(values, config.weight_block_size)
            yield wanted.name, "F8_E4M3", codes
            yield schema.scale_name(wanted.name), "F32", scales
        else:
            yield wanted.name, "BF16", round_to_bfloat16(values)


def config_json(config: ModelConfig, precision: Precision) -> dict[str, Any]:
    """Return the config.json of the model with the quantization that is stored and no other."""
    fields = {name: value for name, value in config.raw.items() if name != "quantization_config"}
    fields["torch_dtype"] = "float32" if precision is Precision.FLOAT32 else "bfloat16"
    if precision is Precision.FP8:
        fields["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "quant_method": "fp8",
            "weight_block_size": list(config.weight_block_size),
            "modules_to_not_convert": list(config.family.unconverted),
        }
    return fields


def copy_tokenizer(source: Path, directory: Path) -> None:
    """Copy the tokenizer's files to the directory of the weights."""
    for name in TOKENIZER_FILES:
        if (source / name).exists() and (source / name).resolve() != (directory / name).resolve():
            shutil.copyfile(source / name, directory / name)
