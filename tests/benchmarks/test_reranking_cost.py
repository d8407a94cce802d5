"""Tests of the counts and the fitted line of the reranker benchmark."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmarks.reranking_cost import fit_line, main
from hf_mel.candidates.lists import CandidateLists
from hf_mel.hub.saving import save_model_repository
from tests.toy import ToyPairProcessor, register, toy_mentions, toy_reranker, write_toy_dataset


def test_the_line_is_fitted_by_least_squares():
    sizes, seconds = [1, 4, 16, 64], [0.3, 0.5, 1.9, 6.1]
    results = [{"pairs": 8 * n, "mentions": 8, "s": s} for n, s in zip(sizes, seconds, strict=True)]
    slope, intercept = np.polyfit(sizes, seconds, 1)
    assert fit_line(results, "s") == pytest.approx({"per_mention": intercept, "per_candidate": slope})


def test_a_run_is_measured_and_written(tmp_path, capsys):
    register()
    save_model_repository(toy_reranker(), ToyPairProcessor(), tmp_path / "run")
    mentions = toy_mentions(6)
    data = write_toy_dataset(tmp_path / "data", test=mentions)
    ids = [str(mention_id) for mention_id in mentions["mention_id"]]
    lists = CandidateLists(ids, [[gold] for gold in mentions["entity_id"]], {}, {"source": "made up"})
    lists.save(tmp_path / "lists.parquet")
    out = tmp_path / "cost.json"
    main(
        [
            str(tmp_path / "run"),
            str(data),
            "--candidates",
            str(tmp_path / "lists.parquet"),
            "--sizes",
            "1,3,100",
            "--output",
            str(out),
        ]
    )
    content = json.loads(out.read_text())
    assert [result["pairs"] for result in content["results"]] == [6, 18, 72]  # the toy data set has twelve entities
    for result in content["results"]:
        assert result["pairs_per_second"] == pytest.approx(result["pairs"] / (result["seconds_per_mention"] * 6))
        assert result["seconds_per_mention_jointly"] > result["seconds_per_mention"] > 0
    for column, fit in content["fitted"].items():
        slope, intercept = np.polyfit([1, 3, 12], [result[column] for result in content["results"]], 1)
        assert fit == pytest.approx({"per_mention": intercept, "per_candidate": slope})
    assert set(content["fitted"]) == {"seconds_per_mention", "seconds_per_mention_jointly"}
    assert "· |E|" in capsys.readouterr().out
