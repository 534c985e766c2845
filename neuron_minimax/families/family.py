"""A family of models as data: its weights, their place on Neuron, its architecture and its formats.

Everything else asks the family. Names are templates over layer `{l}` and expert `{e}`.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """The task of a weight, whatever its family calls it."""

    EMBEDDING = "embedding"
    ATTENTION_NORM = "norm before attention"
    QUERY = "query projection"
    KEY = "key projection"
    VALUE = "value projection"
    OUTPUT = "output projection"
    QUERY_BIAS = "bias of the query projection"
    KEY_BIAS = "bias of the key projection"
    VALUE_BIAS = "bias of the value projection"
    QUERY_NORM = "norm of queries"
    KEY_NORM = "norm of keys"
    MLP_NORM = "norm before the MLP"
    ROUTER = "router"
    ROUTER_BIAS = "bias of the router's choice"
    EXPERT_GATE = "gate projection of an expert"
    EXPERT_UP = "up projection of an expert"
    EXPERT_DOWN = "down projection of an expert"
    MLP_GATE = "gate projection of a dense MLP"
    MLP_UP = "up projection of a dense MLP"
    MLP_DOWN = "down projection of a dense MLP"
    SHARED_GATE = "gate projection of the shared expert"
    SHARED_UP = "up projection of the shared expert"
    SHARED_DOWN = "down projection of the shared expert"
    FINAL_NORM = "norm before the head"
    HEAD = "head"


# Role -> what reports gather it under.
MODULE_GROUPS: Mapping[Role, str] = {
    Role.EMBEDDING: "embedding",
    Role.ATTENTION_NORM: "norm",
    Role.QUERY: "attention",
    Role.KEY: "attention",
    Role.VALUE: "attention",
    Role.OUTPUT: "attention",
    Role.QUERY_BIAS: "attention",
    Role.KEY_BIAS: "attention",
    Role.VALUE_BIAS: "attention",
    Role.QUERY_NORM: "norm",
    Role.KEY_NORM: "norm",
    Role.MLP_NORM: "norm",
    Role.ROUTER: "router",
    Role.ROUTER_BIAS: "router",
    Role.EXPERT_GATE: "experts",
    Role.EXPERT_UP: "experts",
    Role.EXPERT_DOWN: "experts",
    Role.MLP_GATE: "mlp",
    Role.MLP_UP: "mlp",
    Role.MLP_DOWN: "mlp",
    Role.SHARED_GATE: "mlp",
    Role.SHARED_UP: "mlp",
    Role.SHARED_DOWN: "mlp",
    Role.FINAL_NORM: "norm",
    Role.HEAD: "head",
}


class LayerKind(StrEnum):
    """A layer by its MLP: one for all tokens, or a mixture of experts."""

    ANY = "any"
    DENSE = "dense"
    SPARSE = "sparse"


# The matrices of each kind of MLP; the first has its intermediate channels as rows.
DENSE_ROLES = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)
EXPERT_ROLES = (Role.EXPERT_GATE, Role.EXPERT_UP, Role.EXPERT_DOWN)
SHARED_ROLES = (Role.SHARED_GATE, Role.SHARED_UP, Role.SHARED_DOWN)
SPARSE_ROLES = (Role.ROUTER, Role.ROUTER_BIAS, *EXPERT_ROLES, *SHARED_ROLES)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """One row of the table: a published tensor's name template, its dimensions, dtype and role.

    `dimensions` are letters: V vocabulary, H hidden, I intermediate (of an expert, or of the MLP of
    a dense family), F intermediate of a dense layer among sparse ones, S of the shared expert,
    Q query width, K key/value width, E experts, D head_dim.
    """

    template: str
    dimensions: tuple[str, ...]
    published_dtype: str
    role: Role

    @property
    def module(self) -> str:
        """The last part of its name, without a `.weight`: `q_proj`."""
        return self.template.removesuffix(".weight").rpartition(".")[2]

    @property
    def module_group(self) -> str:
        """One of embedding, norm, attention, router, experts, mlp, head."""
        return MODULE_GROUPS[self.role]

    @property
    def is_matrix(self) -> bool:
        return len(self.dimensions) == 2

    @property
    def quantized(self) -> bool:
        """True where the published checkpoint stores it as FP8 codes with block scales."""
        return self.published_dtype == "F8_E4M3"

    @property
    def float32_only(self) -> bool:
        """True where the published checkpoint stores float32, which a conversion keeps: routing.

        A checkpoint that stores it in less is widened, and a report says so: bias values are 4.7 to
        9.5, where BF16 steps are 0.03 to 0.06 and flip experts. FP8 is refused.
        """
        return self.published_dtype == "F32"

    @property
    def per_layer(self) -> bool:
        return "{l}" in self.template

    @property
    def per_expert(self) -> bool:
        return "{e}" in self.template

    @property
    def layer_kind(self) -> "LayerKind":
        """The layers that have it, of a family with experts."""
        if self.role in DENSE_ROLES:
            return LayerKind.DENSE
        return LayerKind.SPARSE if self.role in SPARSE_ROLES else LayerKind.ANY


class Operation(StrEnum):
    """The ways in which sources become a target; `convert/pieces.py` has the arithmetic of each."""

    COPY = "copy"
    STACK_TRANSPOSED = "stack over experts, each transposed, side by side"


class ScalePolicy(StrEnum):
    """The place of an FP8 source's block scales: a `.scale` arranged as the weight, or none."""

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
    """The width over which the RMS norms of queries and keys run."""

    NONE = "none"
    PER_HEAD = "per head"
    FULL_WIDTH = "full width"


