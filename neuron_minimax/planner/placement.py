"""Which rank holds which expert: expert-parallel ranks that carry the same load, from how often
experts are chosen.

A placement is an order of the experts of each layer, [L,E], of which each rank holds its share
(config.py's `expert_share`): as many as the others, or one fewer. Applied to a converted state dict
it renumbers the experts (weights, router rows, bias), so any loader may split it. Shapes: L layers,
E experts, R ranks.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import numpy as np
from pydantic import ConfigDict, Field

from neuron_minimax.checkpoint.writer import replacing
from neuron_minimax.config import expert_share
from neuron_minimax.errors import ConversionError, counted
from neuron_minimax.families import Family
from neuron_minimax.files import read_json

if TYPE_CHECKING:
    import torch

Tensor = TypeVar("Tensor", np.ndarray, "torch.Tensor")
FORMAT_VERSION = 1
_Number = Annotated[int, Field(ge=0, lt=1 << 31)]


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A placement as its file holds it."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    # No Literal: it takes what equals 1, such as true.
    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)]
    moe_ep_degree: _Number
    expert_order: Annotated[
        list[Annotated[list[_Number], Field(min_length=1)]], Field(min_length=1)
    ]


@dataclass(frozen=True, kw_only=True, eq=False)
class Placement:
    """`order` [L,E] of int, and how many expert-parallel ranks it is for."""

    order: np.ndarray
    ranks: int

    def __post_init__(self) -> None:
        experts = self.order.shape[1]
        _require_enough(experts, self.ranks)
        if not (np.sort(self.order, axis=1) == np.arange(experts)).all():
            raise ConversionError("a placement has to name every expert of a layer exactly once")

    def rank_load(self, counts_LE: np.ndarray) -> np.ndarray:
        """Load [L,R] of each rank for counts in the original numbering."""
        placed = np.take_along_axis(counts_LE, self.order, axis=1)
        experts = self.order.shape[1]
        starts = [expert_share(experts, rank, self.ranks).start for rank in range(self.ranks)]
        return np.add.reduceat(placed, starts, axis=1)

    def max_to_mean(self, counts_LE: np.ndarray) -> np.ndarray:
        """Largest rank load over the mean, per layer [L]; 1 is even, and all wait for the slowest
        rank.
        """
        load_LR = self.rank_load(counts_LE)
        return load_LR.max(axis=1) / np.maximum(load_LR.mean(axis=1), 1e-12)

    def apply(self, state: Mapping[str, Tensor], family: Family) -> dict[str, Tensor]:
        """A converted state dict with the experts renumbered; the model computes the same.

        Raises ConversionError when it has other numbers of layers or experts.
        """
        result = dict(state)
        for layer, order in enumerate(self.order):
            for template in family.expert_targets:
                name = template.format(l=layer)
                if name not in state and name.endswith(".scale"):
                    continue
                if name not in state or state[name].shape[0] != len(order):
                    raise ConversionError(
                        f"{name} is not in the state dict with "
                        f"{counted(len(order), 'expert')}, as placed"
                    )
                result[name] = _reordered(state[name], order)
        extra = family.expert_targets[0].format(l=len(self.order))
        if extra in state:
            raise ConversionError(
                f"the placement has {counted(len(self.order), 'layer')}, but the state "
                f"dict has {extra}"
            )
        return result

    def for_ranks(self, ranks: int) -> "Placement":
        """Itself. Raises ConversionError when it was made for another number of expert-parallel
        ranks.
        """
        if self.ranks != ranks:
            raise ConversionError(
                f"the placement is for {self.ranks} expert-parallel ranks, but moe_ep_degree is "
                f"{ranks}; make another"
            )
        return self

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all: `format_version`, `moe_ep_degree`, `expert_order` (one
        list per layer). Raises OSError.
        """
        contents = {
            "format_version": FORMAT_VERSION,
            "moe_ep_degree": self.ranks,
            "expert_order": self.order.tolist(),
        }
        with replacing(Path(path)) as file:
            file.write((json.dumps(contents) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> "Placement":
        """Read what `save` wrote. Raises ConversionError when it is no placement."""
        advice = "`neuron-minimax experts --trace FILE --placement RANKS` makes one"
        try:
            stored = read_json(Path(path), _Stored, ConversionError, advice)
        except FileNotFoundError:
            raise ConversionError(f"{path} does not exist; {advice}") from None
        experts = len(stored.expert_order[0])
        if any(len(row) != experts for row in stored.expert_order):
            raise ConversionError(f"{path} has layers of different numbers of experts; {advice}")
        return cls(order=np.array(stored.expert_order, np.int64), ranks=stored.moe_ep_degree)


def _reordered(stacked: Tensor, order: np.ndarray) -> Tensor:
    """The rows of an array or tensor in this order; FP8 codes move as bytes."""
    if isinstance(stacked, np.ndarray):
        return stacked[order]
    import torch

    rows = torch.from_numpy(order)
    if stacked.element_size() == 1:
        return stacked.view(torch.uint8)[rows].view(stacked.dtype)
    return stacked[rows]


def as_numbered(layers: int, experts: int, ranks: int) -> Placement:
    """The placement without a placement: experts in their own order."""
    return Placement(order=np.tile(np.arange(experts), (layers, 1)), ranks=ranks)


def place(counts_LE: np.ndarray, ranks: int) -> Placement:
    """Spread each layer's experts over the ranks, as many on each or one fewer, so that their loads
    are as equal as found.

    Largest first onto the least loaded rank that has room, then exchanges between the heaviest and
    the other ranks as long as one lowers the larger of the two loads.
    """
    _require_enough(counts_LE.shape[1], ranks)
    return Placement(
        order=np.stack([_balance(row.astype(float), ranks) for row in counts_LE]), ranks=ranks
    )


def _require_enough(experts: int, ranks: int) -> None:
    """Raise ConversionError unless every rank has an expert."""
    if not 1 <= ranks <= experts:
        raise ConversionError(
            f"{counted(experts, 'expert')} cannot be split over {counted(ranks, 'rank')}; expected "
            f"1 to {experts} ranks"
        )


def _balance(load_E: np.ndarray, ranks: int) -> np.ndarray:
    room = [len(expert_share(len(load_E), rank, ranks)) for rank in range(ranks)]
    held: list[list[int]] = [[] for _ in range(ranks)]
    totals = np.zeros(ranks)
    for expert in np.argsort(-load_E, kind="stable"):
        open_ranks = [rank for rank in range(ranks) if len(held[rank]) < room[rank]]
        rank = min(open_ranks, key=lambda rank: totals[rank])
        held[rank].append(int(expert))
        totals[rank] += load_E[expert]
    while _exchange(load_E, held, totals):
        pass
    return np.concatenate([sorted(experts) for experts in held])


def _exchange(load_E: np.ndarray, held: list[list[int]], totals: np.ndarray) -> bool:
    """One exchange that lowers the heaviest rank; False when there is none."""
    heavy = int(totals.argmax())
    best: tuple[float, int, int, int] | None = None
    for light in range(len(held)):
        if light == heavy:
            continue
        for i, mine in enumerate(held[heavy]):
            for j, theirs in enumerate(held[light]):
                moved = load_E[mine] - load_E[theirs]
                larger = max(totals[heavy] - moved, totals[light] + moved)
                if larger < totals[heavy] - 1e-9 and (best is None or larger < best[0]):
                    best = (larger, light, i, j)
    if best is None:
        return False
    _, light, i, j = best
    moved = load_E[held[heavy][i]] - load_E[held[light][j]]
    held[heavy][i], held[light][j] = held[light][j], held[heavy][i]
    totals[heavy] -= moved
    totals[light] += moved
    return True
