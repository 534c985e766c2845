"""Probes: converted directories of one real layer whose logits show one thing each.

All have the same tensors, dtypes and shapes, so that their graphs are the same; only weights
differ. What is not under test is put to zero, and where a probe reads channels of the residual
stream, one logit is one channel: the embedding is zero there, so that nothing is added to what the
layer wrote.
Shapes: V tokens of the probe, H hidden, E experts, I intermediate.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property, partial
from math import log2, prod
from pathlib import Path
from typing import Any

import numpy as np

from neuron_minimax import fp8
from neuron_minimax.checkpoint.header import STORED_DTYPES, HasSpec, TensorSpec
from neuron_minimax.checkpoint.kinds import CONVERSION_NAME
from neuron_minimax.checkpoint.output import Recipe, fill_directory
from neuron_minimax.checkpoint.reader import TensorDirectory
from neuron_minimax.checkpoint.shards import Piece, StreamedShard, StreamedTensor
from neuron_minimax.config import ModelConfig
from neuron_minimax.convert.manifest import FORMAT_VERSION, read_manifest
from neuron_minimax.convert.pieces import PIECE_BYTES
from neuron_minimax.convert.plan import Converted
from neuron_minimax.errors import ConversionError
from neuron_minimax.families import Role, module_of, target_scale_name
from neuron_minimax.fp8 import bfloat16, ceil_div
from neuron_minimax.inspection.modules import Framework, Module, needed

# Most tokens of a probe. A layer computes the same for any vocabulary, and 200,064 tokens would add
# 2.4 GB to each probe; 6144 is a multiple of every tp degree, so that no rank's share of the head
# is padded.
MOST_TOKENS = 6144
# In units of the embedding's root mean square, which the coded probes make 1.
CONSTANT = 4.0
EXPERT_OUTPUT = 16.0
# Per-layer fields of config.json that are lists, and fields that name tokens of the whole
# vocabulary.
PER_LAYER_FIELDS = ("attn_type_list",)
TOKEN_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Probe(StrEnum):
    ROUTER = "router"
    ATTENTION = "attention"
    LAYER = "layer"


@dataclass(frozen=True, kw_only=True)
class Target(HasSpec):
    """One tensor of a probe, and the name of the layer's tensor, which is stored alike."""

    role: Role  # of the first weight that it is made of
    spec: TensorSpec
    source: str
    is_scale: bool

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Float32 values as stored elements; those of probes are powers of two, or rounded once
        to BF16.
        """
        if self.dtype == "F8_E4M3":
            return fp8.encode(values)
        if self.dtype == "BF16":
            return np.ascontiguousarray(bfloat16.round_to_bfloat16(values))
        return values.astype(STORED_DTYPES[self.dtype])


# Stored elements of a range along the first dimension of a target.
Content = Callable[[slice], np.ndarray]
Change = Callable[[Target], Content]


@dataclass(frozen=True, kw_only=True)
class ExpertCode:
    """The mark of a chosen expert: it writes one channel of the residual stream, the same amount
    whichever expert it is. Its input is channel `constant`, which every token's
    embedding holds alike.
    """

    constant: int
    channels: np.ndarray  # [E], what each expert writes
    gate_up: float
    down: float


class Layer:
    """One layer of a converted directory, and the tokens that its probes have.

    Raises ConversionError when the directory is not a finished conversion, or has no such layer.
    """

    def __init__(self, converted: Path, number: int) -> None:
        self.converted = converted
        self.number = number
        self.manifest = read_manifest(converted)
        self.config = ModelConfig.from_dir(converted)
        self.tensors = TensorDirectory(converted)
        self.tensors.require_usable()
        if not 0 <= number < self.config.num_hidden_layers:
            raise ConversionError(
                f"--layer {number}: {converted} has layers 0 to {self.config.num_hidden_layers - 1}"
            )
        if self.config.num_local_experts >= self.config.hidden_size:
            raise ConversionError(
                f"{self.config.num_local_experts} experts do not fit into "
                f"{self.config.hidden_size} channels, one for each; the router cannot be checked "
                "this way"
            )
        self.vocabulary = min(self.config.vocab_size, MOST_TOKENS)
        if self.vocabulary < self.config.num_local_experts:
            raise ConversionError(
                f"a vocabulary of {self.vocabulary} tokens has no logit for each of "
                f"{self.config.num_local_experts} experts; the router cannot be checked this way"
            )

    @cached_property
    def token_rows(self) -> np.ndarray:
        """Which tokens of the vocabulary the probe's are, [V], spread over all of it."""
        return np.arange(self.vocabulary) * self.config.vocab_size // self.vocabulary

    def name_of(self, role: Role) -> str:
        """The converted name of this layer's weight of one role."""
        return self.config.family.rule_of(role).target.format(l=self.number)

    def targets(self) -> Iterator[Target]:
        """Every tensor of a probe, by the conversion's rules."""
        family = self.config.family
        for rule in family.rules:
            weight = family.weight(rule.sources[0])
            for is_scale, template in (
                (False, rule.target),
                (True, target_scale_name(rule.target)),
            ):
                source = template.format(l=self.number)
                if is_scale and source not in self.tensors.entries:
                    continue
                entry = self.tensors.entry(source)
                cut = weight.dimensions[0] == "V"
                shape = (self.vocabulary, *entry.shape[1:]) if cut else entry.shape
                spec = TensorSpec(template.format(l=0), entry.dtype, shape)
                yield Target(role=weight.role, spec=spec, source=source, is_scale=is_scale)

    def probe_config(self) -> dict[str, Any]:
        """config.json of a probe: one layer, fewer tokens, else the converted directory's."""
        raw = dict(self.config.raw) | {"num_hidden_layers": 1, "vocab_size": self.vocabulary}
        raw |= dict.fromkeys(TOKEN_FIELDS)
        for field in PER_LAYER_FIELDS:
            if raw.get(field):
                raw[field] = raw[field][self.number : self.number + 1]
        if self.config.declares_fp8:
            matrices = [
                target for target in self.targets() if not target.is_scale and len(target.shape) > 1
            ]
            modules = [
                Module(path=module_of(target.name), weights=1, fp8=int(target.dtype == "F8_E4M3"))
                for target in matrices
            ]
            listed = list(needed(Framework.NXDI, modules))
            raw["quantization_config"] = raw["quantization_config"] | {
                "modules_to_not_convert": listed
            }
        return raw

    @cached_property
    def code(self) -> ExpertCode:
        """The experts' code for this layer. Raises ConversionError when the norm before the
        experts is all zero.
        """
        config = self.config
        norm = bfloat16.to_float32(self.tensors.array(self.name_of(Role.MLP_NORM)))
        constant = int(np.abs(norm).argmax())
        hidden = config.hidden_size
        value = CONSTANT / float(np.sqrt(1 + CONSTANT**2 / hidden)) * float(norm[constant])
        if value == 0:
            raise ConversionError(
                f"layer {self.number} of {self.converted} has a norm of zeros before its experts"
            )
        gate_up = np.copysign(2.0 ** round(log2(4 / abs(value))), value)
        gate = gate_up * value
        # Every block of intermediate channels has a part, so that the share of every rank has one.
        parts = ceil_div(config.intermediate_size, config.weight_block_size[0])
        written = gate / (1 + np.exp(-gate)) * gate * parts
        others = np.delete(np.arange(hidden), constant)
        return ExpertCode(
            constant=constant,
            channels=others[
                np.arange(config.num_local_experts) * len(others) // config.num_local_experts
            ],
            gate_up=float(gate_up),
            down=2.0 ** round(log2(EXPERT_OUTPUT / written)),
        )

    @cached_property
    def attention_channels(self) -> np.ndarray:
        """Channels of the residual stream that the attention probe reads: every other one, as
        far as logits go.
        """
        return np.arange(0, self.config.hidden_size, 2)[: self.vocabulary]


