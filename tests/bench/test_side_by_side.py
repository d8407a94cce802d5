"""Comparisons of evaluations: pairs of mentions, refusals, and cases side by side."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from hf_mel.bench.comparability import MentionRanks, load_results, mean_scores
from hf_mel.bench.side_by_side import cases, compare_results
from hf_mel.errors import ComparisonError, DataFormatError
from hf_mel.files import file_sha256


def write_evaluation(folder: Path, name: str, ranks: dict, **changes) -> Path:
    """Writes results and predictions as `hf-mel evaluate` does. A rank of `None` is a miss."""
    predictions = folder / f"{name}.jsonl"
    records = [
        {"mention_id": m, "entity_id": "Q1", "rank": rank, "candidates": [{"entity_id": f"E{name}", "score": 1.0}]}
        for m, rank in ranks.items()
    ]
    records.append({"mention_id": "nil", "entity_id": "NIL", "rank": None, "candidates": []})
    predictions.write_text("".join(json.dumps(record) + "\n" for record in records))
    hits = np.mean([rank is not None and rank <= 1 for rank in ranks.values()])
    content = {
        "protocol": "full",
        "kb_size": 9,
        "num_mentions": len(ranks) + 1,
        "ties": "realistic",
        "data": {"dataset": "x", "sha256": "s", "split": "test"},
        "metrics": {"hits@1": float(hits), "mrr": 0.5, "num_ranked": len(ranks)},
        "predictions": {"file": predictions.name, "sha256": file_sha256(predictions)},
        **changes,
    }
    file = folder / f"{name}.json"
    file.write_text(json.dumps(content))
    return file


def test_a_comparison_pairs_mentions_by_id_whatever_their_order(tmp_path):
    first = {"a": 1.0, "b": 2.0, "c": None, "d": 1.0, "e": 4.0}
    second = {"e": 1.0, "d": 1.5, "c": 1.0, "b": 2.0, "a": 1.0}
    compared = compare_results(
        {"A": [write_evaluation(tmp_path, "A", first)], "B": [write_evaluation(tmp_path, "B", second)]}
    )
    one = np.array([0 if first[m] is None else 1 / first[m] for m in "abcde"])
    other = np.array([1 / second[m] for m in "abcde"])
    by_metric = {test["metric"]: test for test in compared["tests"]}
    assert by_metric["mrr"]["difference"] == pytest.approx((other - one).mean())
    assert by_metric["mrr"]["p_t"] == pytest.approx(stats.ttest_rel(other, one).pvalue)
    assert by_metric["hits@1"]["difference"] == pytest.approx((3 - 2) / 5)
    assert (by_metric["hits@1"]["num_better"], by_metric["hits@1"]["num_worse"]) == (2, 1)
    assert [row["name"] for row in compared["rows"]] == ["A", "B"]
    assert compared["tests"][0]["against"] == "A"


def test_seeds_of_one_system_count_with_the_mean_of_each_mention(tmp_path):
    runs = [{"a": 1.0, "b": 2.0}, {"a": 2.0, "b": 4.0}]
    files = [write_evaluation(tmp_path, f"A{i}", ranks) for i, ranks in enumerate(runs)]
    ranks = [MentionRanks.of_results(file, load_results(file)) for file in files]
    assert mean_scores(ranks, "mrr").tolist() == [0.75, 0.375]
    assert mean_scores(ranks, "hits@1").tolist() == [0.5, 0.0]
    compared = compare_results({"A": files, "B": [write_evaluation(tmp_path, "B", {"a": 1.0, "b": 1.0})]})
    assert compared["rows"][0]["metrics"]["hits@1"]["values"] == [0.5, 0.0]
    assert compared["tests"][0]["difference"] == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"kb_size": 8}, {"a": 1.0, "b": 1.0}, "size of the knowledge base: 9 and 8"),
        ({"data": {"sha256": "t", "split": "test"}}, {"a": 1.0, "b": 1.0}, "data: s and t"),
        ({"candidates": {"source": "name", "k": 4, "sha256": "l"}}, {"a": 1.0, "b": 1.0}, "candidate lists"),
        ({"predictions": None}, {"a": 1.0, "b": 1.0}, "no predictions"),
        ({}, {"a": 1.0, "c": 1.0}, "have other mentions, among them 'b'"),
    ],
)
def test_results_that_cannot_be_compared_are_refused(tmp_path, changes, ranks, message):
    first = write_evaluation(tmp_path, "A", {"a": 1.0, "b": 2.0})
    with pytest.raises(ComparisonError, match=message):
        compare_results({"A": [first], "B": [write_evaluation(tmp_path, "B", ranks, **changes)]})


def test_predictions_that_changed_or_are_missing_are_refused(tmp_path):
    files = [write_evaluation(tmp_path, name, {"a": 1.0, "b": 2.0}) for name in "AB"]
    (tmp_path / "B.jsonl").write_text((tmp_path / "B.jsonl").read_text() + "\n")
    with pytest.raises(ComparisonError, match="written again since"):
        compare_results({"A": [files[0]], "B": [files[1]]})
    (tmp_path / "B.jsonl").unlink()
    with pytest.raises(ComparisonError, match="are missing"):
        compare_results({"A": [files[0]], "B": [files[1]]})
    with pytest.raises(ComparisonError, match="two systems"):
        compare_results({"A": [files[0]]})


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read"), ("[]", "no results"), ("{}", "'data' is missing")]
)
def test_files_without_results_are_errors(tmp_path, text, message):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataFormatError, match=message) as raised:
        load_results(tmp_path / "x.json")
    assert raised.value.file == tmp_path / "x.json"


@pytest.mark.parametrize("line", ["{", '{"mention_id": "a"}', "[]"])
def test_damaged_predictions_name_the_line(tmp_path, line):
    file = tmp_path / "x.jsonl"
    file.write_text('{"mention_id": "b", "entity_id": "Q1", "rank": 1, "candidates": []}\n' + line + "\n")
    with pytest.raises(DataFormatError, match=r"x.jsonl, row 2: The predictions cannot be read"):
        MentionRanks.load(file)
    with pytest.raises(DataFormatError, match=r"x.jsonl, row 2: The predictions cannot be read"):
        cases({"A": file, "B": file})


def test_cases_are_mentions_that_one_system_has_right_and_another_wrong(tmp_path):
    for name, ranks in {"A": {"a": 1.0, "b": 3.0, "c": 1.0}, "B": {"a": 1.0, "b": 1.0, "c": None}}.items():
        write_evaluation(tmp_path, name, ranks)
    listed = cases({"A": tmp_path / "A.jsonl", "B": tmp_path / "B.jsonl"})
    assert [case["mention_id"] for case in listed] == ["c", "b"]
    assert listed[0]["systems"]["B"] == {"rank": None, "candidates": [{"entity_id": "EB", "score": 1.0}]}
    write_evaluation(tmp_path, "C", {"a": 1.0})
    with pytest.raises(ComparisonError, match="other mentions"):
        cases({"A": tmp_path / "A.jsonl", "C": tmp_path / "C.jsonl"})
    with pytest.raises(ComparisonError, match="predictions of two systems"):
        cases({"A": tmp_path / "A.jsonl"})
