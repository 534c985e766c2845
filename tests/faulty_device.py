"""Devices for the device check: the eager backend, right or with one fault built into its model
or its steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from neuron_minimax.backends.cpu.backend import EagerBackend
from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.device_check.check import CheckRequest
from neuron_minimax.device_check.run import answer
from neuron_minimax.model.decoder import Decoder

Break = Callable[[Decoder], None]


class Norms(nn.Module):
    """A QK norm over each of `parts` equal parts of the width, as ranks that do not reduce would
    take it.
    """

    def __init__(self, norm: nn.Module, parts: int) -> None:
        super().__init__()
        self.norm = norm
        self.parts = parts

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        pieces = [
            piece.float()
            / (piece.float().square().mean(-1, keepdim=True) + self.norm.epsilon).sqrt()
            for piece in hidden.chunk(self.parts, dim=-1)
        ]
        return self.norm.weight.to(hidden.dtype) * torch.cat(pieces, -1).to(hidden.dtype)


def moe(model: Decoder) -> nn.Module:
    return model.layers[0].block_sparse_moe


def drop_bias(model: Decoder) -> None:
    router = moe(model).router
    router.e_score_correction_bias = torch.zeros_like(router.e_score_correction_bias)


def round_router(model: Decoder) -> None:
    router = moe(model).router
    router.e_score_correction_bias = router.e_score_correction_bias.to(torch.bfloat16).to(
        torch.float32
    )
    gate = router.linear_router
    gate.weight = nn.Parameter(
        gate.weight.to(torch.bfloat16).to(torch.float32), requires_grad=False
    )


def move_experts(model: Decoder) -> None:
    """What a wrong order of experts over ranks does."""
    for weight in (
        moe(model).expert_mlps.mlp_op.gate_up_proj,
        moe(model).expert_mlps.mlp_op.down_proj,
    ):
        order = torch.arange(weight.weight.shape[0]).roll(1)
        codes = weight.weight.view(torch.uint8)[order].view(weight.weight.dtype)
        weight.weight = nn.Parameter(codes, requires_grad=False)
        weight.scale = nn.Parameter(weight.scale[order], requires_grad=False)


def split_norms(model: Decoder) -> None:
    attention = model.layers[0].self_attn
    attention.q_norm = Norms(attention.q_norm, 2)
    attention.k_norm = Norms(attention.k_norm, 2)


def rotate_everything(model: Decoder) -> None:
    model.config = replace(model.config, rotary_dim=model.config.head_dim)


def swap_gate_and_up(model: Decoder) -> None:
    weight = moe(model).expert_mlps.mlp_op.gate_up_proj
    codes = weight.weight.view(torch.uint8)
    gate, up = codes.chunk(2, dim=-1)
    weight.weight = nn.Parameter(
        torch.cat([up, gate], -1).view(weight.weight.dtype), requires_grad=False
    )
    gate, up = weight.scale.chunk(2, dim=-1)
    weight.scale = nn.Parameter(torch.cat([up, gate], -1), requires_grad=False)


def double_a_scale(model: Decoder) -> None:
    """One block of every expert's gate, which silent and coded experts do not tell from the
    right one.
    """
    weight = moe(model).expert_mlps.mlp_op.gate_up_proj
    scale = weight.scale.clone()
    scale[:, 0, 0] *= 2
    weight.scale = nn.Parameter(scale, requires_grad=False)


def halve_values(model: Decoder) -> None:
    """The first half of the value projection's rows is lost."""
    projection = model.layers[0].self_attn.qkv_proj.v_proj
    codes = projection.weight.view(torch.uint8).clone()
    codes[: len(codes) // 2] = 0
    projection.weight = nn.Parameter(codes.view(projection.weight.dtype), requires_grad=False)


class Faulty(EagerBackend):
    """`encoding` breaks the model of context encoding, `generation` that of token generation."""

    def __init__(
        self, model: Path, options: CPUOptions, encoding: Break | None, generation: Break | None
    ) -> None:
        super().__init__(model, options)
        self.models = {True: self.model, False: EagerBackend(model, options).model}
        for is_encoding, broken in ((True, encoding), (False, generation)):
            if broken is not None:
                broken(self.models[is_encoding])

    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        self.model = self.models[True]
        return super()._encode(slot, ids, start, all_positions)

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        self.model = self.models[False]
        return super()._step(tokens, positions, active)


class LateSteps(EagerBackend):
    """Token generation forgets the last position of the cache."""

    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        return super()._step(tokens, (positions - 1).clamp_min(0), active)


@dataclass(frozen=True, kw_only=True)
class InProcess:
    """A device in this process, whose backend is made from a probe and the options of the
    request.
    """

    request: CheckRequest
    make: Callable[[Path, CPUOptions], EagerBackend] = EagerBackend

    def run_probe(self, probe: Path, asked: Path, logits: Path) -> None:
        request = self.request
        options = CPUOptions(
            slots=request.slots,
            seq_len=request.seq_len,
            buckets=request.buckets,
            compute=request.compute,
            engine="eager",
        )
        answer(self.make(probe, options), asked, logits)

    def run(self, traced: Path, asked: Path, logits: Path) -> None:
        self.run_probe(traced / "model", asked, logits)


def with_fault(
    request: CheckRequest, encoding: Break | None, generation: Break | None
) -> InProcess:
    """A device with a fault in one phase or both."""
    return InProcess(
        request=request, make=lambda probe, options: Faulty(probe, options, encoding, generation)
    )
