"""The CPU's side of a check: the eager model over the same probe, and the same model with one known
fault.

A fault's logits serve twice: they show that the probe would see it, and name it when the device
gives them.
Shapes: N rows, V vocabulary, H hidden, Q width of a projection, A attention heads, D head_dim, B
batch, T tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from neuron_minimax.backends.cpu.backend import EagerBackend
from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.config import ModelConfig
from neuron_minimax.device_check.schedule import Limits, Round, run_rounds
from neuron_minimax.kernels.reference import FP8_DTYPES, ExpertWeights, dequantize
from neuron_minimax.model.decoder import Decoder, DecoderLayer
from neuron_minimax.model.layers import Kernels, Linear, RMSNorm, StoredWeight
from neuron_minimax.model.moe import Router, Routing
from neuron_minimax.planner.sharding import head_layout


class ExpandedWeights:
    """The eager kernels over weights that are expanded from FP8 once and kept, not for every token
    again.

    A product of BF16 is one of float32 whose inputs and result are rounded to BF16: that is how the
    device defines it, and few CPUs have another way that is fast. With `last_token` experts run for
    the last token alone, zero before it.
    """

    def __init__(self, compute: torch.dtype) -> None:
        self.compute = compute
        self.kept: dict[tuple[int, int], torch.Tensor] = {}

    def kernels(self, *, last_token: bool) -> Kernels:
        return Kernels(
            linear=self.linear,
            expert_mlp=self.last_token_experts if last_token else self.expert_mlp,
        )

    def linear(
        self,
        hidden_NI: torch.Tensor,
        weight_OI: torch.Tensor,
        scale: torch.Tensor | None,
        block: tuple[int, int],
    ) -> torch.Tensor:
        expanded_OI = self._expanded((id(weight_OI), 0), weight_OI, scale, block)
        return F.linear(hidden_NI.float(), expanded_OI).to(self.compute)

    def expert_mlp(
        self,
        hidden_TH: torch.Tensor,
        expert_index_TK: torch.Tensor,
        affinity_TK: torch.Tensor,
        weights: ExpertWeights,
    ) -> torch.Tensor:
        out_TH = torch.zeros_like(hidden_TH, dtype=torch.float32)
        for expert in expert_index_TK.unique().tolist():
            tokens, places = torch.where(expert_index_TK == expert)
            gate_up, gate_up_scale, down, down_scale, block = weights.expert(expert)
            wide_H2I = self._expanded(
                (id(weights.gate_up), expert), gate_up, gate_up_scale, block, parts=2
            )
            down_IH = self._expanded((id(weights.down), expert), down, down_scale, block)
            gate_TI, up_TI = (
                (hidden_TH[tokens].float() @ wide_H2I).to(self.compute).chunk(2, dim=-1)
            )
            product_TH = ((F.silu(gate_TI) * up_TI).float() @ down_IH).to(self.compute)
            out_TH = out_TH.index_add(
                0, tokens, product_TH.float() * affinity_TK[tokens, places, None]
            )
        return out_TH.to(hidden_TH.dtype)

    def last_token_experts(
        self,
        hidden_TH: torch.Tensor,
        expert_index_TK: torch.Tensor,
        affinity_TK: torch.Tensor,
        weights: ExpertWeights,
    ) -> torch.Tensor:
        out_TH = torch.zeros_like(hidden_TH)
        last = slice(-1, None)
        out_TH[last] = self.expert_mlp(
            hidden_TH[last], expert_index_TK[last], affinity_TK[last], weights
        )
        return out_TH

    def _expanded(
        self,
        key: tuple[int, int],
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        block: tuple[int, int],
        parts: int = 1,
    ) -> torch.Tensor:
        """The weight's values in the compute dtype, held in float32."""
        if key not in self.kept:
            self.kept[key] = dequantize(weight, scale, block, parts).to(self.compute).float()
        return self.kept[key]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that a model can do wrong: in words, and done to the eager model."""

    name: str
    says: str  # completes "the device's logits are those of a model where ..."
    apply: Callable[[Decoder], None]


class Reference(EagerBackend):
    """The eager backend over a probe; it keeps what the router was given.

    A `fault` makes all of it wrong, or with `only_steps` token generation alone.
    """

    def __init__(
        self,
        probe: Path,
        limits: Limits,
        compute: str,
        fault: Fault | None = None,
        *,
        only_steps: bool = False,
    ) -> None:
        options = CPUOptions(
            slots=limits.slots,
            seq_len=limits.seq_len,
            buckets=limits.buckets,
            compute=compute,
            engine="eager",
        )
        super().__init__(probe, options)
        self.encoding_model = self.model
        if fault is not None and only_steps:
            self.model = EagerBackend(probe, options).model
        if fault is not None:
            fault.apply(self.model)
        self.generation_model = self.model
        if fault is not None and not only_steps:
            self.encoding_model = self.model
        self.weights = ExpandedWeights(self.model.compute)
        self.router_inputs: list[torch.Tensor] = []  # [tokens of a call, H]
        for model in {self.encoding_model, self.generation_model}:
            moe = layer_of(model).moe
            moe.router = RecordingRouter(self.config, moe.router, self.router_inputs)

    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        self.model = self.encoding_model
        return super()._encode(slot, ids, start, all_positions)

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        self.model = self.generation_model
        return super()._step(tokens, positions, active)

    def _run(
        self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, rows_B: torch.Tensor
    ) -> torch.Tensor:
        """Run the eager backend's pass; no logits and no keys of one layer depend on what experts
        give for earlier tokens.
        """
        kernels = self.weights.kernels(last_token=ids_BT.shape[1] > 1)
        filled = int(positions_BT.max()) + 1
        hidden_BTH, _ = self.model.hidden_states(
            ids_BT, positions_BT, cache=self.cache, rows_B=rows_B, filled=filled, kernels=kernels
        )
        return hidden_BTH

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.logits(hidden, self.weights.kernels(last_token=False)).float()

    def run(self, rounds: Sequence[Round]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [N,V] and what the router was given [N,H], in the order of `rows_of`."""
        self.router_inputs.clear()
        logits_NV = run_rounds(self, rounds)
        self.weights.kept.clear()
        calls = iter(self.router_inputs)
        inputs = []
        for round_ in rounds:
            inputs += [next(calls)[-1] for _ in round_]
            in_order = sorted(
                sequence.slot for sequence in round_
            )  # as a step gives the active slots to the model
            for _ in round_[0].continuation:
                call = next(calls)
                inputs += [call[in_order.index(sequence.slot)] for sequence in round_]
        return logits_NV, torch.stack(inputs)


