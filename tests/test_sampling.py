"""Sampling against transformers' own logits processors and the definitions of the penalties."""

from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from neuron_minimax.errors import GenerationError
from neuron_minimax.generation.sampling import (
    GREEDY,
    Sampler,
    SamplingParams,
    distinct_ratio,
    log_probabilities,
)

VOCAB = 1500  # more than the head that is sorted first


def random_logits(seed):
    return 3 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "options",
    [
        SamplingParams(),
        SamplingParams(temperature=0.3),
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.8),
        SamplingParams(temperature=8.0, top_p=0.99),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.7, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.3),
        SamplingParams(temperature=0.5, top_p=0.01, repetition_penalty=0.5),
    ],
)
def test_candidates_and_their_probabilities_are_those_of_transformers(options):
    prompt = [1, 2, 3, 250]
    warpers = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty=options.repetition_penalty)]
    )
    warpers.append(TemperatureLogitsWarper(options.temperature))
    if options.top_k:
        warpers.append(TopKLogitsWarper(options.top_k))
    warpers.append(TopPLogitsWarper(options.top_p))
    warpers.append(MinPLogitsWarper(options.min_p))
    for seed in range(20):
        logits = random_logits(seed)
        tokens, probabilities = Sampler(options, prompt).distribution(logits)
        wanted = warpers(torch.tensor([prompt]), logits[None].clone()).softmax(-1)[0].double()
        found = torch.zeros(VOCAB, dtype=torch.float64).index_put((tokens,), probabilities)
        assert set(tokens.tolist()) == set(wanted.nonzero().flatten().tolist())
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_presence_and_frequency_penalties_are_subtracted_for_tokens_of_the_answer_only():
    options = SamplingParams(temperature=0.0, presence_penalty=0.75, frequency_penalty=0.5)
    sampler = Sampler(options, prompt_ids=[0, 1, 2])
    counts = Counter()
    logits = random_logits(5)
    for _ in range(30):
        scores = [
            float(logits[token]) - (0.75 + 0.5 * counts[token] if counts[token] else 0)
            for token in range(VOCAB)
        ]
        wanted = scores.index(max(scores))
        assert sampler.choose(logits) == wanted
        counts[wanted] += 1
    assert len(counts) > 5


def test_the_repetition_penalty_covers_prompt_and_answer():
    said = [3, 700]
    logits = random_logits(6)
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=3.0), said)
    processor = RepetitionPenaltyLogitsProcessor(penalty=3.0)
    for _ in range(20):
        wanted = int(processor(torch.tensor([said]), logits[None].clone()).argmax())
        assert sampler.choose(logits) == wanted
        said.append(wanted)
    assert len(set(said)) > 5


def test_greedy_takes_the_first_of_the_largest_logits():
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert Sampler(GREEDY).choose(logits) == 1


def test_draws_follow_the_distribution():
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    sampler = Sampler(SamplingParams(seed=1))
    drawn = Counter(sampler.choose(logits) for _ in range(4000))
    for token, share in enumerate((0.5, 0.3, 0.15, 0.05)):
        assert abs(drawn[token] / 4000 - share) < 0.03  # more than three standard deviations


def test_a_seed_fixes_the_tokens_and_another_seed_changes_them():
    def run(seed):
        sampler = Sampler(SamplingParams(seed=seed))
        return [sampler.choose(random_logits(step)) for step in range(30)]

    assert run(7) == run(7)
    assert len({tuple(run(seed)) for seed in (7, 8, 9, None, None)}) == 5


def test_forbidden_tokens_are_never_drawn():
    logits = torch.full((VOCAB,), -torch.inf)
    logits[[3, 4]] = torch.tensor([0.0, -2.0])
    sampler = Sampler(SamplingParams(temperature=5.0, seed=0, repetition_penalty=2.0))
    assert {sampler.choose(logits) for _ in range(100)} == {3, 4}


def test_log_probabilities_are_those_of_the_raw_logits():
    logits = random_logits(3)
    chosen, top = log_probabilities(logits, 17, 5)
    wanted = torch.log_softmax(logits.double(), 0)
    assert chosen == pytest.approx(float(wanted[17]), abs=1e-5)
    assert [token for token, _ in top] == wanted.topk(5).indices.tolist()
    assert [value for _, value in top] == pytest.approx(wanted.topk(5).values.tolist(), abs=1e-5)
    assert log_probabilities(logits, 17, 0)[1] == []


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_broken_logits_are_an_error(value):
    with pytest.raises(GenerationError, match="logits"):
        Sampler(GREEDY).choose(torch.full((4,), value))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("top_k", -2),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("presence_penalty", 3),
        ("frequency_penalty", True),
        ("seed", 2**64),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(GenerationError, match=name):
        SamplingParams(**{name: value})


def test_repetition_lowers_the_ratio_of_distinct_tokens():
    assert distinct_ratio(range(100)) == 1.0
    assert distinct_ratio([5, 6] * 50) == 2 / 50
    assert distinct_ratio([*range(100), *[1] * 50]) == 1 / 50
    assert distinct_ratio([]) == 1.0


def test_stop_is_a_text_or_several_and_never_the_letters_of_one():
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["END", "\n"]).stop == ("END", "\n")
    for wrong in ("", ["", "END"], [5], 5, None, {"END": 1}):
        with pytest.raises(GenerationError, match="expected texts that end an answer"):
            SamplingParams(stop=wrong)
