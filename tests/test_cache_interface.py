"""`logits, cache = model(ids, past_key_values=cache, use_cache=True)`: every kind of cache and mask
against transformers' Qwen2ForCausalLM in float32, on the same random weights.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, StaticCache

from neuron_minimax.checkpoint.reader import Checkpoint
from neuron_minimax.errors import GenerationError
from neuron_minimax.kernels.reference import attend
from neuron_minimax.model.cache import BatchingCache, Cache, FullCache, KVCache, LayerCache
from neuron_minimax.model.decoder import Decoder
from neuron_minimax.model.masks import causal_mask
from tests.tiny import write_tiny

TOLERANCE = 1.5e-5  # Measured: at most 4e-6, for logits of size 4.
VOCABULARY = 151
# Three query heads to a key head, of an odd number of channel pairs.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 84,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
KINDS = ["KVCache", "FullCache", "BatchingCache", "DynamicCache"]


@dataclass
class Qwen2:
    """The decoder, and transformers' model with the same weights."""

    ours: Decoder
    theirs: torch.nn.Module

    def empty(self, kind: str, sequences: int, capacity: int = 32):
        """An empty cache; of a KVCache's first capacity little is left, so that it grows."""
        if kind == "DynamicCache":
            return DynamicCache()
        if kind == "KVCache":
            return KVCache.allocate(self.ours.config, sequences, 4)
        if kind == "FullCache":
            return FullCache.allocate(self.ours.config, sequences, capacity)
        cache = BatchingCache.allocate(self.ours.config, sequences + 1, 4)
        for _ in range(sequences):
            cache.join()
        return cache

    def wanted(self, ids: torch.Tensor, **words) -> torch.Tensor:
        return self.theirs(ids, use_cache=False, **words).logits


def written(directory, family: str = "qwen2", **fields) -> Qwen2:
    checkpoint = Checkpoint(write_tiny(directory / "published", family=family, **fields))
    dense = write_tiny(directory / "dense", dense=True, family=family, **fields)
    model = AutoModelForCausalLM.from_pretrained(
        dense, dtype=torch.float32, experts_implementation="eager"
    )
    return Qwen2(Decoder.from_checkpoint(checkpoint), model.float().eval())


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    return written(tmp_path_factory.mktemp("untied"), **SIZES)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return written(tmp_path_factory.mktemp("tied"), **SIZES, tie_word_embeddings=True)


@pytest.fixture(params=["qwen2", "tied"])
def either(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def some_ids(rows: int, tokens: int, seed: int = 5) -> torch.Tensor:
    return torch.randint(
        0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed)
    )


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def held(cache, layers: int) -> list[torch.Tensor]:
    """Copies of what a cache holds: keys and values of every layer and sequence."""
    if isinstance(cache, DynamicCache):
        return [
            tensor[row].clone()
            for layer in cache.layers
            for row in range(len(layer.keys))
            for tensor in (layer.keys, layer.values)
        ]
    return [
        tensors[0].clone()
        for layer in range(layers)
        for row, length in enumerate(cache.lengths.tolist())
        for tensors in cache.read(layer, torch.tensor([row]), length)
    ]


# Basic


def test_basic_logits_are_those_of_transformers_and_no_cache_is_made_unasked(either):
    ids = some_ids(2, 11)
    wanted = either.wanted(ids)
    assert wanted.std() > 0.3, "logits that are all alike show nothing"
    logits, none = either.ours(ids)
    assert none is None
    assert_near(logits, wanted)


def test_basic_the_first_cache_holds_what_transformers_holds(either):
    ids = some_ids(2, 11)
    logits, cache = either.ours(ids, use_cache=True)
    theirs = either.theirs(ids, use_cache=True)
    assert_near(logits, theirs.logits)
    assert type(cache) is KVCache
    assert cache.lengths.tolist() == [11, 11]
    for layer, expected in enumerate(theirs.cache.layers):
        keys, values = cache.read(layer, None, 11)
        assert_near(keys, expected.keys)
        assert_near(values, expected.values)


@pytest.mark.parametrize("kind", KINDS)
def test_basic_a_given_cache_is_extended_and_returned_itself(qwen2, kind):
    ids = some_ids(2, 9)
    empty = qwen2.empty(kind, 2)
    logits, cache = qwen2.ours(ids, past_key_values=empty, use_cache=True)
    assert cache is empty
    assert_near(logits, qwen2.wanted(ids))
    layers = qwen2.ours.config.num_hidden_layers
    theirs = held(qwen2.theirs(ids, use_cache=True).cache, layers)
    assert len(theirs) == layers * 2 * 2
    for found, expected in zip(held(cache, layers), theirs, strict=True):
        assert_near(found, expected)


