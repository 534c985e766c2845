"""A checkpoint's weights as llama.cpp reads them: one GGUF file in Q8_0 or float32.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names of tensors and fields are
those of the `gguf` package. Norms, routers and their biases stay float32, as llama.cpp's own
conversion keeps them.
"""

import json
import os
from collections.abc import Iterator
from itertools import groupby
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint import schema
from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.config import ModelConfig
from neuron_minimax.fp8 import bfloat16

if TYPE_CHECKING:
    from gguf import GGUFWriter

FLOAT32_GROUPS = ("norm", "router")
# llama.cpp's name for what the demo's tokenizer does first: single digits, then GPT-2's words.
SPLIT_AS = "starcoder"


def write_gguf(source: Checkpoint, path: Path, kind: str = "Q8_0") -> Path:
    """Write a MiniMax-M2 checkpoint unless it is there already; `kind` is "Q8_0" or "F32".

    Its tokenizer and chat template are in the file where the checkpoint has them.
    """
    import gguf
    from gguf.quants import quant_shape_to_byte_shape, quantize

    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    config = source.config
    architecture = gguf.MODEL_ARCH.MINIMAXM2
    writer = gguf.GGUFWriter(unfinished, gguf.MODEL_ARCH_NAMES[architecture])
    describe(writer, config)
    describe_tokenizer(writer, source.directory, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    weights = list(stacked_weights(config))
    types = []
    for wanted in weights:
        first = wanted[0]
        dense = len(first.shape) == 1 or first.weight.module_group in FLOAT32_GROUPS
        types.append(gguf.GGMLQuantizationType["F32" if dense else kind])
        experts = () if first.expert is None else (len(wanted),)
        shape = quant_shape_to_byte_shape((*experts, *first.shape), types[-1])
        name = names.get_name(merged_name(first), try_suffixes=(".weight", ".bias"))
        assert name is not None, f"gguf has no name for {first.name}"
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), prod(shape), raw_dtype=types[-1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for wanted, stored in zip(weights, types, strict=True):
        writer.write_tensor_data(
            np.stack([quantize(float32_of(source, each), stored) for each in wanted])
        )
    writer.close()
    os.replace(unfinished, path)
    return path


def describe(writer: "GGUFWriter", config: ModelConfig) -> None:
    import gguf

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_expert_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.rotary_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_local_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)


def describe_tokenizer(writer: "GGUFWriter", directory: Path, config: ModelConfig) -> None:
    """Add a byte-level BPE and the chat template, or say that there is none."""
    import gguf

    path = directory / "tokenizer.json"
    if not path.exists():
        writer.add_tokenizer_model("none")
        return
    fields = json.loads(path.read_text(encoding="utf-8"))
    added = {each["id"]: each for each in fields["added_tokens"]}
    texts = {number: text for text, number in fields["model"]["vocab"].items()}
    texts |= {number: each["content"] for number, each in added.items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL) | {
        number: gguf.TokenType.CONTROL if each["special"] else gguf.TokenType.USER_DEFINED
        for number, each in added.items()
    }
    every = range(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(SPLIT_AS)
    writer.add_token_list([texts.get(number, f"[PAD{number}]") for number in every])
    writer.add_token_types([kinds.get(number, gguf.TokenType.UNUSED) for number in every])
    writer.add_token_merges([" ".join(pair) for pair in fields["model"]["merges"]])
    special = {each["content"]: number for number, each in added.items()}
    settings = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
    for add, name in (
        (writer.add_bos_token_id, "bos_token"),
        (writer.add_eos_token_id, "eos_token"),
    ):
        if settings.get(name) in special:
            add(special[settings[name]])
    writer.add_add_bos_token(False)
    writer.add_chat_template((directory / "chat_template.jinja").read_text(encoding="utf-8"))


def stacked_weights(config: ModelConfig) -> Iterator[list[schema.Expected]]:
    """Yield each tensor of the file: one weight, or those of all experts of a layer."""
    weights = (wanted for wanted in schema.expected(config) if not wanted.is_scale)
    for _, group in groupby(weights, lambda wanted: (wanted.weight, wanted.layer)):
        yield list(group)


def merged_name(wanted: schema.Expected) -> str:
    """Return the weight's name as the `gguf` package looks it up: experts without their number, a
    bias as a suffix.
    """
    name = wanted.weight.template.format(l=wanted.layer, e="").replace("..", ".")
    return f"{name.removesuffix('_bias')}.bias" if name.endswith("_bias") else name


def float32_of(source: Checkpoint, wanted: schema.Expected) -> np.ndarray:
    if not source.is_fp8(wanted.name):
        return bfloat16.to_float32(source.array(wanted.name))
    return fp8.dequantize(
        source.array(wanted.name), source.multipliers(wanted.name), source.config.weight_block_size
    )
