"""The decoder's switches, one family of other models each, against transformers in float32.

The families are defined here: weights, rules and an architecture. Their checkpoints, config.json
included, are what transformers saves, converted by the rules.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.convert.plan import plan_conversion
from neuron_minimax.convert.state_dict import (
    convert_hf_to_neuron_state_dict,
    neuron_to_hf_state_dict,
)
from neuron_minimax.families import FAMILIES
from neuron_minimax.families.family import (
    Architecture,
    Family,
    Operation,
    QKNorm,
    Role,
    RouterKind,
    Rule,
    SamplingDefaults,
    Weight,
)
from neuron_minimax.model.decoder import Decoder, initial_state

TOLERANCE = 1e-4
LAYER = "model.layers.{l}."
TARGET = "layers.{l}."
SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
}

# Published name, dimensions, what stands in the converted name in its place, and the role.
Row = tuple[str, str, str, Role]
EVERY_LAYER: list[Row] = [
    ("input_layernorm.weight", "H", "input_layernorm.weight", Role.ATTENTION_NORM),
    ("post_attention_layernorm.weight", "H", "post_attention_layernorm.weight", Role.MLP_NORM),
    ("self_attn.q_proj.weight", "QH", "self_attn.qkv_proj.q_proj.weight", Role.QUERY),
    ("self_attn.k_proj.weight", "KH", "self_attn.qkv_proj.k_proj.weight", Role.KEY),
    ("self_attn.v_proj.weight", "KH", "self_attn.qkv_proj.v_proj.weight", Role.VALUE),
    ("self_attn.o_proj.weight", "HQ", "self_attn.o_proj.o_proj.weight", Role.OUTPUT),
]
HEAD_NORMS: list[Row] = [
    (f"self_attn.{name}_norm.weight", "D", f"self_attn.{name}_norm.weight", role)
    for name, role in (("q", Role.QUERY_NORM), ("k", Role.KEY_NORM))
]
QKV_BIAS: list[Row] = [
    (f"self_attn.{name}_proj.bias", width, f"self_attn.qkv_proj.{name}_proj.bias", role)
    for name, width, role in (
        ("q", "Q", Role.QUERY_BIAS),
        ("k", "K", Role.KEY_BIAS),
        ("v", "K", Role.VALUE_BIAS),
    )
]
DENSE: list[Row] = [
    (f"mlp.{name}_proj.weight", shape, f"mlp.{name}_proj.weight", role)
    for name, shape, role in (
        ("gate", "IH", Role.MLP_GATE),
        ("up", "IH", Role.MLP_UP),
        ("down", "HI", Role.MLP_DOWN),
    )
]
ROUTED: list[Row] = [("mlp.gate.weight", "EH", "mlp.router.linear_router.weight", Role.ROUTER)]
BIASED_ROUTER: list[Row] = [
    (
        "mlp.gate.e_score_correction_bias",
        "E",
        "mlp.router.e_score_correction_bias",
        Role.ROUTER_BIAS,
    )
]
# One shared expert, as wide as the routed ones.
SHARED: list[Row] = [
    (
        f"mlp.shared_experts.{name}_proj.weight",
        shape,
        f"mlp.shared_experts.{name}_proj.weight",
        role,
    )
    for name, shape, role in (
        ("gate", "IH", Role.SHARED_GATE),
        ("up", "IH", Role.SHARED_UP),
        ("down", "HI", Role.SHARED_DOWN),
    )
]


def family(architecture: Architecture, rows: list[Row], field_names: Mapping[str, str]) -> Family:
    """A family of these rows in every layer, beside embedding, norm, head and attention."""
    outer = [
        ("model.embed_tokens.weight", "VH", "embed_tokens.weight", Role.EMBEDDING),
        ("model.norm.weight", "H", "norm.weight", Role.FINAL_NORM),
        ("lm_head.weight", "VH", "lm_head.weight", Role.HEAD),
    ]
    inner = [
        (LAYER + source, shape, TARGET + target, role)
        for source, shape, target, role in EVERY_LAYER + rows
    ]
    weights = [(source, shape, role) for source, shape, _, role in outer + inner]
    rules = [Rule(target, (source,), Operation.COPY) for source, _, target, _ in outer + inner]
    if architecture.router is not RouterKind.NONE:
        expert = LAYER + "mlp.experts.{e}."
        names = {part: f"{expert}{part}_proj.weight" for part in ("gate", "up", "down")}
        weights += [
            (names["gate"], "IH", Role.EXPERT_GATE),
            (names["up"], "IH", Role.EXPERT_UP),
            (names["down"], "HI", Role.EXPERT_DOWN),
        ]
        stacked = TARGET + "mlp.expert_mlps.mlp_op."
        rules += [
            Rule(
                stacked + "gate_up_proj.weight",
                (names["gate"], names["up"]),
                Operation.STACK_TRANSPOSED,
            ),
            Rule(stacked + "down_proj.weight", (names["down"],), Operation.STACK_TRANSPOSED),
        ]
    return Family(
        model_type="test",
        title="a family of this test",
        models="none",
        fixed_fields={},
        weights=tuple(
            Weight(
                template=source,
                dimensions=tuple(shape),
                published_dtype="BF16",
                role=role,
            )
            for source, shape, role in weights
        ),
        rules=tuple(rules),
        rank_tensors=(),
        architecture=architecture,
        chat_format="none",
        sampling=SamplingDefaults(temperature=1.0, top_p=1.0, top_k=0),
        neuron_class="none",
        rope_theta=10_000.0,
        field_names=field_names,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of transformers, what `ModelConfig` says of it, and the names of config.json that
    differ.
    """

    model_type: str
    fields: dict[str, Any]
    architecture: Architecture
    rows: list[Row]
    sizes: dict[str, Any]
    field_names: Mapping[str, str] = field(default_factory=dict)
    tied: bool = False


