"""The metric of annotated texts, against hand counts, an independent count, and laws."""

from __future__ import annotations

from pathlib import Path

import evaluate
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_mel.spaces.mel_annotation import mel_annotation
from hf_mel.spaces.mel_annotation.mel_annotation import annotation_metrics, count_matches

FOLDER = Path(mel_annotation.__file__).parent

# "Ghana beat the guests in Accra. Togo watched." — text 1; "Mali" — text 2; a text without mentions — text 3.
GOLDS = [
    [(0, 5, "Q117"), (11, 21, "Q945"), (25, 30, "NIL"), (32, 36, "Q945")],
    [(0, 4, "Q912")],
    [],
]
PREDICTIONS = [
    # right; span too short, right entity; wrong (an entity instead of NIL); NIL instead of an entity; found, not linked
    [(0, 5, "Q117"), (15, 21, "Q945"), (25, 30, "Q38"), (32, 36, "NIL"), (37, 44, None)],
    [(0, 4, "Q38")],
    [],
]


def figures(group):
    names = ("micro_precision", "micro_recall", "micro_f1", "macro_precision", "macro_recall", "macro_f1")
    return [round(group[name], 4) for name in names]


def test_hand_counted_texts():
    results = annotation_metrics(GOLDS, PREDICTIONS)
    assert results["num_texts"] == 3
    strong, weak = results["strong"], results["weak"]
    # Spans: 4 of 6 predictions are golds (0-5, 25-30, 32-36; 0-4), 4 of 5 golds are found.
    # Text 1: P 3/5, R 3/4, F 6/9. Text 2: 1, 1, 1. Text 3: 1, 1, 1.
    assert figures(strong["detection"]) == [0.6667, 0.8, 0.7273, 0.8667, 0.9167, 0.8889]
    # 5 of 6 overlap a gold, and all 5 golds are found. Text 1: P 4/5, R 4/4, F 8/9.
    assert figures(weak["detection"]) == [0.8333, 1.0, 0.9091, 0.9333, 1.0, 0.963]
    # Entities: one of 5 linked predictions is right, of 5 golds. Text 1: 1/4, 1/4, 1/4. Text 2: 0. Text 3: 1.
    assert figures(strong["linking"]) == [0.2, 0.2, 0.2, 0.4167, 0.4167, 0.4167]
    # The short span counts. Text 1: 2/4.
    assert figures(weak["linking"]) == [0.4, 0.4, 0.4, 0.5, 0.5, 0.5]
    # Of the KB: golds 0-5, 11-21, 32-36; 0-4. Predictions 0-5, 15-21, 25-30; 0-4. Text 1: 1/3 each.
    assert figures(strong["in_kb"]) == [0.25, 0.25, 0.25, 0.4444, 0.4444, 0.4444]
    assert figures(weak["in_kb"]) == [0.5, 0.5, 0.5, 0.5556, 0.5556, 0.5556]
    # NIL: one gold, another prediction. Texts 2 and 3 have neither.
    assert figures(strong["nil"]) == [0.0, 0.0, 0.0, 0.6667, 0.6667, 0.6667]
    assert strong["nil"] | {"num_gold": 1, "num_predicted": 1, "num_correct": 0} == strong["nil"]


def test_one_prediction_matches_one_gold():
    golds, wide = [(0, 4, "Q1"), (6, 9, "Q1")], [(0, 9, "Q1")]
    matched, missed, free = count_matches(golds, wide, "weak", same_entity=True)
    assert (matched, missed, free) == ([(0, 4, "Q1")], [(6, 9, "Q1")], [])
    results = annotation_metrics([golds], [wide])
    assert figures(results["weak"]["linking"])[:3] == [1.0, 0.5, 0.6667]
    assert figures(results["strong"]["linking"])[:3] == [0.0, 0.0, 0.0]


def test_spans_that_touch_do_not_overlap():
    assert annotation_metrics([[(0, 4, "Q1")]], [[(4, 6, "Q1")]])["weak"]["linking"]["num_correct"] == 0


@pytest.mark.parametrize(
    ("golds", "predictions", "message"),
    [
        ([[]], [], "golds of 1 texts"),
        ([[(3, 3, "Q1")]], [[]], "no span"),
        ([[]], [[(-1, 3, "Q1")]], "no span"),
        ([[(0, 3, None)]], [[]], "no entity_id"),
    ],
)
def test_inputs_that_cannot_be_compared(golds, predictions, message):
    with pytest.raises(ValueError, match=message):
        annotation_metrics(golds, predictions)


MENTIONS = st.lists(
    st.builds(
        lambda start, length, entity_id: (start, start + length, entity_id),
        st.integers(0, 8),
        st.integers(1, 3),
        st.sampled_from(["Q1", "Q2", "NIL"]),
    ),
    max_size=5,
)
TEXTS = st.lists(st.tuples(MENTIONS, MENTIONS), min_size=1, max_size=4)


@given(TEXTS)
def test_strong_matches_are_those_of_sets(texts):
    golds, predictions = [gold for gold, _ in texts], [predicted for _, predicted in texts]
    results = annotation_metrics(golds, predictions)
    for name, keep in {
        "linking": lambda m: m,
        "in_kb": lambda m: m if m[2] != "NIL" else None,
        "nil": lambda m: m if m[2] == "NIL" else None,
        "detection": lambda m: m[:2],
    }.items():
        sets = [({keep(m) for m in gold} - {None}, {keep(m) for m in predicted} - {None}) for gold, predicted in texts]
        correct, gold, predicted = (
            sum(map(len, column)) for column in zip(*((g & p, g, p) for g, p in sets), strict=True)
        )
        group = results["strong"][name]
        assert (group["num_correct"], group["num_gold"], group["num_predicted"]) == (correct, gold, predicted)
        f1 = [2 * len(g & p) / (len(g) + len(p)) if g or p else 1 for g, p in sets]
        assert group["macro_f1"] == pytest.approx(sum(f1) / len(f1))


@given(TEXTS)
def test_golds_as_predictions_are_perfect_and_the_order_does_not_count(texts):
    golds = [gold for gold, _ in texts]
    results = annotation_metrics(golds, [gold[::-1] for gold in golds])
    for match in ("strong", "weak"):
        for name in ("detection", "linking", "in_kb", "nil"):
            assert set(figures(results[match][name])) == {1.0}
    predictions = [predicted for _, predicted in texts]
    first = annotation_metrics(golds, predictions)["strong"]
    assert annotation_metrics([gold[::-1] for gold in golds], predictions)["strong"] == first


def test_evaluate_loads_the_metric(tmp_path):
    metric = evaluate.load(str(FOLDER), cache_dir=str(tmp_path))

    def rows(texts):
        return [[{"start": s, "end": e, "entity_id": i} for s, e, i in mentions] for mentions in texts]

    assert metric.compute(references=rows(GOLDS), predictions=rows(PREDICTIONS)) == annotation_metrics(
        GOLDS, PREDICTIONS
    )
