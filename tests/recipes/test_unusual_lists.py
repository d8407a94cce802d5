"""Rerankers with unusual lists: no gold, one candidate, none, equal scores, contexts of NIL alone, images of one side."""

from __future__ import annotations

import json
import math

import datasets
import pytest
import torch

from hf_mel.candidates.lists import CandidateLists
from hf_mel.errors import DataFormatError
from hf_mel.evaluation.candidate_evaluator import CandidateEvaluator
from hf_mel.evaluation.tables import results_table, write_results
from hf_mel.inference.inputs import ModelInputs
from hf_mel.schema import NIL
from hf_mel.training.arguments import MelTrainingArguments
from hf_mel.training.assemble import build_model
from hf_mel.training.trainer import MelTrainer
from tests.recipes.test_rerankers import encoders, load  # noqa: F401 (a fixture)
from tests.toy import toy_entities, toy_mentions

ENTITIES = toy_entities(12)
GOLDS = ["Q1", "Q2", "Q3", NIL, NIL, "Q6"]
CONTEXTS = ["a", "a", "b", "c", "c", "d"]  # every mention of "c" is NIL
MENTIONS = toy_mentions(6).map(
    lambda row, k: {"entity_id": GOLDS[k], "context_id": CONTEXTS[k]}, with_indices=True, load_from_cache_file=False
)
#: The gold is missing, alone, in the list, and missing from an empty list.
IDS = [["Q2", "Q3"], ["Q2"], ["Q5", "Q3", "Q4"], ["Q1", "Q2"], [], []]
LISTS = CandidateLists(list(MENTIONS["mention_id"]), IDS, {}, {"source": "here"})
#: Rank of each gold if all scores are equal: the mean of the best and the worst position.
RANKS = [math.nan, 1.0, 2.0, math.nan, math.nan, math.nan]


@pytest.fixture(params=["mmel_flags", "pfmel-fmel_flags"])
def reranker(request, encoders):  # noqa: F811
    torch.manual_seed(0)
    return build_model(load(request.param, "", encoders))


def without_images(rows: datasets.Dataset, column: str) -> datasets.Dataset:
    return rows.map(lambda row: {column: [] if column == "images" else None}, load_from_cache_file=False)


def trainer(reranker, folder, mentions=MENTIONS, entities=ENTITIES, lists=LISTS, eval_mentions=MENTIONS):
    model, processor = reranker
    arguments = MelTrainingArguments(
        folder,
        num_train_epochs=1,
        per_device_train_batch_size=16,  # more than there are mentions
        num_negatives=3,
        disable_tqdm=True,
        **({} if eval_mentions is not None else {"eval_strategy": "no", "load_best_model_at_end": False}),
    )
    candidates = {"train_candidates": lists, "eval_candidates": LISTS}
    return MelTrainer(
        model, arguments, mentions, eval_mentions, entities=entities, processing_class=processor, **candidates
    )


def test_equal_scores_share_ranks_and_missing_golds_and_nil_do_not_count(reranker, tmp_path):
    model, processor = reranker
    for name, parameter in model.named_parameters():
        if name.startswith(("classifier", "nsp_head")):
            parameter.data.zero_()
    result = CandidateEvaluator(ENTITIES, joint=False, ks=(1, 2), progress=False)(
        ModelInputs(model.eval(), processor), MENTIONS, LISTS
    )
    end_to_end = result.ranks["candidates (end to end)"]
    assert end_to_end == pytest.approx(RANKS, nan_ok=True)
    assert result.metrics["mrr"] == pytest.approx((0 + 1 + 1 / 2 + 0) / 4)
    assert result.metrics["num_ranked"] == 4
    # With the gold added: three equal candidates, one, three, and one.
    assert result.ranks["candidates (gold added)"] == pytest.approx([2, 1, 2, math.nan, math.nan, 1], nan_ok=True)
    records = list(result.records())
    assert [len(record["candidates"]) for record in records] == [2, 1, 3, 2, 0, 0]
    write_results(result.to_dict(), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["num_nil"] == 2


def test_training_on_unusual_lists_takes_a_step(reranker, tmp_path, caplog):
    """The gold is a candidate of training even if its list lacks it, and negatives come from other entities if needed."""
    caplog.set_level("INFO")
    built = trainer(reranker, tmp_path)
    batch = built.collator(built.train_dataset.__getitems__(list(range(len(built.train_dataset)))))
    assert batch["pair_mask"].sum(1).tolist() == [4] * len(batch["labels"])
    assert "leaves out 2 mentions whose gold is NIL" in caplog.text
    output = built.train()
    assert output.global_step == 1
    assert math.isfinite(output.training_loss)
    assert 0 <= built.evaluate()["eval_mrr"] <= 1


def test_a_knowledge_base_of_one_entity_trains_without_negatives(reranker, tmp_path):
    single = MENTIONS.select([0])
    lists = CandidateLists(list(single["mention_id"]), [["Q1"]], {})
    model, _ = reranker
    built = trainer(reranker, tmp_path, single, ENTITIES.select([0]), lists, eval_mentions=None)
    loss = model(**built.collator(built.train_dataset.__getitems__([0]))).loss
    loss.backward()
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("side", ["mentions", "entities", "neither"])
def test_images_of_one_side_or_none_give_finite_scores_and_gradients(reranker, side, tmp_path):
    mentions = MENTIONS if side == "mentions" else without_images(MENTIONS, "image")
    entities = ENTITIES if side == "entities" else without_images(ENTITIES, "images")
    model, _ = reranker
    built = trainer(reranker, tmp_path, mentions, entities, eval_mentions=mentions)
    batch = built.collator(built.train_dataset.__getitems__([0, 1]))
    output = model(**batch)
    output.loss.backward()
    assert output.scores[batch["pair_mask"].bool()].isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert 0 <= built.evaluate()["eval_mrr"] <= 1


def test_mentions_that_are_all_nil_are_an_error_in_training_and_have_no_rank(reranker, tmp_path):
    nil = MENTIONS.select([3, 4])
    with pytest.raises(DataFormatError, match="no mentions to train on"):
        trainer(reranker, tmp_path, nil)
    model, processor = reranker
    result = CandidateEvaluator(ENTITIES, progress=False)(ModelInputs(model, processor), nil, LISTS)
    assert math.isnan(result.metrics["mrr"])
    assert result.metrics["num_nil"] == 2
    assert [record["rank"] for record in result.records()] == [None, None]
    results_table(result.to_dict())
    write_results(result.to_dict(), tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["metrics"]["mrr"] is None


def test_training_ends_if_every_mention_to_evaluate_is_nil(reranker, tmp_path):
    built = trainer(reranker, tmp_path, eval_mentions=MENTIONS.select([3, 4]))
    built.train()
    assert built.state.global_step == 1
