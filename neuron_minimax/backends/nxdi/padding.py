"""Experts of zeros beside a model's own, so that each expert-parallel rank holds as many; needs
torch alone, so it is proven everywhere.

The router is not padded: it scores the model's own experts and chooses among them, whatever kind it
is, so that padding is exact by construction. What it says of E experts is then told by the places
that they have among all: the first ranks hold one expert more than the others, which hold zeros
after theirs.
"""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

import torch

from neuron_minimax.config import ModelConfig
from neuron_minimax.families import target_scale_name


@dataclass(frozen=True)
class Padding:
    """That of `experts` on `ranks` expert-parallel ranks (config.py's `expert_share`)."""

    experts: int
    ranks: int

    @property
    def held(self) -> int:
        """Experts of all ranks, zeros included."""
        return self.experts + (-self.experts) % self.ranks

    @property
    def _fewest(self) -> int:
        """Experts of a rank that holds zeros too."""
        return self.experts // self.ranks

    @property
    def _whole(self) -> int:
        """Experts of the ranks that hold none."""
        return self.experts % self.ranks * (self._fewest + 1)

    def pad(self, values: torch.Tensor, dimension: int) -> torch.Tensor:
        """Zeros where a dimension of the model's own experts has none: held of them."""
        if self.held == self.experts:
            return values
        rest = self.experts - self._whole
        whole, others = values.split((self._whole, rest), dimension)
        by_rank = others.unflatten(dimension, (-1, self._fewest))
        zeros = torch.zeros_like(by_rank.narrow(dimension + 1, 0, 1))
        padded = torch.cat((by_rank, zeros), dimension + 1).flatten(dimension, dimension + 1)
        return torch.cat((whole, padded), dimension)

    def places(self, index: torch.Tensor) -> torch.Tensor:
        """Numbers of the model's own experts as places among all that are held."""
        if self.held == self.experts:
            return index
        # The first expert of each rank behind one that holds zeros; a chip compares faster than
        # it divides.
        behind = torch.arange(
            self._whole + self._fewest, self.experts, self._fewest, device=index.device
        )
        return index + (index[..., None] >= behind).sum(dim=-1)

    def pad_experts(
        self,
        state: MutableMapping[str, torch.Tensor],
        config: ModelConfig,
        layers: Iterable[int],
    ) -> None:
        """Pad the experts of these layers in full checkpoint tensors, which are copied where there
        is something to pad: in host memory, as many bytes as the experts have.
        """
        if self.held == self.experts:
            return
        targets = [rule.target for rule in config.family.rules if rule.per_expert]
        for layer in layers:
            for target in targets:
                weight = target.format(l=layer)
                for name in (weight, target_scale_name(weight)):
                    if name in state:  # coverage names what is missing
                        stored = state[name]
                        by_byte = stored.view(torch.uint8) if stored.itemsize == 1 else stored
                        state[name] = self.pad(by_byte, 0).view(stored.dtype)
