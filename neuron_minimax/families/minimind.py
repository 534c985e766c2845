"""MiniMind 3 and MiniMind 2, dense and MoE: small models to train and to learn from.

Sources: the model definitions and config classes of github.com/jingyaogong/minimind. Its releases
share one `model_type`; the fields of config.json tell them apart. MiniMind 2 has no norms of
queries and keys, and an expert that every token has.
"""

from collections.abc import Mapping
from typing import Any

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
    SHARED_MLP,
    SPARSE_MLP,
    Part,
    dense_mlp,
    projections,
)

BEFORE_NORMS = EMBEDDING + ATTENTION_NORM + projections(FP8)
# What `inference_rope_scaling` switches on.
YARN = {
    "rope_type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}
# Its code writes the fields of experts into dense models, and of one release into another's.
OF_THE_OTHER_RELEASES = (
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "norm_topk_prob",
    "num_experts",
    "num_experts_per_tok",
    "scoring_func",
)


def _family(
    name: str,
    title: str,
    table: Part,
    *,
    older: bool,
    router: RouterKind,
    field_names: dict[str, tuple[str, ...]],
) -> Family:
    sparse = router is not RouterKind.NONE
    older_fields = {"scoring_func": ("softmax",), "n_shared_experts": (1,)}
    return Family(
        name=name,
        model_type="minimind",
        selected_by={"use_moe": sparse, "n_routed_experts": older},
        title=title,
        models=title,
        fixed_fields={"hidden_act": ("silu",), **(older_fields if older and sparse else {})},
        field_names=field_names,
        defaults={"tie_word_embeddings": True},
        switched_rope_scaling=YARN,
        weights=table.weights,
        rules=table.rules,
        rank_tensors=RANK_TENSORS,
        architecture=Architecture(
            qk_norm=QKNorm.NONE if older else QKNorm.PER_HEAD,
            router=router,
            shared_expert=older and sparse,
            norms_one_expert=not older,
        ),
        chat_format="minimind",
        sampling=SamplingDefaults(temperature=0.85, top_p=0.85, top_k=50),
        neuron_class="",
        rope_theta=1_000_000.0,
        sums_router_aux_loss=True,
        unused_fields=OF_THE_OTHER_RELEASES,
        published_as="jingyaogong/MiniMind2 or minimind-3",
    )


MINIMIND = _family(
    "minimind",
    "MiniMind",
    BEFORE_NORMS + HEAD_NORMS + MLP_NORM + dense_mlp(FP8) + HEAD,
    older=False,
    router=RouterKind.NONE,
    field_names={},
)
MINIMIND_MOE = _family(
    "minimind_moe",
    "MiniMind-MoE",
    BEFORE_NORMS + HEAD_NORMS + MLP_NORM + SPARSE_MLP + HEAD,
    older=False,
    router=RouterKind.SOFTMAX,
    field_names={
        "num_local_experts": ("num_experts", "num_local_experts"),
        "intermediate_size": ("moe_intermediate_size", "intermediate_size"),
    },
)
MINIMIND2 = _family(
    "minimind2",
    "MiniMind2",
    BEFORE_NORMS + MLP_NORM + dense_mlp(FP8) + HEAD,
    older=True,
    router=RouterKind.NONE,
    field_names={},
)
MINIMIND2_MOE = _family(
    "minimind2_moe",
    "MiniMind2-MoE",
    BEFORE_NORMS + MLP_NORM + SPARSE_MLP + SHARED_MLP + HEAD,
    older=True,
    router=RouterKind.SOFTMAX,
    field_names={
        "num_local_experts": ("n_routed_experts",),
        "shared_intermediate_size": ("intermediate_size",),
    },
)

# What MiniMind's code takes where nobody says anything else.
ASSUMED: dict[str, Any] = {
    "num_attention_heads": 8,
    "num_experts_per_tok": 1,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 32_768,
    "inference_rope_scaling": False,
}
ASSUMED_OF_EXPERTS: dict[str, Any] = {"router_aux_loss_coef": 5e-4}  # of the third release's
ASSUMED_BEFORE_3 = ASSUMED | {"num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
OF_EXPERTS = ("num_experts_per_tok", "norm_topk_prob")


def derived_config(
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return a config.json for tensors of MiniMind, and which of its fields are assumed.

    None when the names are not MiniMind's. Its training saves tensors without a config.json.
    """
    first = {
        name.removeprefix("model.layers.0."): shape
        for name, shape in shapes.items()
        if name.startswith("model.layers.0.")
    }
    sparse = "mlp.gate.weight" in first
    older = "self_attn.q_norm.weight" not in first
    wide = first.get("mlp.experts.0.gate_proj.weight" if sparse else "mlp.gate_proj.weight")
    embedding = shapes.get("model.embed_tokens.weight")
    query = first.get("self_attn.q_proj.weight")
    key = first.get("self_attn.k_proj.weight")
    if not (wide and embedding and query and key) or "self_attn.q_proj.bias" in first:
        return None
    assumed = dict(ASSUMED_BEFORE_3 if older else ASSUMED)
    if older:
        size = query[0] // assumed["num_attention_heads"]
    else:
        size = first["self_attn.q_norm.weight"][0]
        assumed["num_attention_heads"] = query[0] // size
        assumed |= ASSUMED_OF_EXPERTS if sparse else {}
    layers = {name.split(".")[2] for name in shapes if name.startswith("model.layers.")}
    raw = {
        "model_type": "minimind",
        "vocab_size": embedding[0],
        "hidden_size": embedding[1],
        "intermediate_size": wide[0],
        "num_hidden_layers": len(layers),
        "num_key_value_heads": key[0] // size,
        "head_dim": size,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "use_moe": sparse,
        **assumed,
    }
    if sparse:
        experts = first["mlp.gate.weight"][0]
        raw |= {"n_routed_experts": experts} if older else {"num_experts": experts}
        raw |= {"moe_intermediate_size": wide[0]} if not older else {}
    else:
        assumed = {name: value for name, value in assumed.items() if name not in OF_EXPERTS}
    if older:
        raw |= {"n_shared_experts": 1, "scoring_func": "softmax"}
        raw.setdefault("n_routed_experts", 4)
    else:
        assumed.pop("num_attention_heads")
    return raw, assumed
