"""Attention of one token per slot, and of prompts, against softmax written out in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neuron_minimax import fp8
from neuron_minimax.fp8 import bfloat16
from neuron_minimax.kernels.cpu import operators
from neuron_minimax.kernels.cpu.operators import DENSE_DTYPES
from neuron_minimax.kernels.reference import SCALE_BYTES, as_cached

pytestmark = pytest.mark.usefixtures("kernels")

# Positions that are attended to together, and numbers of one and of two registers or more.
DEPTH, NARROW_STRIP, WIDE_STRIP = 128, 32, 64
# Absolute, for outputs of up to 6: twice the largest error that is found here; of bfloat16 that is
# rounding's.
ERROR = {torch.float32: 1e-5, torch.bfloat16: 2**-5}
ERROR_OF_PROMPT = {
    torch.float32: 2.8e-6,
    torch.bfloat16: 0.018,
}  # without one's own key it is 0.021 at least


# Of a cache in fewer bits; of bfloat16 the softmax's weights and the result are rounded.
OF_CACHE = {torch.float32: 1e-5, torch.bfloat16: 0.018}


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
    """Query, keys and values of a cache with two positions more; behind each slot's position
    nothing is a number.
    """
    generator = torch.Generator().manual_seed(0)
    query = 3 * torch.randn(slots, key_heads * group, size, generator=generator)
    keys, values = 2 * torch.randn(
        2, slots, key_heads, max(positions) + 3, size, generator=generator
    )
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
def test_one_token_attends_to_what_its_slot_has_filled(
    slots, key_heads, group, size, positions, dtype
):
    query, keys, values = random_case(slots, key_heads, group, size, positions, dtype)
    filled = max(positions) + 1
    cached = keys[:, :, :filled], values[:, :, :filled]
    found = operators.attend(query[:, None], *cached, torch.tensor(positions)[:, None])
    assert found.shape == (slots, 1, key_heads * group * size)
    assert found.dtype == dtype
    wanted = slow(query, keys, values, positions)
    assert np.abs(found[:, 0].double().numpy() - wanted).max() < ERROR[dtype]


@pytest.mark.parametrize("tokens", [1, 2])
def test_scores_far_apart_neither_overflow_nor_vanish(tokens):
    query, keys, values = random_case(1, 1, 4, WIDE_STRIP, [2 * DEPTH], torch.float32)
    positions = torch.arange(2 * DEPTH + 1 - tokens, 2 * DEPTH + 1)[None]
    for order in (1, -1):  # the largest score in the first positions, or in the last
        growing = 30 * torch.linspace(order, -order, keys.shape[2])[:, None] * query[0, 0]
        of_tokens = query[:, None].expand(-1, tokens, -1, -1)
        seen = growing[None, None, :-2], values[:, :, :-2]
        found = operators.attend(of_tokens, *seen, positions)
        wanted = slow(query, growing[None, None], values, [2 * DEPTH])
        assert (
            np.abs(found[:, -1].numpy() - wanted).max() < 6e-5
        )  # scores reach 2,000: float32's last place is 1e-4


def test_a_slot_behind_the_filled_positions_attends_to_nothing():
    query, keys, values = random_case(2, 2, 3, WIDE_STRIP, [4, 4], torch.float32)
    found = operators.attend(
        query[:, None], keys[:, :, :5], values[:, :, :5], torch.tensor([[5], [3]])
    )
    assert not found[0].any()
    assert (
        np.abs(found[1].numpy() - slow(query, keys, values, [0, 3])[1]).max() < ERROR[torch.float32]
    )


@pytest.mark.parametrize(
    ("dtype", "pairs"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
)
@pytest.mark.parametrize(
    "shape",  # slots, key heads, query heads of each, head_dim, first position, tokens
    [
        (1, 2, 6, DEPTH, 0, 40),
        (1, 1, 2, NARROW_STRIP, DEPTH - 1, 60),
        (2, 1, 5, 3 * NARROW_STRIP, 2 * DEPTH, 3),
        (1, 1, 100, NARROW_STRIP, 7, 2),
    ],
)
def test_each_token_of_a_prompt_attends_up_to_its_own_position(shape, dtype, pairs):
    slots, key_heads, group, size, start, tokens = shape
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(slots, tokens + 2, key_heads * group, size, generator=generator).to(dtype)
    keys, values = torch.randn(
        2, slots, key_heads, start + tokens + 5, size, generator=generator
    ).to(dtype)
    filled = start + tokens
    keys[:, :, filled:] = values[:, :, filled:] = torch.nan
    positions = torch.cat([start + torch.arange(tokens), torch.tensor([filled, 5000])]).expand(
        slots, -1
    )
    found = operators.attend(query, keys[:, :, :filled], values[:, :, :filled], positions, pairs)
    assert found.shape == (slots, tokens + 2, key_heads * group * size)
    assert found.dtype == dtype
    assert not found[:, tokens:].any(), "a token behind the filled positions attends to nothing"
    for token in range(tokens):
        wanted = slow(query[:, token], keys, values, [start + token] * slots)
        assert np.abs(found[:, token].double().numpy() - wanted).max() < ERROR_OF_PROMPT[dtype]


@pytest.mark.parametrize("tokens", [1, 60])
@pytest.mark.parametrize("team", [1, 3])
def test_the_number_of_threads_changes_nothing(team, tokens):
    query, keys, values = random_case(3, 2, 2, WIDE_STRIP, [69, 140, 67], torch.float32)
    positions = torch.tensor([[69], [140], [67]]) + torch.arange(1 - tokens, 1)
    arguments = (
        query[:, None].repeat(1, tokens, 1, 1),
        keys[:, :, :141],
        values[:, :, :141],
        positions,
    )
    wanted = operators.attend(*arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(team)
    try:
        assert torch.equal(operators.attend(*arguments), wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("tokens", [1, 2, 9])
@pytest.mark.parametrize("size", [1, 16, 80, 129, 160])
@pytest.mark.parametrize("dtype", DENSE_DTYPES)
def test_any_head_size_is_attended_with(tokens, size, dtype):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, tokens, 4, size, generator=generator).to(dtype)
    keys, values = torch.randn(2, 1, 2, 150, size, generator=generator).to(dtype)
    found = operators.attend(query, keys, values, torch.arange(150 - tokens, 150)[None])
    wanted = slow(query[:, -1], keys, values, [149])
    assert np.abs(found[:, -1].double().numpy() - wanted).max() < ERROR_OF_PROMPT[dtype]


@given(
    size=st.sampled_from([1, 16, 128]),
    exponent=st.integers(-44, 30),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_what_is_cached_is_rounded_once_with_a_scale_per_position_and_head(size, exponent, seed):
    chance = np.random.default_rng(seed)
    rows = (chance.normal(size=(2, 3, 5, size)) * 10.0**exponent).astype(np.float32)
    rows[0, 0, 0] = 0
    halves = as_cached(torch.from_numpy(rows), torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(halves, bfloat16.round_to_bfloat16(rows))
    stored = as_cached(torch.from_numpy(rows), torch.uint8).numpy()
    scale = np.abs(rows).max(-1, keepdims=True) / np.float32(448)
    scale = np.maximum(scale, np.float32(2**-126))
    assert np.array_equal(stored[..., :-SCALE_BYTES], fp8.encode(rows / scale))
    assert np.array_equal(stored[..., -SCALE_BYTES:].copy().view(np.float32), scale)


def values_of(stored):
    """Float64 of what `as_cached` has made."""
    if stored.dtype != torch.uint8:
        return stored.double()
    bytes_ = stored.numpy()
    scale = bytes_[..., -SCALE_BYTES:].copy().view(np.float32)
    return torch.from_numpy(fp8.decode(bytes_[..., :-SCALE_BYTES]).astype(np.float64) * scale)


@given(
    length=st.integers(1, 3 * DEPTH),
    tokens=st.sampled_from([1, 2, 9]),
    size=st.sampled_from([1, 40, 64, 128]),
    group=st.integers(1, 8),
    dtype=st.sampled_from([torch.bfloat16, torch.uint8]),
    compute=st.sampled_from(DENSE_DTYPES),
    magnitude=st.sampled_from([1.0, 1e-6, 1e-12, 1e12]),
)
@settings(max_examples=60, deadline=None)
def test_a_cache_in_fewer_bits_is_attended_to_as_it_is(
    length, tokens, size, group, dtype, compute, magnitude
):
    """Values may be of any magnitude, and the error is of theirs."""
    tokens = min(tokens, length)
    generator = torch.Generator().manual_seed(length)
    query = torch.randn(1, tokens, 2 * group, size, generator=generator).to(compute)
    keys, values = (
        as_cached(scaling * torch.randn(1, 2, length + 3, size, generator=generator), dtype)
        for scaling in (1, magnitude)
    )
    keys[:, :, length:] = values[:, :, length:] = 0x7F if dtype == torch.uint8 else torch.nan
    positions = torch.arange(length - tokens, length)[None]
    found = operators.attend(query, keys[:, :, :length], values[:, :, :length], positions)
    wide = values_of(keys), values_of(values)
    for token in range(tokens):
        wanted = slow(query[:, token], *wide, [length - tokens + token])
        off = np.abs(found[:, token].double().numpy() - wanted).max()
        assert off < magnitude * OF_CACHE[compute]


def test_keys_and_values_that_lie_differently_are_refused():
    query, keys, values = random_case(1, 2, 2, WIDE_STRIP, [6], torch.float32)
    for other in (values.transpose(1, 2).contiguous().transpose(1, 2), values.bfloat16()):
        with pytest.raises(ValueError, match="expected the same of both"):
            operators.attend(query[:, None], keys, other, torch.tensor([[6]]))


def test_no_tokens_and_no_sequences_are_attended_with():
    keys = torch.randn(2, 2, 5, WIDE_STRIP)
    for batch, tokens in ((2, 0), (0, 3)):
        query = torch.randn(batch, tokens, 4, WIDE_STRIP)
        positions = torch.zeros(batch, tokens, dtype=torch.int64)
        found = operators.attend(query, keys[:batch], keys[:batch], positions)
        assert found.shape == (batch, tokens, 4 * WIDE_STRIP)


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_position_before_the_first_attends_to_nothing(tokens):
    query, keys = torch.randn(1, tokens, 4, WIDE_STRIP), torch.randn(1, 2, 5, WIDE_STRIP)
    found = operators.attend(query, keys, keys, torch.full((1, tokens), -3))
    assert torch.equal(found, torch.zeros(1, tokens, 4 * WIDE_STRIP))


@pytest.mark.parametrize(
    ("heads", "sequences", "positions"), [(3, 1, (1, 2)), (4, 2, (1, 2)), (4, 1, (1, 1))]
)
def test_what_kernels_would_read_beside_is_refused(heads, sequences, positions):
    query, keys = torch.randn(1, 2, heads, WIDE_STRIP), torch.randn(sequences, 2, 5, WIDE_STRIP)
    with pytest.raises(ValueError, match=r"expected those of 1 sequences of 2 tokens, .* divide"):
        operators.attend(query, keys, keys, torch.zeros(positions, dtype=torch.int64))
