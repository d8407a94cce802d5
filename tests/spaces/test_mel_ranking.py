"""Tests of the metric, against counted positions and as a module loaded by `evaluate`."""

import re
from itertools import pairwise, permutations
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_mel.spaces.mel_ranking import mel_ranking
from hf_mel.spaces.mel_ranking.mel_ranking import nil_metrics, ranking_metrics, ranks_from_ids, resolve_ranks

FOLDER = Path(mel_ranking.__file__).parent


@pytest.fixture
def load(tmp_path):
    return lambda config=None: evaluate.load(str(FOLDER), config, cache_dir=str(tmp_path))


def test_metrics_equal_values_counted_by_hand():
    # The ranks are 1, 3 and 12, and one gold is missed.
    results = ranking_metrics([1, 3, 12, None], ks=(1, 3, 10, 20))
    assert [results[f"hits@{k}"] for k in (1, 3, 10, 20)] == [1 / 4, 2 / 4, 2 / 4, 3 / 4]
    assert results["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 12) / 4)
    assert results["mr"] == pytest.approx((1 + 3 + 12) / 3)
    assert (results["num_ranked"], results["num_missed"]) == (4, 1)
    assert ranking_metrics([1, 3, 12, None], kb_size=100)["mr"] == pytest.approx((1 + 3 + 12 + 100) / 4)


def test_tie_policies_change_the_rank_of_ties():
    best, worst = [1, 2], [4, 2]
    assert resolve_ranks(best, worst).tolist() == [2.5, 2]
    assert resolve_ranks(best, worst, "optimistic").tolist() == [1, 2]
    assert resolve_ranks(best, worst, "pessimistic").tolist() == [4, 2]


def test_a_fractional_rank_misses_the_next_lower_k():
    results = ranking_metrics([1], [2], ks=(1, 2))
    assert (results["hits@1"], results["hits@2"], results["mrr"]) == (0, 1, 2 / 3)


@pytest.mark.parametrize("size", [50, 1001])
def test_a_constant_scorer_gains_nothing_from_ties(size):
    gold = np.arange(size)
    results = ranking_metrics(np.ones(size), np.full(size, size), ks=(1, 3, 5, 10, 20))
    assert all(results[f"hits@{k}"] == 0 for k in (1, 3, 5, 10, 20))
    assert results["mrr"] == pytest.approx(2 / (size + 1))
    ids = [f"Q{i}" for i in gold]
    listed = ranks_from_ids([ids] * 3, ids[:3], scores=[[0.5] * size] * 3)
    assert ranking_metrics(*listed)["hits@20"] == 0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-2, 2), min_size=1, max_size=5), st.data())
