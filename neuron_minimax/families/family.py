"""A family of models as data: its weights, their place on Neuron, its architecture and its formats.

Everything else asks the family. Names are templates over layer `{l}` and expert `{e}`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of the table: a published tensor's name template, its dimensions, and its dtype.

    `dimensions` are letters: V vocabulary, H hidden, I intermediate, Q query width, K key/value
    width, E experts, D head_dim. `module_group` is one of embedding, norm, attention, router,
    experts, mlp, head.
    """

    template: str
    dimensions: tuple[str, ...]
    published_dtype: str
    kind: str
    module_group: str

    @property
    def quantized(self) -> bool:
        """Whether the published checkpoint stores it as FP8 codes with block scales."""
        return self.published_dtype == "F8_E4M3"

    @property
    def float32_only(self) -> bool:
        """Whether less than float32 is refused.

        Routing needs float32: bias values are 4.7 to 9.5, where BF16 steps are 0.03 to 0.06 and
        flip experts.
        """
        return self.published_dtype == "F32"

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.template

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.template


class Operation(StrEnum):
    """How sources become a target; `convert/pieces.py` does each, and its inverse."""

    COPY = "copy"
    STACK_TRANSPOSED = "stack over experts, each transposed, side by side"


class ScalePolicy(StrEnum):
    """What an FP8 source's block scales become: a `.scale` arranged as the weight, or an error."""

    NONE = "none"
    BLOCK = "block"


@dataclass(frozen=True)
class Rule:
    """One Neuron parameter: its name, the published weights it is made of, and how."""

    target: str
    sources: tuple[str, ...]
    operation: Operation
    scale: ScalePolicy = ScalePolicy.NONE

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.target

    @property
    def per_expert(self) -> bool:
        return self.operation is Operation.STACK_TRANSPOSED


class QKNorm(StrEnum):
    """What the RMS norms of queries and keys run over."""

    NONE = "none"
    PER_HEAD = "per head"
    FULL_WIDTH = "full width"


class RouterKind(StrEnum):
    """How experts are chosen and weighted; NONE is a dense MLP in every layer."""

    NONE = "none"
    SIGMOID_BIAS = "sigmoid, a bias chooses"
    SOFTMAX = "softmax"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The switches in which one family's decoder differs from another's (model/decoder.py)."""

    qk_norm: QKNorm
    router: RouterKind
    qkv_bias: bool = False
    shared_expert: bool = False


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """What the family's authors recommend; generation_config.json goes before it."""

    temperature: float
    top_p: float
    top_k: int


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is particular to one family of models.

    `fixed_fields` are fields of config.json with the values that the architecture allows, the
    published one first; other values are refused. `field_names` says under which name of
    config.json a field of ModelConfig is stored, where the two differ. `rank_tensors` are int32
    [tp_degree] tensors of NxD, each rank's own number after sharding; they are made for a state
    dict in memory, never stored. `chat_format` is a name in generation/chat_formats; `neuron_class`
    is "module:class" of the NxDI application. `ignored_markers` begin the name parts of published
    tensors that are not run (multi-token prediction).
    """

    model_type: str
    title: str
    models: str
    fixed_fields: Mapping[str, tuple[Any, ...]]
    weights: tuple[Weight, ...]
    rules: tuple[Rule, ...]
    rank_tensors: tuple[str, ...]
    architecture: Architecture
    chat_format: str
    sampling: SamplingDefaults
    neuron_class: str
    rope_theta: float
    field_names: Mapping[str, str] = field(default_factory=dict)
    ignored_markers: tuple[str, ...] = ()

    def weight(self, template: str) -> Weight:
        """The row of a published name template."""
        return next(weight for weight in self.weights if weight.template == template)


def module_of(weight_name: str) -> str:
    """The dotted module path that holds a parameter."""
    return weight_name.rpartition(".")[0]


def target_scale_name(target: str) -> str:
    """The name of a converted weight's block scales."""
    return module_of(target) + ".scale"
