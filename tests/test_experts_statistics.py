"""Each statistic against a slow, obvious computation, and the permutation tests against planted
patterns and chance.
"""

import numpy as np
import pytest

from neuron_minimax.studies.experts import statistics

LAYERS = 5
TOKENS = 40
TOP_K = 3
EXPERTS = 12


@pytest.fixture
def index():
    generator = np.random.default_rng(0)
    return np.stack(
        [
            [generator.choice(EXPERTS - 2, TOP_K, replace=False) for _ in range(TOKENS)]
            for _ in range(LAYERS)
        ]
    ).astype(np.int16)


@pytest.fixture
def affinity():
    return (
        np.random.default_rng(1).dirichlet(np.ones(TOP_K), size=(LAYERS, TOKENS)).astype(np.float32)
    )


def test_counts_frequency_and_weight_equal_counting_by_hand(index, affinity):
    index[2, 7, 1] = -1  # padding
    counts = np.zeros((LAYERS, EXPERTS), dtype=int)
    sums = np.zeros((LAYERS, EXPERTS))
    for layer in range(LAYERS):
        for token in range(TOKENS):
            for choice in range(TOP_K):
                expert = index[layer, token, choice]
                if expert >= 0:
                    counts[layer, expert] += 1
                    sums[layer, expert] += affinity[layer, token, choice]
    assert np.array_equal(statistics.counts(index, EXPERTS), counts)
    assert np.allclose(statistics.frequency(index, EXPERTS), counts / TOKENS)
    means = [
        [total / max(1, count) for total, count in zip(*rows, strict=True)]
        for rows in zip(sums, counts, strict=True)
    ]
    assert np.allclose(statistics.mean_weight(index, affinity, EXPERTS), means)


def test_load_balance_equals_its_definitions(index):
    counts = statistics.counts(index, EXPERTS)
    found = statistics.load_balance(counts)
    for layer, row in enumerate(counts):
        shares = row / row.sum()
        assert np.isclose(
            found.entropy[layer], -sum(p * np.log(p) for p in shares if p) / np.log(EXPERTS)
        )
        gini = sum(abs(a - b) for a in row for b in row) / (2 * EXPERTS * row.sum())
        assert np.isclose(found.gini[layer], gini)
        assert np.isclose(found.max_to_mean[layer], row.max() / row.mean())
        assert found.dead[layer] == tuple(e for e in range(EXPERTS) if row[e] == 0)
        assert found.hot[layer] == tuple(e for e in range(EXPERTS) if row[e] >= 3 * row.mean())


def test_load_balance_at_its_ends():
    even = np.full((1, 8), 5)
    one = np.eye(8, dtype=int)[:1] * 40
    assert statistics.load_balance(even).gini[0] == pytest.approx(0)
    assert statistics.load_balance(even).entropy[0] == pytest.approx(1)
    assert statistics.load_balance(one).gini[0] == pytest.approx(1 - 1 / 8)
    assert statistics.load_balance(one).entropy[0] == pytest.approx(0)
    assert statistics.load_balance(one).hot == ((0,),)


def test_bias_effect_counts_the_choices_that_would_be_others():
    generator = np.random.default_rng(2)
    scores = generator.random((LAYERS, TOKENS, EXPERTS))
    bias = generator.normal(7, 0.3, (LAYERS, EXPERTS))
    found = statistics.bias_effect(scores, bias, TOP_K)
    for layer in range(LAYERS):
        changed = 0
        for token in range(TOKENS):
            plain = sorted(range(EXPERTS), key=lambda e: -np.float32(scores[layer, token, e]))[
                :TOP_K
            ]
            biased = sorted(
                range(EXPERTS),
                key=lambda e: -(np.float32(scores[layer, token, e]) + bias[layer, e]),
            )[:TOP_K]
            changed += len(set(biased) - set(plain))
        assert np.isclose(found[layer], changed / (TOKENS * TOP_K))
    assert statistics.bias_effect(scores, np.full_like(bias, 7.0), TOP_K).max() == 0


def test_correlation_equals_numpy_and_a_constant_pattern_gives_zero():
    patterns = np.random.default_rng(3).random((LAYERS, EXPERTS))
    assert np.allclose(statistics.layer_correlation(patterns), np.corrcoef(patterns))
    patterns[1] = 0.5
    assert np.array_equal(statistics.layer_correlation(patterns)[1], np.zeros(LAYERS))
    correlation = np.corrcoef(np.random.default_rng(4).random((6, EXPERTS)))
    for distance, mean in enumerate(statistics.mean_by_distance(correlation), start=1):
        assert np.isclose(
            mean, np.mean([correlation[i, i + distance] for i in range(6 - distance)])
        )


def test_a_planted_period_is_found_and_chance_is_not_called_a_pattern():
    generator = np.random.default_rng(5)
    bases = generator.random((3, 64))
    planted = np.stack([bases[layer % 3] for layer in range(18)]) + 0.1 * generator.random((18, 64))
    by_distance = statistics.correlation_by_distance(planted, permutations=199)
    assert set(by_distance.labels[by_distance.p_values < 0.05]) == {3, 6, 9, 12, 15}
    period = statistics.periodicity(planted, permutations=199)
    assert period.labels[period.observed.argmax()] == 3
    assert period.p_values[period.observed.argmax()] < 0.05
    false_alarms = 0
    for seed in range(20):
        noise = np.random.default_rng(100 + seed).random((12, 64))
        false_alarms += (
            statistics.correlation_by_distance(noise, permutations=99, seed=seed).p_values.min()
            < 0.05
        )
        false_alarms += (
            statistics.periodicity(noise, permutations=99, seed=seed).p_values.min() < 0.05
        )
    assert false_alarms <= 6  # 2 of 40 are expected; more than 6 has a probability below 0.01


def test_coactivation_counts_tokens_that_chose_both(index):
    found = statistics.coactivation(index, EXPERTS)
    for layer in range(LAYERS):
        for first in range(EXPERTS):
            for second in range(EXPERTS):
                both = sum(first in row and second in row for row in index[layer])
                assert found[layer, first, second] == (both if first != second else 0)


def test_groups_and_their_distance_equal_selecting_tokens_by_hand(index):
    groups = ["digits" if token % 3 else "code" for token in range(TOKENS)]
    found = statistics.by_group(index, groups, EXPERTS)
    assert list(found) == ["code", "digits"]
    rows = [token for token in range(TOKENS) if token % 3 == 0]
    assert np.allclose(found["code"], statistics.counts(index[:, rows], EXPERTS) / len(rows))
    distance = statistics.total_variation(found["code"], found["digits"])
    for layer in range(LAYERS):
        shares = [group[layer] / group[layer].sum() for group in found.values()]
        assert np.isclose(
            distance[layer], sum(abs(a - b) for a, b in zip(*shares, strict=True)) / 2
        )
    assert statistics.total_variation(np.eye(2)[:1], np.eye(2)[1:]) == 1


def test_routers_of_the_same_rows_in_another_order_are_alike_at_any_distance():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(16, 64))
    others = generator.normal(size=(16, 64))
    found = statistics.layer_similarity([rows, 3 * rows[::-1], others])
    assert found[0, 1] == pytest.approx(1)
    cosines = [[one @ two / np.sqrt(one @ one * (two @ two)) for two in others] for one in rows]
    wanted = (np.max(cosines, axis=0).mean() + np.max(cosines, axis=1).mean()) / 2
    assert found[0, 2] == found[2, 0] == pytest.approx(wanted)
    assert found[0, 0] == pytest.approx(found[1, 1])
    assert found[0, 0] < 0.5
