import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.evaluation.nil import best_other_scores, calibrate_nil_threshold
from hf_mel.inference.ranking import RankingResult

# Few distinct scores, so that equal ones occur; a mention is (score, correct, gold is NIL).
rows = st.lists(
    st.tuples(st.integers(-3, 3).map(lambda i: i / 4), st.booleans(), st.booleans()), min_size=1, max_size=12
)


def accuracy(threshold, cases):
    """Decides every case by itself."""
    decisions = [nil if score < threshold else (right and not nil) for score, right, nil in cases]
    return sum(decisions) / len(cases)


def every_threshold(cases):
    """One below, one between and one above all scores."""
    scores = sorted({score for score, _, _ in cases})
    middles = [(a + b) / 2 for a, b in zip([scores[0] - 1, *scores], [*scores, scores[-1] + 1], strict=True)]
    return {threshold: accuracy(threshold, cases) for threshold in middles}


@settings(max_examples=300, deadline=None)
@given(rows)
def test_best_of_all_thresholds(cases):
    if not any(nil for _, _, nil in cases):
        cases = [*cases, (0.0, False, True)]
    found = calibrate_nil_threshold(*zip(*cases, strict=True))
    tried = every_threshold(cases)
    assert found.accuracy == pytest.approx(max(tried.values()))
    assert accuracy(found.threshold, cases) == pytest.approx(found.accuracy)
    assert not found.simulated
    # Of equally good thresholds the lowest: it links exactly as many as the lowest best one of the brute force.
    lowest = min(threshold for threshold, value in tried.items() if value == max(tried.values()))
    assert [score < found.threshold for score, _, _ in cases] == [score < lowest for score, _, _ in cases]


@settings(max_examples=300, deadline=None)
@given(rows, st.data())
def test_leaving_golds_out(cases, data):
    scores, correct, _ = zip(*cases, strict=True)
    others = data.draw(st.lists(st.integers(-3, 3).map(lambda i: i / 4), min_size=len(cases), max_size=len(cases)))
    found = calibrate_nil_threshold(scores, correct, [False] * len(cases), others)
    simulated = [(score, right, False) for score, right in zip(scores, correct, strict=True)]
    simulated += [(other, False, True) for other in others]
    assert found.simulated
    assert found.accuracy == pytest.approx(max(every_threshold(simulated).values()))
    assert accuracy(found.threshold, simulated) == pytest.approx(found.accuracy)


def test_real_nil_mentions_take_precedence():
    found = calibrate_nil_threshold([0.9, 0.2], [True, False], [False, True], other_scores=[5.0, 5.0])
    assert not found.simulated
    assert found.accuracy == 1
    assert found.threshold == pytest.approx(0.55)


def test_adjacent_scores_stay_apart():
    low = np.float64(1.0)
    high = np.nextafter(low, 2)
    found = calibrate_nil_threshold([low, high], [False, True], [True, False])
    assert low < found.threshold <= high


def test_wrong_input():
    with pytest.raises(ValueError, match="above 0"):
        calibrate_nil_threshold([], [], [])
    with pytest.raises(ValueError, match="other_scores"):
        calibrate_nil_threshold([1.0], [True], [False])
    with pytest.raises(ValueError, match="finite"):
        calibrate_nil_threshold([float("nan")], [True], [True])
    with pytest.raises(ValueError, match="one length"):
        calibrate_nil_threshold([1.0, 2.0], [True], [True])
    with pytest.raises(ValueError, match="one per mention"):
        calibrate_nil_threshold([1.0, 2.0], [True, False], [False, False], [1.0])


def test_best_other_scores():
    ranking = RankingResult(torch.tensor([[3.0, 2], [3, 2], [3, 2]]), torch.tensor([[4, 1], [1, 4], [0, 2]]))
    assert best_other_scores(ranking, [4, 4, -1]).tolist() == [2, 3, 3]
    with pytest.raises(ValueError, match="two best"):
        best_other_scores(RankingResult(torch.tensor([[3.0]]), torch.tensor([[4]])), [4])