class RecordingRouter(Router):
    """A router that keeps the hidden states it is given."""

    def __init__(self, config: ModelConfig, router: Router, inputs: list[torch.Tensor]) -> None:
        super().__init__(config)
        self.linear_router = router.linear_router
        self.inputs = inputs
        self.e_score_correction_bias = router.e_score_correction_bias

    def forward(self, hidden_TH: torch.Tensor) -> Routing:
        self.inputs.append(hidden_TH)
        return super().forward(hidden_TH)


class GroupedRMSNorm(RMSNorm):
    """RMSNorm that takes the mean square of each head from some heads only; `shares` [A,A] says
    with which weight.
    """

    def __init__(self, norm: RMSNorm, shares: torch.Tensor) -> None:
        super().__init__(norm.weight.shape[0], norm.epsilon)
        self.weight = norm.weight
        self.shares = shares

    def forward(self, projected_BTQ: torch.Tensor) -> torch.Tensor:
        by_head = projected_BTQ.float().unflatten(-1, (self.shares.shape[0], -1))
        mean_squares = by_head.pow(2).mean(-1) @ self.shares.T
        normed = (by_head * torch.rsqrt(mean_squares + self.epsilon)[..., None]).flatten(-2)
        return self.weight.to(projected_BTQ.dtype) * normed.to(projected_BTQ.dtype)


