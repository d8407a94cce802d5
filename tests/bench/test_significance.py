"""Tests of significance against plain computations: every resample of a tiny case, textbook formulas, Holm by hand."""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_mel.bench.significance import Difference, check_packages, corrected, paired_difference
from hf_mel.errors import ComparisonError, MissingExtraError


def test_the_bootstrap_agrees_with_all_resamples_of_a_tiny_case():
    first, second = np.array([1.0, 1, 0, 1, 1]), np.array([0.0, 1, 0.5, 0, 0.25])
    differences = first - second
    means = [np.mean([differences[i] for i in rows]) for rows in itertools.product(range(5), repeat=5)]
    observed = differences.mean()
    exact = np.mean([abs(mean - observed) >= abs(observed) - 1e-12 for mean in means])
    result = paired_difference(first, second, resamples=200_000)
    assert result.difference == pytest.approx(observed)
    assert result.p_bootstrap == pytest.approx(exact, abs=4 * math.sqrt(exact / 200_000) + 1e-5)
    ordered = np.sort(means)
    for end, share in ((result.low, 0.025), (result.high, 0.975)):
        # The distribution has steps: the percentile lies between those of neighbouring shares.
        assert np.quantile(ordered, share - 0.003) <= end <= np.quantile(ordered, share + 0.003)


def test_the_bootstrap_of_many_mentions_agrees_with_drawing_mentions():
    generator = np.random.default_rng(3)
    first, second = 1 / generator.integers(1, 40, 300), 1 / generator.integers(1, 50, 300)
    result = paired_difference(first, second, resamples=20_000)
    differences = first - second
    drawn = differences[generator.integers(0, 300, (20_000, 300))].mean(1)
    assert (result.low, result.high) == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=2e-3)
    p = np.mean(np.abs(drawn - differences.mean()) >= abs(differences.mean()))
    assert result.p_bootstrap == pytest.approx(p, abs=0.02)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=40))
def test_the_t_test_is_that_of_the_differences(ranks):
    first, second = (1 / np.array(column) for column in zip(*ranks, strict=True))
    differences = first - second
    result = paired_difference(first, second, resamples=10)
    assert result.difference == pytest.approx(differences.mean())
    assert (result.num_better, result.num_worse) == ((differences > 0).sum(), (differences < 0).sum())
    if not differences.any():
        assert (result.p_t, result.p_bootstrap) == (1, 1)
    elif np.ptp(differences) > 1e-9:
        assert result.p_t == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)
        error = math.sqrt(((differences - differences.mean()) ** 2).sum() / (len(ranks) - 1) / len(ranks))
        t = differences.mean() / error
        assert result.p_t == pytest.approx(2 * stats.t.sf(abs(t), len(ranks) - 1))


def test_a_t_test_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, t = 2 sqrt(3); with 2 degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    result = paired_difference(np.array([2.0, 4, 6]), np.array([1.0, 2, 3]), resamples=10)
    t = 2 * math.sqrt(3)
    assert result.p_t == pytest.approx(1 - t / math.sqrt(t**2 + 2))


def test_exchanging_the_systems_turns_the_sign_and_keeps_p():
    generator = np.random.default_rng(0)
    first, second = generator.random(50).round(1), generator.random(50).round(1)
    one, other = paired_difference(first, second, resamples=4000), paired_difference(second, first, resamples=4000)
    assert one.difference == pytest.approx(-other.difference)
    assert one.p_t == pytest.approx(other.p_t)
    assert one.p_bootstrap == pytest.approx(other.p_bootstrap, abs=0.05)


def test_a_seed_gives_the_same_resamples():
    generator = np.random.default_rng(1)
    first, second = generator.random(40), generator.random(40)
    assert paired_difference(first, second, seed=5) == paired_difference(first, second, seed=5)


def of_p(bootstrap: float, t: float) -> Difference:
    return Difference(0.1, 0, 0.2, bootstrap, t, 10, 2, 1)


def test_holm_by_hand():
    # Sorted: 0.01 * 4, then 0.02 * 3, 0.03 * 2 (not below the one before), 0.4 * 1.
    result = corrected([of_p(0.03, 0.5), of_p(0.01, 0.5), of_p(0.4, 0.5), of_p(0.02, 0.001)])
    assert [item.p_bootstrap_corrected for item in result] == pytest.approx([0.06, 0.04, 0.4, 0.06])
    assert [item.p_t_corrected for item in result] == pytest.approx([1, 1, 1, 0.004])
    assert [item.p_bootstrap for item in result] == [0.03, 0.01, 0.4, 0.02]
    assert corrected([]) == []


@pytest.mark.parametrize(("first", "second"), [([1.0], [0.0]), ([1.0, 0.0], [1.0])])
def test_mentions_that_cannot_be_paired(first, second):
    with pytest.raises(ComparisonError, match="cannot be paired"):
        paired_difference(np.array(first), np.array(second))


@pytest.mark.parametrize(
    ("module", "call"),
    [
        ("scipy", lambda: paired_difference(np.array([1.0, 0]), np.array([0.0, 1]))),
        ("statsmodels.stats.multitest", lambda: corrected([of_p(0.1, 0.1)])),
        ("statsmodels.stats.multitest", check_packages),
    ],
)
def test_a_missing_package_names_the_extra(monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=r'pip install "hf_mel\[bench\]"'):
        call()
