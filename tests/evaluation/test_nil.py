"""Tests of the calibration against trying every threshold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.evaluation.nil import best_other_scores, calibrate_nil_threshold, nil_detection
from hf_mel.inference.ranking import RankingResult

# A case is (score, correct, gold is NIL). Few distinct scores, so that equal scores occur.
CASES = st.lists(
    st.tuples(st.integers(-3, 3).map(lambda i: i / 4), st.booleans(), st.booleans()), min_size=1, max_size=12
)


def accuracy(threshold, cases):
    """Returns the accuracy of a threshold, one case at a time."""
    correct = [nil if score < threshold else (linked_correctly and not nil) for score, linked_correctly, nil in cases]
    return sum(correct) / len(cases)


def accuracy_by_threshold(cases):
    """Returns the accuracy of one threshold below all scores, one between any two, and one above all."""
    scores = sorted({score for score, _, _ in cases})
    middles = [(a + b) / 2 for a, b in zip([scores[0] - 1, *scores], [*scores, scores[-1] + 1], strict=True)]
    return {threshold: accuracy(threshold, cases) for threshold in middles}


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_the_threshold_is_the_best_of_all(cases):
    if not any(nil for _, _, nil in cases):
        cases = [*cases, (0.0, False, True)]
    calibrated = calibrate_nil_threshold(*zip(*cases, strict=True))
    accuracies = accuracy_by_threshold(cases)
    assert calibrated.accuracy == pytest.approx(max(accuracies.values()))
    assert accuracy(calibrated.threshold, cases) == pytest.approx(calibrated.accuracy)
    assert not calibrated.simulated
    # Among the best thresholds the lowest is returned: it decides every case as the lowest of the brute force does.
    lowest = min(threshold for threshold, value in accuracies.items() if value == max(accuracies.values()))
    assert [score < calibrated.threshold for score, _, _ in cases] == [score < lowest for score, _, _ in cases]


def f1_of_nil(threshold, cases):
    """Returns the F1 of NIL of a threshold, one case at a time."""
    found = sum(nil and score < threshold for score, _, nil in cases)
    predicted, golds = sum(score < threshold for score, _, _ in cases), sum(nil for _, _, nil in cases)
    return 2 * found / (predicted + golds)


@settings(max_examples=300, deadline=None)
@given(CASES)
def test_the_threshold_with_the_best_f1_is_the_best_of_all(cases):
    cases = [*cases, (0.0, False, True)]
    calibrated = calibrate_nil_threshold(*zip(*cases, strict=True), objective="f1")
    values = {threshold: f1_of_nil(threshold, cases) for threshold in accuracy_by_threshold(cases)}
    assert f1_of_nil(calibrated.threshold, cases) == pytest.approx(max(values.values()))
    assert accuracy(calibrated.threshold, cases) == pytest.approx(calibrated.accuracy)
    assert calibrated.objective == "f1"
    lowest = min(threshold for threshold, value in values.items() if value == pytest.approx(max(values.values())))
    assert [score < calibrated.threshold for score, _, _ in cases] == [score < lowest for score, _, _ in cases]


@settings(max_examples=300, deadline=None)
@given(CASES, st.data())
def test_nil_mentions_are_simulated_by_leaving_golds_out(cases, data):
    scores, correct, _ = zip(*cases, strict=True)
    others = data.draw(st.lists(st.integers(-3, 3).map(lambda i: i / 4), min_size=len(cases), max_size=len(cases)))
    calibrated = calibrate_nil_threshold(scores, correct, [False] * len(cases), others)
    simulated = [(score, linked_correctly, False) for score, linked_correctly in zip(scores, correct, strict=True)]
    simulated += [(other, False, True) for other in others]
    assert calibrated.simulated
    assert calibrated.accuracy == pytest.approx(max(accuracy_by_threshold(simulated).values()))
    assert accuracy(calibrated.threshold, simulated) == pytest.approx(calibrated.accuracy)


def test_real_nil_mentions_take_precedence():
    calibrated = calibrate_nil_threshold([0.9, 0.2], [True, False], [False, True], other_scores=[5.0, 5.0])
    assert not calibrated.simulated
    assert calibrated.accuracy == 1
    assert calibrated.threshold == pytest.approx(0.55)


def test_a_threshold_separates_adjacent_floats():
    low = np.float64(1.0)
    high = np.nextafter(low, 2)
    calibrated = calibrate_nil_threshold([low, high], [False, True], [True, False])
    assert low < calibrated.threshold <= high


def test_invalid_input_is_an_error():
    with pytest.raises(ValueError, match="above 0"):
        calibrate_nil_threshold([], [], [])
    with pytest.raises(ValueError, match="other_scores"):
        calibrate_nil_threshold([1.0], [True], [False])
    with pytest.raises(ValueError, match="finite"):
        calibrate_nil_threshold([float("nan")], [True], [True])
    with pytest.raises(ValueError, match="one length"):
        calibrate_nil_threshold([1.0, 2.0], [True], [True])
    with pytest.raises(ValueError, match="objective"):
        calibrate_nil_threshold([1.0], [True], [True], objective="recall")
    with pytest.raises(ValueError, match="one per mention"):
        calibrate_nil_threshold([1.0, 2.0], [True, False], [False, False], [1.0])


def test_best_other_scores():
    ranking = RankingResult(torch.tensor([[3.0, 2], [3, 2], [3, 2]]), torch.tensor([[4, 1], [1, 4], [0, 2]]))
    assert best_other_scores(ranking, [4, 4, -1]).tolist() == [2, 3, 3]
    with pytest.raises(ValueError, match="two best"):
        best_other_scores(RankingResult(torch.tensor([[3.0]]), torch.tensor([[4]])), [4])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=20), st.lists(st.integers(-3, 3), min_size=1, max_size=20))
def test_nil_detection_counts_pairs_and_decisions(nil, known):
    result = nil_detection(nil, known, threshold=0.5)
    pairs = [(a < b) + (a == b) / 2 for a in nil for b in known]
    assert result["num"] == len(nil)
    assert result["auc"] == pytest.approx(sum(pairs) / len(pairs))
    predicted = sum(value < 0.5 for value in nil), sum(value < 0.5 for value in known)
    assert result["recall"] == pytest.approx(predicted[0] / len(nil))
    if sum(predicted):
        assert result["precision"] == pytest.approx(predicted[0] / sum(predicted))
    else:
        assert np.isnan(result["precision"])
    assert "recall" not in nil_detection(nil, known)
