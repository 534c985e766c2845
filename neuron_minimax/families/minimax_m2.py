"""MiniMax-M2, M2.1, M2.5 and M2.7.

Sources: the headers and config.json of the published checkpoints (huggingface.co/MiniMaxAI), and
the parameter names that NxDI's attention, router and expert modules load.
"""

from neuron_minimax.families.family import (
    Architecture,
    Family,
    Operation,
    QKNorm,
    Role,
    RouterKind,
    Rule,
    SamplingDefaults,
    ScalePolicy,
    Weight,
)

COPY = Operation.COPY
STACK = Operation.STACK_TRANSPOSED
BLOCK = ScalePolicy.BLOCK

LAYER = "model.layers.{l}."
ATTENTION = LAYER + "self_attn."
MOE = LAYER + "block_sparse_moe."
EXPERT = MOE + "experts.{e}."


def _row(template: str, dimensions: str, dtype: str, role: Role) -> Weight:
    return Weight(template=template, dimensions=tuple(dimensions), published_dtype=dtype, role=role)


WEIGHTS = (
    _row("model.embed_tokens.weight", "VH", "BF16", Role.EMBEDDING),
    _row(LAYER + "input_layernorm.weight", "H", "BF16", Role.ATTENTION_NORM),
    _row(ATTENTION + "q_proj.weight", "QH", "F8_E4M3", Role.QUERY),
    _row(ATTENTION + "k_proj.weight", "KH", "F8_E4M3", Role.KEY),
    _row(ATTENTION + "v_proj.weight", "KH", "F8_E4M3", Role.VALUE),
    _row(ATTENTION + "o_proj.weight", "HQ", "F8_E4M3", Role.OUTPUT),
    _row(ATTENTION + "q_norm.weight", "Q", "BF16", Role.QUERY_NORM),
    _row(ATTENTION + "k_norm.weight", "K", "BF16", Role.KEY_NORM),
    _row(LAYER + "post_attention_layernorm.weight", "H", "BF16", Role.MLP_NORM),
    _row(MOE + "gate.weight", "EH", "F32", Role.ROUTER),
    _row(MOE + "e_score_correction_bias", "E", "F32", Role.ROUTER_BIAS),
    _row(EXPERT + "w1.weight", "IH", "F8_E4M3", Role.EXPERT_GATE),
    _row(EXPERT + "w2.weight", "HI", "F8_E4M3", Role.EXPERT_DOWN),
    _row(EXPERT + "w3.weight", "IH", "F8_E4M3", Role.EXPERT_UP),
    _row("model.norm.weight", "H", "BF16", Role.FINAL_NORM),
    _row("lm_head.weight", "VH", "BF16", Role.HEAD),
)

TARGET = "layers.{l}."
QKV = TARGET + "self_attn.qkv_proj."
ROUTER = TARGET + "block_sparse_moe.router."
EXPERTS = TARGET + "block_sparse_moe.expert_mlps.mlp_op."

RULES = (
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
    Rule(
        TARGET + "post_attention_layernorm.weight",
        (LAYER + "post_attention_layernorm.weight",),
        COPY,
    ),
    Rule(ROUTER + "linear_router.weight", (MOE + "gate.weight",), COPY),
    Rule(ROUTER + "e_score_correction_bias", (MOE + "e_score_correction_bias",), COPY),
    Rule(
        EXPERTS + "gate_up_proj.weight", (EXPERT + "w1.weight", EXPERT + "w3.weight"), STACK, BLOCK
    ),
    Rule(EXPERTS + "down_proj.weight", (EXPERT + "w2.weight",), STACK, BLOCK),
)

MINIMAX_M2 = Family(
    name="minimax_m2",
    model_type="minimax_m2",
    title="MiniMax-M2",
    models="MiniMax-M2, M2.1, M2.5 and M2.7",
    fixed_fields={
        "hidden_act": ("silu",),
        "scoring_func": ("sigmoid",),
        "use_qk_norm": (True,),
        "qk_norm_type": ("per_layer",),
        "use_routing_bias": (True,),
        "tie_word_embeddings": (False,),
        "norm_topk_prob": (True, None),
        "attention_bias": (False, None),
        "shared_intermediate_size": (0, None),
        "sliding_window": (None,),
        "attn_window_size": (None,),
    },
    weights=WEIGHTS,
    rules=RULES,
    rank_tensors=("rank_util.rank", TARGET + "self_attn.rank_util.rank"),
    architecture=Architecture(qk_norm=QKNorm.FULL_WIDTH, router=RouterKind.SIGMOID_BIAS),
    chat_format="minimax_m2",
    sampling=SamplingDefaults(temperature=1.0, top_p=0.95, top_k=40),
    neuron_class="neuron_minimax.backends.nxdi.model:NeuronForCausalLM",
    rope_theta=5_000_000.0,
    transformers_names={"block_sparse_moe": "mlp"},
    published_as="MiniMaxAI/MiniMax-M2, -M2.1, -M2.5 or -M2.7",
)