PER_HEAD = Architecture(qk_norm=QKNorm.PER_HEAD, router=RouterKind.NONE)
SOFTMAX = Architecture(qk_norm=QKNorm.PER_HEAD, router=RouterKind.SOFTMAX)
NO_NORM = Architecture(qk_norm=QKNorm.NONE, router=RouterKind.NONE, qkv_bias=True)
SHARED_EXPERT = Architecture(
    qk_norm=QKNorm.PER_HEAD, router=RouterKind.SIGMOID_BIAS, shared_expert=True
)
DENSE_SIZES = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 96}
MOE_SIZES = {"num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48}
QWEN3_MOE = {"head_dim": 32, "num_experts": 6, "num_experts_per_tok": 2}
QWEN3_MOE |= {"moe_intermediate_size": 48, "intermediate_size": 96}
EXPERT_WIDTH = {"intermediate_size": "moe_intermediate_size"}
DOTS1 = {"head_dim": 32, "n_routed_experts": 6, "n_shared_experts": 1, "num_experts_per_tok": 2}
DOTS1 |= {"moe_intermediate_size": 48, "first_k_dense_replace": 0, "n_group": 1, "topk_group": 1}
DOTS1 |= {"norm_topk_prob": True, "routed_scaling_factor": 1.0, "intermediate_size": 96}


def qwen3(tied: bool) -> Case:
    return Case(
        model_type="qwen3",
        fields={"head_dim": 32, "intermediate_size": 96},
        architecture=PER_HEAD,
        rows=HEAD_NORMS + DENSE,
        sizes=DENSE_SIZES | {"head_dim": 32},
        tied=tied,
    )


def qwen3_moe(renormalised: bool) -> Case:
    return Case(
        model_type="qwen3_moe",
        fields=QWEN3_MOE | {"norm_topk_prob": renormalised},
        architecture=SOFTMAX,
        rows=HEAD_NORMS + ROUTED,
        sizes=MOE_SIZES | {"head_dim": 32, "norm_topk_prob": renormalised},
        field_names=EXPERT_WIDTH,
    )


CASES = {
    "Qwen3: dense, a norm per head": qwen3(tied=False),
    "Qwen3, tied": qwen3(tied=True),
    "Qwen3-MoE: softmax, as it is": qwen3_moe(renormalised=False),
    "Qwen3-MoE: softmax, renormalised": qwen3_moe(renormalised=True),
    "Qwen2: biases, no norm": Case(
        model_type="qwen2",
        fields={"intermediate_size": 96},
        architecture=NO_NORM,
        rows=QKV_BIAS + DENSE,
        sizes=DENSE_SIZES | {"head_dim": 16},
    ),
    "dots.llm1: sigmoid, a bias chooses, a shared expert": Case(
        model_type="dots1",
        fields=DOTS1,
        architecture=SHARED_EXPERT,
        rows=HEAD_NORMS + ROUTED + BIASED_ROUTER + SHARED,
        sizes=MOE_SIZES | {"head_dim": 32, "shared_intermediate_size": 48},
        field_names={
            "num_local_experts": "n_routed_experts",
            "shared_intermediate_size": "moe_intermediate_size",
        }
        | EXPERT_WIDTH,
    ),
}


@contextmanager
def registered(case: Case) -> Iterator[None]:
    """Let the case's family be the one that its model_type names."""
    made = family(case.architecture, case.rows, case.field_names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, case.model_type, made)
        yield


class Pair:
    """The decoder over a converted checkpoint of a case, and transformers' model that saved it."""

    def __init__(self, case: Case, directory: Path) -> None:
        raw = AutoConfig.for_model(
            case.model_type,
            **SIZES,
            **case.fields,
            tie_word_embeddings=case.tied,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        )
        torch.manual_seed(0)
        self.oracle = AutoModelForCausalLM.from_config(
            raw, dtype=torch.float32, experts_implementation="eager"
        ).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            # Fresh biases are zero and norms one; larger weights make logits of about size 1.
            for tensor in self.oracle.state_dict().values():
                noise = torch.randn(tensor.shape, generator=generator)
                scale = 2 * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.2
                tensor.copy_(scale * noise + (tensor.dim() == 1) * tensor)
        self.oracle.save_pretrained(directory)
        self.case = case
        self.directory = directory
        self.checkpoint = self.opened()
        self.config = self.checkpoint.config
        self.published = load_file(directory / "model.safetensors")
        self.state = convert_hf_to_neuron_state_dict(self.published, self.config)
        self.decoder = Decoder.from_checkpoint(self.checkpoint)

    def opened(self) -> Checkpoint:
        with registered(self.case):
            return Checkpoint(self.directory)

    def wanted(self, ids: torch.Tensor) -> torch.Tensor:
        return self.oracle(ids).logits


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("decoder"))