@pytest.mark.parametrize("sequences", [1, 3])
@pytest.mark.parametrize("positions", [7, 40])
def test_basic_what_a_full_cache_takes_is_the_formula(qwen2, sequences, positions):
    config = qwen2.ours.config
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = FullCache.allocate(config, sequences, positions, dtype)
        formula = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        assert cache.nbytes == formula * sequences * positions * size
    qwen2.ours(some_ids(sequences, 7), cache := FullCache.allocate(config, sequences, positions))
    assert cache.nbytes == formula * sequences * positions * 4


# Incremental


@pytest.mark.parametrize("kind", KINDS)
def test_incremental_passes_give_the_logits_of_one_however_they_are_cut(either, kind):
    ids = some_ids(2, 24)
    wanted = either.wanted(ids)
    for cut in ([1] * 24, [7, 1, 1, 15], [24], [3, 20, 1]):
        cache = either.empty(kind, 2)
        parts = []
        for piece in ids.split(cut, dim=1):
            logits, same = either.ours(piece, past_key_values=cache, use_cache=True)
            assert same is cache
            parts.append(logits)
        assert_near(torch.cat(parts, dim=1), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_incremental_greedy_tokens_are_those_that_transformers_generates(qwen2, kind):
    prompt = some_ids(2, 5)
    wanted = qwen2.theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens = [prompt]
    cache = qwen2.empty(kind, 2)
    for _ in range(16):
        logits, cache = qwen2.ours(tokens[-1], past_key_values=cache, use_cache=True)
        tokens.append(logits[:, -1:].argmax(-1))
    assert torch.equal(torch.cat(tokens, dim=1), wanted)


@pytest.mark.parametrize("kind", ["KVCache", "FullCache", "BatchingCache"])
def test_incremental_sequences_of_unequal_lengths_give_what_each_gives_alone(either, kind):
    sequences = [[], [], []]
    cache = either.empty(kind, 3, capacity=12)
    # Chunks of a prompt, padded on the right; a sequence may sit out. The longest ends as full.
    for seed, real in enumerate(([3, 9, 6], [4, 0, 2], [1, 1, 1], [0, 2, 3])):
        ids = some_ids(3, max(real), seed)
        lengths = torch.tensor(real)
        logits, cache = either.ours(ids, past_key_values=cache, lengths=lengths)
        for row, count in enumerate(real):
            sequences[row] += ids[row, :count].tolist()
            wanted = either.wanted(torch.tensor([sequences[row]]))[0]
            assert_near(logits[row, :count], wanted[len(wanted) - count :])
    assert cache.lengths.tolist() == [len(sequence) for sequence in sequences] == [8, 12, 12]


def test_incremental_sequences_join_and_leave_a_batch_and_give_what_each_gives_alone(qwen2):
    batch = BatchingCache.allocate(qwen2.ours.config, 3, 8)
    written = {}

    def join(seed: int, length: int, kind: str) -> int:
        """A prompt that was filled in a cache of its own, as the second of two."""
        ids = some_ids(2, length, seed)
        _, alone = qwen2.ours(ids, past_key_values=qwen2.empty(kind, 2))
        number = batch.join(alone, row=1)
        written[number] = ids[1].tolist()
        return number

    def step(seed: int) -> None:
        ids = some_ids(len(batch.sequences), 1, seed)
        logits, same = qwen2.ours(ids, past_key_values=batch, use_cache=True)
        assert same is batch
        for row, number in enumerate(batch.sequences):
            written[number].append(int(ids[row, 0]))
            assert_near(logits[row, 0], qwen2.wanted(torch.tensor([written[number]]))[0, -1])

    first = join(10, 3, "KVCache")
    step(20)
    second = join(11, 11, "DynamicCache")  # longer than the first capacity
    third = join(12, 5, "FullCache")
    step(21)
    batch.leave(first)
    assert batch.sequences == [second, third]
    step(22)
    fourth = join(13, 6, "BatchingCache")
    step(23)
    batch.leave(third)
    step(24)
    fifth = batch.join()
    written[fifth] = []
    step(25)
    assert batch.sequences == [second, fourth, fifth]
    assert len({first, second, third, fourth, fifth}) == 5
    assert batch.lengths.tolist() == [len(written[number]) for number in batch.sequences]
    with pytest.raises(GenerationError, match="all 3 slots of the BatchingCache are taken"):
        batch.join()
    with pytest.raises(GenerationError, match=rf"sequence {third} is not in .* \[1, 3, 4\]"):
        batch.leave(third)
    for number in batch.sequences.copy():
        batch.leave(number)
    assert batch.sequences == batch.lengths.tolist() == []


def test_incremental_a_sequence_that_is_copied_goes_on_in_two_ways(qwen2):
    batch = BatchingCache.allocate(qwen2.ours.config, 2, 2)
    batch.join()
    ids = some_ids(1, 5)
    qwen2.ours(ids, batch)
    batch.join(batch, row=0)
    following = some_ids(2, 3, seed=1)
    logits, _ = qwen2.ours(following, batch)
    for row in range(2):
        alone = torch.cat((ids[0], following[row]))[None]
        assert_near(logits[row], qwen2.wanted(alone)[0, 5:])


def test_incremental_a_sequence_joins_only_what_is_of_its_model(qwen2):
    batch = BatchingCache.allocate(qwen2.ours.config, 2, 8)
    _, two = qwen2.ours(some_ids(2, 4), use_cache=True)
    with pytest.raises(GenerationError, match="row 2 is not in the cache, which holds 2 sequences"):
        batch.join(two, row=2)
    low = KVCache.allocate(qwen2.ours.config, 1, 8, torch.bfloat16)
    with pytest.raises(GenerationError, match=r"in bfloat16, but .* in float32 are expected"):
        batch.join(low)
    with pytest.raises(GenerationError, match="row 0 is not in the cache, which holds 0 sequences"):
        batch.join(DynamicCache())
    assert batch.sequences == []


# Consistency


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_a_cache_and_none_give_the_same_tokens(either, kind):
    prompt = some_ids(2, 6, seed=8)
    whole = prompt
    cache = either.empty(kind, 2)
    piece = prompt
    for _ in range(12):
        without, _ = either.ours(whole)
        logits, cache = either.ours(piece, past_key_values=cache, use_cache=True)
        assert_near(logits[:, -1], without[:, -1])
        piece = logits[:, -1:].argmax(-1)
        assert torch.equal(piece, without[:, -1:].argmax(-1))
        whole = torch.cat((whole, piece), dim=1)


def test_consistency_a_cache_of_transformers_continues_here_and_ours_there(either):
    ids = some_ids(2, 20)
    wanted = either.wanted(ids)
    for first, second in ((either.theirs, either.ours), (either.ours, either.theirs)):
        cache = DynamicCache()
        parts = []
        # To and fro, several times: each extends the very cache that the other did.
        for turn, piece in enumerate(ids.split([6, 1, 5, 1, 1, 6], dim=1)):
            model = (first, second)[turn % 2]
            if model is either.theirs:
                made = model(piece, cache=cache, use_cache=True)
                parts.append(made.logits)
            else:
                logits, same = model(piece, past_key_values=cache, use_cache=True)
                assert same is cache
                parts.append(logits)
        assert cache.get_seq_length() == 20
        assert_near(torch.cat(parts, dim=1), wanted)


def test_consistency_a_cache_that_transformers_made_for_its_config_continues_here(qwen2):
    ids = some_ids(2, 9)
    theirs = qwen2.theirs(ids[:, :8], use_cache=True).cache
    logits, same = qwen2.ours(ids[:, 8:], past_key_values=theirs, use_cache=True)
    assert same is theirs
    assert_near(logits, qwen2.wanted(ids)[:, 8:])


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_a_pass_without_the_cache_reads_the_past_and_leaves_it(qwen2, kind):
    ids = some_ids(2, 12)
    layers = qwen2.ours.config.num_hidden_layers
    _, cache = qwen2.ours(ids[:, :8], past_key_values=qwen2.empty(kind, 2))
    before = held(cache, layers)
    for seed in (1, 2):
        other = some_ids(2, 5, seed)
        logits, none = qwen2.ours(other, past_key_values=cache, use_cache=False)
        assert none is None
        assert_near(logits, qwen2.wanted(torch.cat((ids[:, :8], other), dim=1))[:, 8:])
    assert all(map(torch.equal, held(cache, layers), before))
    logits, _ = qwen2.ours(ids[:, 8:], past_key_values=cache, use_cache=True)
    assert_near(logits, qwen2.wanted(ids)[:, 8:])


def test_consistency_a_dynamic_cache_that_is_empty_again_takes_any_batch(qwen2):
    for cache in (DynamicCache(), DynamicCache(config=qwen2.theirs.config)):
        qwen2.ours(some_ids(2, 5), cache, use_cache=False)
        assert cache.get_seq_length() == 0
        ids = some_ids(3, 5)
        logits, _ = qwen2.ours(ids, cache)
        theirs = qwen2.theirs(ids[:, :1], cache=cache).logits
        assert_near(torch.cat((logits, theirs), dim=1), qwen2.wanted(ids[:, [0, 1, 2, 3, 4, 0]]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("filled", [0, 8])
def test_consistency_a_pass_that_fails_leaves_the_cache_as_it_was(qwen2, kind, filled, monkeypatch):
    ids = some_ids(2, 12)
    cache = qwen2.empty(kind, 2)
    if filled:
        qwen2.ours(ids[:, :filled], past_key_values=cache)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(qwen2.ours.layers[-1], "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            qwen2.ours(ids[:, filled:], past_key_values=cache)
    logits, _ = qwen2.ours(ids[:, filled:], past_key_values=cache)
    assert_near(logits, qwen2.wanted(ids)[:, filled:])


# Masks and positions


def causal(tokens: int, positions: int) -> torch.Tensor:
    return torch.ones(positions, positions, dtype=torch.bool).tril()[positions - tokens :]


def added(mask: torch.Tensor, hidden: float) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_a_causal_mask_in_any_form_is_the_word_causal(qwen2, kind):
    ids = some_ids(2, 12)
    layers = qwen2.ours.config.num_hidden_layers
    wanted, cache = qwen2.ours(ids[:, :7], past_key_values=qwen2.empty(kind, 2))
    wanted_next, _ = qwen2.ours(ids[:, 7:], past_key_values=cache)
    for form in (
        lambda mask: mask,
        lambda mask: mask.expand(2, *mask.shape),
        lambda mask: added(mask, -torch.inf),
        lambda mask: added(mask, torch.finfo(torch.float32).min).expand(2, *mask.shape),
    ):
        empty = qwen2.empty(kind, 2)
        logits, again = qwen2.ours(ids[:, :7], empty, use_cache=True, mask=form(causal(7, 7)))
        assert torch.equal(logits, wanted)
        logits, again = qwen2.ours(ids[:, 7:], again, use_cache=True, mask=form(causal(5, 12)))
        assert torch.equal(logits, wanted_next)
        assert all(map(torch.equal, held(again, layers), held(cache, layers)))


def test_consistency_a_mask_of_floats_is_taken_in_any_precision(qwen2):
    low = Decoder(qwen2.ours.config, qwen2.ours.state_dict(), compute=torch.bfloat16)
    ids = some_ids(2, 6)
    wanted, _ = low(ids)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        mask = added(causal(6, 6), -torch.inf).to(dtype)
        assert torch.equal(low(ids, mask=mask)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_consistency_a_mask_of_ones_own_is_what_transformers_makes_of_it(qwen2, dtype):
    """A prefix that sees itself in both directions, a window, and scores that are raised."""
    ids = some_ids(2, 10)
    mask = causal(10, 10).repeat(2, 1, 1)
    mask[0, :4, :4] = True
    mask[1] &= ~causal(10, 10).roll(3, dims=1).tril(-3)
    if dtype == torch.float32:
        bias = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
        mask = torch.where(mask, bias, -torch.inf)
    wanted = qwen2.wanted(ids, attention_mask=mask[:, None])
    assert_near(qwen2.ours(ids, mask=mask)[0], wanted)
    assert (qwen2.ours(ids)[0] - wanted).abs().max() > 0.1, "a mask that changes nothing"
    for kind in KINDS:
        cache = qwen2.empty(kind, 2)
        first, _ = qwen2.ours(ids[:, :4], cache, mask=mask[:, :4, :4])
        second, _ = qwen2.ours(ids[:, 4:], cache, mask=mask[:, 4:])
        assert_near(torch.cat((first, second), dim=1), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_padding_on_the_left_is_hidden_by_a_mask(qwen2, kind):
    ids = some_ids(3, 14)
    attention_mask = torch.ones(3, 14, dtype=torch.int64)
    attention_mask[0, :5] = 0
    attention_mask[2, :2] = 0
    wanted = qwen2.wanted(ids, attention_mask=attention_mask)
    cache = qwen2.empty(kind, 3)
    parts = []
    filled = 0
    for piece in ids.split([8, 1, 1, 4], dim=1):
        filled += piece.shape[1]
        mask = causal_mask(attention_mask[:, :filled], piece.shape[1])
        logits, cache = qwen2.ours(piece, past_key_values=cache, use_cache=True, mask=mask)
        parts.append(logits)
    logits = torch.cat(parts, dim=1)
    for row, padding in enumerate([5, 0, 2]):
        assert_near(logits[row, padding:], wanted[row, padding:])
        # Without padding positions are smaller; RoPE sees their distances alone.
        assert_near(logits[row, padding:], qwen2.wanted(ids[row : row + 1, padding:])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_padding_on_the_right_is_hidden_by_a_mask_and_position_ids(qwen2, kind):
    ids = some_ids(2, 8)
    attention_mask = torch.ones(2, 8, dtype=torch.int64)
    attention_mask[0, 3:] = 0
    cache = qwen2.empty(kind, 2)
    logits, _ = qwen2.ours(ids, cache, mask=causal_mask(attention_mask, 8))
    assert_near(logits[0, :3], qwen2.wanted(ids[:1, :3])[0])
    assert_near(logits[1], qwen2.wanted(ids[1:])[0])
    # The padding stays in the cache: its places are hidden, and what follows is nearer than they.
    following = some_ids(2, 2, seed=6)
    attention_mask = torch.nn.functional.pad(attention_mask, (0, 2), value=1)
    logits, _ = qwen2.ours(
        following,
        cache,
        mask=causal_mask(attention_mask, 2),
        position_ids=torch.tensor([[3, 4], [8, 9]]),
    )
    for row, length in enumerate([3, 8]):
        alone = torch.cat((ids[row, :length], following[row]))[None]
        assert_near(logits[row], qwen2.wanted(alone)[0, length:])


def test_consistency_a_padded_cache_that_transformers_generated_continues_here(qwen2):
    """`generate` counts positions without the padding on the left."""
    ids = some_ids(2, 7)
    attention_mask = torch.ones(2, 7, dtype=torch.int64)
    attention_mask[0, :4] = 0
    words = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = qwen2.theirs.generate(ids, attention_mask=attention_mask, max_new_tokens=12, **words)
    begun = qwen2.theirs.generate(
        ids,
        attention_mask=attention_mask,
        max_new_tokens=4,
        return_dict_in_generate=True,
        **words,
    )
    tokens = begun.sequences
    cache = begun.cache
    while tokens.shape[1] < wanted.shape[1]:
        attention_mask = torch.nn.functional.pad(
            attention_mask, (0, tokens.shape[1] - attention_mask.shape[1]), value=1
        )
        logits, cache = qwen2.ours(
            tokens[:, -1:],
            past_key_values=cache,
            use_cache=True,
            mask=causal_mask(attention_mask, 1),
            position_ids=attention_mask.cumsum(1)[:, -1:] - 1,
        )
        alone = qwen2.wanted(tokens[:1, 4:])
        assert_near(logits[0, -1], alone[0, -1])
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), dim=1)
    assert torch.equal(tokens, wanted)


def test_consistency_a_mask_never_shows_what_a_shorter_sequence_does_not_hold(qwen2):
    """Nor the padding on the right that `lengths` names."""
    ids = some_ids(2, 9)
    lengths = torch.tensor([4, 9])
    everything = torch.ones(9, 9, dtype=torch.bool)
    cache = qwen2.empty("KVCache", 2)
    cache.keys[0][0, :, :4] = 50.0  # whatever lay there before
    logits, _ = qwen2.ours(ids, cache, lengths=lengths, mask=everything)
    for row, length in enumerate(lengths.tolist()):
        both_ways = torch.ones(1, 1, length, length, dtype=torch.bool)
        wanted = qwen2.wanted(ids[row : row + 1, :length], attention_mask=both_ways)
        assert_near(logits[row, :length], wanted[0])
    following = some_ids(2, 1)
    logits, _ = qwen2.ours(following, cache, mask=torch.ones(1, 10, dtype=torch.bool))
    assert cache.lengths.tolist() == [5, 10]
    for row, length in enumerate(lengths.tolist()):
        mask = torch.ones(1, 1, length + 1, length + 1, dtype=torch.bool)
        mask[..., :length, length] = False
        alone = torch.cat((ids[row, :length], following[row]))[None]
        assert_near(logits[row, 0], qwen2.wanted(alone, attention_mask=mask)[0, -1])


def test_consistency_padding_may_see_nothing_and_leaves_finite_numbers(qwen2):
    """`lengths` names it; in a FullCache it may stand behind the last position, too."""
    ids = some_ids(2, 6)
    lengths = torch.tensor([2, 6])
    real = torch.arange(6) < lengths[:, None]
    for cache in (KVCache.allocate(qwen2.ours.config, 2, 8), qwen2.empty("FullCache", 2, 8)):
        for form in (lambda mask: mask, lambda mask: added(mask, -torch.inf)):
            cache.lengths = torch.zeros(2, dtype=torch.int64)
            mask = causal(6, 6) & real[:, :, None]
            qwen2.ours(ids, cache, lengths=lengths, mask=form(mask))
            assert all(tensor.isfinite().all() for tensor in cache.keys + cache.values)
            # Four more tokens of the first, two of the second: in all six and eight.
            following = some_ids(2, 4, seed=1)
            more = torch.tensor([4, 2])
            filled = 10 if type(cache) is KVCache else 8
            mask = torch.arange(filled) <= (lengths[:, None] + torch.arange(4))[:, :, None]
            mask &= (torch.arange(4) < more[:, None])[:, :, None]
            logits, _ = qwen2.ours(following, cache, lengths=more, mask=form(mask))
            assert cache.lengths.tolist() == [6, 8]
            for row, (old, new) in enumerate([(2, 4), (6, 2)]):
                alone = torch.cat((ids[row, :old], following[row, :new]))[None]
                assert_near(logits[row, :new], qwen2.wanted(alone)[0, old:])


@pytest.mark.parametrize("family", ["minimax_m2", "qwen3_moe", "qwen3"])
def test_consistency_other_families_take_the_same_caches_and_masks(tmp_path, family):
    model = written(tmp_path, family)
    ids = some_ids(2, 9)
    attention_mask = torch.ones(2, 9, dtype=torch.int64)
    attention_mask[1, :3] = 0
    wanted = model.wanted(ids, attention_mask=attention_mask)
    for kind in KINDS:
        cache = model.empty(kind, 2)
        begun, _ = model.ours(ids[:, :5], cache, mask=causal_mask(attention_mask[:, :5], 5))
        if kind == "DynamicCache":
            mask = {"attention_mask": attention_mask[:, :7]}
            continued = model.theirs(ids[:, 5:7], cache=cache, **mask).logits
        else:
            mask = causal_mask(attention_mask[:, :7], 2)
            continued, _ = model.ours(ids[:, 5:7], cache, mask=mask)
        ended, _ = model.ours(ids[:, 7:], cache, mask=causal_mask(attention_mask, 2))
        logits = torch.cat((begun, continued, ended), dim=1)
        assert_near(logits[0], wanted[0])
        assert_near(logits[1, 3:], wanted[1, 3:])


def test_attention_with_a_mask_is_the_sum_written_out():
    """One query at a time; and its gradient reaches floats that are added."""
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(2, 3, 4, 8, generator=generator)
    keys, values = torch.randn(2, 2, 2, 5, 8, generator=generator)
    positions = torch.tensor([[2, 3, 4], [0, 1, 2]])
    for mask in (torch.rand(2, 3, 5, generator=generator) > 0.4, torch.randn(2, 3, 5)):
        if mask.dtype == torch.bool:
            mask[:, :, 0] = True
        bias = mask if mask.is_floating_point() else added(mask, -torch.inf)
        found = attend(query, keys, values, positions, mask).view(2, 3, 4, 8)
        for row in range(2):
            for token in range(3):
                for head in range(4):
                    scores = keys[row, head // 2] @ query[row, token, head] / 8**0.5
                    weights = (scores + bias[row, token]).softmax(-1)
                    wanted = weights @ values[row, head // 2]
                    torch.testing.assert_close(found[row, token, head], wanted)
    with torch.enable_grad():
        leaf = mask.requires_grad_()
        attend(query, keys, values, positions, leaf).square().sum().backward()
    assert leaf.grad.abs().min() > 0


# Backward compatibility


def test_backward_compatibility_calls_without_a_cache_are_what_they_were(either):
    ids = some_ids(3, 10)
    logits, none = either.ours(ids)
    assert none is None
    for words in ({"use_cache": False}, {"past_key_values": None}, {"mask": "causal"}):
        again, none = either.ours(ids, **words)
        assert none is None
        assert torch.equal(again, logits)
    lengths = torch.tensor([2, 10, 7])
    padded, none, routing = either.ours(ids, lengths=lengths, return_routing=True)
    assert none is None
    assert routing == []
    for row, length in enumerate(lengths.tolist()):
        assert_near(padded[row, :length], either.wanted(ids[row : row + 1, :length])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_backward_compatibility_a_past_by_its_place_is_extended_without_more_words(either, kind):
    ids = some_ids(2, 10)
    logits, cache = either.ours(ids[:, :9], either.empty(kind, 2))
    logits, same = either.ours(ids[:, 9:], cache)
    assert same is cache
    assert_near(logits, either.wanted(ids)[:, 9:])


def test_backward_compatibility_a_smaller_length_shortens_a_sequence(qwen2):
    ids = some_ids(2, 10)
    for kind in ("KVCache", "FullCache", "BatchingCache"):
        _, cache = qwen2.ours(ids, qwen2.empty(kind, 2))
        cache.lengths = torch.tensor([6, 9])
        following = some_ids(2, 1, seed=9)
        logits, _ = qwen2.ours(following, cache)
        for row, length in enumerate([6, 9]):
            alone = torch.cat((ids[row, :length], following[row]))[None]
            assert_near(logits[row, 0], qwen2.wanted(alone)[0, -1])
    _, cache = qwen2.ours(ids, DynamicCache())
    cache.crop(-3)
    assert_near(qwen2.ours(ids[:, 7:], cache)[0], qwen2.wanted(ids)[:, 7:])


def test_backward_compatibility_the_documented_calls_give_what_the_documentation_says(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_tiny(Path("Qwen2.5-0.5B"), family="qwen2", vocab_size=10_000)
    text = (Path(__file__).parents[1] / "docs" / "cache.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names = {}
    exec(compile(first, "cache.md", "exec"), names)
    assert type(names["cache"]) is KVCache
    assert names["cache"].lengths.tolist() == [6]
    assert names["logits"].shape == (1, 5, 10_000)
    exec(compile(second, "cache.md", "exec"), names)
    assert names["batch"].sequences == [names["second"]]
    whole, _ = names["model"](torch.tensor([[3838, 374, 264, 4285]]))
    assert_near(names["logits"][0, -1], whole[0, -1])


# What is refused: by one message, and nothing is changed


def sliding() -> DynamicCache:
    config = Qwen2Config(
        num_hidden_layers=3, use_sliding_window=True, sliding_window=4, max_window_layers=1
    )
    return DynamicCache(config=config)


def uneven(qwen2: Qwen2) -> DynamicCache:
    _, cache = qwen2.ours(some_ids(2, 4), DynamicCache())
    cache.layers[0].crop(-1)
    return cache


ROW = torch.tensor([1, 1, 0, 1], dtype=torch.bool)[:, None].expand(4, 4)
REFUSED = {
    "a word": ({"mask": "full"}, r"""mask is 'full'; expected "causal" or a tensor \[2, 4, 4\]"""),
    "none": ({"mask": None}, "mask is None; expected"),
    "a tokenizer's": (
        {"mask": torch.ones(2, 4)},
        r"shape \[2, 4\]; expected \[4, 4\] or \[2, 4, 4\], for 4 tokens.*causal_mask\(\)",
    ),
    "heads": ({"mask": torch.ones(2, 1, 4, 4)}, r"mask has shape \[2, 1, 4, 4\]"),
    "integers": ({"mask": torch.ones(4, 4, dtype=torch.int64)}, "mask is of torch.int64"),
    "blind": ({"mask": ROW}, "mask lets token 2 of sequence 0 see nothing"),
    "blind by floats": (
        {"mask": torch.stack((torch.zeros(4, 4), added(ROW, -torch.inf)))},
        "mask lets token 2 of sequence 1 see nothing",
    ),
    "blind by the lowest": (
        {"mask": added(ROW, torch.finfo(torch.float32).min)},
        "mask lets token 2 of sequence 0 see nothing",
    ),
    "NaN": ({"mask": torch.zeros(4, 4).index_fill(1, torch.tensor([0]), torch.nan)}, "holds NaN"),
    "infinite": ({"mask": torch.full((4, 4), torch.inf)}, "mask holds NaN or inf"),
    "positions": (
        {"position_ids": torch.zeros(2, 3)},
        r"position_ids have shape \[2, 3\].*\[2, 4\]",
    ),
    "too long": (
        {"lengths": torch.tensor([4, 5])},
        r"lengths are \[4, 5\]; .* 2 numbers of 0 to 4",
    ),
    "too many": ({"lengths": torch.tensor([4, 4, 4])}, r"lengths are \[4, 4, 4\]"),
}


@pytest.mark.parametrize(("words", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_does_not_fit_is_refused_and_the_cache_is_as_it_was(qwen2, words, message):
    with pytest.raises(GenerationError, match=message):
        qwen2.ours(some_ids(2, 4), **words)
    for kind in KINDS:
        cache = qwen2.empty(kind, 2)
        with pytest.raises(GenerationError, match=message):
            qwen2.ours(some_ids(2, 4), cache, use_cache=True, **words)
        assert not any(tensor.numel() for tensor in held(cache, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda qwen2: 3, "past_key_values is a int; expected a KVCache"),
        (lambda qwen2: ((1, 2),), "past_key_values is a tuple"),
        (
            lambda qwen2: StaticCache(qwen2.theirs.config, max_cache_len=8),
            "past_key_values is a StaticCache",
        ),
        (lambda qwen2: sliding(), "has layers of DynamicSlidingWindowLayer"),
        (
            lambda qwen2: DynamicCache(config=Qwen2Config(num_hidden_layers=4)),
            "made for 4 layers, but the model has 3",
        ),
        (uneven, "layers of the DynamicCache hold 3 to 4 positions"),
        (lambda qwen2: qwen2.ours(some_ids(3, 4), DynamicCache())[1], "holds 3 sequences"),
        (lambda qwen2: qwen2.empty("BatchingCache", 1), "holds 1 sequences, but the batch has 2"),
        (
            lambda qwen2: KVCache.allocate(replace(qwen2.ours.config, head_dim=32), 2, 8),
            "3 layers of 2 heads of 32 in float32, but 3 layers of 2 heads of 14 in float32",
        ),
        (
            lambda qwen2: KVCache.allocate(qwen2.ours.config, 2, 8, torch.bfloat16),
            "in bfloat16, but .* in float32 are expected",
        ),
    ],
)
def test_a_cache_of_another_kind_or_model_is_refused(qwen2, make, message):
    with pytest.raises(GenerationError, match=message):
        qwen2.ours(some_ids(2, 4), past_key_values=make(qwen2), use_cache=True)


def test_sequences_of_unequal_lengths_do_not_fit_a_dynamic_cache(qwen2):
    ids = some_ids(2, 4)
    _, cache = qwen2.ours(ids, DynamicCache())
    with pytest.raises(GenerationError, match=r"lengths are \[2, 4\], but .* DynamicCache"):
        qwen2.ours(ids, cache, lengths=torch.tensor([2, 4]))
    assert cache.get_seq_length() == 4
    logits, _ = qwen2.ours(ids, cache, lengths=torch.tensor([3, 3]))
    assert cache.get_seq_length() == 7
    assert_near(logits[:, :3], qwen2.wanted(torch.cat((ids, ids), dim=1))[:, 4:7])


def test_a_full_cache_refuses_by_name_what_does_not_fit_before_it_writes(qwen2):
    ids = some_ids(2, 7)
    layers = qwen2.ours.config.num_hidden_layers
    cache = FullCache.allocate(qwen2.ours.config, 2, 8)
    qwen2.ours(ids, cache, lengths=torch.tensor([2, 6]))
    before = [tensor.clone() for tensor in cache.keys + cache.values]
    message = "sequence 1 holds 6 of the 8 positions of its FullCache, which has no room for 3 more"
    for words in ({}, {"use_cache": False}, {"lengths": torch.tensor([1, 3])}):
        with pytest.raises(GenerationError, match=message):
            qwen2.ours(ids[:, :3], cache, **words)
    assert all(map(torch.equal, cache.keys + cache.values, before))
    # Six and two fit, though the padding of the second does not; and then nothing more.
    logits, _ = qwen2.ours(some_ids(2, 6, seed=1), cache, lengths=torch.tensor([6, 2]))
    assert cache.lengths.tolist() == [8, 8]
    for row, (old, new) in enumerate([(2, 6), (6, 2)]):
        whole = torch.cat((ids[row, :old], some_ids(2, 6, seed=1)[row, :new]))[None]
        assert_near(logits[row, :new], qwen2.wanted(whole)[0, old:])
    with pytest.raises(GenerationError, match="sequence 0 holds 8 of the 8 positions"):
        qwen2.ours(ids[:, :1], cache)
    assert len(held(cache, layers)) == 2 * 2 * layers


def test_causal_mask_is_what_each_token_may_see():
    attention_mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    wanted = torch.zeros(2, 3, 5, dtype=torch.bool)
    for row in range(2):
        for token in range(3):
            for place in range(5):
                own = place == 2 + token
                real = attention_mask[row, place] and attention_mask[row, 2 + token]
                wanted[row, token, place] = own or (place <= 2 + token and bool(real))
    assert torch.equal(causal_mask(attention_mask, 3), wanted)
    with pytest.raises(GenerationError, match="has 5 positions for 6 tokens"):
        causal_mask(attention_mask, 6)


def test_what_the_decoder_takes_for_a_cache_is_one_that_layers_take():
    assert LayerCache in Cache.__mro__
