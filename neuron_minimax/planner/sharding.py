"""Place attention heads on tensor-parallel ranks as NxDI does, written once for every user.

Source: neuronx-distributed-inference 0.9.0, modules/attention/gqa.py; `tests/data` holds what it
builds.
"""

from dataclasses import dataclass

from neuron_minimax.fp8 import ceil_div


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """Heads after padding and replication; each slot names the source head it holds, or None for
    zeros.
    """

    tp_degree: int
    query_slots: tuple[int | None, ...]
    key_value_slots: tuple[int | None, ...]
    key_value_copies: int  # how often each key/value head occurs over all ranks

    @property
    def query_heads_per_rank(self) -> int:
        return len(self.query_slots) // self.tp_degree

    @property
    def key_value_heads_per_rank(self) -> int:
        return len(self.key_value_slots) // self.tp_degree

    def query_slots_of(self, rank: int) -> tuple[int | None, ...]:
        return self.query_slots[
            rank * self.query_heads_per_rank : (rank + 1) * self.query_heads_per_rank
        ]

    def key_value_slots_of(self, rank: int) -> tuple[int | None, ...]:
        return self.key_value_slots[
            rank * self.key_value_heads_per_rank : (rank + 1) * self.key_value_heads_per_rank
        ]


def head_layout(query_heads: int, key_value_heads: int, tp_degree: int) -> HeadLayout:
    """Place the heads on `tp_degree` ranks.

    Where tp_degree is a multiple of the key/value heads these are repeated to one per rank, and
    query heads are padded at the end of each key/value group, so that a query head always meets its
    own key. Elsewhere, unless the key/value heads divide evenly, they are repeated to one per query
    head and both are padded at the end.
    """
    padded = ceil_div(query_heads, tp_degree) * tp_degree
    group = query_heads // key_value_heads
    by_group = tp_degree % key_value_heads == 0
    if by_group:
        padded_group = padded // key_value_heads
        queries = tuple(
            slot // padded_group * group + slot % padded_group
            if slot % padded_group < group
            else None
            for slot in range(padded)
        )
    else:
        queries = tuple(slot if slot < query_heads else None for slot in range(padded))
    keys, copies = _key_value_slots(query_heads, key_value_heads, tp_degree, padded, by_group)
    return HeadLayout(
        tp_degree=tp_degree, query_slots=queries, key_value_slots=keys, key_value_copies=copies
    )


def _key_value_slots(
    query_heads: int, key_value_heads: int, tp_degree: int, padded: int, by_group: bool
) -> tuple[tuple[int | None, ...], int]:
    if query_heads == key_value_heads:
        target = padded
    elif key_value_heads % tp_degree == 0:
        target = key_value_heads
    else:
        target = tp_degree if by_group else padded
    if target == key_value_heads:
        return tuple(range(key_value_heads)), 1
    copies = tp_degree // key_value_heads if by_group else query_heads // key_value_heads
    filled = copies * key_value_heads
    return tuple(slot // copies if slot < filled else None for slot in range(target)), copies
