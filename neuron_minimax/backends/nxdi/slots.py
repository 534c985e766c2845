"""The backend contract over an NxDI application with continuous batching: one sequence id per slot.

Shapes: S slots, T tokens, V vocabulary, which comes padded to a multiple of the ranks.
"""

from pathlib import Path

import torch

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.backends.nxdi.model import NeuronMiniMaxM2ForCausalLM
from neuron_minimax.backends.nxdi.options import NeuronOptions


class NeuronBackend(Backend):
    """Prompts are encoded one at a time; every step runs all slots, as the compiled batch does."""

    def __init__(
        self, application: NeuronMiniMaxM2ForCausalLM, model: Path, options: NeuronOptions
    ) -> None:
        self.application = application
        self.model_directory = model
        self.config = application.config.model_config
        self.capabilities = Capabilities(
            slots=options.slots,
            seq_len=options.seq_len,
            buckets=options.buckets,
            vocab_size=self.config.vocab_size,
            chunked_encoding=False,  # NxDI continues a prompt with a block layout of the cache only
            # Its context encoding computes the head for the last position
            all_position_logits=False,
        )
        self._lengths = [0] * options.slots

    def reset(self, slot: int) -> None:
        """A position is written before it is read, whatever a slot held before."""
        self._check_slot(slot)
        self._lengths[slot] = 0

    @torch.inference_mode()
    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        # Padded here, because NxDI gives padding position 1 and takes the logits at the highest
        # position: of a prompt of one token that would be a padding's.
        padding = [0] * (self.capabilities.bucket_for(len(ids)) - len(ids))
        logits_1TV = self.application(
            input_ids=torch.tensor([ids + padding]),
            attention_mask=torch.tensor([[1] * len(ids) + padding]),
            position_ids=torch.tensor([[*range(len(ids)), *padding]]),
            seq_ids=torch.tensor([slot]),
        ).logits
        self._lengths[slot] = len(ids)
        return logits_1TV[0, -1, : self.config.vocab_size].float()

    @torch.inference_mode()
    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        # An inactive slot writes where its own next token will be written, and so leaves nothing
        # behind. Position 0 would make NxDI take the batch for a prompt.
        last = self.capabilities.seq_len - 1
        resting = torch.tensor(self._lengths).clamp(1, last)
        positions = torch.where(active, positions, resting)
        logits_S1V = self.application(
            input_ids=torch.where(active, tokens, 0)[:, None],
            attention_mask=(torch.arange(int(positions.max())) < positions[:, None]).long(),
            position_ids=positions[:, None],
            seq_ids=torch.arange(self.capabilities.slots),
        ).logits
        for slot in active.nonzero().flatten().tolist():
            self._lengths[slot] = int(positions[slot]) + 1
        return logits_S1V[:, -1, : self.config.vocab_size].float()
