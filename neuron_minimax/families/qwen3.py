"""Qwen3, dense and MoE, in FP8 or BF16.

Sources: the headers and config.json of the published checkpoints (huggingface.co/Qwen), whose FP8
has block scales in BF16, and the parameter names that NxDI's modules load.
"""

from neuron_minimax.families.family import (
    Architecture,
    Family,
    QKNorm,
    RouterKind,
    SamplingDefaults,
)
from neuron_minimax.families.parts import (
    ATTENTION_NORM,
    EMBEDDING,
    FP8,
    HEAD,
    HEAD_NORMS,
    MLP_NORM,
    RANK_TENSORS,
    SPARSE_MLP,
    dense_mlp,
    projections,
)

BEFORE_MLP = EMBEDDING + ATTENTION_NORM + projections(FP8) + HEAD_NORMS + MLP_NORM
DENSE = BEFORE_MLP + dense_mlp(FP8) + HEAD
SPARSE = BEFORE_MLP + SPARSE_MLP + dense_mlp(FP8, "F") + HEAD

FIXED_FIELDS = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "use_sliding_window": (False, None),
    "dual_chunk_attention_config": (None,),  # of the configs for a million positions
}
SAMPLING = SamplingDefaults(temperature=0.6, top_p=0.95, top_k=20)
WITHOUT_REASONING = SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20)

QWEN3 = Family(
    name="qwen3",
    model_type="qwen3",
    title="Qwen3",
    models="Qwen3-0.6B to 32B",
    fixed_fields=FIXED_FIELDS,
    weights=DENSE.weights,
    rules=DENSE.rules,
    rank_tensors=RANK_TENSORS,
    architecture=Architecture(qk_norm=QKNorm.PER_HEAD, router=RouterKind.NONE),
    chat_format="qwen3",
    sampling=SAMPLING,
    sampling_without_reasoning=WITHOUT_REASONING,
    neuron_class="neuron_minimax.backends.nxdi.model:NeuronForCausalLM",
    rope_theta=10_000.0,
    scale_dtypes=("BF16", "F32"),
    published_as="Qwen/Qwen3-8B or its like, or with -FP8",
)

QWEN3_MOE = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    title="Qwen3-MoE",
    models="Qwen3-30B-A3B, 235B-A22B and Coder-480B-A35B",
    fixed_fields=FIXED_FIELDS,
    # transformers 5 writes the second of the names of the count of experts.
    field_names={
        "num_local_experts": ("num_experts", "num_local_experts"),
        "intermediate_size": ("moe_intermediate_size",),
        "dense_intermediate_size": ("intermediate_size",),
    },
    defaults={"norm_topk_prob": False},
    weights=SPARSE.weights,
    rules=SPARSE.rules,
    rank_tensors=RANK_TENSORS,
    architecture=Architecture(qk_norm=QKNorm.PER_HEAD, router=RouterKind.SOFTMAX),
    chat_format="qwen3",
    sampling=SAMPLING,
    sampling_without_reasoning=WITHOUT_REASONING,
    neuron_class="neuron_minimax.backends.nxdi.model:NeuronForCausalLM",
    rope_theta=10_000.0,
    scale_dtypes=("BF16", "F32"),
    unused_fields=("use_qk_norm",),
    published_as="Qwen/Qwen3-30B-A3B or its like, or with -FP8",
)
