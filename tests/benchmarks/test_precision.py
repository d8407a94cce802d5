"""Tests of the benchmark of half precision, against a plain evaluation of rounded encodings."""

from __future__ import annotations

import pytest
import torch

from benchmarks import precision, summary
from hf_mel.data.loading import load_mentions
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.inputs import ModelInputs
from tests.toy import ToyProcessor, register, toy_entities, toy_model, write_toy_dataset


def test_rows_equal_an_evaluation_with_rounded_entities(tmp_path):
    register()
    model, processor = toy_model(), ToyProcessor()
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    data = write_toy_dataset(tmp_path / "data")
    args = ["--model", str(tmp_path / "run"), "--dataset", str(data), "--scratch", str(tmp_path / "scratch")]
    result = precision.run(precision.arguments().parse_args(args))
    mentions, entities = load_mentions(str(data), "test"), toy_entities()
    assert [row["dtype"] for row in result["rows"]] == ["float32", "float16", "bfloat16"]
    ranks = []
    for row in result["rows"]:
        encode = type(model).encode_entities

        class Rounded(type(model)):
            def encode_entities(self, dtype=getattr(torch, row["dtype"]), encode=encode, **inputs):
                return {name: tensor.to(dtype).float() for name, tensor in encode(self, **inputs).items()}

        rounded = Rounded(model.config).eval()
        rounded.load_state_dict(model.state_dict())
        expected = FullEvaluator(entities, progress=False)(ModelInputs(rounded, processor), mentions)
        ranks.append(expected.ranking.best_rank + expected.ranking.worst_rank)
        assert row["metrics"]["mrr"] == pytest.approx(expected.metrics["mrr"])
        assert row["changed_ranks"] == int((ranks[-1] != ranks[0]).sum())
    assert result["rows"][0]["changed_ranks"] == result["rows"][0]["changed_first_places"] == 0
    assert result["rows"][1]["bytes_per_entity"] < result["rows"][0]["bytes_per_entity"]
    _, columns, lines, _ = summary.report_precision(result)
    assert [len(line) for line in lines] == [len(columns)] * 3
