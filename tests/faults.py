"""Faulty checkpoints, each made from a good tiny one by one change: what the fault is called and
what it concerns.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax.checkpoint.index import INDEX_NAME
from neuron_minimax.config import ModelConfig
from neuron_minimax.fp8 import bfloat16
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint

Tensors = dict[str, tuple[str, np.ndarray]]
ATTENTION = "model.layers.1.self_attn."
MOE = "model.layers.1.block_sparse_moe."
SHARD = "model-00002-of-00003.safetensors"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A checkpoint with one fault. `subject` must be named by what finds it; `values`: only reading
    values shows it. `means` changes the tensors of the good checkpoint into what these mean.
    """

    title: str
    subject: str
    words: tuple[str, ...]
    values: bool = False
    tensors: Callable[[Tensors], Any] = lambda tensors: None
    config: Callable[[dict[str, Any]], Any] = lambda raw: None
    files: Callable[[Path], Any] = lambda directory: None
    means: Callable[[Tensors], Any] = lambda tensors: None

    def write(self, directory: Path) -> Path:
        """Write the faulty checkpoint, in three shards."""
        raw = tiny_config()
        tensors = {
            name: (dtype, array) for name, dtype, array in tiny_tensors(ModelConfig.from_dict(raw))
        }
        self.tensors(tensors)
        self.config(raw)
        write_checkpoint(
            directory, raw, [(name, *rest) for name, rest in tensors.items()], shards=3
        )
        self.files(directory)
        return directory


def drop(*ends: str) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(ends)]:
            del tensors[name]

    return change


def put(
    name: str, change: Callable[[np.ndarray], np.ndarray], dtype: str | None = None
) -> Callable[[Tensors], Any]:
    """Replace a tensor by what `change` makes of it."""

    def apply(tensors: Tensors) -> None:
        old, array = tensors[name]
        tensors[name] = (dtype or old, np.ascontiguousarray(change(array)))

    return apply


def to_bfloat16(name: str, stored: str) -> Callable[[Tensors], Any]:
    """Round a tensor to BF16, and store it as that or as float32."""

    def rounded(array: np.ndarray) -> np.ndarray:
        bits = bfloat16.round_to_bfloat16(array)
        return bits if stored == "BF16" else bfloat16.to_float32(bits)

    return put(name, rounded, stored)


def in_bfloat16(title: str, name: str, subject: str, *words: str) -> Fault:
    """A tensor that is BF16 where float32 is published: it is widened."""
    return Fault(
        title=title,
        subject=subject,
        words=("BF16", *words),
        tensors=to_bfloat16(name, "BF16"),
        means=to_bfloat16(name, "F32"),
    )


def with_element(value: Any) -> Callable[[np.ndarray], np.ndarray]:
    """Set the element at the origin."""

    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[(0,) * array.ndim] = value
        return array

    return change


def rename(old: str, new: str) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if old in name]:
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


def invert_scales(*ends: str) -> Callable[[Tensors], Any]:
    def change(tensors: Tensors) -> None:
        for name, (dtype, array) in tensors.items():
            if name.endswith(ends):
                tensors[name] = (dtype, np.float32(1) / array)

    return change


def edit_bytes(change: Callable[[bytes], bytes], file: str = SHARD) -> Callable[[Path], Any]:
    return lambda directory: (directory / file).write_bytes(change((directory / file).read_bytes()))


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], Any]:
    def apply(directory: Path) -> None:
        index = json.loads((directory / INDEX_NAME).read_text())
        change(index["weight_map"])
        (directory / INDEX_NAME).write_text(json.dumps(index))

    return apply


def shifted_header(data: bytes) -> bytes:
    """The first tensor's offsets moved by eight bytes, so that it overlaps the second."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = min(
        (key for key in header if key != "__metadata__"),
        key=lambda key: header[key]["data_offsets"],
    )
    header[name]["data_offsets"] = [offset + 8 for offset in header[name]["data_offsets"]]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def twice(directory: Path) -> None:
    """The last tensor's file also holds a tensor of the first."""
    from safetensors.numpy import save_file

    save_file({"model.norm.weight": np.ones(256, np.float32)}, directory / "extra.safetensors")
    edit_index(lambda weight_map: weight_map.update({"model.extra.weight": "extra.safetensors"}))(
        directory
    )