class RouterKind(StrEnum):
    """The rule that chooses and weights experts; NONE is a dense MLP in every layer."""

    NONE = "none"
    SIGMOID_BIAS = "sigmoid, a bias chooses"
    SOFTMAX = "softmax"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The switches in which one family's decoder differs from another's (model/decoder.py).

    `norms_one_expert`: the affinity of a token's only expert is divided by itself as several are by
    their sum.
    """

    qk_norm: QKNorm
    router: RouterKind
    qkv_bias: bool = False
    shared_expert: bool = False
    norms_one_expert: bool = True

    @property
    def has_experts(self) -> bool:
        return self.router is not RouterKind.NONE


@dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The settings that the authors recommend; generation_config.json goes before them."""

    temperature: float
    top_p: float
    top_k: int


# What is allowed for each option of sampling: (lowest, highest, whether the lowest itself is).
SAMPLING_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 100.0, True),
    "top_p": (0.0, 1.0, False),
    "min_p": (0.0, 1.0, True),
    "repetition_penalty": (0.0, 100.0, False),
    "presence_penalty": (-2.0, 2.0, True),
    "frequency_penalty": (-2.0, 2.0, True),
}


def out_of_range(name: str, value: float) -> str:
    """Say which numbers an option of sampling may be, "" for one of these."""
    (low, high, closed) = SAMPLING_RANGES[name]
    if (low <= value if closed else low < value) and value <= high:
        return ""
    bound = "from" if closed else "above"
    return f"{name} is {value}; expected a number {bound} {low:g} up to {high:g}"


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that is particular to one family of models.

    `model_type` is config.json's; where several families have the same, `selected_by` says which of
    its fields are set (to something true) in the family's own, and which are not. `fixed_fields`
    are fields of config.json with the values that the architecture allows, the published one first;
    other values are refused. `field_names` says under which names of config.json a field of
    ModelConfig is stored, where it is not its own; the first that is there counts. `defaults` says
    what fields mean that config.json lacks. `scale_dtypes` are those of stored block scales, the
    published one first. `switched_rope_scaling` is what `inference_rope_scaling` in config.json
    switches on.
    `rank_tensors` are int32 [tp_degree] tensors of NxD, each rank's own number after sharding; they
    are made for a state dict in memory, never stored. `chat_format` is a name in
    generation/chat_formats; `neuron_class` is "module:class" of the NxDI application, or empty.
    `sampling_without_reasoning` are the settings where a prompt closes the reasoning, if others are
    recommended there. `transformers_names` are the parts of published names that the modules of
    transformers spell differently. `ignored_markers` begin the name parts of published tensors that
    are not run (multi-token prediction). `unused_fields` are fields of config.json that change
    nothing in this family, and `published_as` the hub ids of its checkpoints.
    `sums_router_aux_loss`: `router_aux_loss_coef` in config.json weighs the sum of the layers'
    balance losses; without it their mean.
    """

    name: str
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
    selected_by: Mapping[str, bool] = field(default_factory=dict)
    field_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    scale_dtypes: tuple[str, ...] = ("F32",)
    switched_rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    transformers_names: Mapping[str, str] = field(default_factory=dict)
    ignored_markers: tuple[str, ...] = ("mtp", "nextn")
    unused_fields: tuple[str, ...] = ()
    published_as: str = ""
    sampling_without_reasoning: SamplingDefaults | None = None
    sums_router_aux_loss: bool = False

    def __post_init__(self) -> None:
        templates = [weight.template for weight in self.weights]
        used = [source for rule in self.rules for source in rule.sources]
        assert len({weight.role for weight in self.weights}) == len(templates), "a role twice"
        assert sorted(used) == sorted(templates), "not every weight is in exactly one rule"

    def describes(self, raw: Mapping[str, Any]) -> bool:
        """Return whether a config.json is of this family."""
        return raw.get("model_type") == self.model_type and all(
            bool(raw.get(name)) == wanted for name, wanted in self.selected_by.items()
        )

    def has(self, role: Role) -> bool:
        return any(weight.role is role for weight in self.weights)

    def weight(self, template: str) -> Weight:
        """The row of a published name template."""
        return next(weight for weight in self.weights if weight.template == template)

    def kind(self, weight: Weight) -> str:
        """The family's own word for a row: the last parts of its name that no other row has."""
        named = [_words(other) for other in self.weights]
        words = _words(weight)
        for start in range(len(words) - 1, -1, -1):
            ending = words[start:]
            if sum(other[-len(ending) :] == ending for other in named) == 1:
                return ".".join(ending)
        raise AssertionError(f"{weight.template} is no row of {self.title}")

    def weight_of(self, role: Role) -> Weight:
        """The row of a role that the family has; StopIteration is our own mistake."""
        return next(weight for weight in self.weights if weight.role is role)

    def rule_of(self, role: Role) -> Rule:
        """The rule that converts the weight of a role."""
        template = self.weight_of(role).template
        return next(rule for rule in self.rules if template in rule.sources)

    def module(self, role: Role) -> str:
        """The dotted path of the module on Neuron that holds the weight of a role, over `{l}`."""
        return module_of(self.rule_of(role).target)

    def module_name(self, role: Role) -> str:
        """The last part of that path."""
        return self.module(role).rpartition(".")[2]

    def rank_names(self, layers: int) -> tuple[str, ...]:
        """Names of the rank tensors of a model of so many layers, each once."""
        return tuple(
            template.format(l=layer)
            for template in self.rank_tensors
            for layer in range(layers if "{l}" in template else 1)
        )

    @property
    def float32_endings(self) -> tuple[str, ...]:
        """Ends of the converted names that stay float32 under every cast: routing, and scales."""
        routing = (
            rule.target.rpartition("{l}")[2]
            for rule in self.rules
            if self.weight(rule.sources[0]).float32_only
        )
        return (*routing, ".scale")

    @property
    def expert_targets(self) -> tuple[str, ...]:
        """Converted names, scales included, whose first dimension counts experts."""
        names: list[str] = []
        for rule in self.rules:
            if rule.per_expert or self.weight(rule.sources[0]).dimensions[0] == "E":
                scaled = rule.scale is ScalePolicy.BLOCK
                names += [rule.target, *([target_scale_name(rule.target)] if scaled else [])]
        return tuple(names)

    @property
    def unconverted(self) -> tuple[str, ...]:
        """The published `modules_to_not_convert`: routing and head."""
        return tuple(
            weight.module for weight in self.weights if weight.module_group in ("router", "head")
        )

    @property
    def attention_module(self) -> str:
        """The name, here and in the published files, of the module with a layer's projections."""
        around = [
            _around(module_of(weight.template))
            for weight in self.weights
            if weight.module_group == "attention"
        ]
        innermost = [module for module in around[0] if all(module in each for each in around)][-1]
        return innermost.rpartition(".")[2]

    @property
    def head_module(self) -> str:
        return self.weight_of(Role.HEAD).module

    @property
    def experts_module(self) -> str:
        """The name on Neuron of the outermost module that holds the experts and nothing else."""
        experts = {rule.target for rule in self.rules if rule.per_expert}
        return self._modules_of(experts)[0]

    @property
    def routing_modules(self) -> tuple[str, ...]:
        """Names, on Neuron and published, of modules that hold float32 routing and no more."""
        published = {weight.template for weight in self.weights if weight.float32_only}
        converted = {rule.target for rule in self.rules if published & {*rule.sources}}
        return self._modules_of(published | converted)

    def _modules_of(self, names: Collection[str]) -> tuple[str, ...]:
        """Last parts of the modules that hold these weights alone, outermost first."""
        everything = [
            *(weight.template for weight in self.weights),
            *(rule.target for rule in self.rules),
        ]
        shared = {module for name in everything if name not in names for module in _around(name)}
        own = (module for name in names for module in _around(name) if module not in shared)
        found = sorted(set(own), key=lambda module: (module.count("."), module))
        return tuple(dict.fromkeys(module.rpartition(".")[2] for module in found))


def _words(weight: Weight) -> list[str]:
    """The parts of a name that say what it is: no numbers, and no `weight`."""
    parts = weight.template.removesuffix(".weight").split(".")
    return [part for part in parts if not part.startswith("{") and not part.isdigit()]


def _around(weight_name: str) -> list[str]:
    """Paths of all modules around a parameter, outermost first."""
    parts = module_of(weight_name).split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def module_of(weight_name: str) -> str:
    """The dotted module path that holds a parameter."""
    return weight_name.rpartition(".")[0]


def target_scale_name(target: str) -> str:
    """The name of a converted weight's block scales."""
    return module_of(target) + ".scale"
