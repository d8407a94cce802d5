"""Links at a stated precision, against plain counting and against draws whose precision is given."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.inference.selective import RiskCoverage, link_confidence

MENTIONS = st.lists(st.tuples(st.integers(0, 30), st.booleans(), st.booleans()), max_size=120)


@settings(max_examples=100, deadline=None)
@given(MENTIONS)
def test_every_point_of_the_curve_counts_the_links_at_least_as_sure(rows):
    confidences, correct, linked = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    curve = RiskCoverage.of(confidences, correct, linked)
    assert curve.mentions == len(rows)
    assert curve.confidences == sorted(set(curve.confidences), reverse=True)
    for confidence, links, wrong in zip(curve.confidences, curve.links, curve.wrong, strict=True):
        made = [right for value, right, link in rows if link and value >= confidence]
        assert links == len(made)
        assert wrong == made.count(False)
    if any(linked):
        assert curve.links[-1] == sum(linked)  # the curve ends with all links
    assert RiskCoverage.from_dict(vars(curve)) == curve


@settings(max_examples=100, deadline=None)
@given(MENTIONS, st.floats(0.05, 0.95), st.floats(0.05, 0.5))
def test_the_threshold_passes_an_exact_binomial_test_with_all_surer_ones(rows, precision, chance):
    confidences, correct, linked = (list(column) for column in zip(*rows, strict=True)) if rows else ([], [], [])
    curve = RiskCoverage.of(confidences, correct, linked)
    threshold = curve.threshold(precision, chance)

    def passes(confidence, limit):
        made = [right for value, right, link in rows if link and value >= confidence]
        wrong, n = made.count(False), len(made)
        return sum(math.comb(n, k) * (1 - precision) ** k * precision ** (n - k) for k in range(wrong + 1)) <= limit

    testable = [
        value for value, links in zip(curve.confidences, curve.links, strict=True) if precision**links <= chance / 4
    ]
    # By hand: a point is taken if it and all from some start on pass.
    starts = sorted({len(testable) * number // 4 for number in range(4)})
    for slack in (1 - 1e-9, 1 + 1e-9):  # a test may be exactly on its limit
        reached = [
            value
            for start in starts
            for k, value in enumerate(testable)
            if k >= start and all(passes(each, chance / 4 * slack) for each in testable[start : k + 1])
        ]
        if threshold == min(reached, default=math.inf):
            break
    else:
        raise AssertionError(threshold, reached)


def test_the_guarantee_holds_in_nine_of_ten_splits():
    """Links whose probability of being right is known, so that the precision at any threshold is, too."""
    draw = np.random.default_rng(0)
    grid = np.linspace(0, 1, 2001)
    # A confidence c is uniform, and a link is right with probability 1 - (1 - c)²: precision above t is 1 - (1 - t)²/3.
    precision_above = dict(zip(grid.round(4).tolist(), 1 - (1 - grid) ** 2 / 3, strict=True))
    broken, shares = 0, []
    for _ in range(400):
        confidences = draw.choice(grid, 300)
        correct = draw.random(300) < 1 - (1 - confidences) ** 2
        threshold = RiskCoverage.of(confidences, correct).threshold(0.9, chance=0.1)
        if threshold < math.inf:
            broken += precision_above[round(threshold, 4)] < 0.9
            shares.append(1 - threshold)
    assert broken <= 60  # 40 are expected at most; more than 60 has a probability below 0.1 %
    assert np.mean(shares) > 0.2  # the threshold is not kept by linking next to nothing; 0.55 is possible


def test_a_split_too_small_for_the_precision_links_nothing():
    assert RiskCoverage.of(np.arange(10), np.ones(10)).threshold(0.95) == math.inf
    assert RiskCoverage.of([], []).threshold(0.5) == math.inf
    assert RiskCoverage.of([], []).coverage(0.5) == 0
    sure = RiskCoverage.of(np.arange(200), np.ones(200))
    assert sure.threshold(0.95) == 0
    assert sure.coverage(0.95) == 1
    assert sure.threshold(0.999) == math.inf


def test_the_confidence_is_the_lead_over_the_second_entity_and_over_a_learned_nil():
    best, second = np.array([5.0, 5.0, -1.0]), np.array([3.0, -2.0, -4.0])
    assert link_confidence(best, second).tolist() == [2.0, 7.0, 3.0]
    assert link_confidence(best, second, nil_is_learned=True).tolist() == [2.0, 5.0, -1.0]
    assert link_confidence(2.0, -math.inf, nil_is_learned=True) == 2.0


@pytest.mark.parametrize("precision", [0, 1, 1.5, -1])
def test_a_precision_outside_0_and_1_is_refused(precision):
    with pytest.raises(ValueError, match="above 0 and below 1"):
        RiskCoverage.of([1.0], [True]).threshold(precision)


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match="one length"):
        RiskCoverage.of([1.0], [True, False])
    with pytest.raises(ValueError, match="nan"):
        RiskCoverage.of([math.nan], [True])