def write_probe(layer: Layer, probe: Probe, directory: Path) -> None:
    """Write a probe as a converted directory, or recognize it as written; piece by piece, never
    half.

    Raises ConversionError when the disk is too small, or the directory holds something else.
    """
    identity = asdict(layer.manifest.identity) | {
        "source_fingerprint": Converted.open(layer.converted, read_shards=False).fingerprint,
        "format_version": FORMAT_VERSION,
        "probe": f"{probe} of layer {layer.number}",
    }
    changes = _changes(layer, probe)
    tensors = tuple(
        StreamedTensor(target.spec, list(_pieces(layer, target, changes)))
        for target in layer.targets()
    )
    recipe = Recipe(
        manifest_name=CONVERSION_NAME,
        identity=identity,
        source=layer.tensors,
        shards=lambda: [StreamedShard("model.safetensors", tensors)],
        config=layer.probe_config,
        manifest=lambda records: {"probe": str(probe), "layer": layer.number},
        compare="check again",
        companions=False,
    )
    fill_directory(directory, recipe, overwrite=True)


def _pieces(layer: Layer, target: Target, changes: Mapping[Role, Change]) -> Iterator[Piece]:
    content = changes.get(target.role, partial(_copied, layer))(target)
    rows = target.shape[0]
    row_bytes = prod(target.shape[1:]) * STORED_DTYPES[target.dtype].itemsize
    step = max(1, PIECE_BYTES // row_bytes)
    for start in range(0, rows, step):
        taken = slice(start, min(start + step, rows))
        yield Piece((taken.stop - taken.start) * row_bytes, partial(_fill, content, taken, target))


def _fill(content: Content, taken: slice, target: Target, memory: np.ndarray) -> int:
    elements = memory.view(STORED_DTYPES[target.dtype]).reshape(-1, *target.shape[1:])
    elements[...] = content(taken)
    return 0


def _changes(layer: Layer, probe: Probe) -> dict[Role, Change]:
    """The changes that a probe makes to the layer's own weights, by role."""
    if probe is Probe.LAYER:
        return {Role.EMBEDDING: partial(_cut, layer), Role.HEAD: partial(_cut, layer)}
    read = layer.code.channels if probe is Probe.ROUTER else layer.attention_channels
    shown: dict[Role, Change] = {
        Role.EMBEDDING: partial(_masked_embedding, layer, read, probe is Probe.ROUTER),
        Role.FINAL_NORM: _ones,
        Role.HEAD: partial(_channel_head, read),
    }
    if probe is Probe.ATTENTION:
        return shown | {Role.EXPERT_DOWN: partial(_silent, layer)}
    return shown | {
        Role.OUTPUT: partial(_silent, layer),
        Role.EXPERT_GATE: partial(_coded_gate_up, layer),
        Role.EXPERT_DOWN: partial(_coded_down, layer),
    }


def _copied(layer: Layer, target: Target) -> Content:
    return lambda taken: layer.tensors.array(target.source)[taken]


def _cut(layer: Layer, target: Target) -> Content:
    return lambda taken: layer.tensors.array(target.source)[layer.token_rows[taken]]


def _ones(target: Target) -> Content:
    return lambda taken: target.encode(
        np.ones((taken.stop - taken.start, *target.shape[1:]), np.float32)
    )


def _silent(layer: Layer, target: Target) -> Content:
    """Zero codes under the layer's own scales: the product is there and gives nothing."""
    if target.is_scale:
        return _copied(layer, target)
    return lambda taken: np.zeros(
        (taken.stop - taken.start, *target.shape[1:]), STORED_DTYPES[target.dtype]
    )


def _masked_embedding(layer: Layer, read: np.ndarray, coded: bool, target: Target) -> Content:
    """The tokens' own embeddings, each of root mean square 1 (the norm takes its size away in
    any case), zero in the channels that are read; with the experts' constant channel when
    `coded`.
    """

    def content(taken: slice) -> np.ndarray:
        rows = bfloat16.to_float32(
            layer.tensors.array(target.source)[layer.token_rows[taken]]
        ).copy()
        rows[:, read] = 0
        size = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
        rows = np.divide(rows, size, out=np.zeros_like(rows), where=size > 0)
        if coded:
            rows[:, layer.code.constant] = CONSTANT
        return target.encode(rows)

    return content


def _channel_head(read: np.ndarray, target: Target) -> Content:
    """Logit v is channel read[v]; the other tokens' logits are zero."""

    def content(taken: slice) -> np.ndarray:
        head = np.zeros((taken.stop - taken.start, target.shape[1]), np.float32)
        shown = np.arange(taken.start, min(taken.stop, len(read)))
        head[shown - taken.start, read[shown]] = 1
        return target.encode(head)

    return content


def _coded_gate_up(layer: Layer, target: Target) -> Content:
    code = layer.code
    config = layer.config
    first = np.arange(0, config.intermediate_size, config.weight_block_size[0])
    columns = np.concatenate([first, config.intermediate_size + first])  # gate, then up
    return _one_row(target, code.constant, columns, code.gate_up)


def _coded_down(layer: Layer, target: Target) -> Content:
    code = layer.code
    config = layer.config
    rows = np.arange(0, config.intermediate_size, config.weight_block_size[0])
    if target.is_scale:
        return _scales(target, code.down)

    def content(taken: slice) -> np.ndarray:
        down = np.zeros((taken.stop - taken.start, *target.shape[1:]), np.float32)
        experts = np.arange(taken.start, taken.stop)
        value = 1.0 if target.dtype == "F8_E4M3" else code.down
        down[(experts - taken.start)[:, None], rows, code.channels[experts][:, None]] = value
        return target.encode(down)

    return content


def _one_row(target: Target, row: int, columns: np.ndarray, value: float) -> Content:
    """Experts that read one input channel; of FP8 the size is in the scales and the sign in the
    codes.
    """
    if target.is_scale:
        return _scales(target, abs(value))
    value = float(np.sign(value)) if target.dtype == "F8_E4M3" else value

    def content(taken: slice) -> np.ndarray:
        weight = np.zeros((taken.stop - taken.start, *target.shape[1:]), np.float32)
        weight[:, row, columns] = value
        return target.encode(weight)

    return content


def _scales(target: Target, value: float) -> Content:
    return lambda taken: np.full((taken.stop - taken.start, *target.shape[1:]), value, np.float32)