def quantization(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda raw: raw["quantization_config"].update(changes)


Q_PROJ = ATTENTION + "q_proj.weight"
Q_SCALE = ATTENTION + "q_proj.weight_scale_inv"
O_PROJ = ATTENTION + "o_proj.weight"
O_SCALE = ATTENTION + "o_proj.weight_scale_inv"
# The expert of the largest bias, which tokens do choose.
W1 = MOE + "experts.0.w1.weight"
W1_SCALE = MOE + "experts.0.w1.weight_scale_inv"

FAULTS = (
    # What transformers loads without a word (but for a table of missing names).
    Fault(
        title="a q_proj is missing",
        subject=Q_PROJ,
        words=("missing",),
        tensors=drop(Q_PROJ, Q_SCALE),
    ),
    Fault(
        title="a norm is missing",
        subject="model.norm.weight",
        words=("missing",),
        tensors=drop("model.norm.weight"),
    ),
    Fault(
        title="a router bias is missing",
        subject=MOE + "e_score_correction_bias",
        words=("missing",),
        tensors=drop(MOE + "e_score_correction_bias"),
    ),
    Fault(
        title="lm_head is missing",
        subject="lm_head.weight",
        words=("missing",),
        tensors=drop("lm_head.weight"),
    ),
    Fault(
        title="o_proj is missing in every layer",
        subject=ATTENTION + "o_proj.weight",
        words=("missing",),
        tensors=drop("o_proj.weight", "o_proj.weight_scale_inv"),
    ),
    Fault(
        title="an expert weight is missing",
        subject=W1,
        words=("missing",),
        tensors=drop(W1, W1_SCALE),
    ),
    Fault(
        title="an attention scale is missing",
        subject=O_SCALE,
        words=("missing", "raw codes"),
        tensors=drop(O_SCALE),
    ),
    Fault(
        title="an expert scale is missing",
        subject=W1_SCALE,
        words=("missing", "raw codes"),
        tensors=drop(W1_SCALE),
    ),
    Fault(
        title="a scale is NaN",
        subject=O_SCALE,
        words=("nan", "block [0, 0]"),
        values=True,
        tensors=put(O_SCALE, with_element(np.nan)),
    ),
    Fault(
        title="a scale is infinite",
        subject=W1_SCALE,
        words=("inf", "block [0, 0]"),
        values=True,
        tensors=put(W1_SCALE, with_element(np.inf)),
    ),
    Fault(
        title="a scale is zero",
        subject=O_SCALE,
        words=("0.0",),
        values=True,
        tensors=put(O_SCALE, with_element(0)),
    ),
    Fault(
        title="a scale is negative",
        subject=W1_SCALE,
        words=("-1.0",),
        values=True,
        tensors=put(W1_SCALE, with_element(-1)),
    ),
    Fault(
        title="a scale is transposed",
        subject=O_SCALE,
        words=("[4, 2]", "[2, 4]"),
        tensors=put(O_SCALE, np.transpose),
    ),
    Fault(
        title="a scale is 1 x 1",
        subject=O_SCALE,
        words=("[1, 1]", "[2, 4]"),
        tensors=put(O_SCALE, lambda scale: scale[:1, :1]),
    ),
    Fault(
        title="a scale is one per row",
        subject=O_SCALE,
        words=("[256, 1]", "[2, 4]"),
        tensors=put(O_SCALE, lambda scale: np.repeat(scale[:, :1], 128, axis=0)),
    ),
    Fault(
        title="FP8 codes are NaN",
        subject=O_PROJ,
        words=("1 NaN code ",),
        values=True,
        tensors=put(O_PROJ, with_element(0x7F)),
    ),
    Fault(
        title="a BF16 weight has an infinite element",
        subject="model.embed_tokens.weight",
        words=("1 NaN or infinite",),
        values=True,
        tensors=put("model.embed_tokens.weight", with_element(0x7F80)),
    ),
    # Scales that mean something else.
    Fault(
        title="some scales are reciprocals",
        subject="o_proj.weight",
        words=("unclear", "multiplier", "reciprocal"),
        values=True,
        tensors=invert_scales("o_proj.weight_scale_inv"),
    ),
    Fault(
        title="config.json has another block size",
        subject=O_SCALE,
        words=("[2, 4]", "[4, 8]"),
        config=quantization(weight_block_size=[64, 64]),
    ),
    # Weights of another form.
    Fault(
        title="q_norm is averaged to the head size",
        subject=ATTENTION + "q_norm.weight",
        words=("[128]", "[512]"),
        tensors=put(ATTENTION + "q_norm.weight", lambda norm: norm[:128]),
    ),
    Fault(
        title="a weight is FP8 e5m2",
        subject=O_PROJ,
        words=("F8_E5M2",),
        tensors=put(O_PROJ, np.copy, "F8_E5M2"),
    ),
    Fault(
        title="a weight is transposed",
        subject=ATTENTION + "o_proj.weight",
        words=("[512, 256]", "[256, 512]"),
        tensors=put(ATTENTION + "o_proj.weight", np.transpose),
    ),
    Fault(
        title="one expert of a layer is BF16",
        subject=W1,
        words=("several dtypes",),
        tensors=lambda tensors: (
            put(W1, lambda w: bfloat16.round_to_bfloat16(w * 1e-3), "BF16")(tensors),
            drop(W1_SCALE)(tensors),
        ),
    ),
    Fault(
        title="a BF16 weight has a scale",
        subject=O_SCALE,
        words=("scales a weight", "BF16"),
        tensors=put(O_PROJ, lambda codes: bfloat16.round_to_bfloat16(codes * 1e-3), "BF16"),
    ),
    Fault(
        title="names are already those of the conversion",
        subject=ATTENTION + "o_proj.o_proj.weight",
        words=("no weight of this model",),
        tensors=rename("o_proj.", "o_proj.o_proj."),
    ),
    Fault(
        title="a tensor of another model is there",
        subject="model.layers.1.mlp.gate_proj.weight",
        words=("no weight of this model",),
        tensors=lambda tensors: tensors.update(
            {"model.layers.1.mlp.gate_proj.weight": ("BF16", np.zeros((4, 4), np.uint16))}
        ),
    ),
    # config.json edited in place.
    Fault(
        title="config.json has fewer layers",
        subject=Q_PROJ,
        words=("no weight of this model",),
        config=lambda raw: raw.update(num_hidden_layers=1, num_mtp_modules=0),
    ),
    Fault(
        title="config.json has another vocabulary",
        subject="lm_head.weight",
        words=("[160, 256]", "[176, 256]"),
        config=lambda raw: raw.update(vocab_size=176),
    ),
    # Files.
    Fault(
        title="a shard is truncated",
        subject=SHARD,
        words=("truncated",),
        files=edit_bytes(lambda data: data[:-100]),
    ),
    Fault(
        title="a shard is empty",
        subject=SHARD,
        words=("empty",),
        files=edit_bytes(lambda data: b""),
    ),
    Fault(
        title="a shard is missing",
        subject=SHARD,
        words=("is missing",),
        files=lambda path: (path / SHARD).unlink(),
    ),
    Fault(
        title="a header is overwritten",
        subject=SHARD,
        words=("header",),
        files=edit_bytes(lambda d: b"\0" * len(d)),
    ),
    Fault(
        title="a header lies about offsets",
        subject=SHARD,
        words=("expected",),
        files=edit_bytes(shifted_header),
    ),
    Fault(
        title="the index lists a tensor that its shard does not have",
        subject="model.layers.1.extra.weight",
        words=("not in that file",),
        files=edit_index(
            lambda weight_map: weight_map.update({"model.layers.1.extra.weight": SHARD})
        ),
    ),
    Fault(
        title="the index leaves out a tensor",
        subject="lm_head.weight",
        words=("does not list it",),
        files=edit_index(lambda weight_map: weight_map.pop("lm_head.weight")),
    ),
    Fault(
        title="a tensor is in two shards",
        subject="model.norm.weight",
        words=("two shards",),
        files=twice,
    ),
)

# Wrong elsewhere, right here: a warning (or nothing), and a conversion that equals that of the good
# checkpoint.
HANDLED = (
    Fault(
        title="quantization_config is absent",
        subject="config.json",
        words=("no quantization_config", "silently"),
        config=lambda raw: raw.pop("quantization_config"),
    ),
    Fault(
        title="every scale is a reciprocal",
        subject="weight_scale_inv",
        words=("is the reciprocal",),
        values=True,
        tensors=invert_scales("_scale_inv"),
    ),
    Fault(
        title="modules_to_not_convert lists self_attn",
        subject="self_attn",
        words=("in FP8 with scales", "AssertionError"),
        config=quantization(modules_to_not_convert=["self_attn", "lm_head"]),
    ),
    Fault(
        title="modules_to_not_convert lists gate",
        subject="gate",
        words=("gate_up_proj", "silently"),
        config=quantization(modules_to_not_convert=["gate", "lm_head"]),
    ),
    Fault(
        title="modules_to_not_convert leaves out lm_head",
        subject="lm_head",
        words=("no entry reaches lm_head",),
        config=quantization(modules_to_not_convert=["router"]),
    ),
    Fault(
        title="tensors of multi-token prediction are there",
        subject="model.mtp.0.proj.weight",
        words=("left out",),
        tensors=lambda tensors: tensors.update(
            {"model.mtp.0.proj.weight": ("BF16", np.zeros((4, 4), np.uint16))}
        ),
    ),
    in_bfloat16("a scale is BF16", O_SCALE, "BF16", "widened"),
    in_bfloat16(
        "a router bias is BF16", MOE + "e_score_correction_bias", "e_score_correction_bias", "flips"
    ),
    in_bfloat16("a router gate is BF16", MOE + "gate.weight", "gate", "rounded by whoever"),
    Fault(title="no file names an end token", subject="eos_token_id", words=("end-of-turn token",)),
)