def test_the_realistic_rank_is_the_mean_over_all_orders_of_ties(scores, data):
    gold = data.draw(st.integers(0, len(scores) - 1))
    # The position of the gold in every order that sorts these scores.
    positions = [
        order.index(gold) + 1
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    ids = [str(i) for i in order]
    best, worst = ranks_from_ids([ids], [str(gold)], [[scores[i] for i in order]])
    assert (best[0], worst[0]) == (min(positions), max(positions))
    assert resolve_ranks(best, worst)[0] == pytest.approx(np.mean(positions))


def test_scores_within_the_tolerance_tie():
    ids, gold = [["a", "b"]], ["b"]
    assert ranks_from_ids(ids, gold, [[0.5 + 1e-7, 0.5]]) == (1, 2)
    assert ranks_from_ids(ids, gold, [[0.5 + 1e-5, 0.5]]) == (2, 2)
    assert ranks_from_ids(ids, ["a"], [[0.5 + 1e-7, 0.5]]) == (1, 2)
    assert ranks_from_ids(ids, ["a"], [[0.5 + 1e-5, 0.5]]) == (1, 1)
    assert ranks_from_ids(ids, gold, [[1000 + 1e-4, 1000]]) == (1, 2)  # relative above 1
    assert ranks_from_ids(ids, gold, [[0.5 + 1e-5, 0.5]], tie_tolerance=1e-4) == (1, 2)


def test_nil_metrics_equal_values_counted_by_hand():
    #          correct  wrong  predicted NIL | correct NIL  linked NIL
    gold_nil = [False, False, False, True, True]
    said_nil = [False, False, True, True, False]
    correct = [True, False, True, True, True]  # the last three are ignored
    results = nil_metrics(gold_nil, said_nil, correct)
    assert results["accuracy"] == 2 / 5
    assert results["in_kb_accuracy"] == results["micro_recall"] == 1 / 3
    assert results["micro_precision"] == 1 / 3
    assert results["micro_f1"] == pytest.approx(1 / 3)
    assert (results["nil_precision"], results["nil_recall"]) == (1 / 2, 1 / 2)
    assert (results["num_mentions"], results["num_nil"]) == (5, 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_nil_metrics_are_consistent(rows):
    results = nil_metrics(*zip(*rows, strict=True))
    precision, recall, f1 = (results[f"micro_{name}"] for name in ("precision", "recall", "f1"))
    if precision == precision and recall == recall and precision + recall > 0:
        assert f1 == pytest.approx(2 * precision * recall / (precision + recall))
    nil = results["num_nil"]
    right = (nil and results["nil_recall"] * nil) + (nil < len(rows) and recall * (len(rows) - nil))
    assert results["accuracy"] * len(rows) == pytest.approx(right)


def test_metrics_of_no_mentions_are_nan():
    assert np.isnan(ranking_metrics([])["mrr"])
    assert np.isnan(nil_metrics([False], [False], [True])["nil_recall"])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ranking_metrics([0]), "Row 0: best rank 0"),
        (lambda: ranking_metrics([1, 5], [1, 4]), "Row 1"),
        (lambda: ranking_metrics([1, None], [1, 4]), "Row 1"),
        (lambda: ranking_metrics([1, 2], [1]), "same length"),
        (lambda: ranking_metrics([1], ties="random"), "realistic, optimistic, pessimistic"),
        (lambda: ranking_metrics([1], ks=[0]), "at least 1"),
        (lambda: ranking_metrics([7], kb_size=6), "Rank 7 is beyond the 6"),
        (lambda: ranks_from_ids([["a", "a"]], ["a"]), "Row 0: an id occurs twice"),
        (lambda: ranks_from_ids([["a", "b"]], ["a"], [[1.0]]), "2 ids but 1 scores"),
        (lambda: ranks_from_ids([["a", "b"]], ["a"], [[1.0, 2.0]]), "increase"),
        (lambda: ranks_from_ids([["a"]], ["a"], [[float("nan")]]), "finite"),
        (lambda: nil_metrics([True], [True], []), "same length"),
    ],
)
def test_the_error_names_invalid_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_module_returns_the_values_of_the_functions(load):
    metric = load()
    predictions = [["Q1", "Q2"], ["Q3", "Q1"], ["NIL", "Q2"], [], ["Q5", "Q4"]]
    references = ["Q2", "Q3", "Q2", "NIL", "Q9"]
    results = metric.compute(predictions=predictions, references=references, ks=[1, 2], kb_size=9)
    assert results == {
        **ranking_metrics([2, 1, 2, None], ks=[1, 2], kb_size=9),
        **nil_metrics([False, False, False, True, False], [False, False, True, True, False], [0, 1, 0, 0, 0]),
    }


def test_the_module_recognises_ties_and_accumulates_batches(load):
    metric = load()
    metric.add_batch(predictions=[["Q1", "Q2"]], references=["Q2"], scores=[[1.0, 1.0]])
    metric.add(prediction=["Q1", "Q2"], reference="Q1")
    results = metric.compute(ks=[1])
    assert results["mr"] == (1.5 + 1) / 2
    assert results["hits@1"] == results["accuracy"] == 0.5
    optimistic = metric.compute(
        predictions=[["Q1", "Q2"]], references=["Q2"], scores=[[1.0, 1.0]], ks=[1], ties="optimistic"
    )
    assert optimistic["hits@1"] == 1


def test_the_module_accepts_ranks(load):
    metric = load("ranks")
    expected = ranking_metrics([1, 3, None], [1, 5, None])
    assert metric.compute(ranks=[1, 3, None], worst_ranks=[1, 5, None]) == expected
    metric.add_batch(ranks=np.array([1, 3]), worst_ranks=np.array([1, 5]))
    metric.add(ranks=2)
    assert metric.compute() == ranking_metrics([1, 3, 2], [1, 5, 2])


def test_the_error_names_the_other_configuration(load):
    with pytest.raises(ValueError, match="configuration 'ranks'"):
        load().compute(ranks=[1])
    with pytest.raises(ValueError, match="configuration 'ids'"):
        load("ranks").compute(predictions=[["Q1"]], references=["Q1"])
    with pytest.raises(ValueError, match="ids and ranks"):
        load("other")


def test_the_examples_in_the_card_run(tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent.parent)
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) == 3
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)


def test_the_card_defines_every_key(load):
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    keys = load().compute(predictions=[["Q1"]], references=["Q1"], ks=[1])
    assert all(f"`{'hits@k' if key == 'hits@1' else key}`" in card for key in keys)
