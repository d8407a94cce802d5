"""Tests of the benchmark of missing images."""

from __future__ import annotations

import json

import datasets

from benchmarks.missing_images import CONDITIONS, compare_golds, main, without_images
from hf_mel.evaluation import FullEvaluator
from hf_mel.hub.saving import save_model_repository
from hf_mel.inference.inputs import ModelInputs
from tests.toy import ToyProcessor, register, toy_entities, toy_mentions, toy_model, write_toy_dataset


def test_only_chosen_rows_lose_their_images():
    mentions, entities = toy_mentions(6), toy_entities(6)
    assert [row["image"] is None for row in mentions] == [True, False, False, True, False, False]
    assert [row["image"] is None for row in without_images(mentions, [1, 4])] == [True, True, False, True, True, False]
    assert [len(row["images"]) for row in entities] == [0, 1, 1, 1, 1, 0]
    assert [len(row["images"]) for row in without_images(entities, [2])] == [0, 1, 0, 1, 1, 0]
    assert without_images(mentions, [1]).features == mentions.features
    assert without_images(entities, [2])[1]["images"][0].getpixel((0, 0)) == entities[1]["images"][0].getpixel((0, 0))


def test_golds_with_and_without_images_are_compared():
    class Result:
        def records(self):
            golds, ranks, firsts = ["A", "B", "B", "C", "NIL"], [1.0, 2.0, 1.0, 3.0, None], ["A", "A", "B", "B", "B"]
            for gold, rank, first in zip(golds, ranks, firsts, strict=True):
                yield {"entity_id": gold, "rank": rank, "candidates": [{"entity_id": first}]}

    assert compare_golds(Result(), {"B"}) == {
        "hits@1 of golds with": 1 / 2,
        "hits@1 of golds without": 1 / 2,
        "first places without": 2 / 4,
    }


def test_a_run_is_measured_and_written(tmp_path, capsys):
    register()
    model, processor, mentions = toy_model(), ToyProcessor(), toy_mentions(12)
    save_model_repository(model, processor, tmp_path / "run")
    data = write_toy_dataset(tmp_path / "data", test=mentions)
    main([str(tmp_path / "run"), "--dataset", str(data), "--output", str(tmp_path / "out.json")])
    row = json.loads((tmp_path / "out.json").read_text())["models"][str(tmp_path / "run")]
    assert set(row) == {*CONDITIONS, "half_without"}
    evaluate = FullEvaluator(toy_entities(), progress=False)
    blind = datasets.Dataset.from_list([{**mention, "image": None} for mention in mentions], mentions.features)
    for condition, shown in (("all images", mentions), ("mentions without", blind)):
        assert row[condition] == evaluate(ModelInputs(model, processor), shown).metrics["hits@1"]
    assert row["all images"] != row["mentions without"]
    assert "half of the entities without" in capsys.readouterr().out
