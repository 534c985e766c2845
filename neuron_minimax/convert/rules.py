"""One row per Neuron parameter: its name, the Hugging Face weights it is made of, how, and what its scales do.

The names and shapes are those NxDI's attention, router and expert modules load.
"""

from dataclasses import dataclass
from enum import StrEnum

from neuron_minimax.checkpoint.schema import ATTENTION, EXPERT, LAYER, MOE


class Operation(StrEnum):
    """How sources become a target; `convert/ops.py` has the arithmetic of each, forward and back."""

    COPY = "copy"
    STACK_TRANSPOSED = "stack over experts, each transposed, side by side"


class ScalePolicy(StrEnum):
    """What an FP8 source's block scales become: a `.scale` of their own, arranged as the weight, or not allowed."""

    NONE = "none"
    BLOCK = "block"


@dataclass(frozen=True)
class Rule:
    """Target template over layer `{l}`, source templates over layer `{l}` and expert `{e}`."""

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


COPY, STACK, BLOCK = Operation.COPY, Operation.STACK_TRANSPOSED, ScalePolicy.BLOCK

TARGET = "layers.{l}."
QKV = TARGET + "self_attn.qkv_proj."
ROUTER = TARGET + "block_sparse_moe.router."
EXPERTS = TARGET + "block_sparse_moe.expert_mlps.mlp_op."

RULES: tuple[Rule, ...] = (
    Rule("embed_tokens.weight", ("model.embed_tokens.weight",), COPY),
    Rule("norm.weight", ("model.norm.weight",), COPY),
    Rule("lm_head.weight", ("lm_head.weight",), COPY),
    Rule(TARGET + "input_layernorm.weight", (LAYER + "input_layernorm.weight",), COPY),
    Rule(QKV + "q_proj.weight", (ATTENTION + "q_proj.weight",), COPY, BLOCK),
    Rule(QKV + "k_proj.weight", (ATTENTION + "k_proj.weight",), COPY, BLOCK),
    Rule(QKV + "v_proj.weight", (ATTENTION + "v_proj.weight",), COPY, BLOCK),
    Rule(TARGET + "self_attn.o_proj.o_proj.weight", (ATTENTION + "o_proj.weight",), COPY, BLOCK),
    Rule(TARGET + "self_attn.q_norm.weight", (ATTENTION + "q_norm.weight",), COPY),
    Rule(TARGET + "self_attn.k_norm.weight", (ATTENTION + "k_norm.weight",), COPY),
    Rule(TARGET + "post_attention_layernorm.weight", (LAYER + "post_attention_layernorm.weight",), COPY),
    Rule(ROUTER + "linear_router.weight", (MOE + "gate.weight",), COPY),
    Rule(ROUTER + "e_score_correction_bias", (MOE + "e_score_correction_bias",), COPY),
    Rule(EXPERTS + "gate_up_proj.weight", (EXPERT + "w1.weight", EXPERT + "w3.weight"), STACK, BLOCK),
    Rule(EXPERTS + "down_proj.weight", (EXPERT + "w2.weight",), STACK, BLOCK),
)

# int32 [tp_degree], each rank's own number after sharding; made for a state dict in memory, never stored.
RANK_TENSORS: tuple[str, ...] = ("rank_util.rank", TARGET + "self_attn.rank_util.rank")


def module_of(weight_name: str) -> str:
    """The dotted module path that holds a parameter."""
    return weight_name.rpartition(".")[0]


def target_scale_name(target: str) -> str:
    return module_of(target) + ".scale"
