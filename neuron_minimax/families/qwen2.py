"""Qwen2 and Qwen2.5, dense, in BF16.

Sources: the headers and config.json of the published checkpoints (huggingface.co/Qwen), and the
parameter names that NxDI's modules load.
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
    BIASES,
    EMBEDDING,
    HEAD,
    MLP_NORM,
    RANK_TENSORS,
    dense_mlp,
    projections,
)

TABLE = (
    EMBEDDING + ATTENTION_NORM + projections("BF16") + BIASES + MLP_NORM + dense_mlp("BF16") + HEAD
)

QWEN2 = Family(
    name="qwen2",
    model_type="qwen2",
    title="Qwen2",
    models="Qwen2 and Qwen2.5",
    fixed_fields={
        "hidden_act": ("silu",),
        "use_sliding_window": (False, None),  # present, and off
        "use_mrope": (False, None),
        "dual_chunk_attention_config": (None,),
    },
    weights=TABLE.weights,
    rules=TABLE.rules,
    rank_tensors=RANK_TENSORS,
    architecture=Architecture(qk_norm=QKNorm.NONE, router=RouterKind.NONE, qkv_bias=True),
    chat_format="qwen2",
    sampling=SamplingDefaults(temperature=0.7, top_p=0.8, top_k=20),
    neuron_class="neuron_minimax.backends.nxdi.model:NeuronForCausalLM",
    rope_theta=10_000.0,
    published_as="Qwen/Qwen2.5-7B-Instruct or its like",
)
