"""Tests of the benchmark of encodings in few bits, against a plain evaluation of rounded encodings."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from benchmarks import precision, summary
from benchmarks.sources import Generated
from hf_mel.data.loading import load_mentions
from hf_mel.evaluation.full_evaluator import FullEvaluator
from hf_mel.inference.inputs import ModelInputs
from hf_mel.inference.quantisation import dequantise, quantise
from hf_mel.inference.ranking import rank
from hf_mel.kb.knowledge_base import KnowledgeBase
from hf_mel.kb.manifest import DTYPES
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
    assert [row["dtype"] for row in result["rows"]] == list(precision.FORMS)
    ranks = []
    for row in result["rows"]:
        assert row["times_smaller"] == pytest.approx(result["rows"][0]["bytes_per_entity"] / row["bytes_per_entity"])
        encode = type(model).encode_entities

        class Rounded(type(model)):
            def encode_entities(self, dtype=row["dtype"], encode=encode, **inputs):
                return {name: rounded_as(tensor, dtype) for name, tensor in encode(self, **inputs).items()}

        rounded = Rounded(model.config).eval()
        rounded.load_state_dict(model.state_dict())
        expected = FullEvaluator(entities, progress=False)(ModelInputs(rounded, processor), mentions)
        ranks.append(expected.ranking.best_rank + expected.ranking.worst_rank)
        assert row["metrics"]["mrr"] == pytest.approx(expected.metrics["mrr"])
        assert row["changed_ranks"] == int((ranks[-1] != ranks[0]).sum())
        assert row["best_among_64"] == {"1": 1, "10": 1}  # of fewer entities than 64
    assert result["rows"][0]["changed_ranks"] == result["rows"][0]["changed_first_places"] == 0
    assert result["rows"][1]["bytes_per_entity"] < result["rows"][0]["bytes_per_entity"]
    _, columns, lines, _ = summary.report_precision(result)
    assert [len(line) for line in lines] == [len(columns)] * len(precision.FORMS)
    for row in result["rows"]:
        assert ("cpu_of_bfloat16" in row) == (row["dtype"] in DTYPES)
    assert result["rows"][2]["cpu_of_bfloat16"] == {"1": 1, "8": 1}


def rounded_as(vectors: torch.Tensor, dtype: str) -> torch.Tensor:
    """Rounds an entity's single vectors [N, d] as a knowledge base of a dtype does: int4 keeps them in 8 bits."""
    if dtype.endswith("in float32"):
        return vectors
    if dtype in ("float32", "float16", "bfloat16"):
        return vectors.to(getattr(torch, dtype)).float()
    form = "int4" if dtype.startswith("int4,") else "int8"
    integers, scales = quantise(vectors, form)
    return dequantise(integers, scales, vectors.shape[-1])


def test_the_knowledge_base_of_the_entities_replaces_their_encoding(tmp_path):
    register()
    model, processor = toy_model(), ToyProcessor()
    model.save_pretrained(tmp_path / "run")
    processor.save_pretrained(tmp_path / "run")
    data = str(write_toy_dataset(tmp_path / "data"))
    KnowledgeBase.build(data, model, processor, output=tmp_path / "kb", progress=False)
    args = [
        "--model",
        str(tmp_path / "run"),
        "--dataset",
        data,
        "--scratch",
        str(tmp_path / "scratch"),
        "--mentions",
        "3",
    ]
    results = [
        precision.run(precision.arguments().parse_args([*args, *more]))
        for more in ([], ["--kb", str(tmp_path / "kb")])
    ]
    for rows in zip(*(result["rows"] for result in results), strict=True):
        assert rows[0]["metrics"] == rows[1]["metrics"]
        assert rows[0]["bytes_per_entity"] == rows[1]["bytes_per_entity"]
    assert results[0]["mentions"] == 3


def test_forms_of_generated_people_are_stored_as_a_knowledge_base_stores_them(tmp_path, monkeypatch):
    small = {"length": 24, "text_width": 32, "unit_width": 8, "image_size": 16, "patch_size": 8, "vision_width": 16}
    monkeypatch.setattr(precision, "Generated", partial(Generated, sizes=small))
    args = ["--people", "1000", "--steps", "0", "--mentions", "6", "--repeats", "1", "--scratch", str(tmp_path)]
    result = precision.run(precision.arguments().parse_args(args))
    assert (result["mentions"], result["entities"]) == (6, 1000)
    source = Generated(tmp_path, 1000, steps=0, sizes=small, mask_padding=True)
    mentions, _, golds = source.mentions(6)
    for row in result["rows"]:
        if row["dtype"] in DTYPES:
            kb = source.knowledge_base(1000, row["dtype"])
            ranks = rank(source.model, mentions, kb, gold_rows=golds)
            assert row["metrics"]["mrr"] == pytest.approx((2 / (ranks.best_rank + ranks.worst_rank)).mean().item())
            assert row["bytes_per_entity"] == pytest.approx(kb.info()["encoding_bytes"] / 1000, rel=0.02)
    sizes = {row["dtype"]: row["bytes_per_entity"] for row in result["rows"]}
    assert (
        sizes["int4, single vectors too"] < sizes["int4"] < sizes["int4, single vectors in float32"] < sizes["float32"]
    )


def test_the_share_of_rows_that_are_found_is_that_of_sets():
    generator = torch.Generator().manual_seed(0)
    best, among = (torch.stack([torch.randperm(30, generator=generator)[:k] for _ in range(50)]) for k in (5, 12))
    expected = [len({*a} & {*b}) / 5 for a, b in zip(best.tolist(), among.tolist(), strict=True)]
    assert 0 < sum(expected) < 50
    assert precision.share_found(best, among) == pytest.approx(sum(expected) / 50)


def test_a_run_needs_its_data_set(tmp_path):
    with pytest.raises(SystemExit, match="--model and --dataset must be given together"):
        precision.run(precision.arguments().parse_args(["--model", str(tmp_path)]))
