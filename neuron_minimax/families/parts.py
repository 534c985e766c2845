"""The parts of a decoder that several families share, under transformers' names and NxDI's."""

from dataclasses import dataclass

from neuron_minimax.families.family import Operation, Role, Rule, ScalePolicy, Weight

COPY = Operation.COPY
BLOCK = ScalePolicy.BLOCK
FP8 = "F8_E4M3"

LAYER = "model.layers.{l}."
ATTENTION = LAYER + "self_attn."
MLP = LAYER + "mlp."
EXPERT = MLP + "experts.{e}."
SHARED = MLP + "shared_experts.0."

TARGET = "layers.{l}."
ON_NEURON = TARGET + "self_attn."
QKV = ON_NEURON + "qkv_proj."
MLP_ON_NEURON = TARGET + "mlp."
EXPERTS = MLP_ON_NEURON + "expert_mlps.mlp_op."
SHARED_ON_NEURON = MLP_ON_NEURON + "shared_experts."

RANK_TENSORS = ("rank_util.rank", ON_NEURON + "rank_util.rank")


@dataclass(frozen=True)
class Part:
    """Some rows of a family's table, and the rules that use them."""

    weights: tuple[Weight, ...]
    rules: tuple[Rule, ...]

    def __add__(self, other: "Part") -> "Part":
        return Part(self.weights + other.weights, self.rules + other.rules)


def weight(name: str, dimensions: str, dtype: str, role: Role) -> Weight:
    return Weight(template=name, dimensions=tuple(dimensions), published_dtype=dtype, role=role)


def copied(name: str, target: str, dimensions: str, role: Role, dtype: str = "BF16") -> Part:
    """A weight that is stored on Neuron as it is, with its block scales where it is FP8."""
    scale = BLOCK if dtype == FP8 else ScalePolicy.NONE
    return Part((weight(name, dimensions, dtype, role),), (Rule(target, (name,), COPY, scale),))


def projections(dtype: str) -> Part:
    """The four projections of attention."""
    return (
        copied(ATTENTION + "q_proj.weight", QKV + "q_proj.weight", "QH", Role.QUERY, dtype)
        + copied(ATTENTION + "k_proj.weight", QKV + "k_proj.weight", "KH", Role.KEY, dtype)
        + copied(ATTENTION + "v_proj.weight", QKV + "v_proj.weight", "KH", Role.VALUE, dtype)
        + copied(
            ATTENTION + "o_proj.weight",
            ON_NEURON + "o_proj.o_proj.weight",
            "HQ",
            Role.OUTPUT,
            dtype,
        )
    )


def dense_mlp(dtype: str, size: str = "I") -> Part:
    """A gated MLP; `size` is the letter of its intermediate dimension."""
    wide = size + "H"
    narrow = "H" + size
    return (
        copied(
            MLP + "gate_proj.weight", MLP_ON_NEURON + "gate_proj.weight", wide, Role.MLP_GATE, dtype
        )
        + copied(MLP + "up_proj.weight", MLP_ON_NEURON + "up_proj.weight", wide, Role.MLP_UP, dtype)
        + copied(
            MLP + "down_proj.weight",
            MLP_ON_NEURON + "down_proj.weight",
            narrow,
            Role.MLP_DOWN,
            dtype,
        )
    )


EMBEDDING = copied("model.embed_tokens.weight", "embed_tokens.weight", "VH", Role.EMBEDDING)
ATTENTION_NORM = copied(
    LAYER + "input_layernorm.weight", TARGET + "input_layernorm.weight", "H", Role.ATTENTION_NORM
)
BIASES = (
    copied(ATTENTION + "q_proj.bias", QKV + "q_proj.bias", "Q", Role.QUERY_BIAS)
    + copied(ATTENTION + "k_proj.bias", QKV + "k_proj.bias", "K", Role.KEY_BIAS)
    + copied(ATTENTION + "v_proj.bias", QKV + "v_proj.bias", "K", Role.VALUE_BIAS)
)
HEAD_NORMS = copied(
    ATTENTION + "q_norm.weight", ON_NEURON + "q_norm.weight", "D", Role.QUERY_NORM
) + copied(ATTENTION + "k_norm.weight", ON_NEURON + "k_norm.weight", "D", Role.KEY_NORM)
MLP_NORM = copied(
    LAYER + "post_attention_layernorm.weight",
    TARGET + "post_attention_layernorm.weight",
    "H",
    Role.MLP_NORM,
)
SPARSE_MLP = copied(
    MLP + "gate.weight", MLP_ON_NEURON + "router.linear_router.weight", "EH", Role.ROUTER
) + Part(
    (
        weight(EXPERT + "gate_proj.weight", "IH", FP8, Role.EXPERT_GATE),
        weight(EXPERT + "up_proj.weight", "IH", FP8, Role.EXPERT_UP),
        weight(EXPERT + "down_proj.weight", "HI", FP8, Role.EXPERT_DOWN),
    ),
    (
        Rule(
            EXPERTS + "gate_up_proj.weight",
            (EXPERT + "gate_proj.weight", EXPERT + "up_proj.weight"),
            Operation.STACK_TRANSPOSED,
            BLOCK,
        ),
        Rule(
            EXPERTS + "down_proj.weight",
            (EXPERT + "down_proj.weight",),
            Operation.STACK_TRANSPOSED,
            BLOCK,
        ),
    ),
)
SHARED_MLP = (
    copied(
        SHARED + "gate_proj.weight",
        SHARED_ON_NEURON + "gate_proj.weight",
        "SH",
        Role.SHARED_GATE,
        FP8,
    )
    + copied(
        SHARED + "up_proj.weight",
        SHARED_ON_NEURON + "up_proj.weight",
        "SH",
        Role.SHARED_UP,
        FP8,
    )
    + copied(
        SHARED + "down_proj.weight",
        SHARED_ON_NEURON + "down_proj.weight",
        "HS",
        Role.SHARED_DOWN,
        FP8,
    )
)
HEAD = copied("model.norm.weight", "norm.weight", "H", Role.FINAL_NORM) + copied(
    "lm_head.weight", "lm_head.weight", "VH", Role.HEAD
)
