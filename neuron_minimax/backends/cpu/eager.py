"""The eager engine of the CPU backend: the model as it is, over one cache with a row per slot."""

from pathlib import Path

import torch

from neuron_minimax.backends.base import Backend, Capabilities
from neuron_minimax.backends.cpu.options import CPUOptions
from neuron_minimax.model.cache import KVCache
from neuron_minimax.model.decoder import COMPUTE_DTYPES, load_model
from neuron_minimax.model.layers import Kernels


class EagerBackend(Backend):
    def __init__(self, model: Path, options: CPUOptions) -> None:
        self.model_directory = model
        self.model = load_model(model, compute=COMPUTE_DTYPES[options.compute])
        self.config = self.model.config
        self.capabilities = capabilities_of(options, self.config.vocab_size)
        self.cache = KVCache.allocate(
            self.config, options.slots, options.seq_len, self.model.compute
        )

    def reset(self, slot: int) -> None:
        """Nothing to do: a position is written before it is read, whatever a slot held before."""
        self._check_slot(slot)

    @torch.inference_mode()
    def _encode(self, slot: int, ids: list[int], start: int, all_positions: bool) -> torch.Tensor:
        positions_BT = torch.arange(start, start + len(ids))[None]
        hidden_BTH = self._run(torch.tensor([ids]), positions_BT, torch.tensor([slot]))
        logits_TV = self._head(hidden_BTH[0] if all_positions else hidden_BTH[0, -1:])
        return logits_TV if all_positions else logits_TV[0]

    @torch.inference_mode()
    def _step(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor
    ) -> torch.Tensor:
        logits_SV = torch.zeros(self.capabilities.slots, self.capabilities.vocab_size)
        rows = active.nonzero().flatten()
        if len(rows):
            hidden_BTH = self._run(tokens[rows, None], positions[rows, None], rows)
            logits_SV[rows] = self._head(hidden_BTH[:, 0])
        return logits_SV

    def _run(
        self, ids_BT: torch.Tensor, positions_BT: torch.Tensor, rows_B: torch.Tensor
    ) -> torch.Tensor:
        filled = int(positions_BT.max()) + 1
        hidden_BTH, _ = self.model.hidden_states(
            ids_BT, positions_BT, cache=self.cache, rows_B=rows_B, filled=filled
        )
        return hidden_BTH

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden, Kernels()).float()


def capabilities_of(options: CPUOptions, vocab_size: int) -> Capabilities:
    return Capabilities(
        slots=options.slots,
        seq_len=options.seq_len,
        buckets=options.buckets,
        vocab_size=vocab_size,
        chunked_encoding=True,
        all_position_logits=True,
    )