class RolledHeads(Linear):
    """A projection whose heads come out one place further."""

    def __init__(self, projection: Linear, head_dim: int) -> None:
        super().__init__(projection.weight.shape[1], projection.weight.shape[0], projection.block)
        self.weight = projection.weight
        self.scale = projection.scale
        self.head_dim = head_dim

    def forward(self, hidden: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        return super().forward(hidden, kernels).roll(self.head_dim, -1)


def layer_of(model: Decoder) -> DecoderLayer:
    """The one layer of a probe."""
    layer = model.layers[0]
    assert isinstance(layer, DecoderLayer)
    return layer


def attention_faults(model: Decoder, tp_degree: int) -> list[Fault]:
    """Known faults between the projections and the softmax of this model."""
    config = model.config
    faults = []
    if tp_degree > 1:
        faults.append(
            Fault(
                name="norm per rank",
                says=f"each of the {tp_degree} ranks takes the QK norm over its own heads "
                "instead of the full width",
                apply=lambda model: _group_norms(model, *_rank_shares(config, tp_degree)),
            )
        )
    faults.append(
        Fault(
            name="norm per head",
            says="the QK norm is taken per head instead of over the full width",
            apply=lambda model: _group_norms(
                model, torch.eye(config.num_attention_heads), torch.eye(config.num_key_value_heads)
            ),
        )
    )
    if config.rotary_dim < config.head_dim:
        faults.append(
            Fault(
                name="RoPE over all channels",
                says=f"RoPE rotates all {config.head_dim} channels of a head instead of the "
                f"first {config.rotary_dim}",
                apply=_rotate_all,
            )
        )
    return faults


def value_faults(model: Decoder) -> list[Fault]:
    """Known faults of the value and output projections of this model."""
    faults = []
    if model.config.num_key_value_heads > 1:
        faults.append(
            Fault(
                name="value heads moved",
                says="each group of query heads gets the value of another key/value head",
                apply=_roll_values,
            )
        )
    if layer_of(model).self_attn.o_proj.o_proj.scale is not None:
        faults.append(
            Fault(
                name="attention without scales",
                says="the block scales of the value and output projections are not applied",
                apply=_drop_attention_scales,
            )
        )
    return faults


def expert_faults(model: Decoder) -> list[Fault]:
    """Known faults of the experts of this model."""
    faults = [
        Fault(
            name="gate and up swapped",
            says="the gate and up projections of the experts are swapped",
            apply=_swap_gate_up,
        )
    ]
    if layer_of(model).moe.expert_mlps.mlp_op.down_proj.scale is not None:
        faults.append(
            Fault(
                name="experts without scales",
                says="the block scales of the experts are not applied",
                apply=_drop_expert_scales,
            )
        )
    return faults


def _rank_shares(config: ModelConfig, tp_degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For queries and for keys, how much of each head's mean square a rank's norm takes into
    each of its heads'.
    """
    layout = head_layout(config.num_attention_heads, config.num_key_value_heads, tp_degree)
    queries = [layout.query_slots_of(rank) for rank in range(tp_degree)]
    keys = [layout.key_value_slots_of(rank) for rank in range(tp_degree)]
    return _shares(queries, config.num_attention_heads), _shares(keys, config.num_key_value_heads)


def _shares(ranks: Sequence[Sequence[int | None]], heads: int) -> torch.Tensor:
    """[A,A]; a head that is on several ranks counts with the first of them, as padding its zeros
    count.
    """
    shares = torch.zeros(heads, heads)
    seen: set[int] = set()
    for slots in ranks:
        for head in {slot for slot in slots if slot is not None} - seen:
            for other in slots:
                if other is not None:
                    shares[head, other] += 1 / len(slots)
            seen.add(head)
    return shares


def _group_norms(model: Decoder, queries: torch.Tensor, keys: torch.Tensor) -> None:
    attention = layer_of(model).self_attn
    attention.q_norm = GroupedRMSNorm(attention.q_norm, queries)
    attention.k_norm = GroupedRMSNorm(attention.k_norm, keys)


def _rotate_all(model: Decoder) -> None:
    model.config = replace(model.config, rotary_dim=model.config.head_dim)


def _roll_values(model: Decoder) -> None:
    projections = layer_of(model).self_attn.qkv_proj
    projections.v_proj = RolledHeads(projections.v_proj, model.config.head_dim)


def _drop_attention_scales(model: Decoder) -> None:
    attention = layer_of(model).self_attn
    for weight in (attention.qkv_proj.v_proj, attention.o_proj.o_proj):
        _drop_scale(weight)


def _drop_expert_scales(model: Decoder) -> None:
    experts = layer_of(model).moe.expert_mlps.mlp_op
    for weight in (experts.gate_up_proj, experts.down_proj):
        _drop_scale(weight)


def _drop_scale(module: StoredWeight) -> None:
    if module.scale is not None:
        module.scale = nn.Parameter(torch.ones_like(module.scale), requires_grad=False)


def _swap_gate_up(model: Decoder) -> None:
    gate_up = layer_of(model).moe.expert_mlps.mlp_op.gate_up_proj
    weight = gate_up.weight
    bits = weight.view(torch.uint8) if weight.dtype in FP8_DTYPES else weight
    half = bits.shape[-1] // 2
    gate_up.weight = nn.Parameter(bits.roll(half, -1).view(weight.dtype), requires_grad=False)
    if gate_up.scale is not None:
        half = gate_up.scale.shape[-1] // 2
        gate_up.scale = nn.Parameter(gate_up.scale.roll(half, -1), requires_grad=False)