def some_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(0, 160, (rows, tokens), generator=torch.Generator().manual_seed(5))


def test_config_json_says_what_every_family_is(pair):
    wanted = SIZES | pair.case.sizes | {"tie_word_embeddings": pair.case.tied}
    assert {name: getattr(pair.config, name) for name in wanted} == wanted
    assert pair.config.rotary_dim == pair.config.head_dim
    assert pair.config.rope_theta == 10_000.0


def test_every_checkpoint_is_complete_and_all_of_it_is_converted(pair):
    assert pair.checkpoint.problems == []
    outputs = plan_conversion(pair.checkpoint).outputs
    assert {output.name for output in outputs} == pair.state.keys()
    assert ("lm_head.weight" in pair.state) == (not pair.case.tied)
    back = neuron_to_hf_state_dict(pair.state, pair.config)
    assert back.keys() == pair.published.keys()


@torch.no_grad()
def test_every_family_gives_the_logits_of_transformers(pair):
    ids = some_ids(2, 24)
    logits, cache = pair.decoder(ids)
    wanted = pair.wanted(ids)
    assert cache is None
    assert wanted.std() > 0.3, "logits that are all alike show nothing"
    assert (logits - wanted).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_converted_directory_gives_the_same_in_every_family(pair, tmp_path):
    ids = some_ids(1, 8)
    with registered(pair.case):
        plan_conversion(pair.checkpoint).write(tmp_path / "converted")
        decoder = Decoder.from_converted(tmp_path / "converted")
    assert torch.equal(decoder(ids)[0], pair.decoder(ids)[0])


@torch.no_grad()
def test_incremental_equals_full_in_every_family(pair):
    ids = some_ids(2, 24)
    cache = None
    parts = []
    for piece in ids.split([7, 1, 1, 15], dim=1):
        logits, cache = pair.decoder(piece, cache, use_cache=True)
        parts.append(logits)
    assert cache.lengths.tolist() == [24, 24]
    assert (torch.cat(parts, dim=1) - pair.wanted(ids)).abs().max() < TOLERANCE


@torch.no_grad()
def test_sequences_of_unequal_length_give_what_each_gives_alone_in_every_family(pair):
    ids = some_ids(3, 12)
    lengths = torch.tensor([3, 12, 7])
    logits, cache = pair.decoder(ids, use_cache=True, lengths=lengths)
    following = torch.tensor([[4], [5], [6]])
    next_logits, _ = pair.decoder(following, cache)
    for row, length in enumerate(lengths.tolist()):
        alone = torch.cat([ids[row, :length], following[row]])[None]
        wanted = pair.wanted(alone)[0]
        assert (logits[row, :length] - wanted[:-1]).abs().max() < TOLERANCE
        assert (next_logits[row, 0] - wanted[-1]).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_stored_head_is_used_though_config_json_ties_it(tmp_path):
    pair = Pair(CASES["Qwen3, tied"], tmp_path)
    head = 2 * pair.published["model.embed_tokens.weight"]
    save_file(pair.published | {"lm_head.weight": head}, tmp_path / "model.safetensors")
    checkpoint = pair.opened()
    assert checkpoint.problems == []
    plan = plan_conversion(checkpoint)
    assert "lm_head.weight" in {output.name for output in plan.outputs}
    assert plan.converted_config()["tie_word_embeddings"] is False
    ids = some_ids(1, 8)
    logits, _ = Decoder.from_checkpoint(checkpoint)(ids)
    assert (logits - 2 * pair.wanted(ids)).abs().max() < 2 * TOLERANCE


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_an_untied_head_and_an_embedding_must_be_there(tmp_path, name):
    pair = Pair(CASES["Qwen3: dense, a norm per head"], tmp_path)
    left = {other: tensor for other, tensor in pair.published.items() if other != name}
    save_file(left, tmp_path / "model.safetensors")
    assert [(problem.subject, problem.kind) for problem in pair.opened().problems] == [
        (name, "missing")
    ]


def test_every_router_has_a_bias_which_is_zero_where_the_family_has_none(pair):
    architecture = pair.config.family.architecture
    biases = [router.bias for router in pair.decoder.routers]
    has_experts = architecture.router is not RouterKind.NONE
    assert len(biases) == has_experts * pair.config.num_hidden_layers
    for bias in biases:
        assert bias.shape == (pair.config.num_local_experts,)
        assert bias.any() == (architecture.router is RouterKind.SIGMOID_BIAS)


def test_the_state_dict_has_the_names_of_the_familys_layout(pair):
    assert pair.decoder.state_dict().keys() == pair.state.keys()
    assert initial_state(pair.config, seed=0).keys() == pair.state.keys()
