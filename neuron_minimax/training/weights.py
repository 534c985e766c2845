"""Weights from published checkpoints of any precision, and to ones in float32, BF16 or FP8."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.checkpoint.writer import copy_file, write_checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.state_dict import (
    convert_hf_to_neuron_state_dict,
    neuron_to_hf_state_dict,
)
from neuron_minimax.errors import TrainingError, some_of
from neuron_minimax.families import Family
from neuron_minimax.fp8 import bfloat16
from neuron_minimax.model.decoder import Decoder

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


def precision_of(family: Family, precision: Precision | None) -> Precision:
    """Return the precision to store in: the one asked for, or else the family's own.

    Raises TrainingError when FP8 is asked for and the family has none.
    """
    has_fp8 = any(weight.quantized for weight in family.weights)
    if precision is Precision.FP8 and not has_fp8:
        raise TrainingError(
            f"{family.title} has no FP8 format; expected {Precision.BF16} or {Precision.FLOAT32}",
            usage=True,
        )
    return precision or (Precision.FP8 if has_fp8 else Precision.BF16)


def read_initial(checkpoint: Checkpoint, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Read a checkpoint as a float32 state dict of converted names; FP8 is dequantized, BF16
    widened, so that no value changes.

    Raises CheckpointError when it cannot be used, and TrainingError when its weights are not those
    of `config`: one is missing, of another shape, or has no place there.
    """
    directory = checkpoint.directory
    checkpoint.require_usable()
    names = _weights(config)
    for name, wanted in names.items():
        found = checkpoint.entries[name].shape if name in checkpoint.entries else None
        if found != wanted.shape:
            raise TrainingError(
                f"{directory}: {name} is {'missing' if found is None else list(found)}, but the "
                f"model to train implies {list(wanted.shape)}; leave --config out to train the "
                "checkpoint's own model"
            )
    left = [name for name in _weights(checkpoint.config) if name not in names]
    if left:
        raise TrainingError(
            f"{directory}: the model to train has no place for {some_of(left)}; leave --config "
            "out to train the checkpoint's own model"
        )
    published = {name: torch.from_numpy(_float32(checkpoint, name)) for name in names}
    # Through the model, which refuses what it has no place for.
    return Decoder(config, convert_hf_to_neuron_state_dict(published, config)).state_dict()


def _weights(config: ModelConfig) -> dict[str, schema.Expected]:
    return {wanted.name: wanted for wanted in schema.expected(config) if not wanted.is_scale}


def _float32(checkpoint: Checkpoint, name: str) -> np.ndarray:
    elements = checkpoint.array(name)
    if not checkpoint.is_fp8(name):
        bfloat16.check_finite(name, elements)
        return np.array(bfloat16.to_float32(elements))
    fp8.check_codes(name, elements)
    scales = checkpoint.multipliers(name)
    bfloat16.check_finite(schema.scale_name(name), scales * np.float32(fp8.OCP_MAX))
    return fp8.dequantize(elements, scales, checkpoint.config.weight_block_size)


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
            yield wanted.name, "BF16", bfloat16.round_to_bfloat16(values)


def config_json(config: ModelConfig, precision: Precision) -> dict[str, Any]:
    """Return the config.json of the model with the quantization that is stored and no other."""
    replaced = ("quantization_config", "torch_dtype", "dtype")  # transformers 5 reads the last
    fields = {name: value for name, value in config.raw.items() if name not in replaced}
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
    """Copy the tokenizer's files to the directory of the weights. Raises OSError."""
    for name in TOKENIZER_FILES:
        if (source / name).exists() and (source / name).resolve() != (directory / name).resolve():
            copy_file(source / name, directory / name)
