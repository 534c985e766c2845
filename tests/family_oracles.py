"""Tiny checkpoints of every family and an oracle of each: transformers in float32 on the exactly
dequantized weights, or MiniMind written out slowly.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from neuron_minimax.checkpoint.reader import Checkpoint
from tests import minimind
from tests.tiny import tiny_config, write_tiny

BF16: dict[str, Any] = {"quantization_config": None}
FP8: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}
}


@dataclass(frozen=True)
class Case:
    family: str
    overrides: dict[str, Any] = field(default_factory=dict)


# Every family in every storage, and the switches of config.json that change what is computed.
CASES = {
    "MiniMax-M2": Case("minimax_m2"),
    "Qwen3 in FP8, tied": Case("qwen3"),
    "Qwen3 in BF16, a head of its own": Case("qwen3", BF16 | {"tie_word_embeddings": False}),
    "Qwen3-MoE in FP8": Case("qwen3_moe"),
    "Qwen3-MoE in BF16, softmax as it is, dense layers": Case(
        "qwen3_moe",
        BF16 | {"norm_topk_prob": False, "num_hidden_layers": 3, "mlp_only_layers": [0]},
    ),
    "Qwen3-MoE in FP8, every second layer sparse": Case(
        "qwen3_moe", {"num_hidden_layers": 3, "decoder_sparse_step": 2}
    ),
    "Qwen3 with YaRN": Case(
        "qwen3",
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "Qwen2": Case("qwen2"),
    "Qwen2, tied": Case("qwen2", {"tie_word_embeddings": True}),
    "MiniMind": Case("minimind"),
    "MiniMind in FP8, with YaRN": Case("minimind", FP8 | {"inference_rope_scaling": True}),
    "MiniMind-MoE": Case("minimind_moe"),
    "MiniMind-MoE in FP8, two of four": Case("minimind_moe", FP8 | {"num_experts_per_tok": 2}),
    "MiniMind2": Case("minimind2"),
    "MiniMind2-MoE": Case("minimind2_moe"),
    "MiniMind2-MoE in FP8, one of four": Case("minimind2_moe", FP8 | {"num_experts_per_tok": 1}),
}


class Pair:
    """A tiny checkpoint of a case, and its oracle."""

    def __init__(self, case: Case, directory: Path) -> None:
        self.case = case
        self.directory = write_tiny(directory / "published", family=case.family, **case.overrides)
        self.dense = write_tiny(
            directory / "dense", dense=True, family=case.family, **case.overrides
        )
        self.checkpoint = Checkpoint(self.directory)
        self.config = self.checkpoint.config
        self._model = None
        if not case.family.startswith("minimind"):
            # Its grouped matrix products refuse odd sizes and add up in another order; the plain
            # loop does neither.
            self._model = AutoModelForCausalLM.from_pretrained(
                self.dense, dtype=torch.float32, experts_implementation="eager"
            ).float()

    @property
    def dense_state(self) -> dict[str, torch.Tensor]:
        return {
            name: tensor
            for path in sorted(self.dense.glob("*.safetensors"))
            for name, tensor in load_file(path).items()
        }

    @torch.no_grad()
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """The oracle's logits [B, T, V]."""
        if self._model is not None:
            return self._model(ids).logits
        raw = tiny_config(self.case.family, **self.case.overrides)
        return torch.stack([minimind.logits(raw, self.dense_state, row.tolist()) for row in ids])

    def greedy(self, prompt: list[int], steps: int) -> list[int]:
        """The oracle's tokens after a prompt, each the likeliest."""
        ids = torch.tensor([prompt])
        for _ in range(steps):
            ids = torch.cat([ids, self.logits(ids)[:, -1:].argmax(-1)], dim=1)
        return ids[0, len(prompt) :].tolist()
