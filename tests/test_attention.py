"""Attention of one token per slot, by torch and by Numba's loops, against softmax written out in float64."""

import numpy as np
import pytest
import torch

from neuron_minimax.kernels import attention, operators
from neuron_minimax.kernels.operators import DENSE_DTYPES, QUERIES
from neuron_minimax.kernels.tiles import DEPTH, WIDE_STRIP

# Absolute, for outputs of up to 6: twice the largest error that is found here; of bfloat16 that is rounding's.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
ERROR_OF_PROMPT = {torch.float32: 8e-7, torch.bfloat16: 0.013}  # without one's own key it is 0.019


def slow(query_SND, keys_SKCD, values_SKCD, positions_S):
    query, keys, values = (each.double().numpy() for each in (query_SND, keys_SKCD, values_SKCD))
    out = np.zeros_like(query)
    group = query.shape[1] // keys.shape[1]
    for slot, position in enumerate(positions_S):
        for head in range(query.shape[1]):
            seen = slice(0, position + 1)
            scores = keys[slot, head // group, seen] @ query[slot, head] / np.sqrt(query.shape[2])
            weights = np.exp(scores - scores.max())
            out[slot, head] = weights / weights.sum() @ values[slot, head // group, seen]
    return out.reshape(len(query), -1)


def random_case(slots, key_heads, group, size, positions, dtype):
    """Query, keys and values of a cache with two positions more; behind each slot's position nothing is a number."""
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(slots, key_heads * group, size, generator=generator)
    keys, values = 2 * torch.randn(2, slots, key_heads, max(positions) + 3, size, generator=generator)
    for slot, position in enumerate(positions):
        keys[slot, :, position + 1 :] = values[slot, :, position + 1 :] = torch.nan
    return [each.to(dtype) for each in (query, keys, values)]


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
@pytest.mark.parametrize(
    ("slots", "key_heads", "group", "size", "positions"),
    [
        (1, 8, 6, 2 * WIDE_STRIP, [87]),
        (3, 2, 1, WIDE_STRIP, [0, 4, 2]),
        (2, 1, 7, 2 * WIDE_STRIP, [DEPTH - 1, DEPTH]),
        (1, 1, 13, 3 * WIDE_STRIP, [2 * DEPTH + 5]),
    ],
)
def test_one_token_attends_to_what_its_slot_has_filled(slots, key_heads, group, size, positions, dtype):
    query, keys, values = random_case(slots, key_heads, group, size, positions, dtype)
    filled = max(positions) + 1
    cached = keys[:, :, :filled], values[:, :, :filled]
    found = operators.attend(query[:, None], *cached, torch.tensor(positions)[:, None])
    assert found.shape == (slots, 1, key_heads * group * size)
    assert found.dtype == dtype
    wanted = slow(query, keys, values, positions)
    assert np.abs(found[:, 0].double().numpy() - wanted).max() < ERROR[dtype]


def test_scores_far_apart_neither_overflow_nor_vanish():
    query, keys, values = random_case(1, 1, 4, WIDE_STRIP, [2 * DEPTH], torch.float32)
    for order in (1, -1):  # the largest score in the first positions, or in the last
        growing = 30 * torch.linspace(order, -order, keys.shape[2])[:, None] * query[0, 0]
        found = operators.attend(query[:, None], growing[None, None], values[:, :, :-2], torch.tensor([[2 * DEPTH]]))
        wanted = slow(query, growing[None, None], values, [2 * DEPTH])
        assert np.abs(found[:, 0].numpy() - wanted).max() < 6e-5  # scores reach 2,000: float32's last place is 1e-4


def test_a_slot_behind_the_filled_positions_attends_to_nothing():
    query, keys, values = random_case(2, 2, 3, WIDE_STRIP, [4, 4], torch.float32)
    found = operators.attend(query[:, None], keys[:, :, :5], values[:, :, :5], torch.tensor([[5], [3]]))
    assert not found[0].any()
    assert np.abs(found[1].numpy() - slow(query, keys, values, [0, 3])[1]).max() < ERROR[torch.float32]


@pytest.mark.parametrize("dtype", DENSE_DTYPES)
@pytest.mark.parametrize("start", [0, 7])
def test_a_prompt_attends_in_parts_as_in_one(start, dtype):
    tokens, padding = QUERIES + 9, 5
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, tokens + padding, 4, WIDE_STRIP, generator=generator).to(dtype)
    keys, values = torch.randn(2, 1, 2, start + tokens, WIDE_STRIP, generator=generator).to(dtype)
    positions = torch.cat([start + torch.arange(tokens), torch.full((padding,), 1000)])[None]
    found = operators.attend(query, keys, values, positions)
    assert found.shape == (1, tokens + padding, 4 * WIDE_STRIP)
    assert found.dtype == dtype
    for token in (0, 1, QUERIES - 1, QUERIES, tokens - 1):
        wanted = slow(query[:, token], keys, values, [start + token])
        assert np.abs(found[:, token].double().numpy() - wanted).max() < ERROR_OF_PROMPT[dtype]


@pytest.mark.parametrize("team", [1, 3])
def test_the_number_of_threads_changes_nothing(team):
    query, keys, values = random_case(3, 2, 2, WIDE_STRIP, [9, 40, 7], torch.float32)
    arguments = query[:, None], keys[:, :, :41], values[:, :, :41], torch.tensor([[9], [40], [7]])
    wanted, before = operators.attend(*arguments), torch.get_num_threads()
    torch.set_num_threads(team)
    try:
        assert torch.equal(operators.attend(*arguments), wanted)
    finally:
        torch.set_num_threads(before)


def test_several_tokens_and_odd_head_sizes_are_left_to_torch():
    generator = torch.Generator().manual_seed(0)
    for tokens, size in ((2, WIDE_STRIP), (1, 20)):
        query = torch.randn(1, tokens, 4, size, generator=generator)
        keys, values = torch.randn(2, 1, 2, 6, size, generator=generator)
        positions = torch.arange(6 - tokens, 6)[None]
        assert torch.equal(
            operators.attend(query, keys, values, positions), attention.attend(query, keys, values, positions)
        )
        wanted = slow(query[:, -1], keys, values, [5])
        assert np.abs(attention.attend(query, keys, values, positions)[:, -1].numpy() - wanted).max() < 4e-7


def test_keys_and_values_that_lie_differently_are_refused():
    query, keys, values = random_case(1, 2, 2, WIDE_STRIP, [6], torch.float32)
    for other in (values.transpose(1, 2).contiguous().transpose(1, 2), values.bfloat16()):
        with pytest.raises(ValueError, match="expected the same of both"):
            operators.attend(query[:, None], keys, other, torch.tensor([[6]]))
